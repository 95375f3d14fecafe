"""Lines that begin with a slash: what they ask of a conversation. Knows no terminal."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from qspec_jax.dialogue.conversation import Conversation
from qspec_jax.dialogue.figures import figures
from qspec_jax.dialogue.files import read_conversation, write_conversation
from qspec_jax.errors import UsageError

HELP = {
    "/help": "this list",
    "/stats": "speed, accepted drafts, context used, tokens reused from the cache",
    "/system [TEXT]": "show or replace the system prompt; - removes it",
    "/retry": "answer the last message again",
    "/undo": "take the last message and its answer back",
    "/reset": "begin anew, under the same system prompt",
    "/save [-f] FILE": "write the conversation; -f replaces a file",
    "/load FILE": "go on with a conversation: JSON lines, or a list of messages",
    "/exit": "leave, as Ctrl-D",
}
NAMES = [usage.split()[0] for usage in HELP]
KEYS = "Enter sends, Alt-Enter or a \\ before Enter begins a line, Ctrl-R searches, Ctrl-C stops an answer"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a line.

    Attributes:
        lines: to be shown.
        answer: pieces of an answer to be shown as they come.
        leaves: the conversation ends.
    """

    lines: list[str] = dataclasses.field(default_factory=list)
    answer: Iterator[str] | None = None
    leaves: bool = False


class SlashCommands:
    """Does what lines ask of a conversation."""

    def __init__(self, conversation: Conversation):
        self._conversation = conversation
        self._own_file: Path | None = None  # which may be written again
        self._commands: dict[str, Callable[[str], Outcome]] = {
            "/help": self._help,
            "/stats": self._stats,
            "/system": self._system,
            "/retry": self._retry,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/exit": self._exit,
            "/quit": self._exit,
        }

    def do(self, line: str) -> Outcome:
        """What a line asks for: a command if it begins with one slash, else an answer.

        Raises:
            UsageError: there is no such command, or it makes no sense now.
            QSpecError: a file cannot be written.
        """
        if not line.startswith("/") or line.startswith("//"):
            return Outcome(answer=self._conversation.ask(line.removeprefix("/")))
        name, *rest = line.split(maxsplit=1)
        command = self._commands.get(name.lower())
        if command is None:
            near = difflib.get_close_matches(name.lower(), self._commands, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"there is no command {name}; {meant}/help lists them, and // sends a text with a slash")
        return command(rest[0].strip() if rest else "")

    def _help(self, text: str) -> Outcome:
        _require_nothing("/help", text)
        return Outcome([*(f"{usage:16} {what}" for usage, what in HELP.items()), KEYS])

    def _stats(self, text: str) -> Outcome:
        _require_nothing("/stats", text)
        return Outcome(figures(self._conversation))

    def _system(self, text: str) -> Outcome:
        if text:
            self._conversation.set_system(None if text == "-" else text)
        system = self._conversation.system
        return Outcome([f"system prompt: {system}" if system else "there is no system prompt"])

    def _retry(self, text: str) -> Outcome:
        _require_nothing("/retry", text)
        return Outcome(answer=self._conversation.retry())

    def _undo(self, text: str) -> Outcome:
        _require_nothing("/undo", text)
        return Outcome([f"taken back: {_begin(self._conversation.undo())}"])

    def _reset(self, text: str) -> Outcome:
        _require_nothing("/reset", text)
        self._conversation.reset()
        self._own_file = None  # which holds the conversation before
        kept = "; the system prompt stays" if self._conversation.system else ""
        return Outcome([f"a new conversation{kept}"])

    def _save(self, text: str) -> Outcome:
        option, _, rest = text.partition(" ")
        force = option == "-f"
        path = _path("/save", rest.strip() if force else text)
        if not self._conversation.messages:
            raise UsageError("there is nothing to save; write a message first")
        if path.exists() and path.is_file() and not force and path.resolve() != self._own_file:
            raise UsageError(f"{path} is there already; /save -f {path} replaces it")
        write_conversation(path, self._conversation.messages)
        self._own_file = path.resolve()
        return Outcome([f"{len(self._conversation.messages)} messages are in {path}"])

    def _load(self, text: str) -> Outcome:
        path = _path("/load", text)
        messages = read_conversation(path)
        self._conversation.take(messages)
        self._own_file = None
        waits = "; /retry answers the last one" if messages[-1]["role"] == "user" else ""
        last = messages[-1]
        return Outcome([f"{len(messages)} messages, the last by {last['role']}: {_begin(last['content'])}{waits}"])

    def _exit(self, text: str) -> Outcome:
        _require_nothing("/exit", text)
        return Outcome(leaves=True)


def _require_nothing(name: str, text: str) -> None:
    if text:
        raise UsageError(f"{name} takes nothing after it; it was given {_begin(text)!r}")


def _path(name: str, text: str) -> Path:
    if not text:
        raise UsageError(f"{name} needs the name of a file: {name} FILE")
    return Path(os.path.expanduser(text))


def _begin(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."

"""Where the lines of a conversation come from: a terminal with prompt_toolkit, one without, or a file or pipe."""

from __future__ import annotations

import abc
import contextlib
import functools
import sys
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

try:
    import termios
except ImportError:  # Windows
    termios = None

from qspec_jax.commands.output import is_terminal, say
from qspec_jax.device.processes import before_the_end
from qspec_jax.dialogue.stop_key import CtrlC
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.files.text import decode

PROMPT, CONTINUED = "> ", ". "


class Lines(abc.ABC):
    """Gives one message or command after the other."""

    @abc.abstractmethod
    def read(self) -> str | None:
        """The next one, None at the end.

        Raises:
            CtrlC: it was pressed instead; ``args[0]`` is what had been typed, if that is known.
            UsageError: the line is no text.
        """

    def while_others_write(self) -> AbstractContextManager[None]:
        """Around all of a conversation: what is typed while nobody reads is for the next line, and not shown before."""
        return contextlib.nullcontext()


def lines_of_the_user(*, keeps_history: bool, commands: Sequence[str]) -> Lines:
    """With prompt_toolkit where somebody is at a terminal and it is there, else from the standard input as it is.

    Raises:
        QSpecError: there is no standard input.
    """
    if sys.stdin is None:
        raise QSpecError("there is no standard input to read from; give messages, one on a line")
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        return PlainLines(asks=is_terminal(sys.stdin))
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        say("without history and editing, which need prompt_toolkit: pip install 'qspec-jax[chat]'")
        return PlainLines(asks=True)
    from qspec_jax.dialogue.history import open_history

    return EditedLines(open_history(is_kept=keeps_history), commands)


class PlainLines(Lines):
    """A message on each line, blank ones left out. One who is asked may end a line with a backslash to go on."""

    def __init__(self, *, asks: bool):
        self._asks, self._number = asks, 0

    def read(self) -> str | None:
        """See :class:`Lines`."""
        parts: list[str] = []
        while (line := self._line(CONTINUED if parts else PROMPT)) is not None:
            if self._asks and line.endswith("\\"):
                parts.append(line[:-1])
                continue
            if text := "\n".join([*parts, line]).strip():
                return text
            parts = []
        return "\n".join(parts).strip() or None

    def _line(self, prompt: str) -> str | None:
        self._ask(prompt)
        self._number += 1
        data = b""
        try:
            data = sys.stdin.buffer.readline()
            if not data:
                return None
        finally:
            if not data.endswith(b"\n"):  # Ctrl-D or Ctrl-C, after which the terminal is within the line
                self._ask("\n")
        try:
            return decode(data).rstrip("\n")
        except ValueError as error:
            reason = str(error).removeprefix("line 1 ")
            raise UsageError(f"line {self._number} of the standard input {reason}") from error

    def _ask(self, text: str) -> None:
        if self._asks and sys.stderr is not None:
            print(text, end="", file=sys.stderr, flush=True)


class EditedLines(Lines):
    """Lines with history, search, completion of commands, and messages of several lines."""

    def __init__(self, history: Any, commands: Sequence[str], **streams: Any):
        """Prepares to read; ``streams`` are prompt_toolkit's ``input`` and ``output`` if they are not the terminal."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.shortcuts import CompleteStyle

        self._session: Any = PromptSession(
            history=history,
            completer=WordCompleter(list(commands), sentence=True),
            complete_style=CompleteStyle.READLINE_LIKE,  # which keeps no room below for a menu
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=_key_bindings(),
            enable_suspend=True,
            **streams,
        )

    def read(self) -> str | None:
        """See :class:`Lines`."""
        while True:
            try:
                # Its own handler of exceptions asks for Enter, again and again where that cannot be read.
                text = self._session.prompt([("bold", PROMPT)], set_exception_handler=False)
            except EOFError:
                return None
            if text.strip():
                return text.strip()

    def while_others_write(self) -> AbstractContextManager[None]:
        """See :class:`Lines`."""
        return _without_echo(self._session.input)


@contextlib.contextmanager
def _without_echo(terminal: Any) -> Generator[None]:
    """Keys are not shown among what is printed, nor made into whole lines; Ctrl-C stays a signal."""
    if termios is None:  # Windows
        yield
        return
    try:
        number = terminal.fileno()
        earlier = termios.tcgetattr(number)
    except (OSError, ValueError, NotImplementedError, termios.error):  # no terminal
        yield
        return
    quiet: list[Any] = [*earlier[:6], list(earlier[6])]
    quiet[0] &= ~termios.ICRNL  # Enter is what it is where a line is read
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    restore = functools.partial(termios.tcsetattr, number, termios.TCSANOW, earlier)
    termios.tcsetattr(number, termios.TCSANOW, quiet)
    before_the_end.append(restore)
    try:
        yield
    finally:
        before_the_end.remove(restore)
        restore()


def _key_bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    # Not Ctrl-J: Enter comes as one where it was pressed before anybody read.
    @bindings.add("escape", "enter")
    def begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def give_up(event: Any) -> None:
        event.app.exit(exception=CtrlC(event.current_buffer.text), style="class:aborting")

    return bindings

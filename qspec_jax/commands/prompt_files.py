"""Prompts from a file and results into one, line by line, so that a run that was interrupted goes on where it was.

A line of input is a prompt, or a JSON object with ``"prompt"`` or ``"messages"``, perhaps an ``"id"`` and a ``"kind"``
of task, and perhaps options of its own. A line of output is the JSON object of the result at the same place, after a
key of all that the result depends on: what a file has of another run is recognised line by line, without any other
file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

from qspec_jax.commands.output import say
from qspec_jax.decoding.request_options import REQUEST_OPTIONS, SAMPLING_OPTIONS, request_options
from qspec_jax.decoding.sampling_params import seed_after
from qspec_jax.engine.results import GenerationResult
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.files import json_lines
from qspec_jax.files.lock import lock
from qspec_jax.files.text import is_standard_input, read_text
from qspec_jax.weights.contents import contents_digest
from qspec_jax.weights.resolve import demo_gguf_path, resolve_model

if TYPE_CHECKING:
    from qspec_jax.decoding.plan import Plan
    from qspec_jax.engine.language_model import LanguageModel
    from qspec_jax.engine.requests import Request

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""

LINE_OPTIONS = REQUEST_OPTIONS
_OWN_KEYS = ("prompt", "messages", "id", "kind")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")  # of which lines would be taken for prompts, headings too
_SAMPLE_LINE = '{"prompt": TEXT} or {"messages": [{"role": "user", "content": TEXT}]}'


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """A prompt, and what its line says besides.

    Attributes:
        prompt: a text or the messages of a conversation.
        options: those of :data:`LINE_OPTIONS` that the line has, checked; other keys have no meaning here.
        id: the user's name for it, any JSON value.
        sample: its place among the samples of the same prompt.
        kind: of task, such as ``summary``; None where nobody says.
        error: why it cannot run, whatever the model; None where it can.
        key: what identifies a line that cannot run, of which not all is kept.
        where: it stands, ``FILE:LINE``; empty where it is no line of a file.
    """

    prompt: Prompt
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    id: Any = None
    sample: int = 0
    kind: str | None = None
    error: str | None = None
    key: str = ""
    where: str = dataclasses.field(default="", compare=False)

    def resolved(self, defaults: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The options of :meth:`LanguageModel.request`: the line's own, or those given for all.

        Args:
            defaults: a value for each of :data:`LINE_OPTIONS`.
            index: of the line; a seed given for all counts up from the first.
        """
        seed = seed_after(defaults["seed"], index)
        if "seed" in self.options:
            seed = seed_after(self.options["seed"], self.sample)
        merged = {**defaults, **self.options, "seed": seed}
        return {
            "max_new_tokens": merged["max_new_tokens"],
            "chat": merged["chat"],
            "sampling": {name: merged[name] for name in SAMPLING_OPTIONS if name in merged},
        }


def read_prompt_lines(path: Path) -> list[PromptLine]:
    """The prompts of a file, or of the standard input for ``-``; blank lines left out.

    There is an object on each line where the name of the file says so, or where its first line is one, or most are.
    Otherwise a line that is no object is a prompt, unless it begins as one and is damaged.

    Raises:
        UsageError: the file cannot be read, is a table by its name, has blank lines alone, or a line is not such an
            object, has no prompt or a kind that is no text.
    """
    if path.suffix.lower() in _TABLES:
        raise UsageError(f"--prompt-file {path} is a table, which is not read; write lines such as {_SAMPLE_LINE}")
    text = read_text(path, what="--prompt-file")
    name = "standard input" if is_standard_input(path) else str(path)
    lines = [(line, f"{name}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"--prompt-file {path} has no prompt; write one on a line")
    are_objects = [_is_object(line) for line, _ in lines]
    objects_only = json_lines.names_json_lines(path) or are_objects[:1] == [True] or 2 * sum(are_objects) > len(lines)
    return [
        _parse(line, where) if objects_only or is_object or _DAMAGED.match(line) else PromptLine(line, where=where)
        for (line, where), is_object in zip(lines, are_objects, strict=True)
    ]


# In a file of texts, too, such a line is meant as an object.
_DAMAGED = re.compile(r"""\s*(?:\[?\s*\{\s*["']|["'](?:prompt|messages)["']\s*:)""")


def _is_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        json_lines.parse_object(line)
    except json_lines.UnreadableValueError:
        return True
    except UsageError:
        return False
    return True


def _parse(line: str, where: str) -> PromptLine:
    """What a line says. Where it holds what cannot be handed on, or no option makes sense of, it fails alone."""
    failed: dict[str, Any] = {"where": where, "key": hashlib.sha256(line.encode(errors="replace")).hexdigest()}
    try:
        entry = json_lines.parse_object(line)
    except json_lines.UnreadableValueError as error:
        return PromptLine("", error=f"the line {error}", **failed)
    except UsageError as error:
        raise UsageError(f"{where} {error}; a line is {_SAMPLE_LINE}") from error
    prompt, conflict = _prompt_of(entry, where)
    flaws = {name: flaw for name in entry if name in _OWN_KEYS and (flaw := json_lines.flaw(entry[name])) is not None}
    named = {name: entry.get(name) for name in ("id", "kind") if name not in flaws}
    kept: dict[str, Any] = {"prompt": "" if {"prompt", "messages"} & set(flaws) else prompt, **named}
    try:
        for name, flaw in flaws.items():
            raise UsageError(f'"{name}" {flaw}')
        if conflict:
            raise UsageError(conflict)
        return PromptLine(**kept, options=request_options(entry), where=where)
    except UsageError as error:
        return PromptLine(**kept, error=str(error), **failed)


def _prompt_of(entry: Mapping[str, Any], where: str) -> tuple[Prompt, str | None]:
    """The prompt of an object, whose kind is checked as well; and why it is none to run, where there are two.

    Raises:
        UsageError: there is none.
    """
    prompt, messages, kind = (entry.get(name) for name in ("prompt", "messages", "kind"))
    if not isinstance(kind, str | None):
        shown = "..." if json_lines.flaw(kind) else json_lines.dumps(kind)
        raise UsageError(f'{where} has "kind": {shown}; give it a text, such as "summary"')
    if _are_messages(prompt):  # as TRL has conversations that are to be answered
        goes_on = not messages or (isinstance(messages, list) and messages[: len(prompt)] == prompt)
        return (prompt, None) if goes_on else ("", _TWO_PROMPTS)
    if prompt not in (None, "") and messages:
        conversation = _answered(prompt, messages)
        kept = prompt if isinstance(prompt, str) else ""
        return (kept, _TWO_PROMPTS) if conversation is None else (conversation, None)
    if _are_messages(messages):
        return messages, None
    if not isinstance(prompt, str):
        raise UsageError(f'{where} has no text under "prompt" and no "messages"; a line is {_SAMPLE_LINE}')
    return prompt, None


_TWO_PROMPTS = (
    'the line has a "prompt" that is no message of a user in its "messages", so it has two prompts; leave one out, '
    "or make it null"
)


def _answered(prompt: Any, messages: Any) -> Prompt | None:
    """Of a conversation what comes up to the message that a prompt repeats; None where none does.

    Data sets with answers have the first message of a user in both, others the last one.
    """
    if not isinstance(prompt, str) or not _are_messages(messages):
        return None
    places = [place for place, one in enumerate(messages) if (one["role"], one.get("content")) == ("user", prompt)]
    if not places:
        return None
    if places[-1] == len(messages) - 1:
        return messages
    return messages[: places[0] + 1] if places[0] else prompt


def _are_messages(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and "role" in one and {"content", "tool_calls"} & set(one) for one in value)
    )


def repeated_ids(lines: Sequence[PromptLine]) -> list[list[str]]:
    """Where lines stand that have one id, each group of them."""
    by_id: dict[str, list[str]] = {}
    for line in lines:
        if line.id is not None:
            by_id.setdefault(json.dumps(line.id, sort_keys=True), []).append(line.where)
    return [places for places in by_id.values() if len(places) > 1]


def attempt_line(model: LanguageModel, plan: Plan, line: PromptLine, **options: Any) -> Request | GenerationResult:
    """As :meth:`LanguageModel.attempt`, of a line that may be known to fail."""
    if line.error is None:
        return model.attempt(line.prompt, plan, **options)
    from qspec_jax.engine.outcome import failure, statistics

    return failure(line.prompt, UsageError(line.error), statistics(plan, kernels=model.kernels))


def model_identity(model: str | None) -> str:
    """What a model is however it is called: a real path and what is there, a hub id, or ``default``.

    A model is another one once it was written anew.

    Raises:
        CheckpointError: there are several at that path, or the model is damaged.
    """
    name = model or "default"
    if name == "default" or not os.path.exists(name):
        return name
    path, demo = os.path.realpath(resolve_model(name)), demo_gguf_path()
    if demo is not None and path == os.path.realpath(demo):
        return "default"
    from qspec_jax.weights.checkpoint import manifest  # imports JAX

    if manifest.is_checkpoint(Path(path)):
        return f"{path}/{manifest.read_content(Path(path))['data']}"
    return f"{path}/{contents_digest(Path(path))}"


def line_keys(lines: Sequence[PromptLine], defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What identifies the result of each line: its prompt, its options, and the settings of the run."""
    keys = []
    for index, line in enumerate(lines):
        described = [line.prompt, line.id, line.resolved(defaults, index), settings]
        described += [one for one in (line.kind, line.key) if one]
        text = json.dumps(described, sort_keys=True, ensure_ascii=True)
        keys.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return keys


def result_entry(result: GenerationResult, line: PromptLine) -> dict[str, Any]:
    """A result as a JSON object, with the line's ``id`` and ``kind`` if it has them and what was its prompt."""
    names = {"id": line.id, "kind": line.kind}
    named = {name: value for name, value in names.items() if value is not None}
    return {**named, **result.to_dict(), "prompt": line.prompt}


class ResultFile:
    """The results of a run on disk, one more line at a time, in the order of the prompts.

    A line is whole or it is cut off, at once where it cannot be written and otherwise as the file is opened again. No
    line is written twice, and nobody else writes the file meanwhile.

    Attributes:
        num_finished: lines that are there.
        errors: what the lines that were there say that went wrong, by their place.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        """Opens the file, or makes it.

        Args:
            path: of the file.
            keys: what identifies each line, see :func:`line_keys`.

        Raises:
            UsageError: it cannot be written, or has something else than the first lines of this run.
            QSpecError: another run is writing it.
        """
        self._path, self._keys = path, keys
        self.errors: dict[int, str] = {}
        try:
            self._stream: BinaryIO = _open(path)
        except OSError as error:
            raise UsageError(f"cannot write --output {path}: {error.strerror or error}") from error
        try:
            lock(self._stream, f"--output {path}")
            self.num_finished, self._end = self._check_lines()
        except BaseException:
            self.close()
            raise

    def _check_lines(self) -> tuple[int, int]:
        """Compares what is there with the keys, and cuts off a line that is not whole; lines and bytes."""
        count, end = 0, 0
        for line in self._whole_file():
            expected = self._keys[count : count + 1]
            start = _beginning(expected[0]) if expected else b""
            if not expected or not (line.startswith(start) or (not line.endswith(b"\n") and start.startswith(line))):
                raise UsageError(
                    f"{self._path}:{count + 1} is not the result of this prompt with these options; name another "
                    "--output, run the command that wrote it, or remove the file"
                )
            if not line.endswith(b"\n"):
                break
            if _ERROR in line and (error := _error_of(line)) is not None:
                self.errors[count] = error
            count, end = count + 1, end + len(line)
        self._stream.truncate(end)
        return count, end

    def _whole_file(self) -> Iterator[bytes]:
        """The lines that are there."""
        self._stream.seek(0)
        with open(self._stream.fileno(), "rb", closefd=False) as buffered:
            yield from buffered

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends the result of the next line.

        Raises:
            QSpecError: it cannot be written; the lines before it are there.
        """
        data = f"{json_lines.dumps({'key': self._keys[self.num_finished], **entry})}\n".encode()
        try:
            left = memoryview(data)
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._stream.truncate(self._end)
            raise QSpecError(
                f"cannot write --output {self._path}: {error.strerror or error}; {self.num_finished} of "
                f"{len(self._keys)} results are in it, and the same command goes on with it"
            ) from error
        self._end += len(data)
        self.num_finished += 1

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._stream.close()


def _open(path: Path) -> BinaryIO:
    """The file without a buffer, which might fail to be written later on.

    Raises:
        OSError: it cannot be written, or is no file.
    """
    if is_standard_input(path):
        raise OSError("it is no file; leave --output out, and --json prints the same lines")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError("it is no file, so no run could go on with it; give a file, or --json > FILE")
    return path.open("a+b", buffering=0)


_ERROR = b'"finish_reason": "error"'


def _error_of(line: bytes) -> str | None:
    """What a line of output says that went wrong."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return "the line is damaged"
    return str(entry.get("error")) if entry.get("finish_reason") == "error" else None


def _beginning(key: str) -> bytes:
    return f'{{"key": "{key}", '.encode()


def read_prompts_alone(path: Path) -> list[PromptLine]:
    """The lines of a file whose options count for nothing, which is said; see :func:`read_prompt_lines`."""
    lines = read_prompt_lines(path)
    names = {name: None for line in lines for name in line.options}
    if names:
        said = "all prompts have the options of this command; python -m qspec_jax.generate minds those of lines"
        say(f"{', '.join(names)} of lines of {path}: no effect, as {said}")
    return lines


def read_prompt_file(path: Path) -> list[Any]:
    """The prompts of a file that has to be right; see :func:`read_prompts_alone`.

    Raises:
        UsageError: as there, or a line cannot run.
    """
    lines = read_prompts_alone(path)
    for line in lines:
        if line.error is not None:
            raise UsageError(f"{line.where}: {line.error}")
    return [line.prompt for line in lines]

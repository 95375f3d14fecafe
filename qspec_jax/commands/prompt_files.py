"""Prompts from a file and results into one, line by line, so that a run that was interrupted goes on where it was.

A line of input is a prompt, or a JSON object with ``"prompt"`` or ``"messages"``, perhaps an ``"id"`` and a ``"kind"``
of task, and perhaps options of its own. A line of output is the JSON object of the result at the same place, after a
key of all that the result depends on: what a file has of another run is recognised line by line, without any other
file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.results import GenerationResult
from qspec_jax.errors import UsageError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
LINE_OPTIONS = ("max_new_tokens", "chat", *_SAMPLING)
_SAMPLE_LINE = '{"prompt": TEXT} or {"messages": [{"role": "user", "content": TEXT}]}'


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """A prompt, and what its line says besides.

    Attributes:
        prompt: a text or the messages of a conversation.
        options: those of :data:`LINE_OPTIONS` that the line has; other keys have no meaning here.
        id: the user's name for it, any JSON value.
        sample: its place among the samples of the same prompt.
        kind: of task, such as ``summary``; None where nobody says.
    """

    prompt: Prompt
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    id: Any = None
    sample: int = 0
    kind: str | None = None

    def resolved(self, defaults: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The options of :meth:`LanguageModel.request`: the line's own, or those given for all.

        Args:
            defaults: a value for each of :data:`LINE_OPTIONS`.
            index: of the line; a seed given for all counts up from the first.
        """
        merged = {**defaults, "seed": (defaults["seed"] + index) % 2**32, **self.options}
        if self.sample and isinstance(self.options.get("seed"), int):
            merged["seed"] += self.sample
        return {
            "max_new_tokens": merged["max_new_tokens"],
            "chat": merged["chat"],
            "sampling": {name: merged[name] for name in _SAMPLING if name in merged},
        }


def read_prompt_lines(path: Path) -> list[PromptLine]:
    """The prompts of a file, blank lines left out.

    Raises:
        UsageError: the file cannot be read, or a line has no prompt or a kind that is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --prompt-file {path}: {error}") from error
    return [_parse(line.rstrip("\r"), path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, path: Path, number: int) -> PromptLine:
    if not line.lstrip().startswith("{"):
        return PromptLine(line)
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        if path.suffix == ".jsonl":
            raise UsageError(f"{path}:{number} is not JSON: {error}") from error
        return PromptLine(line)
    prompt = entry.get("prompt", entry.get("messages"))
    if not (isinstance(entry.get("prompt"), str) if "prompt" in entry else _are_messages(prompt)):
        raise UsageError(f'{path}:{number} has no text under "prompt" and no "messages"; a line is {_SAMPLE_LINE}')
    kind = entry.get("kind")
    if not isinstance(kind, str | None):
        raise UsageError(f'{path}:{number} has "kind": {json.dumps(kind)}; give it a text, such as "summary"')
    options = {name: entry[name] for name in LINE_OPTIONS if name in entry}
    return PromptLine(prompt, options, entry.get("id"), kind=kind)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and "role" in one and "content" in one for one in value)
    )


def line_keys(lines: Sequence[PromptLine], defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What identifies the result of each line: its prompt, its options, and the settings of the run."""
    keys = []
    for index, line in enumerate(lines):
        described = [line.prompt, line.id, line.resolved(defaults, index), settings]
        described += [] if line.kind is None else [line.kind]
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

    A line is whole or it is cut off as the file is opened again. No line is written twice.

    Attributes:
        num_finished: lines that are there.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        """Opens the file, or makes it.

        Args:
            path: of the file.
            keys: what identifies each line, see :func:`line_keys`.

        Raises:
            UsageError: it cannot be written, or has something else than the first lines of this run.
        """
        self._path, self._keys = path, keys
        try:
            self._stream: BinaryIO = path.open("r+b" if path.exists() else "x+b")
        except OSError as error:
            raise UsageError(f"cannot write --output {path}: {error.strerror or error}") from error
        try:
            self.num_finished = self._check_lines()
        except UsageError:
            self.close()
            raise

    def _check_lines(self) -> int:
        """Compares what is there with the keys, and cuts off a line that is not whole."""
        count, end = 0, 0
        for line in self._stream:
            expected = self._keys[count : count + 1]
            start = _beginning(expected[0]) if expected else b""
            if not expected or not (line.startswith(start) or (not line.endswith(b"\n") and start.startswith(line))):
                raise UsageError(
                    f"{self._path}:{count + 1} is not the result of this prompt with these options; name another "
                    "--output, run the command that wrote it, or remove the file"
                )
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
        self._stream.seek(end)
        self._stream.truncate()
        return count

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends the result of the next line."""
        text = json.dumps({"key": self._keys[self.num_finished], **entry}, ensure_ascii=False)
        self._stream.write(f"{text}\n".encode())
        self._stream.flush()
        self.num_finished += 1

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def _beginning(key: str) -> bytes:
    return f'{{"key": "{key}", '.encode()


def read_prompt_file(path: Path) -> list[Any]:
    """The prompts of a file; see :func:`qspec_jax.commands.prompt_files.read_prompt_lines`."""
    return [line.prompt for line in read_prompt_lines(path)]

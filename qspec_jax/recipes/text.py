"""Calibration text as windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qspec_jax.errors import UsageError
from qspec_jax.files import json_lines
from qspec_jax.files.text import read_text

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer

CONTEXT = 512  # tokens per window
_SAMPLE_LINE = '{"prompt": TEXT} or {"text": TEXT}'
_CHARACTERS_PER_TOKEN = 16  # more than any text has, on average


def token_windows(path: Path, tokenizer: Tokenizer, *, num_tokens: int, context: int = CONTEXT) -> np.ndarray:
    """The first tokens of a text as windows that do not overlap.

    Args:
        path: a text file, or JSONL with ``{"prompt": TEXT}`` or ``{"text": TEXT}`` on each line.
        tokenizer: of the model.
        num_tokens: to take, at least; rounded up to whole windows.
        context: tokens per window.

    Returns:
        ``[windows, context]`` int32.

    Raises:
        UsageError: the file cannot be read, or holds fewer tokens.
    """
    context = min(context, num_tokens)
    num_windows = -(-num_tokens // context)
    needed = num_windows * context
    tokens: list[int] = []
    for text in _texts(path):
        tokens += tokenizer.encode(text[: _CHARACTERS_PER_TOKEN * (needed - len(tokens))])
        if len(tokens) >= needed:
            return np.asarray(tokens[:needed], np.int32).reshape(num_windows, context)
    if not tokens:
        raise UsageError(f"calibration text {path} has no tokens, and {needed} are asked for; give a text")
    whole = len(tokens) // context * context or len(tokens)
    raise UsageError(
        f"calibration text {path} has {len(tokens)} tokens, and {needed} are asked for; give more text, or "
        f"--calibration-tokens {whole}"
    )


def _texts(path: Path) -> list[str]:
    content = read_text(path, what="the calibration text")
    if not json_lines.names_json_lines(path):
        return [content]
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [_text_of(line, f"{path}:{number}") for number, line in lines]


def _text_of(line: str, where: str) -> str:
    try:
        fields = json_lines.parse_object(line)
    except UsageError as error:
        raise UsageError(f"{where} {error}; a line is {_SAMPLE_LINE}") from error
    texts = [fields[key] for key in ("prompt", "text") if isinstance(fields.get(key), str)]
    if not texts:
        raise UsageError(f"{where} has no text; a line is {_SAMPLE_LINE}")
    if (flaw := json_lines.flaw(texts[0])) is not None:
        raise UsageError(f"{where} {flaw}")
    return texts[0]

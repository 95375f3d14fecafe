"""Which tokens of a GGUF vocabulary end a text or a turn, by llama.cpp's rule (``llama-vocab.cpp``).

Converters name one end token, often not the one that a chat ends with. So llama.cpp takes every id that the metadata
name, and every token that is known by its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qspec_jax.model.config import token_ids

_NAMED = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"),
)
# Of tokens that fill in the middle, each kind by the first of these that the metadata do not name.
_FILL_IN = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, those that the metadata name first. Ids that no token has are none."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    keys = {kind: f"tokenizer.ggml.{kind}_token_id" for kind in _NAMED}
    # Without a vocabulary only a model's own size could tell which ids are none.
    size = len(tokens) or 1 << 31
    ends = [one for key in keys.values() for one in token_ids(metadata.get(key), size)]
    known = set(_TEXTS).union(*(texts for kind, texts in _FILL_IN.items() if keys[kind] not in metadata))
    by_text = {token: number for number, token in enumerate(tokens) if isinstance(token, str) and token in known}
    # Where these are there, the others do not end a text.
    if ("<|return|>" in by_text and "<|call|>" in by_text) or ("<|calls|>" in by_text and "<|flush|>" in by_text):
        _leave_out("<|end|>", by_text, ends)
    if "<|tool_response>" in by_text:
        _leave_out("</s>", by_text, ends)
    return tuple(dict.fromkeys([*ends, *by_text.values()]))


def _leave_out(token: str, by_text: dict[str, int], ends: list[int]) -> None:
    if (number := by_text.pop(token, None)) in ends:
        ends.remove(number)

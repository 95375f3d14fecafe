"""Drafts from the text itself: what followed the newest tokens when they last stood there (prompt lookup decoding).

Saxena, "Prompt Lookup Decoding" (2023), finds the newest n-gram earlier in the prompt and proposes what follows it. It
costs nothing and is right where a text repeats its prompt or itself: summaries, edits, code. Here the whole text
counts, of prompt and new tokens, and of the longest of the n-grams that are found the last one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

LONGEST, _SHORTEST = 3, 2  # n-grams


def look_up(
    history: Int32[Array, "B S"], newest: Int32[Array, " B"], *, draft_length: int
) -> tuple[Bool[Array, " B"], Int32[Array, "B gamma"]]:
    """Which texts have their newest n-gram earlier on, and the tokens that followed it there.

    Args:
        history: the tokens of each text by position.
        newest: the position of the newest one of each.
        draft_length: tokens to propose.

    Returns:
        whether it was found, and the tokens. Where the text ends before there are enough of them they begin again,
        and where nothing was found they are any of the text: never what an earlier text has left in the row.
    """
    positions = jnp.arange(history.shape[1], dtype=jnp.int32)
    same = positions < newest[:, None]  # so far, of the n-gram that ends at each position
    length = jnp.zeros(history.shape, jnp.int32)
    for back in range(LONGEST):
        token = jnp.take_along_axis(history, jnp.maximum(newest - back, 0)[:, None], axis=1)
        same &= (jnp.roll(history, back, axis=1) == token) & (positions >= back)
        length += same.astype(jnp.int32)
    best = jnp.max(length, axis=1)
    earlier = positions < newest[:, None]
    place = jnp.max(jnp.where(earlier & (length == best[:, None]), positions, -1), axis=1)
    period = jnp.maximum(newest - place, 1)[:, None]
    following = place[:, None] + 1 + jnp.arange(draft_length, dtype=jnp.int32) % period
    tokens = jnp.take_along_axis(history, following, axis=1)
    return best >= _SHORTEST, tokens


def rewrite(
    history: Int32[Array, "B S"],
    newest: Int32[Array, " B"],
    tokens: Int32[Array, "B capacity"],
    num_tokens: Int32[Array, " B"],
) -> Int32[Array, "B S"]:
    """The history after cycles that did not keep it: the first ``num_tokens`` of ``tokens`` end at ``newest``."""
    positions = jnp.arange(history.shape[1], dtype=jnp.int32)
    index = positions - (newest - num_tokens + 1)[:, None]
    written = (index >= 0) & (index < num_tokens[:, None])
    return jnp.where(written, jnp.take_along_axis(tokens, jnp.clip(index, 0, tokens.shape[1] - 1), axis=1), history)


def write(
    history: Int32[Array, "B S"], start: Int32[Array, " B"], tokens: Int32[Array, "B T"], exists: Bool[Array, "B T"]
) -> Int32[Array, "B S"]:
    """The history with those of the tokens that exist at the positions from ``start`` on."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    columns = jnp.where(exists, start[:, None] + index, history.shape[1])
    return history.at[jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None], columns].set(tokens, mode="drop")

"""Prompts in chunks of few widths, and the shapes that the programs of a batch are compiled for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qspec_jax.decoding.plan import Plan
from qspec_jax.decoding.sampling import NO_TOKEN
from qspec_jax.decoding.sampling_params import MAX_STOP_TOKENS, SamplingFeatures

# A chunk of a prompt is padded to the next of these widths; a longer prompt is read in chunks of the last. Rows may
# share them, so that it is a multiple of what `restart_multiple` of model/cache.py says.
CHUNK_WIDTHS = (32, 64, 128, 256, 512)
# Caches are rounded up to multiples of 64: nearby lengths share a program.
_CAPACITY_MULTIPLE = 64


class Shape(NamedTuple):
    """What the programs of a batch are compiled for, besides their plan.

    Attributes:
        rows: sequences that run together.
        capacity: cache positions of each.
        features: what their sampling needs.
        lookup: drafts are looked up in the texts.
        num_blocks: of the cache, that drafts read; 0 where they read all of it.
        kept_drafts: of a cycle, kept for people to look at; 0 where nobody asks.
    """

    rows: int
    capacity: int
    features: SamplingFeatures = SamplingFeatures()
    lookup: bool = False
    num_blocks: int = 0
    kept_drafts: int = 0

    @classmethod
    def of(cls, plan: Plan, *, rows: int, capacity: int, keep_drafts: bool = False) -> Shape:
        """What a plan needs, for the most likely tokens."""
        kept = plan.draft_length if keep_drafts else 0
        return cls(rows, capacity, lookup=plan.lookup, num_blocks=plan.num_blocks, kept_drafts=kept)


def fitting_capacity(num_tokens: int) -> int:
    """Cache positions for ``num_tokens``, rounded up so that nearby numbers share a program."""
    return -(-num_tokens // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE


def chunk_width(num_tokens: int, widths: Sequence[int] | None = None) -> int:
    """What a chunk of a prompt is padded to, of some widths in order; None for all there are."""
    return next(width for width in widths or CHUNK_WIDTHS if width >= num_tokens)


def empty_chunks(shape: Shape, width: int) -> dict[str, Any]:
    """The fields of as many chunks as a prefill program takes, but for the sampler, as NumPy arrays to be set."""
    # Copies: the device waits for these, and NumPy takes longer to fill arrays.
    return {name: None if field is None else field.copy() for name, field in _no_chunks(shape, width).items()}


@functools.cache
def _no_chunks(shape: Shape, width: int) -> dict[str, Any]:
    rows = (shape.rows,)
    return {
        "tokens": np.zeros((*rows, width), np.int32),
        "num_tokens": np.ones(rows, np.int32),
        "start": np.zeros(rows, np.int32),
        "last": np.zeros(rows, bool),
        "max_new_tokens": np.ones(rows, np.int32),
        "stop_tokens": np.full((*rows, MAX_STOP_TOKENS), NO_TOKEN, np.int32),
        "prompt": np.zeros((*rows, shape.capacity), np.int32) if shape.features.penalises else None,
    }

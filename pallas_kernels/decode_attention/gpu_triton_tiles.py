"""What the Triton kernels of attention to a cache have in common: sizes, tiles of rows and slots, and their sums."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.backends.triton import registers
from pallas_kernels.decode_attention.reference import BLOCK, weighed_tokens

ROWS = 16  # of a product: the fewest that a tensor core takes
# Short chunks keep a GPU busy with one sequence; long ones leave less to put together where many slots do.
SHORT_CHUNK, _LONG_CHUNK, _LONGEST_CHUNK = 64, 256, 512  # slots
CHUNKS = 16  # the short ones, and those that are put together at a time
_LONG_CHUNKS = 28  # before the longest ones, which begin at slot 8,192


@dataclasses.dataclass(frozen=True)
class Problem:
    """What both kernels know of the call: sizes, and the window."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    slots: int
    window: int | None
    weigh_blocks: bool = False
    row_groups: int = 1  # of 16 rows, that a program attends from

    @property
    def weighed_rows(self) -> int:
        """Rows of the tokens that weigh blocks, the first ones."""
        return weighed_tokens(self.num_tokens, self.group) * self.group

    @property
    def num_blocks(self) -> int:
        """Of the smallest size, in all slots."""
        return pl.cdiv(self.slots, BLOCK)

    @property
    def group(self) -> int:
        """Query heads that read the same keys and values. Row ``r`` is head ``r % group`` of token ``r // group``."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.group

    @property
    def rows(self) -> int:
        """Rows of a program."""
        return ROWS * self.row_groups

    @property
    def row_blocks(self) -> int:
        return pl.cdiv(self.num_rows, self.rows)

    @property
    def block_dim(self) -> int:
        """The head dimension, padded to what a tile may have."""
        return max(16, pl.next_power_of_2(self.head_dim))

    @property
    def chunk_sizes(self) -> tuple[int, int, int]:
        """Slots of each of the first chunks, of those after them, and of all others."""
        return SHORT_CHUNK, _LONG_CHUNK, _LONGEST_CHUNK

    @property
    def num_chunks(self) -> int:
        left, count = self.slots, 0
        for size, most in zip(self.chunk_sizes, (CHUNKS, _LONG_CHUNKS, self.slots), strict=True):
            chunks = min(most, pl.cdiv(max(0, left), size))
            left, count = left - chunks * size, count + chunks
        return count

    def first_slot(self, chunk: Array) -> Array:
        """Where a chunk begins: the same for every call, whatever its slots, tokens and lengths."""
        short, long, longest = self.chunk_sizes
        first = jnp.minimum(chunk, CHUNKS), jnp.clip(chunk - CHUNKS, 0, _LONG_CHUNKS)
        return first[0] * short + first[1] * long + jnp.maximum(chunk - (CHUNKS + _LONG_CHUNKS), 0) * longest

    def chunk_of(self, slot: Array) -> Array:
        """The chunk that has a slot."""
        short, long, longest = self.chunk_sizes
        end_of_short = CHUNKS * short
        end_of_long = end_of_short + _LONG_CHUNKS * long
        behind = lax.div(jnp.clip(slot - end_of_short, 0, end_of_long - end_of_short), long)
        return (
            lax.div(jnp.minimum(slot, end_of_short), short)
            + behind
            + lax.div(jnp.maximum(slot - end_of_long, 0), longest)
        )

    def first_seen(self, position: Array) -> Array | int:
        """The first slot that a token at ``position`` sees."""
        return 0 if self.window is None else jnp.maximum(position - (self.window - 1), 0)

    def end_of_seen(self, position: Array) -> Array:
        """The slot after the last one that a token at ``position`` sees."""
        return jnp.minimum(position + 1, self.slots)


def load_rows(ref: registers.Ref, rows: Array, exists: Array, kv_head: Array, problem: Problem) -> Array:
    """The queries of a tile's rows ``[rows, block_dim]``, with zeros where there are none."""
    place, mask = _places(rows, exists, kv_head, problem)
    return plgpu.load(ref.at[place], mask=mask, other=jnp.zeros((), ref.dtype))


def store_rows(ref: registers.Ref, rows: Array, exists: Array, kv_head: Array, problem: Problem, values: Array) -> None:
    """Writes values of a tile's rows ``[rows, block_dim]`` to where their queries are read."""
    place, mask = _places(rows, exists, kv_head, problem)
    plgpu.store(ref.at[place], values.astype(ref.dtype), mask=mask)


def _places(rows: Array, exists: Array, kv_head: Array, problem: Problem) -> tuple[tuple[Array, ...], Array]:
    """Token, head and dimension of all numbers of a tile's rows, and which of them there are."""
    shape = (len(rows), problem.block_dim)
    rows, group = across(rows, shape), problem.group
    dims = lax.broadcasted_iota(jnp.int32, shape, 1)
    place = lax.div(rows, group), kv_head * group + lax.rem(rows, group), dims
    return place, across(exists, shape) & (dims < problem.head_dim)


def load_slots(
    ref: registers.Ref,
    start: Array,
    end: Array | None,
    block_slots: int,
    problem: Problem,
    row: Array | None = None,
) -> Array:
    """Keys or values of the slots from ``start`` on ``[block_slots, block_dim]``, with zeros from ``end`` on.

    ``end`` is None where all of them exist, ``row`` the row of the cache unless ``ref`` has only one.
    """
    shape, masks = (block_slots, problem.block_dim), []
    if end is not None:
        masks.append(start + lax.broadcasted_iota(jnp.int32, shape, 0) < end)
    if problem.block_dim != problem.head_dim:
        masks.append(lax.broadcasted_iota(jnp.int32, shape, 1) < problem.head_dim)
    place = pl.ds(start, block_slots), slice(None)
    slots = ref.at[place if row is None else (row, *place)]
    if not masks:
        return plgpu.load(slots)
    return plgpu.load(slots, mask=functools.reduce(jnp.logical_and, masks), other=jnp.zeros((), ref.dtype))


def nothing(shape: tuple[int, ...], problem: Problem) -> tuple[Array, Array, Array]:
    """Largest logit, sum and weighted values of no slots."""
    zeros = jnp.zeros(shape, jnp.float32)
    return jnp.full(shape, -jnp.inf, jnp.float32), zeros, jnp.zeros((*shape, problem.block_dim), jnp.float32)


def raise_maximum(maximum: Array, logits: Array, *, scale: float, interpret: bool) -> tuple[Array, Array, Array]:
    """The largest logit so far, the factor for what was summed before, and the weights of the new ``logits``.

    Logits are still to be multiplied by ``scale``, which costs nothing here.
    """
    raised = jnp.maximum(maximum, jnp.max(logits, axis=-1))
    less = jnp.where(raised == -jnp.inf, 0.0, raised)  # nothing seen yet: -inf - -inf is not a number
    scale *= registers.LOG2_E
    kept = registers.exp2((maximum - less) * jnp.float32(scale), interpret=interpret)  # 1 where nothing is raised
    below = jnp.broadcast_to(less[..., None], logits.shape)
    return raised, kept, registers.exp2_of_difference(logits, below, scale, interpret=interpret)


def across(column: Array, shape: tuple[int, int]) -> Array:
    """A value per row, repeated along the row."""
    return jnp.broadcast_to(column[:, None], shape)


def dot(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    """In float32; float32 operands are not rounded to tf32."""
    return lax.dot_general(
        a,
        b,
        ((contract[:1], contract[1:]), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

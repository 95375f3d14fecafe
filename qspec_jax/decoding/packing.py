"""Chunks of several prompts cut into pieces of the same size, which one pass over the weights reads together.

A pass for a prompt of 97 tokens reads all weights for 97 rows, and a GPU has arithmetic for many more. So where a token
has the same bits whatever is read beside it (:func:`longest_packed`), chunks are cut into pieces of ``PIECE`` tokens,
of which only the last one of a chunk is padded. Pieces of as many chunks as fit share a pass, for a few numbers of
pieces (:func:`sizes`). Several chunks of one prompt may share one as well: keys and values of all are written before
any piece attends, and each sees what lies before it.

Example, pieces of 32 tokens, a pass of 8: prompts a of 70 tokens, b of 100, c of 20::

    tokens  a0..31 | a32..63 | a64..69 . | b0..31 | b32..63 | b64..95 | b96..99 . | c0..19 .
    rows    0        0         0           1        1         1         1           2
    starts  0        32        64          0        32        64        96          0

Where several devices have some rows of the batch each, each reads pieces of its own rows, as many as the others: the
first ones of a pass are those of the first device. A device with fewer has pieces of nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import pallas_kernels
from pallas_kernels import QuantizedWeight
from pallas_kernels.float_matmul.reference import MAX_ROWS
from qspec_jax.decoding.chunks import CHUNK_WIDTHS
from qspec_jax.decoding.state import PromptPieces
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.layouts import linears
from qspec_jax.model.linear import PIECE

# Weights of Triton's kernels, which multiply many rows at a third of the rate of a library, where prompts are packed.
_MOST_IN_PIECES = 1_000_000_000
# Tokens of a chunk that they share a pass for: longer ones go faster by a library, one at a time.
_LONGEST_IN_PIECES = 256
# Weights up to which chunks of any length share passes: launches take longer than the arithmetic, and a chunk alone has
# as many.
_FEW_IN_PIECES = 300_000_000
_SIZES = (2, 8, 16, 32, 64)  # pieces of a pass: each is a program, which takes 4 s to compile for 32 layers
LONGEST_CHUNK = CHUNK_WIDTHS[-1] // PIECE  # pieces


def longest_packed(decoder: Decoder) -> int:
    """How many tokens a chunk may have that a pass reads beside others, 0 for none.

    The kernels have to give a token the same bits whatever else its pass reads, and to gain by it. Those of Hopper do,
    for any number of rows, and so does that of floats that verify. Triton's for 4 bits do, too, at a fraction of the
    rate of a library, which short chunks of a model of few weights do not feel. Otherwise a library multiplies many
    rows, in an order that depends on their number. Such chunks are read one by one, each padded to one of few widths.
    Which way a chunk is read depends on its own length alone. Where devices share weights, what counts are the parts
    that each has: it adds sums of all in one order.
    """
    head_dim = decoder.config.head_dim
    if decoder.kv == KV_INT8:
        is_alike = pallas_kernels.prefill_int8_is_alike(head_dim, decoder.dtype)
    else:
        is_alike = pallas_kernels.prefill_is_alike(head_dim)
    if not is_alike:
        return 0
    in_pieces = 0
    for linear in linears(decoder):
        weight = linear.weight.get_value()
        if not isinstance(weight, QuantizedWeight):  # a library multiplies floats that nothing drafts for
            return 0
        if linear.floats is not None and not linear.reads_packed_floats:
            return 0
        weight = jax.tree.map(_of_a_device, weight)
        alike = pallas_kernels.rows_alike(weight, linear.dtype, implementation=linear.kernels)
        if alike is not None and alike < MAX_ROWS:
            return 0
        in_pieces += 0 if alike is None else 2 * weight.packed.size
    if in_pieces > _MOST_IN_PIECES:
        return 0
    return LONGEST_CHUNK * PIECE if in_pieces <= _FEW_IN_PIECES else _LONGEST_IN_PIECES


def _of_a_device(array: Any) -> jax.ShapeDtypeStruct:
    """The shape of what each device has of an array."""
    sharding = getattr(array, "sharding", None)
    return jax.ShapeDtypeStruct(array.shape if sharding is None else sharding.shard_shape(array.shape), array.dtype)


def sizes(rows: int, capacity: int) -> tuple[int, ...]:
    """The numbers of pieces that passes over rows of a device have: the last is what these hold in all, or the most."""
    most = min(_SIZES[-1], rows * num_pieces(capacity))
    return (*(size for size in _SIZES if size < most), most)


def sizes_for(widths: Collection[int], rows: int, capacity: int) -> tuple[int, ...]:
    """Those that chunks of some widths may need: more than one of a prompt where one is of the largest width."""
    found, one_each = sizes(rows, capacity), rows * LONGEST_CHUNK
    if CHUNK_WIDTHS[-1] in widths:
        return found
    return found[: 1 + next((place for place, size in enumerate(found) if size >= one_each), len(found))]


class Packed(NamedTuple):
    """What one pass reads.

    Attributes:
        pieces: of the chunks.
        places: of the chunks that were given, those that it reads, in order.
    """

    pieces: PromptPieces
    places: list[int]


def pack(chunks: Sequence[tuple[int, int, Sequence[int]]], *, rows: int, capacity: int, num_devices: int = 1) -> Packed:
    """The first chunks, and of later ones those that the rest of a pass has room for, cut into pieces.

    Example, a pass of up to 64 pieces: of chunks with 40, 30, 16, 8 and 4 pieces it reads the 40, the 16 and the 8.

    Args:
        chunks: row, start and tokens of each, at least one and none with more pieces than the largest pass.
        rows, capacity: of the batch.
        num_devices: that have as many rows each, in order. Each has room of its own, and all as many pieces.
    """
    of_device = rows // num_devices
    numbers, counts = sizes(of_device, capacity), [num_pieces(len(tokens)) for _, _, tokens in chunks]
    fitting: list[list[int]] = []
    for device in range(num_devices):
        some = [place for place, (row, _, _) in enumerate(chunks) if row // of_device == device]
        fitting.append([some[index] for index in _that_fit([counts[place] for place in some], numbers[-1])])
    needed = max(sum(counts[place] for place in some) for some in fitting)
    size = next(size for size in numbers if size >= needed)
    pieces: Any = empty_pieces(num_devices * size, rows)
    next_of = [device * size for device in range(num_devices)]
    places = sorted(place for some in fitting for place in some)
    for chunk, (row, start, tokens) in enumerate(chunks[place] for place in places):
        here = next_of[row // of_device]
        for begin in range(0, len(tokens), PIECE):
            some = tokens[begin : begin + PIECE]
            pieces.tokens[here, : len(some)] = some
            pieces.rows[here], pieces.starts[here], pieces.num_tokens[here] = row, start + begin, len(some)
            here += 1
        pieces.ends[chunk] = (here - 1) * PIECE + int(pieces.num_tokens[here - 1]) - 1
        next_of[row // of_device] = here
    return Packed(pieces, places)


def num_passes(pieces: Sequence[int], room: int) -> int:
    """Passes of some room, as :func:`pack` fills one after another, for chunks of so many pieces, none of more."""
    count, left = 0, list(pieces)
    while left:
        here = set(_that_fit(left, room))
        count, left = count + 1, [one for place, one in enumerate(left) if place not in here]
    return count


def _that_fit(pieces: Sequence[int], room: int) -> list[int]:
    """Places of the first chunks, and of later ones that the rest of the room holds."""
    places = []
    for place, count in enumerate(pieces):
        if count <= room:
            room -= count
            places.append(place)
    return places


def num_pieces(num_tokens: int) -> int:
    """Pieces of a chunk."""
    return -(-num_tokens // PIECE)


def empty_pieces(size: int, rows: int) -> PromptPieces:
    """Pieces of nothing, as NumPy arrays to be set."""
    fields: dict[str, Any] = {
        "tokens": np.zeros((size, PIECE), np.int32),
        "rows": np.full(size, -1, np.int32),
        "starts": np.zeros(size, np.int32),
        "num_tokens": np.zeros(size, np.int32),
        "ends": np.zeros(rows, np.int32),
    }
    return PromptPieces(**fields)

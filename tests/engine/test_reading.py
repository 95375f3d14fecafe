"""Passes that read prompts of several chunks: none is read with less in it than there is to read."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from qspec_jax.decoding import packing
from qspec_jax.engine.prefixes import NextChunk
from qspec_jax.engine.reading import passes, with_more

CHUNK, ROWS, CAPACITY = 512, 64, 8192
SIZES = {"rows": ROWS, "capacity": CAPACITY}
ROOM = packing.sizes(**SIZES)[-1]


def read(lengths, *, most=sys.maxsize):
    """Pieces of each pass until all prompts have been read, and what each row has read by then."""
    tokens = {row: range(1000 * row, 1000 * row + length) for row, length in enumerate(lengths)}
    of_rows = {
        row: [(start, some[start : start + CHUNK]) for start in range(0, len(some), CHUNK)]
        for row, some in tokens.items()
    }
    has_read, pieces = {row: [] for row in of_rows}, []
    while reading := [row for row, chunks in of_rows.items() if sum(map(len, has_read[row])) < len(tokens[row])]:
        num_read = {row: -(-sum(map(len, has_read[row])) // CHUNK) for row in reading}
        next_chunks = [NextChunk(row, row, num_read[row]) for row in reading]
        next_chunks = with_more(next_chunks, of_rows, room=ROOM, most=most, longest_packed=CHUNK)
        texts = [(one, one.text(of_rows[one.row])) for one in next_chunks]
        for one in passes(texts, **SIZES, longest_packed=CHUNK):
            pieces.append(int((one.pieces.rows >= 0).sum()))
            for chunk in one.chunks:
                start, some = chunk.text(of_rows[chunk.row])
                assert start == sum(map(len, has_read[chunk.row]))
                has_read[chunk.row].append(some)
    assert {row: [one for some in had for one in some] for row, had in has_read.items()} == {
        row: list(some) for row, some in tokens.items()
    }
    return pieces


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9, 11, 16, 33])
def test_all_passes_but_the_last_are_full(count):
    """Whatever the number of prompts: a round of five chunks would fill a quarter of its second pass."""
    found = read([4 * CHUNK] * count)
    assert set(found[:-1]) <= {ROOM}
    assert sum(found) == 4 * count * CHUNK // packing.PIECE


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((1750, 2000, 1430, 1999, 1600), 5),
        ((7900, 5600, 300, 40, 7000, 512, 900), 12),
        ((1510, 908, 3112, 2254, 551), 5),  # chunks that were added without a look at who shares a pass took 6
    ],
    ids=str,
)
def test_prompts_of_any_length_take_hardly_more_passes_than_their_pieces_fill(lengths, expected):
    assert expected - 1 <= -(-sum(packing.num_pieces(one) for one in lengths) // ROOM) <= expected
    assert len(read(lengths)) == expected


def test_passes_are_counted_as_they_are_filled():
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths = draw.integers(1, CHUNK + 1, draw.integers(1, 40)).tolist()
        chunks = [(NextChunk(row, row, 0), (0, range(length))) for row, length in enumerate(lengths)]
        found = list(passes(chunks, **SIZES, longest_packed=CHUNK))
        assert packing.num_passes([packing.num_pieces(length) for length in lengths], ROOM) == len(found)


def test_no_more_chunks_are_added_than_others_wait_for():
    assert len(read([4 * CHUNK] * 5, most=0)) == 8

"""Passes that read prompts of several chunks: none is read with less in it than there is to read."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from qspec_jax.decoding import packing
from qspec_jax.engine.prefixes import HeldChunks, NextChunk
from qspec_jax.engine.reading import passes, read_next, with_more

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
        next_chunks = with_more(next_chunks, of_rows, room=ROOM, most=most, longest_packed=CHUNK, rows_of_device=ROWS)
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


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([CHUNK] * 16, 1),  # a quarter of the passes of one device
        ([*[100] * 3, 1500, *[100] * 12], 1),  # one reads all of a prompt, whatever the others have
        ([4 * CHUNK, 4 * CHUNK, 4 * CHUNK, CHUNK, *[CHUNK] * 4], 4),  # as the first one needs by itself
        ([CHUNK] * 3, 1),  # and three have nothing to read
    ],
    ids=["alike", "long", "uneven", "idle"],
)
def test_devices_read_at_the_same_time(lengths, expected):
    """Four with four rows each: as many passes as the one needs that has most to read, and those of its own rows."""
    count, rows = 4, 16
    texts = {row: range(1000 * row, 1000 * row + length) for row, length in enumerate(lengths)}
    has_read, found = {row: [] for row in texts}, 0
    of_rows = {row: [(i, some[i : i + CHUNK]) for i in range(0, len(some), CHUNK)] for row, some in texts.items()}
    held, options = HeldChunks(rows, count), {"most": sys.maxsize, "rows": rows, "capacity": CAPACITY}
    while reading := {row: some for row, some in of_rows.items() if len(has_read[row]) < len(texts[row])}:
        for one in read_next(held, reading, [], longest_packed=CHUNK, num_devices=count, **options):
            found += 1
            of_device = one.pieces.rows.reshape(count, -1)
            assert all(set(some[some >= 0] // 4) <= {device} for device, some in enumerate(of_device))
            for chunk in one.chunks:
                has_read[chunk.row] += chunk.text(of_rows[chunk.row])[1]
                held.note(chunk.row, of_rows[chunk.row][: chunk.index + chunk.count])
    assert has_read == {row: list(some) for row, some in texts.items()}
    assert found == expected


def test_no_more_chunks_are_added_than_others_wait_for():
    assert len(read([4 * CHUNK] * 5, most=0)) == 8

"""Prompts that begin alike: what one row of the cache holds is not computed again for another.

A prompt is read in chunks. Whoever begins with the same chunks as a prompt that some row still holds, running or
finished, enters as a copy of that row and reads the rest. The rows are the store: there is no other memory, no program
besides the prefill ones, and the copy is the one that a prefill makes of a row in any case.

Whole chunks are reused, not blocks of a few tokens as in vLLM (PagedAttention, Kwon et al., 2023) or single ones as in
SGLang (RadixAttention, Zheng et al., 2024). On an accelerator the keys and values of a token depend, in their last
bits, on the width of the chunk it is read in and on where that begins. With the same tokens in the same chunks they are
those that the row would have computed, bit for bit, so that a result does not depend on who was there before. For the
same reason chunks are cut by what the request says of itself (:meth:`Request.chunks`), never by what
others turn out to have in common with it, and the keys and values of generated tokens, which were verified a few at a
time, are reused only by a request that asks for it (:mod:`qspec_jax.engine.held_texts`).

Example, chunks of up to 512 tokens, a system prompt S of 600 (chunks S1 and S2) and questions a, b, c::

    row 0 holds S1 S2 a      still decoding
    row 1 holds S1 S2 b      finished: idle, and its entries are still there
    S1 S2 c comes            enters row 1, which holds most of it; reads c alone
    S1 d comes, row 2 idle   copies row 0 or 1 up to S1 as it enters row 2, then reads d
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

Chunk = tuple[int, Sequence[int]]
"""Tokens of a prompt before a chunk of it, and those of the chunk."""


class NextChunk(NamedTuple):
    """What a row reads next.

    Attributes:
        row: that reads.
        source: the row that holds what the prompt begins with; ``row`` itself if that does.
        index: of the chunk, after those that ``source`` holds.
        count: of chunks from that one on.
    """

    row: int
    source: int
    index: int
    count: int = 1

    def text(self, chunks: Sequence[Chunk]) -> Chunk:
        """What is read of all chunks of a prompt."""
        (start, tokens), *more = chunks[self.index : self.index + self.count]
        return start, (*tokens, *itertools.chain.from_iterable(some for _, some in more)) if more else tokens


class HeldChunks:
    """The chunks that each row holds of the last prompt that it read: those before its end are never overwritten.

    Rows may lie on several devices, as many on each, in order. No row can be copied to another device.
    """

    def __init__(self, rows: int, num_devices: int = 1):
        self._per_device = rows // num_devices
        self._held: list[Sequence[Chunk]] = [[] for _ in range(rows)]
        self._sizes = [0] * rows  # tokens of them

    def note(self, row: int, chunks: Sequence[Chunk]) -> None:
        """A row is asked to read the last of some chunks, after which it holds all of them."""
        self._held[row] = chunks
        self._sizes[row] = sum(len(ids) for _, ids in chunks)

    def keep(self, row: int, num_tokens: int) -> None:
        """What a row holds after so many tokens is about to be overwritten."""
        self.note(row, [(start, ids) for start, ids in self._held[row] if start + len(ids) <= num_tokens])

    def num_shared(self, chunks: Sequence[Chunk]) -> int:
        """Tokens of a prompt that some row holds."""
        most = max(self._all_in_common(chunks))
        return sum(len(ids) for _, ids in chunks[:most])

    def room_for(self, chunks: Sequence[Chunk], idle: Collection[int], also_held: Sequence[int] = ()) -> int:
        """The idle row that is best for a prompt: which holds most of what it begins with, else holds least.

        Of several devices, the one that holds most of it, else the one with most idle rows.

        Args:
            chunks: of the prompt.
            idle: rows, at least one.
            also_held: tokens that each row holds besides.
        """

        def size(row: int) -> int:
            return max(self._sizes[row], *also_held[row : row + 1], 0)

        in_common = self._all_in_common(chunks)
        firsts = range(0, len(self._held), self._per_device)
        most = [max(in_common[first : first + self._per_device]) for first in firsts]
        num_idle = collections.Counter(row // self._per_device for row in idle)

        def order(row: int) -> tuple[int, ...]:
            device = row // self._per_device
            return -most[device], -in_common[row], -num_idle[device], size(row)

        return min(idle, key=order)

    def plan(self, reading: Mapping[int, Sequence[Chunk]]) -> tuple[list[NextChunk], list[int]]:
        """What some rows read next, in any order or at once.

        Args:
            reading: all chunks of the prompt of each row.

        Returns:
            at least one of them, and the rows that have to wait for it: others read what they hold, or are about to
            write what they begin with.
        """
        next_chunks: list[NextChunk] = []
        later, sources, written = [], set(), {}
        for row, chunks in reading.items():
            source, index = self._best_source(row, chunks)
            up_to = chunks[: index + 1]
            shared = index + 1 < len(chunks) and up_to in (written.get(other) for other in self._beside(row))
            if shared or row in sources or source in written:
                later.append(row)
                continue
            next_chunks.append(NextChunk(row, source, index))
            sources.add(source)
            written[row] = up_to
        return next_chunks, later

    def _best_source(self, row: int, chunks: Sequence[Chunk]) -> tuple[int, int]:
        """The row that holds most of the chunks, by preference the one that reads them, and how many."""
        source, most = row, self._in_common(row, chunks)
        for other in self._beside(row):
            if most + 1 == len(chunks):
                break
            if (count := self._in_common(other, chunks)) > most:
                source, most = other, count
        return source, most

    def _beside(self, row: int) -> range:
        """The rows of the same device."""
        first = row - row % self._per_device
        return range(first, first + self._per_device)

    def _all_in_common(self, chunks: Sequence[Chunk]) -> list[int]:
        """By row, how many chunks of a prompt it holds."""
        if len(chunks) < 2:  # as most have, who begin with nothing that is to be copied
            return [0] * len(self._held)
        return [self._in_common(row, chunks) for row in range(len(self._held))]

    def _in_common(self, row: int, chunks: Sequence[Chunk]) -> int:
        """How many chunks of a prompt a row holds, but for the last one, from which the first new token comes."""
        count = 0
        for held, chunk in zip(self._held[row], chunks[:-1], strict=False):
            if held != chunk:
                break
            count += 1
        return count

"""The rows of a batch: which sequence is in each, and what each holds of texts before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from qspec_jax.decoding.chunks import Shape, empty_chunks
from qspec_jax.decoding.sampling import Sampler
from qspec_jax.decoding.state import PromptChunk
from qspec_jax.engine.held_texts import HeldTexts
from qspec_jax.engine.prefixes import HeldChunks, NextChunk
from qspec_jax.engine.sequence import RunningSequence


class Rows:
    """Of a batch.

    Attributes:
        sequences: in each row; None where it is idle.
        held: chunks that rows hold.
        texts: of sessions, that idle rows hold.
    """

    def __init__(self, count: int, num_devices: int):
        """Idle rows that hold nothing, the same number on each device."""
        self.sequences: list[RunningSequence | None] = [None] * count
        self.held, self.texts = HeldChunks(count, num_devices), HeldTexts(count)
        self._retired = np.zeros((count,), bool)

    @property
    def idle(self) -> list[int]:
        """Rows without a sequence."""
        return [row for row, one in enumerate(self.sequences) if one is None]

    @property
    def num_in_use(self) -> int:
        """Rows that a sequence has."""
        return sum(one is not None for one in self.sequences)

    def reading(self) -> dict[int, RunningSequence]:
        """Sequences that have not read all of their prompts, by row."""
        return {row: one for row, one in enumerate(self.sequences) if one is not None and one.reading}

    def decoding(self) -> dict[int, RunningSequence]:
        """Sequences that have read their prompts, by row."""
        return {row: one for row, one in enumerate(self.sequences) if one is not None and not one.reading}

    def enter(self, entering: RunningSequence, idle: Collection[int], *, restart_multiple: int) -> int:
        """Gives a sequence one of some idle rows, where it may go on with the text of its session.

        Args:
            entering: the sequence.
            idle: rows to choose from, at least one.
            restart_multiple: tokens of a text are kept by multiples of it.

        Returns:
            the row.
        """
        request = entering.request
        row, num_kept = self.texts.find(request.session, request.token_ids)
        if num_kept:
            num_kept -= num_kept % restart_multiple
        if row in idle and num_kept > self.held.num_shared(entering.chunks):
            entering.go_on_after(num_kept)
            self.held.keep(row, num_kept)
        else:
            row = self.held.room_for(entering.chunks, sorted(idle), self.texts.sizes())
        self.texts.forget(row)
        self.sequences[row] = entering
        return row

    def free(self, row: int, *, device_knows: bool) -> None:
        """A row is idle from now on; where the device does not know it yet, it is to be told."""
        self.sequences[row] = None
        self._retired[row] = not device_knows

    def read(self, shape: Shape, width: int, next_chunks: Sequence[NextChunk]) -> tuple[PromptChunk, int, int]:
        """Chunks for the device to read, which count as read from now on. Whatever was in their rows has ended.

        Args:
            shape: of the programs.
            width: that chunks are padded to; 0 where they have their tokens elsewhere.
            next_chunks: what is read, by rows.

        Returns:
            the chunks, and how many tokens they take from other rows and compute.
        """
        chunks, sampling, num_reused, num_computed = empty_chunks(shape, width), [], 0, 0
        for place, one in enumerate(next_chunks):
            sequence, num_read = self.sequences[one.row], one.index + one.count
            assert sequence is not None
            start, token_ids = chunk = one.text(sequence.chunks)
            sequence.num_reused += start - sequence.read_up_to
            num_reused += start - sequence.read_up_to
            num_computed += len(token_ids)
            sequence.num_read, sequence.read_up_to = num_read, start + len(token_ids)
            if not sequence.num_kept:  # otherwise what it reads has other bits than that of a request of no session
                self.held.note(one.row, sequence.chunks[:num_read])
            sequence.request.put_chunk(chunks, place, chunk)
            sampling.append(sequence.request.sampling)
            self._retired[one.row] = False
        sampling += sampling[:1] * (shape.rows - len(next_chunks))
        sampler = Sampler.create(sampling, shape.features)
        return PromptChunk(**chunks, sampler=sampler), num_reused, num_computed

    def take_retired(self) -> np.ndarray:
        """Idle rows of which the device is to be told now ``[rows]``."""
        retired, self._retired = self._retired, np.zeros_like(self._retired)
        return retired

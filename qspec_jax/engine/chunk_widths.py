"""The widths that a batch pads chunks of prompts to, and which of them it does without.

What reads chunks of one width is a program of its own, which may not compile, or fail as it first runs: the widest one
takes the most memory. A batch that serves then reads prompts in chunks of the other widths. One that has read anything
is never left out: what it read may have been told to somebody, and chunks of another width round differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable

from qspec_jax.decoding import chunks


class ChunkWidths:
    """Of a batch.

    Attributes:
        needed: of the chunks of all prompts so far, without those that are left out.
    """

    def __init__(self) -> None:
        self.needed: set[int] = set()
        self._left_out: set[int] = set()
        self._have_read: set[int] = set()
        self._reading: int | None = None  # what nothing has been read in before

    @property
    def usable(self) -> tuple[int, ...]:
        """What a chunk may be padded to, in order."""
        return tuple(width for width in chunks.CHUNK_WIDTHS if width not in self._left_out)

    @property
    def are_all(self) -> bool:
        """None is left out."""
        return not self._left_out

    def expect(self, widths: Iterable[int]) -> None:
        """Notes what chunks are padded to, or would be if none were left out."""
        self.needed |= set(widths) - self._left_out

    @contextlib.contextmanager
    def first_read(self, width: int) -> Generator[bool]:
        """To read chunks in, and wait for it if nobody has before. If that fails, :meth:`leave_out_failed` knows it."""
        is_first = width not in self._have_read
        self._reading = width if is_first else None
        yield is_first
        self._reading = None
        self._have_read.add(width)

    def start_again(self) -> None:
        """A step begins anew: whatever fails in it, it is not what failed before."""
        self._reading = None

    def leave_out_failed(self, *, multiple: int) -> int | None:
        """Does without the width whose program failed as it first ran, in the last step.

        Args:
            multiple: of tokens that the longest chunks have; all widths are back if none is left for them.

        Returns:
            the width; None where that is not what failed, or prompts cannot be read without it.
        """
        width, self._reading = self._reading, None
        return width if width is not None and self._leave_out({width}, multiple=multiple) else None

    def leave_out_uncompiled(
        self, compile_widths: Callable[[Iterable[int]], None], *, longest_packed: int, multiple: int
    ) -> dict[int, Exception]:
        """Does without those widths that cannot be compiled, one at a time, where all together could not.

        Args:
            compile_widths: compiles what reads chunks of some widths, and the loop.
            longest_packed: tokens that a chunk has at most that shares a pass, whose program is none of a width.
            multiple: as above.

        Returns:
            why each of them cannot be; empty where nothing has changed.

        Raises:
            Exception: of the loop, without which no width is of use, or of all widths that there are.
        """
        compile_widths(())
        failed: dict[int, Exception] = {}
        for width in sorted(self.needed - self._have_read):
            if width > longest_packed:
                try:
                    compile_widths((width,))
                except Exception as error:
                    failed[width] = error
        if failed and not self._leave_out(failed, multiple=multiple):
            raise next(iter(failed.values()))
        return failed

    def _leave_out(self, widths: Iterable[int], *, multiple: int) -> bool:
        self._left_out |= set(widths)
        self.needed -= self._left_out
        if not self.usable or self.usable[-1] % multiple:
            self._left_out.clear()
            return False
        return True

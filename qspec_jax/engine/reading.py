"""For how long those that decode wait while others read their prompts.

Reading a chunk costs the same whenever it is done, but until the last one its row yields nothing, and a cycle costs
little less. So chunks are read one after another: all of them, or in a batch that serves for as long as those that
decode can be expected to wait, and the bursts between are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from qspec_jax.decoding import packing
from qspec_jax.decoding.chunks import chunk_width
from qspec_jax.decoding.state import PromptPieces
from qspec_jax.engine.prefixes import Chunk, HeldChunks, NextChunk
from qspec_jax.engine.sequence import RunningSequence

_MOST_WAIT_S = 0.05  # that those that decode wait for chunks, or as long as a chunk of each row takes
# Of the time that reading took: what a burst between chunks takes if all other rows decode, and less if fewer do.
_BURST_SHARE = 0.5


class Reading:
    """The pace of reading, by what chunks took before."""

    def __init__(self) -> None:
        self._chunk_s: float | None = None  # that a chunk took the last time
        self._read_s = 0.0  # that chunks took since the last burst

    def note(self, num_chunks: int, seconds: float) -> None:
        """Takes the time into account that chunks took between two bursts."""
        self._chunk_s, self._read_s = seconds / num_chunks, seconds

    def is_enough(self, num_chunks: int, more: int, *, most_s: float | None = None) -> bool:
        """Whether others have waited long enough, for so many chunks, to wait for no more than these.

        Args:
            num_chunks: that they have waited for.
            more: chunks that are read next.
            most_s: seconds to wait; None for those that decode and serve somebody.
        """
        return self._chunk_s is None or (num_chunks + more) * self._chunk_s > (most_s or _MOST_WAIT_S)

    def first(self, reading: Mapping[int, RunningSequence]) -> dict[int, RunningSequence]:
        """Those of some rows that read before those that decode, where these are to wait no longer than need be.

        They are those that came first: as many as read a chunk each in the time that others can be expected to wait,
        but at least one.
        """
        count = 1 if self._chunk_s is None else max(1, int(_MOST_WAIT_S / max(self._chunk_s, 1e-9)))
        came_first = sorted(reading.items(), key=lambda item: item[1].entered_s or 0.0)
        return dict(came_first[:count])

    def num_more(self, num_chunks: int) -> int:
        """Chunks that may be read besides so many, for others to wait no longer than they can be expected to."""
        return 0 if self._chunk_s is None else max(0, int(_MOST_WAIT_S / max(self._chunk_s, 1e-9)) - num_chunks)

    def burst_s(self, *, decoding: int, rows: int) -> float | None:
        """Seconds of a burst while prompts are read; None if nobody knows how long that takes."""
        return _BURST_SHARE * self._read_s * decoding / rows or None


class ChunksOfAPass(NamedTuple):
    """Chunks that one program reads.

    Attributes:
        width: that each is padded to; 0 where ``pieces`` have their tokens.
        chunks: what they are.
        pieces: their tokens, where they are packed.
    """

    width: int
    chunks: Sequence[NextChunk]
    pieces: PromptPieces | None = None


def read_next(
    held: HeldChunks,
    of_rows: Mapping[int, Sequence[Chunk]],
    own: Sequence[NextChunk],
    *,
    most: int,
    rows: int,
    capacity: int,
    longest_packed: int,
    num_devices: int = 1,
    widths: Sequence[int] | None = None,
) -> Iterator[ChunksOfAPass]:
    """What passes read for some rows to have their next chunk, and up to so many more that these have room for.

    Each is to be noted in ``held`` before the next one is asked for: a row that begins as another does waits until that
    one has written it.

    Args:
        held: what each row holds.
        of_rows: all chunks of the prompt of each row.
        own: next chunks of those rows that go on after a text of their session, which nobody else holds.
        most: chunks that may be added.
        rows, capacity: of the batch.
        longest_packed: tokens that a chunk has at most of which a pass reads several.
        num_devices: that have as many rows each, and read those of their own.
        widths: that other chunks are padded to, in order; None for all there are.
    """
    sizes = {"rows": rows, "capacity": capacity, "longest_packed": longest_packed, "num_devices": num_devices}
    of_device = rows // num_devices
    options = {"longest_packed": longest_packed, "rows_of_device": of_device}
    reading = {row: chunks for row, chunks in of_rows.items() if row not in {one.row for one in own}}
    while reading or own:
        chunks, later = held.plan(reading)
        # They write after all that others may read of their rows.
        chunks, own = [*chunks, *own], []
        chunks = with_more(chunks, of_rows, room=packing.sizes(of_device, capacity)[-1], most=most, **options)
        most -= sum(one.count - 1 for one in chunks)
        yield from passes([(one, one.text(of_rows[one.row])) for one in chunks], **sizes, widths=widths)
        reading = {row: reading[row] for row in later}


def with_more(
    chunks: Sequence[NextChunk],
    of_rows: Mapping[int, Sequence[Chunk]],
    *,
    room: int,
    most: int,
    longest_packed: int,
    rows_of_device: int,
) -> list[NextChunk]:
    """The same chunks, and where the passes that they need have room for more, the next ones of the same prompts.

    A pass takes some milliseconds however few pieces it has. A prompt that is read alone would have one for each chunk,
    and of five prompts the second of two passes would be a quarter full.

    Args:
        chunks: that are read next.
        of_rows: all chunks of the prompt of each row.
        room: pieces of a device in the largest pass.
        most: chunks that may be added.
        longest_packed: tokens that a chunk has at most that shares a pass.
        rows_of_device: rows that a device has. Each has room in all passes that one of them needs.
    """
    found = list(chunks)
    order = sorted(range(len(found)), key=lambda place: found[place].source == found[place].row)  # as passes take them
    pieces = {
        place: packing.num_pieces(len(tokens))
        for place in order
        if len(tokens := found[place].text(of_rows[found[place].row])[1]) <= longest_packed
    }
    of_devices: dict[int, dict[int, int]] = {}
    for place, count in pieces.items():
        of_devices.setdefault(found[place].row // rows_of_device, {})[place] = count
    num_passes = max((packing.num_passes(list(some.values()), room) for some in of_devices.values()), default=0)
    left = {device: num_passes * room - sum(some.values()) for device, some in of_devices.items()}
    packed = list(pieces)
    while packed and most > 0 and any(left.values()):
        place, one = packed[0], found[packed.pop(0)]
        device = one.row // rows_of_device
        own = of_devices[device]
        later = of_rows[one.row][one.index + one.count :]
        # Pieces are where they would be otherwise: but for the last chunk, each is a whole number of them.
        if not later or len(one.text(of_rows[one.row])[1]) % packing.PIECE or len(later[0][1]) > longest_packed:
            continue
        if (needed := packing.num_pieces(len(later[0][1]))) > min(left[device], room - own[place]):
            continue
        more = own | {place: own[place] + needed}
        if packing.num_passes(list(more.values()), room) <= num_passes:
            found[place], of_devices[device], most = one._replace(count=one.count + 1), more, most - 1
            left[device] -= needed
            packed.append(place)
    return found


def passes(
    chunks: Sequence[tuple[NextChunk, Chunk]],
    *,
    rows: int,
    capacity: int,
    longest_packed: int,
    num_devices: int = 1,
    widths: Sequence[int] | None = None,
) -> Iterator[ChunksOfAPass]:
    """Chunks by the programs that read them: as many in a pass as fit, or by their width.

    Args:
        chunks: each with its start and tokens.
        rows, capacity: of the batch.
        longest_packed: tokens that a chunk has at most of which a pass reads several.
        num_devices: see :func:`packing.pack`.
        widths: as in :func:`read_next`.
    """
    sizes = {"rows": rows, "capacity": capacity, "num_devices": num_devices}
    left = [(one, text) for one, text in chunks if one.count > 1 or len(text[1]) <= longest_packed]
    left.sort(key=lambda chunk: chunk[0].source == chunk[0].row)  # copies of rows come first in a pass
    while left:
        pieces, places = packing.pack([(one.row, *text) for one, text in left], **sizes)
        yield ChunksOfAPass(0, [left[place][0] for place in places], pieces)
        left = [one for place, one in enumerate(left) if place not in places]
    by_width: dict[int, list[NextChunk]] = {}
    for one, (_, tokens) in chunks:
        if one.count == 1 and len(tokens) > longest_packed:
            by_width.setdefault(chunk_width(len(tokens), widths), []).append(one)
    yield from (ChunksOfAPass(width, some) for width, some in sorted(by_width.items()))

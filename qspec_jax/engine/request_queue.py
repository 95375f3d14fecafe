"""Requests that wait for a row, and those that have one, in the order in which they came."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterable

from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.engine.chunk_widths import ChunkWidths
from qspec_jax.engine.requests import Request, widths_of
from qspec_jax.engine.sequence import RunningSequence


def features_of(sequence: RunningSequence) -> SamplingFeatures:
    """What a sequence needs of the programs."""
    return SamplingFeatures.of([sequence.request.sampling])


class RequestQueue:
    """What a scheduler has to do. Any thread may add to it; all else is for the one that runs a step.

    No step takes longer for the number of those that wait.

    Attributes:
        widths: of chunks.
        features: of sampling that any of them needs.
    """

    def __init__(self) -> None:
        self.widths = ChunkWidths()
        self.features = SamplingFeatures()
        self._adding = threading.Lock()
        self._arrived: collections.deque[RunningSequence] = collections.deque()  # since the last step
        self._needs: set[tuple[str | None, frozenset[int], SamplingFeatures]] = set()  # of those, by session, each once
        self._waiting: collections.OrderedDict[RunningSequence, None] = collections.OrderedDict()
        self._put_off: collections.OrderedDict[RunningSequence, None] = collections.OrderedDict()
        self._served: SamplingFeatures | None = None  # without which those were put off
        self._unfinished: dict[RunningSequence, None] = {}  # those that have a row, too
        self._gone: list[RunningSequence] = []  # dropped since the last step, perhaps of those that had just arrived

    def __len__(self) -> int:
        """How many wait."""
        return len(self._arrived) + len(self._waiting) + len(self._put_off)

    @property
    def anyone_may_enter(self) -> bool:
        """Whether others wait than those that were put off."""
        return bool(self._arrived or self._waiting)

    def expect(self, widths: Iterable[int], features: SamplingFeatures) -> None:
        """Notes what requests to come may need."""
        self.widths.expect(widths)
        self.features = self.features.union(features)

    def expect_of(self, sequence: RunningSequence) -> None:
        """Notes what one needs, as its prompt is cut."""
        self.expect(widths_of(sequence.chunks, self.widths.usable), features_of(sequence))

    def add(self, request: Request) -> RunningSequence:
        """Queues a request."""
        sequence = RunningSequence(request)
        needs = request.session, frozenset(request.widths()), SamplingFeatures.of([request.sampling])
        with self._adding:
            self._unfinished[sequence] = None
            self._needs.add(needs)
            self._arrived.append(sequence)
        return sequence

    def take_in(self, is_held: Callable[[str | None], bool] = lambda _: False) -> None:
        """Notes what the requests need that came since the last step.

        Args:
            is_held: whether something of a session's text is: nobody knows then how much of a prompt will be read.
        """
        if not self._arrived:
            self._gone.clear()
            return
        with self._adding:
            for session, widths, features in self._needs:
                self.expect(() if is_held(session) else widths, features)
            self._needs.clear()
            self._waiting.update(dict.fromkeys(self._arrived))
            self._arrived.clear()
        for sequence in self._gone:
            self._waiting.pop(sequence, None)
        self._gone.clear()

    def next(self, served: SamplingFeatures | None = None) -> RunningSequence | None:
        """The one whose turn it is; None if no other waits that may enter.

        Args:
            served: features that those who enter may need; None for all. Others are put off until there are more.
        """
        if served != self._served:
            self._served = served
            if self._put_off:
                self._waiting, self._put_off = self._put_off | self._waiting, collections.OrderedDict()
        while self._waiting:
            sequence = self._waiting.popitem(last=False)[0]
            if served is None or served.cover(features_of(sequence)):
                sequence.cut(self.widths.usable)
                return sequence
            self._put_off[sequence] = None
        return None

    def first(self, count: int) -> list[RunningSequence]:
        """Those whose turns come next, of those that were taken in, and were not put off."""
        return list(itertools.islice(self._waiting, count))

    def beyond(self, features: SamplingFeatures) -> list[RunningSequence]:
        """Those that wait, were taken in, and need more, in order."""
        return [one for one in (*self._put_off, *self._waiting) if not features.cover(features_of(one))]

    def forget(self, known: SamplingFeatures) -> None:
        """Has :attr:`features` be some, and what those need that are not finished."""
        self.features = known
        for sequence in self.unfinished():
            self.features = self.features.union(features_of(sequence))

    def drop(self, sequence: RunningSequence) -> None:
        """Forgets a sequence that is finished, also before its turn."""
        self._unfinished.pop(sequence, None)
        for some in (self._waiting, self._put_off):
            if sequence in some:
                del some[sequence]
                return
        self._gone.append(sequence)

    def start_again(self) -> int:
        """Has all wait that were not dropped, those that have a row first; how many of them are finished."""
        with self._adding:
            finished = [one for one in self._unfinished if one.finished]
            for sequence in finished:
                del self._unfinished[sequence]
            for some in (self._waiting, self._put_off, self._arrived):
                some.clear()
            self._arrived.extend(self._unfinished)
        self.widths.start_again()
        return len(finished)

    def unfinished(self) -> list[RunningSequence]:
        """All that were not dropped."""
        with self._adding:
            return list(self._unfinished)

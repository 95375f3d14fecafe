"""When the sequences of a batch end, by what their drafts were so far, for a choice between plans."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from qspec_jax.engine.chooser import Chooser
from qspec_jax.engine.makespan import Makespan, Served, makespans
from qspec_jax.engine.sequence import RunningSequence

_ROWFULS = 8  # of requests that wait: where there are more, the end of the last ones is worth little
_LOOK_S = 0.1  # from one look to the next while others wait: one takes about a millisecond of a device's time


class Foresight:
    """What a chooser is told of the end of a batch."""

    def __init__(self, chooser: Chooser, *, rows: int, serves: bool):
        """Of a batch of some rows; of one that ``serves`` nobody knows the end."""
        self.most = _ROWFULS * rows
        self._chooser, self._rows, self._serves = chooser, rows, serves
        self._found: Mapping[str | None, Makespan] = {}
        self._again_s = 0.0

    def look(
        self, decoding: Sequence[RunningSequence], waiting: Sequence[RunningSequence], context: int
    ) -> Mapping[str | None, Makespan]:
        """By source of drafts, when the last sequence ends; nothing where more may come than are known.

        Args:
            decoding: at least one.
            waiting: for rows, all of them or more than :attr:`most`, in order.
            context: tokens that a row holds, on average.
        """
        if self._serves or len(waiting) > self.most:
            return {}
        if waiting and time.perf_counter() < self._again_s:
            return self._found
        kinds, profiles = self._chooser.kinds, self._chooser.profiles()
        served = [
            Served([one.drafts.get(source or "", ()) for one in decoding], kinds[source], profile)
            for source, profile in profiles.items()
        ]
        found = makespans(
            [one.request.max_new_tokens - len(one.token_ids) for one in decoding],
            [one.request.max_new_tokens for one in waiting],
            served,
            rows=self._rows,
            alone=self._chooser.alone(context=context, active=len(decoding)),
        )
        self._found = dict(zip(profiles, found, strict=True))
        # What holds once nobody waits says nothing of those who come after.
        self._again_s = time.perf_counter() + _LOOK_S if waiting else 0.0
        return self._found

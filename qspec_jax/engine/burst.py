"""When a burst ends: once enough rows are idle (:mod:`qspec_jax.engine.refill`), or once somebody comes who has room.

How many cycles a dispatch runs is settled when it is dispatched. So where nobody waits, but somebody may come, a burst
is cut: after each slice a look at who has, which costs the device a dispatch, and no more. Tokens are taken from the
device at the end of the burst, as ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qspec_jax.device.settings import usual_settings

if TYPE_CHECKING:
    from qspec_jax.decoding.programs import Report
    from qspec_jax.decoding.state import DecodeState

# Of a slice. Who comes waits for half of one on average, and a dispatch takes the device a few tenths of a millisecond.
SLICE_S = 0.02


@usual_settings()  # of the thread that dispatches
def run_in_slices(
    loop: Callable[..., tuple[DecodeState, Report]],
    state: DecodeState,
    retired: np.ndarray,
    *,
    max_cycles: int,
    slice_cycles: int,
    ends_early: Callable[[Report], bool],
) -> tuple[DecodeState, Report]:
    """Runs cycles until there were ``max_cycles``, the loop ends by itself, or it is to end early.

    Args:
        loop: ``loop(state, retired, max_cycles=n)`` runs up to ``n`` cycles and uses up the state.
        state: where to go on.
        retired: rows whose sequences end first; nobody else gets them in a burst.
        max_cycles: of the burst.
        slice_cycles: of a slice; from ``max_cycles`` on the burst is one dispatch, and nobody waits for it here.
        ends_early: asked after each slice but the last, of its report.

    Returns:
        the state, and the report of the last slice with the cycles of all.
    """
    if slice_cycles >= max_cycles:
        return loop(state, retired, max_cycles=max_cycles)
    total = 0
    while True:
        wanted = min(slice_cycles, max_cycles - total)
        state, report = loop(state, retired, max_cycles=wanted)
        cycles = int(report.cycles)  # once the slice has ended
        total += cycles
        if cycles < wanted or total >= max_cycles or ends_early(report):
            return state, dataclasses.replace(report, cycles=np.int32(total))

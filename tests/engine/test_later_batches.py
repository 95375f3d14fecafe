"""Later batches of a process with ``auto``, on the device that only counts time."""

from __future__ import annotations

import numpy as np

from tests.engine.simulated_batches import measure
from tests.engine.simulated_device import SMALL


def test_one_row_keeps_to_the_best_static_plan_where_lookup_pays():
    """What lookup yields differs most from text to text, and with one row each text is all that tells."""
    later = [
        one["auto"] / one["static"] for seed in (10, 13) for one in measure(((1, 2048), "lookup", seed, SMALL))[1][1:]
    ]
    assert np.mean(later) > 0.97
    assert min(later) > 0.94

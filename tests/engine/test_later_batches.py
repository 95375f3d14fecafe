"""Later batches of a process with ``auto``, on the device that only counts time."""

from __future__ import annotations

import numpy as np

from qspec_jax.decoding.costs import CostTable
from tests.engine.simulated_batches import CONVERSATIONS, batches_of, measure, on_the_clock, run
from tests.engine.simulated_device import AUTO, PLAIN, SMALL, Process


def test_one_row_keeps_to_the_best_static_plan_where_lookup_pays():
    """What lookup yields differs most from text to text, and with one row each text is all that tells."""
    later = [
        one["auto"] / one["static"] for seed in (10, 13) for one in measure(((1, 2048), "lookup", seed, SMALL))[1][1:]
    ]
    assert np.mean(later) > 0.97
    assert min(later) > 0.94


def test_many_rows_of_conversations_lose_little_where_nothing_pays():
    """The longer a text is, the more it repeats itself: its end promises more of lookup than all of it yields."""
    rows, process, found = 64, Process(CostTable(SMALL.num_bytes, bandwidth=4.3e12), set(AUTO.choices)), []
    with on_the_clock(rows):
        for some in batches_of((rows, 512), CONVERSATIONS, seed=0):
            plain_s, auto_s = (run(plan, rows, some, SMALL, process)[0] for plan in (PLAIN, AUTO))
            found.append(plain_s / auto_s)
    assert np.mean(found[1:]) > 0.98

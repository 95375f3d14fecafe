"""How long first tokens take under load, on a device that only sleeps: ``python -m tests.engine.simulated_serving``.

The scheduler, its threads and its times are the real ones. The device takes as long as an H100 took with weights of
Llama-3-8B (W4A16, 64 rows): 2.3 ms and 0.073 ms per row for a cycle, 4.5 ms and 32 us per token for a chunk, 0.4 ms for
a dispatch. This says what a policy does, and no speed of any hardware.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time

import numpy as np

from qspec_jax import SamplingParams
from qspec_jax.bench.throughput.measure import arrivals
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.model.precision import Precision
from tests.engine.test_scheduler import FakePrograms

ROWS, NUM_REQUESTS = 64, 400


class Sleeping(FakePrograms):
    most_tokens = 256

    def prefill(self, plan, shape, state, chunks, rows, sources, count):
        time.sleep((0.0045 + 32e-6 * chunks.tokens.shape[1]) * count)
        return super().prefill(plan, shape, state, chunks, rows, sources, count)

    def loop(self, *arguments, **limits):
        state, report = super().loop(*arguments, **limits)
        time.sleep(0.0004 + int(report.cycles) * (0.0023 + 0.000073 * self.rows))
        return state, report


def serve(rate: float | None, *, serves: bool) -> float:
    """Prints a line; requests per second."""
    draw = random.Random(0)
    options = {"rows": ROWS, "capacity": 2048, "burst_s": 0.5 if rate is None else 0.1, "serves": serves}
    scheduler = Scheduler(Sleeping(ROWS), DecodingPlan(Precision.W4A16), **options)
    lengths = [(int(draw.lognormvariate(4.6, 1)), int(draw.lognormvariate(4.9, 0.8))) for _ in range(NUM_REQUESTS)]
    requests = [
        Request([1] * min(1000, max(2, prompt)), min(256, max(2, new)), SamplingParams()) for prompt, new in lengths
    ]
    sequences, began = [], time.perf_counter()

    def add_all():
        for arrival_s, request in zip(arrivals(len(requests), rate), requests, strict=True):
            time.sleep(max(0.0, began + arrival_s - time.perf_counter()))
            sequences.append(scheduler.add(request))

    adding = threading.Thread(target=add_all)
    adding.start()
    while adding.is_alive() or scheduler.busy:
        scheduler.advance() if scheduler.busy else time.sleep(0.001)
    seconds = time.perf_counter() - began
    first = [1e3 * (one.arrivals[0][0] - one.added_s) for one in sequences]
    pauses = [1e3 * (b - a) for one in sequences for (a, _), (b, _) in itertools.pairwise(one.arrivals)]
    percentiles = [f"{np.percentile(some, share):.0f}" for some in (first, pauses) for share in (50, 99)]
    print(
        "at once" if rate is None else f"{rate:.1f}/s",
        f"{scheduler.totals.tokens / seconds:.0f}",
        *percentiles,
        sep="\t",
    )
    return len(requests) / seconds


def main():
    serves = "--patient" not in sys.argv
    print("rate", "tokens/s", "first p50", "p99, ms", "pause p50", "p99, ms", sep="\t")
    most = serve(None, serves=False)
    for load in (0.5, 0.8):
        serve(load * most, serves=serves)


if __name__ == "__main__":
    main()

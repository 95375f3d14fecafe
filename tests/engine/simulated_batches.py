"""Whole batches with ``auto`` on a device that takes no time: ``python -m tests.engine.simulated_batches``.

Scheduler, chooser and costs are the real ones; the clock is that of the device. A cycle takes what one took on an H200
with SmolLM2-135M: 0.85 ms and 0.029 ms for each row of 2,006 tokens, 0.0052 ms for each draft that is verified. Every
text is by turns one that can be looked up (0.97 of the drafts are accepted, for 30 tokens on average) and one that
cannot (0.05); the share of the first kind differs from text to text. This says what a choice is worth, and no speed of
any hardware.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import numpy as np

from qspec_jax import SamplingParams
from qspec_jax.decoding.costs import CostTable, PassBytes
from qspec_jax.decoding.plan import AUTO_LENGTHS, AutoPlan, DecodingPlan, Lookup
from qspec_jax.decoding.programs import Report
from qspec_jax.engine import scheduler as of_scheduler
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.model.view import View
from tests.engine.test_scheduler import FakePrograms, OnDevice

FULL, BUDGET = View(activation_bits=8), View(activation_bits=8, cache_budget=512, cache_full_below=1024)
PLAIN = DecodingPlan(View())
LOOKUPS = tuple(DecodingPlan(View(), Lookup(), length) for length in (3, 7))
DRAFTING = tuple(DecodingPlan(View(), view, length) for view in (FULL, BUDGET) for length in AUTO_LENGTHS)
BYTES = PassBytes(142_000_000, 23_040)
ACCEPTED, LOAD_S, DISPATCH_S, STAYS = 0.9, 0.01, 0.0003, 29 / 30
NEW_TOKENS = 256
# Rows, requests, context, share of the text that can be looked up.
BATCHES = [(16, 64, 2006, 0.22), (64, 192, 2006, 0.3), (16, 64, 2006, 0.45), (64, 192, 2006, 0.5), (4, 16, 2006, 0.3)]
BATCHES += [(16, 64, 512, 0.05)]


class Clock:
    now_s = 1000.0


class Later:
    """A pool whose work is done when somebody waits for it: host and device then take turns on one clock."""

    def submit(self, work, *arguments, **options):
        return Later.Done(lambda: work(*arguments, **options))

    class Done:
        def __init__(self, work):
            self.work, self.value = work, None

        def result(self):
            if self.work is not None:
                self.value, self.work = self.work(), None
            return self.value


class Device(FakePrograms):
    def __init__(self, rows, context, shares, costs, seed):
        super().__init__(rows)
        self.context, self.shares, self.table = context, list(shares), costs
        self.draw = np.random.default_rng(seed)
        self.loaded = vars(costs).setdefault("loaded", set())  # plans that have run in the process
        self.known, self.becomes_known = np.zeros(rows, bool), np.zeros(rows)
        self.lengths = np.zeros((rows, 17), int)

    @property
    def costs(self):
        return self.table

    def lay_out_weights(self, plan):
        pass

    def has_loop(self, plan, shape):
        return True

    def _report(self, cycles):
        tokens = np.zeros((self.rows, NEW_TOKENS), int)
        arrays = tokens, self.counts.copy(), self.left <= 0, self.lengths.copy()
        return "state", Report(*map(OnDevice, arrays), np.int32(cycles))

    def prefill(self, plan, shape, state, chunks, rows, sources, count):
        Clock.now_s += 0.001 * count
        for chunk, row in enumerate(rows[:count]):
            self.lengths[row] = 0
            if chunks.last[chunk]:
                share = self.shares.pop(0)
                self.becomes_known[row] = (1 - STAYS) * share / (1 - share)
                self.known[row] = self.draw.random() < share
        return super().prefill(plan, shape, state, chunks, rows, sources, count)

    def loop(self, plan, shape, state, retired, *, max_cycles, until_finished):
        Clock.now_s += DISPATCH_S + (plan not in self.loaded) * LOAD_S
        self.loaded.add(plan)
        self.left[retired], cycles = 0, 0
        while cycles < max_cycles and (self.left <= 0).sum() < until_finished:
            active = self.left > 0
            Clock.now_s += self.cycle_s(plan, int(active.sum()))
            for row in np.flatnonzero(active):
                accepted = self.accepted(plan, row)
                self.lengths[row, accepted] += 1
                new = min(accepted + 1, self.left[row])
                self.left[row] -= new
                self.counts[row] += new
            cycles += 1
        return self._report(cycles)

    def cycle_s(self, plan, active):
        plain = 0.85e-3 + 0.0288e-3 * active * self.context / 2006
        drafts = {None: 0.0, FULL: 0.85, BUDGET: 0.75}[plan.draft_view] * plan.draft_length
        return plain * (1 + drafts) + 0.0052e-3 * active * plan.draft_length

    def accepted(self, plan, row):
        for place in range(plan.draft_length):
            self.go_on(row)
            chance = (0.97 if self.known[row] else 0.05) if plan.lookup else ACCEPTED
            if self.draw.random() >= chance:
                return place
        self.go_on(row)
        return plan.draft_length

    def go_on(self, row):
        self.known[row] = self.draw.random() < (STAYS if self.known[row] else self.becomes_known[row])


def tokens_per_s(plan, rows, requests, context, shares, costs, seed):
    scheduler = Scheduler(Device(rows, context, shares, costs, seed), plan, rows=rows, capacity=4096)
    scheduler._dispatcher = Later()
    sequences = [scheduler.add(Request([1] * context, NEW_TOKENS, SamplingParams())) for _ in range(requests)]
    while scheduler.busy:
        scheduler.advance()
    return sum(len(one.token_ids) for one in sequences) / scheduler.totals.decode_s


def main():
    num_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    time.perf_counter = lambda: Clock.now_s
    of_scheduler.futures = SimpleNamespace(wait=lambda some: [one.result() for one in some])
    plans = (*LOOKUPS, next(plan for plan in DRAFTING if plan.draft_view is BUDGET))
    print("rows", "requests", "context", "share", *(plan.label for plan in plans), "auto", "again", "least", sep="\t")
    for rows, requests, context, share in BATCHES:
        static, runs = [], []
        for seed in range(num_seeds):
            shares = np.random.default_rng(seed).beta(share, 1 - share, requests).clip(0.002, 0.98)
            batch = rows, requests, context, shares
            plain = tokens_per_s(PLAIN, *batch, CostTable(BYTES), seed)
            static.append([tokens_per_s(plan, *batch, CostTable(BYTES), seed) / plain for plan in plans])
            auto, costs = AutoPlan("auto", (PLAIN, *LOOKUPS, *DRAFTING)), CostTable(BYTES)
            runs.append([tokens_per_s(auto, *batch, costs, seed + 10 * run) / plain for run in range(4)])
        again = np.asarray(runs)[:, 1:]
        figures = *np.mean(static, axis=0), np.mean(runs, axis=0)[0], again.mean(), again.min()
        print(rows, requests, context, share, *(f"{one:.2f}" for one in figures), sep="\t", flush=True)


if __name__ == "__main__":
    main()

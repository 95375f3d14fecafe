"""Whole batches with ``auto`` on a device that takes no time: ``python -m tests.engine.simulated_batches``.

Scheduler, chooser and costs are the real ones; the clock is that of :mod:`tests.engine.simulated_device`. Every cell of
batch and context has texts in which lookup pays, in which a budget of the cache pays, and in which nothing does. There
are also conversations, of which was recorded what lookup foretells. The first batch of a process loads programs, later
ones do not. Each seed has other texts, lengths and times; the first one has those of the table of the module. Whole
runs are compared, reading included. This says what a choice is worth, and no speed of any hardware.

Beside ``auto`` stand the best static plan and one who sees what comes: every 64 cycles the plan that yields the most.
What ``auto`` loses against the best static plan is split by where it lost it, in percent of the time of that: loading
programs, trials, plain bursts at the beginning, other bursts of a plan that yields less there, and the rest, which are
looks from burst to burst and rows that end unevenly.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import time
from types import SimpleNamespace

import numpy as np

from qspec_jax import SamplingParams
from qspec_jax.decoding.costs import CostTable
from qspec_jax.engine import scheduler as of_scheduler
from qspec_jax.engine.chooser import Chooser
from qspec_jax.engine.choosing import Choosing
from qspec_jax.engine.requests import Request
from qspec_jax.engine.scheduler import Scheduler
from tests.engine.simulated_device import (
    AUTO,
    BUDGET,
    DRAFTING,
    FULL,
    LARGE,
    LOOKUPS,
    PLAIN,
    SMALL,
    Clock,
    Device,
    Host,
    Later,
    Process,
    advance,
    conversations,
    texts,
)

CELLS = [(rows, context) for rows in (1, 4, 16, 64) for context in (512, 2048, 8192)]
CONVERSATIONS = "conversations"  # of any length, all in the column of 512
# Share of a text that can be looked up, and how often drafts of the model are accepted.
KINDS = {
    "lookup": (0.4, {FULL: 0.9, BUDGET: 0.85}),
    "budget": (0.03, {FULL: 0.95, BUDGET: 0.92}),
    "nothing": (0.03, {FULL: 0.05, BUDGET: 0.03}),
    CONVERSATIONS: (None, {FULL: 0.9, BUDGET: 0.9}),
}
REQUESTS = {1: 24, 4: 48, 16: 128, 64: 256}  # of conversations, by rows
STATIC = (PLAIN, *LOOKUPS, *(plan for plan in DRAFTING if plan.draft_view is BUDGET and plan.draft_length < 7))
LATER = 2  # batches of a process after its first one
TERMS = ("load", "trials", "learning", "choices", "rest")


def run(plan, rows, some, hardware, process, beside=None):
    """Seconds of all, reading included, and the bursts."""
    device, began_s = Device(rows, some, hardware, process, beside), Clock.now_s
    scheduler = Scheduler(device, plan, rows=rows, capacity=device.capacity)
    scheduler._dispatcher = Later()
    sequences = [scheduler.add(Request(one.prompt, len(one.tokens), SamplingParams())) for one in some]
    while scheduler.busy:
        scheduler.advance()
    assert all(len(one.token_ids) == len(text.tokens) for one, text in zip(sequences, some, strict=True))
    return Clock.now_s - began_s, device.ran


def foreseen(rows, some, hardware):
    """Seconds of one who takes the plan that yields the most in the next 64 cycles of plain decoding."""
    device = Device(rows, some, hardware, Process(CostTable(hardware.num_bytes, bandwidth=4.3e12)))
    waiting, seconds = collections.deque(range(len(some))), 0.0
    text_of, counts, left = device.text_of, device.counts, device.left
    while waiting or (left > 0).any():
        for row in np.flatnonzero(left <= 0):
            if waiting:
                text_of[row], counts[row] = (number := waiting.popleft()), 1
                left[row] = len(some[number].tokens) - 1
        tried = [_window(device, plan, (text_of, counts, left), bool(waiting)) for plan in STATIC]
        took_s, _, (counts, left) = max(tried, key=lambda one: one[1] / one[0])
        seconds += took_s
    return seconds


def _window(device, plan, state, others_wait):
    text_of, counts, left = state[0], state[1].copy(), state[2].copy()
    before, took_s, active = counts.sum(), device.host.dispatch_s, int((left > 0).sum())
    window_s = 64 * device.hardware.cycle_s(PLAIN, active, device.context)
    enough = max(1, len(left) // 16) if others_wait else active
    while took_s < window_s and (now := int((left > 0).sum())) > active - enough:
        took_s += device.hardware.cycle_s(plan, now, device.context)
        advance(plan, device.yields, text_of, counts, left)
    return took_s, counts.sum() - before, (counts, left)


def lost(ran, whys, more_s):
    """Seconds of ``more_s`` by where they were lost: in each burst against what the best plan takes for its tokens."""
    terms = dict.fromkeys(TERMS, 0.0)
    for one, why in zip(ran, whys, strict=True):
        terms["load"] += one.load_s
        kind = "trials" if "trial" in why else "learning" if "not known yet" in why else "choices"
        terms[kind] += one.seconds - one.beside_s
    terms["rest"] = more_s - sum(terms.values())
    return terms


@contextlib.contextmanager
def on_the_clock(rows):
    """One clock for device and host, on which a choice of so many rows takes its time; yields why each burst ran."""
    whys = []
    before = time.perf_counter, of_scheduler.futures, Chooser.choose, Choosing.next, Choosing.look_ahead

    def choose(self, **options):
        Clock.now_s += Host.of(rows).choice_s
        return before[2](self, **options)

    def ask(self, *sequences, **options):
        whys.append((burst := before[3](self, *sequences, **options)).why)
        return burst

    def look_ahead(self, *sequences):
        """While the device runs a burst, which comes later on this clock."""
        now_s = Clock.now_s
        before[4](self, *sequences)
        Clock.now_s = now_s

    time.perf_counter, Chooser.choose, Choosing.next = lambda: Clock.now_s, choose, ask
    Choosing.look_ahead = look_ahead
    of_scheduler.futures = SimpleNamespace(wait=lambda some: [one.result() for one in some])
    try:
        yield whys
    finally:
        time.perf_counter, of_scheduler.futures, Chooser.choose, Choosing.next, Choosing.look_ahead = before


def batches_of(cell, kind, seed):
    """The hardware is another one for each seed but the first, and so are the texts of each batch."""
    (rows, context), (lookup, chances) = cell, KINDS[kind]
    draws = [np.random.default_rng([seed, index]) for index in range(1 + LATER)]
    if kind == CONVERSATIONS:
        return [conversations(REQUESTS[rows], one, chances=chances) for one in draws]
    options = {"lookup": lookup, "chances": chances, "varied": seed > 0}
    return [texts(rows * (3 if rows == 64 else 4), context, one, **options) for one in draws]


def hardware_of(kind, seed, base):
    """That of the table for the first seed; otherwise each of its times is more or less."""
    most = 1.15 if kind == CONVERSATIONS else 1.6
    return base if seed == 0 else base.varied(np.random.default_rng(seed), most=most)


def measure(task):
    """Figures of a cell and a kind for a seed."""
    cell, kind, seed, base = task
    rows, hardware = cell[0], hardware_of(kind, seed, base)
    process, figures = Process(CostTable(hardware.num_bytes, bandwidth=4.3e12)), []
    with on_the_clock(rows) as whys:
        for index, some in enumerate(batches_of(cell, kind, seed)):
            static = {plan: run(plan, rows, some, hardware, Process(process.costs, {plan}))[0] for plan in STATIC}
            best = min(static, key=static.__getitem__)
            whys.clear()
            auto_s, ran = run(AUTO, rows, some, hardware, process, best)
            load_s = 0.0 if index else hardware.load_s
            plain_s, best_s = static[PLAIN] + load_s, static[best] + load_s
            terms = lost(ran, whys, auto_s - static[best])
            terms["load"] -= load_s
            seen_s = foreseen(rows, some, hardware)
            figures.append(
                {
                    "auto": plain_s / auto_s,
                    "static": plain_s / best_s,
                    "foreseen": static[PLAIN] / min(seen_s, static[best]),
                    "plain_s": plain_s,
                    "lost": {name: 100 * some / best_s for name, some in terms.items()},
                }
            )
    return task, figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--model", choices=("small", "large"), default="small")
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    base = {"small": SMALL, "large": LARGE}[options.model]
    cells = [cell for cell in CELLS if not options.rows or cell[0] in options.rows]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cells_of = {kind: [one for one in cells if kind != CONVERSATIONS or one[1] == 512] for kind in options.kinds}
    tasks = [(cell, kind, seed, base) for kind, some in cells_of.items() for cell in some for seed in seeds]
    columns = "kind", "rows", "context", "run", "plain s", "static", "foreseen", "auto", "least", "of static", "least"
    print(*columns, *TERMS, sep="\t")
    worst = collections.defaultdict(lambda: (9.0, ""))
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        done = collections.defaultdict(list)
        for (cell, kind, _, _), figures in pool.map(measure, tasks):
            done[kind, cell].append(figures)
            if len(done[kind, cell]) == len(seeds):
                report(kind, cell, done[kind, cell], worst)
    for what, (value, where) in worst.items():
        print(*what, f"{value:.3f}", where)


def report(kind, cell, seeds, worst):
    """Prints a line for the first batches of some seeds and one for later ones; notes what is worst of all."""
    for name, which in (("first", slice(0, 1)), ("later", slice(1, None))):
        some = [figures for batches in seeds for figures in batches[which]]
        auto, static, seen = (np.asarray([one[key] for one in some]) for key in ("auto", "static", "foreseen"))
        plain_s = np.mean([one["plain_s"] for one in some])
        row = (
            plain_s,
            static.mean(),
            seen.mean(),
            auto.mean(),
            auto.min(),
            (auto / static).mean(),
            (auto / static).min(),
        )
        terms = [np.mean([one["lost"][term] for one in some]) for term in TERMS]
        print(kind, *cell, name, *(f"{one:.2f}" for one in row), *(f"{one:.1f}" for one in terms), sep="\t", flush=True)
        for against, values in (("plain decoding", auto), ("the best static plan", auto / static)):
            for how, value in (("mean", values.mean()), ("least", values.min())):
                worst[name, against, how] = min(worst[name, against, how], (float(value), f"{kind} {cell}"))


if __name__ == "__main__":
    main()

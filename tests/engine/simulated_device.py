"""A device that only counts time: cycles of the real scheduler, on texts of which is known what drafts would be.

A text is the same whatever runs. Where its tokens repeat its prompt, lookup finds them by the very rule of the device
(:mod:`qspec_jax.decoding.lookup`); of drafts of the model is drawn for each place whether they would be accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qspec_jax.decoding.costs import CostTable, PassBytes
from qspec_jax.decoding.plan import AUTO_LENGTHS, AutoPlan, DecodingPlan, Lookup
from qspec_jax.decoding.programs import Report
from qspec_jax.model.view import View
from tests.engine.test_scheduler import FakePrograms, OnDevice

FULL, BUDGET = View(activation_bits=8), View(activation_bits=8, cache_budget=512, cache_full_below=1024)
PLAIN = DecodingPlan(View())
LOOKUPS = tuple(DecodingPlan(View(), Lookup(), length) for length in (3, 7))
DRAFTING = tuple(DecodingPlan(View(), view, length) for view in (FULL, BUDGET) for length in AUTO_LENGTHS)
AUTO = AutoPlan("auto", (PLAIN, *LOOKUPS, *DRAFTING))
PASS_S, PIECE_S, BEHIND_S = 0.0046, 14e-6, 2.4e-8  # a pass that reads, each piece, and each for a token before it
# Of greedy texts of the demo model, after the first turns of ShareGPT: tokens of the prompt, and for each new token but
# the first whether lookup foretold it from those before.
_RECORDED = Path(__file__).with_name("recorded_lookup.txt")
_MOST = 7  # drafts of a cycle
_REMEMBERED = 512  # tokens at the end of a prompt that a text may repeat


class Clock:
    now_s = 1000.0


class Host(NamedTuple):
    """What an engine takes besides cycles, as it did beside an H200; with few rows it is guessed.

    Attributes:
        dispatch_s: a burst, which counts as its time.
        gap_s: from the end of a burst to what is dispatched next.
        choice_s: a choice.
    """

    dispatch_s: float
    gap_s: float
    choice_s: float

    @classmethod
    def of(cls, rows: int) -> Host:
        share = rows / 64
        return cls(0.001 + 0.003 * share, 0.0005 + 0.001 * share, 0.0006 + 0.0019 * share)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What cycles of a model take.

    Attributes:
        num_bytes: of its passes, which the engine knows.
        step_s: of a pass, whatever it reads but the cache.
        position_s: for each position of a row's cache.
        verified_s: for each draft that is verified.
        load_s: the first run of a program in a process.
    """

    num_bytes: PassBytes
    step_s: float
    position_s: float
    verified_s: float
    load_s: float = 0.01

    def cycle_s(self, plan: DecodingPlan, active: int, context: float) -> float:
        seconds = self.step_s + active * (context * self.position_s + plan.draft_length * self.verified_s)
        if (view := plan.draft_view) is not None:
            some = view.cache_budget if view.cache_budget and context >= view.cache_full_below else context
            seconds += plan.draft_length * (0.95 * self.step_s + 1.1 * active * some * self.position_s)
        return seconds

    def varied(self, draw: np.random.Generator, *, most: float) -> Hardware:
        """Another one, of which each time is up to so many times more or less."""
        step, position, verified, load = np.exp(draw.uniform(-np.log(most), np.log(most), 4))
        times = self.step_s * step, self.position_s * position, self.verified_s * verified, self.load_s * load
        return Hardware(self.num_bytes, *times)


# SmolLM2-135M as an H200 took it, and an 8B model by the bytes of its weights at 2.4 TB/s.
SMALL = Hardware(PassBytes(142_000_000, 23_040), 0.85e-3, 0.0288e-3 / 2006, 0.0052e-3)
LARGE = Hardware(PassBytes(5_600_000_000, 131_072), 2.5e-3, 131_072 / 2.4e12, 22e-6)


@dataclasses.dataclass(frozen=True)
class Text:
    """A request, and what drafts of it are.

    Attributes:
        prompt, tokens: of which the last one of the prompt names the text.
        found: by place of the newest new token, how many of the next ones lookup drafts.
        drafted: the same of drafts of the model, by view.
    """

    prompt: list[int]
    tokens: np.ndarray
    found: np.ndarray
    drafted: dict[View, np.ndarray]


def texts(
    count: int, context: int, draw: np.random.Generator, *, lookup: float, chances: dict[View, float], varied: bool
) -> list[Text]:
    """Texts of which a share can be looked up, in passages of 30 tokens on average; it differs from text to text."""
    made = []
    for number in range(count):
        length = int(draw.integers(128, 385)) if varied else 256
        share = float(np.clip(draw.beta(lookup, 1 - lookup), 0.002, 0.98))
        memory = draw.integers(0, 1_000_000, min(_REMEMBERED, context - 2))
        prompt = [2_000_000 + number] + [0] * (context - 2 - len(memory)) + memory.tolist() + [1_000_000 + number]
        tokens = _passages(memory, length, share, draw)
        drafted = {}
        for view, chance in chances.items():
            own = np.clip(chance + 0.05 * draw.standard_normal(), 0.0, 0.99)
            drafted[view] = _in_a_row(draw.random(length) < own)
        made.append(Text(prompt, tokens, _found(prompt[-len(memory) - 1 :], tokens), drafted))
    return made


def conversations(count: int, draw: np.random.Generator, *, chances: dict[View, float]) -> list[Text]:
    """Some of the recorded texts, in any order, of which lookup foretells what it foretold then.

    A token that it foretells is the one before it once more, and any other stands nowhere else.
    """
    recorded = [line.split() for line in _RECORDED.read_text(encoding="utf-8").splitlines()]
    made = []
    for number, which in enumerate(draw.integers(len(recorded), size=count)):
        size, right = int(recorded[which][0]), np.asarray([*recorded[which][1]], int)
        tokens = 3_000_000 + np.cumsum(np.append(1, 1 - right))
        prompt = [2_000_000 + number] + [0] * (size - 2) + [1_000_000 + number]
        drafted = {view: _in_a_row(draw.random(len(tokens)) < chance) for view, chance in chances.items()}
        made.append(Text(prompt, tokens, _in_a_row(np.append(1, right)), drafted))
    return made


def _passages(memory: np.ndarray, length: int, share: float, draw: np.random.Generator) -> np.ndarray:
    tokens = draw.integers(0, 1_000_000, length)
    repeats, place, begins = draw.random() < share, int(draw.integers(len(memory))), share / (30 * (1 - share))
    for index in range(length):
        if repeats and draw.random() < 0.97:
            tokens[index] = memory[place % len(memory)]
        place += 1
        if draw.random() < (1 / 30 if repeats else begins):
            repeats, place = not repeats, int(draw.integers(len(memory)))
    return tokens


def _in_a_row(right: np.ndarray) -> np.ndarray:
    """By place, how many of the next places are right before one is not; the place itself does not count."""
    count = np.zeros(len(right) + 1, int)
    for place in range(len(right) - 1, -1, -1):
        count[place] = 0 if place + 1 >= len(right) or not right[place + 1] else count[place + 1] + 1
    return np.minimum(count[:-1], _MOST)


def _found(prompt: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """What lookup accepts behind each new token: a slow and plain reading of its rule."""
    text, last, found = [*prompt, *tokens.tolist()], {}, np.zeros(len(tokens), int)
    for newest in range(len(text)):
        grams = [tuple(text[newest - count + 1 : newest + 1]) for count in range(1, min(3, newest + 1) + 1)]
        if (index := newest - len(prompt)) >= 0:
            place = next((last[gram] for gram in reversed(grams) if gram in last), newest - 1)
            period = max(newest - place, 1)
            while (
                found[index] < _MOST
                and newest + found[index] + 1 < len(text)
                and text[place + 1 + found[index] % period] == text[newest + found[index] + 1]
            ):
                found[index] += 1
        last.update(dict.fromkeys(grams, newest))
    return found


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


@dataclasses.dataclass
class Process:
    """What outlives a batch: costs, and programs that are loaded."""

    costs: CostTable
    loaded: set[DecodingPlan] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Ran:
    """A burst.

    Attributes:
        plan: that ran.
        cycles: of it.
        seconds: of its cycles.
        load_s: for that.
        tokens: of all rows.
        beside_s: that the plan beside which it is held would have taken for as many.
    """

    plan: DecodingPlan
    cycles: int
    seconds: float
    load_s: float
    tokens: int
    beside_s: float


class Device(FakePrograms):
    longest_packed = 512

    def __init__(
        self, rows: int, some: Sequence[Text], hardware: Hardware, process: Process, beside: DecodingPlan | None = None
    ):
        super().__init__(rows)
        self.beside, self.host = beside, Host.of(rows)
        self.texts, self.hardware, self.process, self.ran = some, hardware, process, []
        self.context = round(np.mean([len(one.prompt) + len(one.tokens) / 2 for one in some]))
        self.capacity = max(len(one.prompt) + len(one.tokens) for one in some)
        self.length = max(len(one.tokens) for one in some)
        self.text_of = np.zeros(rows, int)
        self.lengths, self.tokens = np.zeros((rows, 17), int), np.zeros((rows, self.length), int)
        self.yields = {
            source: np.stack([np.pad(value, (0, self.length - len(value))) for value in values])
            for source, values in {
                "lookup": [one.found for one in some],
                **{view.name: [one.drafted[view] for one in some] for view in some[0].drafted},
            }.items()
        }

    @property
    def costs(self):
        return self.process.costs

    def lay_out_weights(self, plan):
        pass

    def has_loop(self, plan, shape):
        return True

    def has_run(self, plan, shape):
        return plan in self.process.loaded

    def _report(self, cycles):
        arrays = self.tokens.copy(), self.counts.copy(), self.left <= 0, self.lengths.copy()
        return "state", Report(*map(OnDevice, arrays), np.int32(cycles))

    def compile(self, plan, shape, widths, *, on_event):
        Clock.now_s += self.host.gap_s  # the host comes by once between two bursts

    def read_pieces(self, plan, shape, state, pieces, chunks, rows, sources, num_copied):
        Clock.now_s += PASS_S + PIECE_S * len(pieces.rows) + BEHIND_S * float(pieces.starts.sum())
        for chunk, row in enumerate(rows[rows < self.rows]):
            self.lengths[row] = 0
            if chunks.last[chunk]:
                number = int(pieces.tokens.ravel()[pieces.ends[chunk]]) - 1_000_000
                self.text_of[row], self.tokens[row] = number, 0
                tokens = self.texts[number].tokens
                self.tokens[row, : len(tokens)] = tokens
            self.left[row] = chunks.max_new_tokens[chunk] - 1 if chunks.last[chunk] else 0
            self.counts[row] = int(chunks.last[chunk])
        return self._report(0)

    def loop(self, plan, shape, state, retired, *, max_cycles, until_finished):
        load_s = 0.0 if plan in self.process.loaded else self.hardware.load_s
        self.process.loaded.add(plan)
        self.left[retired], cycles = 0, 0
        began, began_s, before = (self.counts.copy(), self.left.copy()), Clock.now_s, int(self.counts.sum())
        Clock.now_s += self.host.dispatch_s
        while cycles < max_cycles and (self.left <= 0).sum() < until_finished:
            seconds = float(self.hardware.cycle_s(plan, int((self.left > 0).sum()), self.context))
            Clock.now_s += seconds
            advance(plan, self.yields, self.text_of, self.counts, self.left, self.lengths)
            cycles += 1
        tokens = int(self.counts.sum()) - before
        seconds = Clock.now_s - began_s - self.host.dispatch_s
        Clock.now_s += float(load_s)
        beside_s = 0.0 if self.beside is None else self._seconds_of(tokens, self.beside, *began)
        self.ran.append(Ran(plan, cycles, seconds, load_s, tokens, beside_s))
        return self._report(cycles)

    def _seconds_of(self, tokens, plan, counts, left):
        """What a plan takes for so many tokens; the last cycle counts by its part."""
        seconds = 0.0
        while tokens > 0:
            before, cycle_s = int(counts.sum()), self.hardware.cycle_s(plan, int((left > 0).sum()), self.context)
            advance(plan, self.yields, self.text_of, counts, left)
            new = int(counts.sum()) - before
            seconds += cycle_s * min(1.0, tokens / new)
            tokens -= new
        return seconds


def advance(plan, yields, text_of, counts, left, lengths=None) -> None:
    """A cycle in all rows that are not idle."""
    (rows,) = np.nonzero(left > 0)
    accepted = 0
    if plan.draft is not None:
        accepted = np.minimum(yields[plan.draft_source][text_of[rows], counts[rows] - 1], plan.draft_length)
    if lengths is not None:
        lengths[rows, accepted] += 1
    new = np.minimum(accepted + 1, left[rows])
    left[rows] -= new
    counts[rows] += new

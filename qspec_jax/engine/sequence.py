"""What the host knows of a request under way."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Collection, Sequence

from qspec_jax.decoding.draft_record import DraftRecord
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.sampling import NO_TOKEN
from qspec_jax.decoding.state import TokenScores
from qspec_jax.engine.drafts import DraftedCycle
from qspec_jax.engine.requests import Request

_MEAN_DRAFTS = 8  # of a place that are accepted of a sequence as of others, until more is known of it


class RunningSequence:
    """What the host knows of a request: what it has yielded so far, and when.

    Attributes:
        request: what was asked for.
        token_ids: new tokens.
        accepted_lengths: cycles by number of accepted drafts.
        cycles_of: the same by the plan that they ran.
        drafts: by source of drafts, how many of each place were tried as those before were accepted, and accepted.
        finished: no more tokens come.
        cancelled: that is because nobody wants them.
        added_s, entered_s: when it was added, and when it got a row.
        arrivals: when new tokens were made, and how many.
        watch: the text, if the request asks for it.
        logprobs, top_logprobs: of each new token, and of the most likely ones, if the request asks for them.
        drafted: its cycles, where they are kept; otherwise None.
        chunks, num_read: of its prompt, and how many of them its row holds.
        num_kept: tokens of its prompt that its row held from earlier in its session; the chunks are those after them.
        num_reused: tokens of its prompt that were not read, these included.
        read_up_to: tokens of its prompt that its row holds.
    """

    def __init__(self, request: Request):
        self.request = request
        self.added_s = time.perf_counter()
        self.start_again()

    def start_again(self) -> None:
        """Forgets what came so far, which will come again."""
        request = self.request
        self.token_ids: list[int] = []
        self.accepted_lengths: list[int] = []
        self.cycles_of: dict[DecodingPlan, int] = {}
        self.drafts: dict[str, list[tuple[int, int]]] = {}
        self.finished = self.cancelled = False
        self.entered_s: float | None = None
        self.arrivals: list[tuple[float, int]] = []
        self.watch = None if request.watch is None else request.watch()
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.drafted: list[DraftedCycle] | None = None
        self.chunks = request.chunks()
        self.num_read = self.num_kept = self.num_reused = self.read_up_to = 0

    def go_on_after(self, num_tokens: int) -> None:
        """Its row holds so many tokens of its prompt already."""
        self.num_kept = self.num_reused = self.read_up_to = num_tokens
        self.chunks = self.request.chunks_after(num_tokens)

    @property
    def reading(self) -> bool:
        """Whether chunks of its prompt are left."""
        return self.num_read < len(self.chunks)

    def seconds(self) -> dict[str, float]:
        """The times of :class:`qspec_jax.engine.results.GenerationStats`, as far as they are known."""
        if self.entered_s is None:
            return {}
        times = {"waited_s": self.entered_s - self.added_s}
        if self.arrivals:
            (first_s, _), (last_s, _) = self.arrivals[0], self.arrivals[-1]
            times |= {"prefill_s": first_s - self.entered_s, "decode_s": last_s - first_s}
        return times

    def count_cycles(self, plan: DecodingPlan, histogram: Sequence[int]) -> None:
        """Notes cycles that it took part in, by how many of their drafts were accepted."""
        if cycles := sum(histogram):
            self.cycles_of[plan] = self.cycles_of.get(plan, 0) + cycles
            if plan.draft_source is not None:
                before = self.drafts.get(plan.draft_source, [])
                self.drafts[plan.draft_source] = _with_cycles(before, histogram)

    def chances(self, source: str | None, profile: Sequence[float]) -> list[float]:
        """The chance of each draft of a source to be accepted once those before it are: of its own, and of others."""
        pairs = zip(itertools.chain(self.drafts.get(source or "", ()), itertools.repeat((0, 0))), profile, strict=False)
        return [(accepted + _MEAN_DRAFTS * chance) / (tried + _MEAN_DRAFTS) for (tried, accepted), chance in pairs]

    def receive(self, tokens: Sequence[int], *, finished: bool, made_s: float) -> None:
        """Appends new tokens, up to the one with which a stop string ends the text; they were made at ``made_s``."""
        if self.watch is not None:
            tokens = tokens[: self.watch.push(tokens)]
            finished = finished or self.watch.stopped
            if finished:
                self.watch.finish()
        if tokens:
            self.arrivals.append((made_s, len(tokens)))
        self.token_ids += tokens
        self.finished = finished

    def receive_scores(self, scores: TokenScores | None, row: int, new: slice) -> None:
        """Appends the log-probabilities of the tokens that came."""
        wanted = self.request.sampling.logprobs
        if wanted is None or scores is None:
            return
        kept = slice(new.start, len(self.token_ids))
        self.logprobs += scores.logprobs[row, kept].tolist()
        tokens = scores.top_tokens[row, kept, :wanted].tolist()
        values = scores.top_logprobs[row, kept, :wanted].tolist()
        for some, theirs in zip(tokens, values, strict=True):
            self.top_logprobs.append({one: value for one, value in zip(some, theirs, strict=True) if one != NO_TOKEN})

    def receive_cycles(self, record: DraftRecord | None, row: int, begin: int) -> None:
        """Appends the cycles of the tokens that came, from the place ``begin`` on."""
        if record is not None:
            self.drafted = (self.drafted or []) + _cycles_in(record, row, self.token_ids, begin=begin)


def evenness(sequences: Collection[RunningSequence], source: str | None, profile: Sequence[float]) -> list[float]:
    """How evenly sequences end that get their drafts from a source, by the number of drafts of a cycle from 0 on.

    A text that a source serves badly ends last, and all others wait for it. The more drafts a cycle has, the longer.

    Args:
        sequences: those that decode, while nobody waits for their rows.
        source: of drafts; see ``DecodingPlan.draft_source``.
        profile: the chance of each draft of a text to be accepted once those before it are, on average.

    Returns:
        the time until the last one ends, if all yielded what they do on average, over the time that it will take:
        1 if nothing is known of them.
    """
    mean = _tokens_per_cycle(profile)
    left = [one.request.max_new_tokens - len(one.token_ids) for one in sequences]
    own = [_tokens_per_cycle(one.chances(source, profile)) for one in sequences]
    even = []
    for length, of_all in enumerate(mean):
        cycles = (tokens * of_all / its[length] for tokens, its in zip(left, own, strict=True))
        even.append(max(1, *left) / max(1.0, *cycles) if left else 1.0)
    return even


def _tokens_per_cycle(chances: Sequence[float]) -> list[float]:
    """What cycles yield of no draft, one, and so on."""
    return list(itertools.accumulate(itertools.accumulate([1.0, *chances], operator.mul)))


def _with_cycles(before: Sequence[tuple[int, int]], histogram: Sequence[int]) -> list[tuple[int, int]]:
    """Drafts tried and accepted by place, with those of more cycles, counted by how many were accepted."""
    left, new = sum(histogram), []
    for count in histogram[:-1]:
        new.append((left, left - count))
        left -= count
    pairs = itertools.zip_longest(before, new, fillvalue=(0, 0))
    return [(tried + more, accepted + of_them) for (tried, accepted), (more, of_them) in pairs]


def _cycles_in(record: DraftRecord, row: int, token_ids: Sequence[int], *, begin: int) -> list[DraftedCycle]:
    """The cycles of a row from the place ``begin`` of its new tokens on; the record is in host memory."""
    accepted = record.accepted[row, begin : len(token_ids)].tolist()
    starts = [begin + place for place, count in enumerate(accepted) if count != NO_TOKEN]
    found = []
    for start, end in itertools.pairwise([*starts, len(token_ids)]):
        drafts = tuple(token for token in record.drafts[row, start].tolist() if token != NO_TOKEN)
        found.append(DraftedCycle(drafts, accepted[start - begin], tuple(token_ids[start:end])))
    return found

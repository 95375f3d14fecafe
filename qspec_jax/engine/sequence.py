"""What the host knows of a request under way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from qspec_jax.decoding.draft_record import DraftRecord
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.sampling import NO_TOKEN
from qspec_jax.decoding.state import TokenScores
from qspec_jax.engine.acceptance import Drafts, drafts_of
from qspec_jax.engine.drafts import DraftedCycle
from qspec_jax.engine.replay import Replay
from qspec_jax.engine.requests import Request
from qspec_jax.errors import QSpecError


class RunningSequence:
    """What the host knows of a request: what it has yielded so far, and when.

    Attributes:
        request: what was asked for.
        token_ids: new tokens.
        accepted_lengths: cycles by number of accepted drafts.
        cycles_of: the same by the plan that they ran.
        drafts: by source of drafts, how many were tried and accepted.
        finished: no more tokens come.
        cancelled: that is because nobody wants them.
        error: why it cannot be served; None of all others.
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
        self.drafts: dict[str, Drafts] = {}
        self._replayed: Replay | None = None
        self.finished = self.cancelled = False
        self.error: QSpecError | None = None
        self.entered_s: float | None = None
        self.arrivals: list[tuple[float, int]] = []
        self.watch = None if request.watch is None else request.watch()
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.drafted: list[DraftedCycle] | None = None
        self.num_read = self.num_kept = self.num_reused = self.read_up_to = 0
        self.cut(None)

    def go_on_after(self, num_tokens: int) -> None:
        """Its row holds so many tokens of its prompt already."""
        self.num_kept = self.num_reused = self.read_up_to = num_tokens
        self.cut(self._widths)

    def cut(self, widths: Sequence[int] | None) -> None:
        """Has its prompt, of which nothing was read, be read in chunks of some widths, in order; None for all."""
        request, kept, self._widths = self.request, self.num_kept, widths
        self.chunks = request.chunks_after(kept, widths) if kept else request.chunks(widths)

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
            self._count_drafts(plan, histogram)

    def replay(self, plan: DecodingPlan, *, most: int) -> list[int]:
        """Runs cycles of lookup on tokens that came without it (:meth:`Replay.go_on`), and notes their drafts."""
        counts = self._own_replay().go_on(self.token_ids, plan.draft_length, most=most)
        if any(counts):
            self._count_drafts(plan, counts)
        return counts

    def skip_replay(self) -> None:
        """The tokens so far need no replay: lookup itself has yielded the newest."""
        self._own_replay().skip(self.token_ids)

    def _own_replay(self) -> Replay:
        if self._replayed is None:
            self._replayed = Replay(self.request.token_ids, self.request.max_new_tokens)
        return self._replayed

    def _count_drafts(self, plan: DecodingPlan, histogram: Sequence[int]) -> None:
        if (source := plan.draft_source) is None:
            return
        before, new = self.drafts.get(source, ()), drafts_of(histogram)
        pairs = itertools.zip_longest(before, new, fillvalue=(0.0, 0.0))
        self.drafts[source] = [(one[0] + more[0], one[1] + more[1]) for one, more in pairs]

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


def _cycles_in(record: DraftRecord, row: int, token_ids: Sequence[int], *, begin: int) -> list[DraftedCycle]:
    """The cycles of a row from the place ``begin`` of its new tokens on; the record is in host memory."""
    accepted = record.accepted[row, begin : len(token_ids)].tolist()
    starts = [begin + place for place, count in enumerate(accepted) if count != NO_TOKEN]
    found = []
    for start, end in itertools.pairwise([*starts, len(token_ids)]):
        drafts = tuple(token for token in record.drafts[row, start].tolist() if token != NO_TOKEN)
        found.append(DraftedCycle(drafts, accepted[start - begin], tuple(token_ids[start:end])))
    return found

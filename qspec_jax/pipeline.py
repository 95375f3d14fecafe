"""Requests in, results out, in the order in which the requests came."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from qspec_jax.progress import progress_bar
from qspec_jax.requests import Prompt, Request
from qspec_jax.results import FinishReason, GenerationResult, GenerationStats, RunTotals
from qspec_jax.running import RunningSequence
from qspec_jax.sampling_params import SamplingParams
from qspec_jax.scheduler import Scheduler

if TYPE_CHECKING:
    from qspec_jax.engine import LanguageModel
    from qspec_jax.speculative import DecodingPlan


@dataclasses.dataclass
class _Entry:
    """A request and, once it is finished, its result."""

    sequence: RunningSequence | None = None
    result: GenerationResult | None = None


class Pipeline:
    """A batch that requests enter as others leave it. Made by :meth:`LanguageModel.pipeline`.

    ``submit`` queues a request and returns at once; ``results`` runs the device and yields one result per request in
    the order of submission. More may be submitted while results are taken.
    """

    def __init__(
        self,
        model: LanguageModel,
        plan: DecodingPlan,
        *,
        batch_size: int,
        slots: int,
        on_event: Callable[[str], None] | None,
    ):
        """See :meth:`LanguageModel.pipeline`."""
        self.max_seq_len = min(slots, model.config.max_position_embeddings)
        self._model, self._plan = model, plan
        self._make_scheduler = lambda: Scheduler(model.programs, plan, rows=batch_size, slots=slots, on_event=on_event)
        self._scheduler = self._make_scheduler()
        self._entries: collections.deque[_Entry] = collections.deque()

    @property
    def totals(self) -> RunTotals:
        """Figures of all that ran so far."""
        return self._scheduler.totals

    def __len__(self) -> int:
        """Requests whose results have not been taken."""
        return len(self._entries)

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        chat: bool | None = None,
    ) -> None:
        """Queues a request. One that cannot be served gets a result with the error, and disturbs no other.

        Args:
            prompt: a text, token ids, or the messages of a conversation.
            max_new_tokens, chat: as in :meth:`LanguageModel.generate`.
            sampling: how tokens are drawn: parameters, or a mapping of some of them.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "chat": chat}
        self.add(self._model.attempt(prompt, self._plan, max_seq_len=self.max_seq_len, **options))

    def add(self, request: Request | GenerationResult) -> None:
        """Queues a request that was checked, or the result of one that failed."""
        if isinstance(request, Request):
            self._entries.append(_Entry(sequence=self._scheduler.add(request)))
        else:
            self._entries.append(_Entry(result=request))

    def compile(self) -> None:
        """Compiles what the requests so far need, which otherwise waits for the first result to be taken.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`LanguageModel.generate`.
        """
        self._scheduler.compile()

    def results(self, *, progress: bool = False) -> Iterator[GenerationResult]:
        """Runs the batch, and yields the result of each request as soon as those before it are finished, too.

        Args:
            progress: show finished requests, tokens/s and tokens per cycle on the standard error stream.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`LanguageModel.generate`.
        """
        with progress_bar(len(self._entries), shown=progress) as show:
            while self._entries:
                while (result := self._entries[0].result) is None:
                    self._advance()
                    show(self.totals)
                self._entries.popleft()
                yield result

    def collect(self, *, progress: bool = False) -> list[GenerationResult]:
        """All results that were not taken yet. Ctrl-C ends the run: see :meth:`interrupt`.

        Args:
            progress: show finished requests, tokens/s and tokens per cycle on the standard error stream.
        """
        with progress_bar(len(self._entries), shown=progress) as show:
            try:
                while self._scheduler.busy:
                    self._advance()
                    show(self.totals)
            except KeyboardInterrupt:
                return self.interrupt()
        return list(self.results())

    def interrupt(self) -> list[GenerationResult]:
        """Ends the run, and returns what there is: the text so far of a request that was under way.

        Such a result has the ``finish_reason`` ``interrupted``.
        """
        for entry in self._entries:
            if entry.sequence is not None and entry.result is None:
                entry.result = result_of(self._model, entry.sequence, self._plan, self.totals)
        # The interruption may have come between a dispatch and the note of its result.
        totals, self._scheduler = self.totals, self._make_scheduler()
        self._scheduler.totals = totals
        results = [entry.result for entry in self._entries if entry.result is not None]
        self._entries.clear()
        return results

    def _advance(self) -> None:
        self._scheduler.advance()
        for entry in self._entries:
            if entry.result is None and entry.sequence is not None and entry.sequence.finished:
                entry.result = result_of(self._model, entry.sequence, self._plan, self.totals)


def result_of(
    model: LanguageModel, sequence: RunningSequence, plan: DecodingPlan, totals: RunTotals
) -> GenerationResult:
    """What a sequence has yielded; it was ``interrupted`` if it is not finished."""
    sampling, token_ids = sequence.request.sampling, list(sequence.token_ids)
    stopped = sequence.watch is not None and sequence.watch.stopped
    reason: FinishReason = "length"
    if not sequence.finished:
        reason = "interrupted"
    elif stopped or token_ids[-1] in sampling.stop_token_ids:
        reason = "stop"
    text = model.tokenizer.decode(token_ids) if model.tokenizer else ""
    return GenerationResult(
        prompt=sequence.request.prompt,
        prompt_token_ids=list(sequence.request.token_ids),
        text=sequence.watch.text if sequence.watch is not None and stopped else text,
        token_ids=token_ids,
        finish_reason=reason,
        stats=dataclasses.replace(statistics(model, plan, sequence), compile_s=totals.compile_s),
        logprobs=None if sampling.logprobs is None else sequence.logprobs,
        top_logprobs=sequence.top_logprobs if sampling.logprobs else None,
    )


def statistics(model: LanguageModel, plan: DecodingPlan, sequence: RunningSequence | None = None) -> GenerationStats:
    """Figures of a sequence, or of one that never ran."""
    lengths = [] if sequence is None else sequence.accepted_lengths
    seconds = {"prefill_s": 0.0, "decode_s": 0.0} | ({} if sequence is None else sequence.seconds())
    return GenerationStats(
        mode=plan.mode,
        draft=plan.draft_source,
        draft_length=plan.draft_length,
        accepted_lengths=tuple([*lengths, *[0] * (plan.draft_length + 1)][: plan.draft_length + 1]),
        num_tokens=0 if sequence is None else len(sequence.token_ids),
        compile_s=0.0,
        device=jax.devices()[0].device_kind,
        kernels=model.kernels,
        **seconds,
    )

"""Requests in, results out, in the order in which the requests came."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qspec_jax.decoding.plan import Plan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.intake import Intake
from qspec_jax.engine.outcome import result_of, statistics
from qspec_jax.engine.progress import progress_bar
from qspec_jax.engine.prompts import Prompt
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import GenerationResult, RunTotals
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.engine.uncopied import Uncopied


class Pipeline(Uncopied):
    """A batch that requests enter as others leave it. Made by :meth:`LanguageModel.pipeline`.

    ``submit`` queues a request and returns at once; ``results`` runs the device and yields one result per request in
    the order of submission. More may be submitted while results are taken, also by other threads. Of several threads
    that take results, one runs the device while the others wait, and each result goes to one of them.

    After Ctrl-C, or an error of the device, nothing that was submitted is lost: ``results`` goes on with what was not
    taken, and ``interrupt`` ends it.
    """

    def __init__(
        self,
        intake: Intake,
        programs: Programs,
        plan: Plan,
        *,
        kernels: str,
        batch_size: int,
        capacity: int,
        on_event: Callable[[str], None] | None,
        keep_drafts: bool = False,
    ):
        """See :meth:`LanguageModel.pipeline`."""
        self.max_seq_len = min(capacity, intake.config.max_position_embeddings)
        self._intake, self._programs, self._plan, self._kernels = intake, programs, plan, kernels
        options: dict[str, Any] = {"rows": batch_size, "capacity": capacity, "keep_drafts": keep_drafts}
        self._make_scheduler = lambda: Scheduler(programs, plan, on_event=on_event, **options)
        self._scheduler = self._make_scheduler()
        self._entries: collections.deque[RunningSequence | GenerationResult] = collections.deque()
        self._taking = threading.RLock()  # held to run the device and to take results
        self._adding = threading.RLock()  # held to change what is queued

    def __repr__(self) -> str:
        shape = self._scheduler.shape
        return f"Pipeline({shape.rows} rows of {shape.capacity} positions, {len(self)} results to take, {self.totals})"

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
        max_new_tokens: int | Any = 128,
        sampling: SamplingParams | Mapping[str, Any] | Any = None,
        chat: bool | Any = None,
        session: str | Any = None,
    ) -> None:
        """Queues a request. One that cannot be served gets a result with the error, and disturbs no other.

        Args:
            prompt: a text, token ids (a list or an array), or the messages of a conversation.
            max_new_tokens, chat: as in :meth:`LanguageModel.generate`.
            sampling: how tokens are drawn: parameters, or a mapping of some of them.
            session: a name for requests that go on with one another's text, such as the turns of a conversation. What
                a row still holds of it, generated tokens included, is not read again.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "chat": chat}
        stats = statistics(self._plan, kernels=self._kernels)
        self.add(self._intake.attempt(prompt, stats, max_seq_len=self.max_seq_len, session=session, **options))

    def add(self, request: Request | GenerationResult) -> None:
        """Queues a request that was checked, or the result of one that failed."""
        with self._adding:
            self._entries.append(self._scheduler.add(request) if isinstance(request, Request) else request)

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
            while True:
                is_taken, result = False, None
                try:
                    with self._taking:
                        if (result := self._finish_first(show)) is None:
                            return
                        del self._entries[0]
                        is_taken = True
                except BaseException:
                    if is_taken and result is not None:  # an interruption on the way out
                        self._entries.appendleft(result)
                    raise
                yield result

    def _finish_first(self, show: Callable[[RunTotals], None]) -> GenerationResult | None:
        """Runs the device until the first request that waits is finished: its result, None if there is no request."""
        while self._entries:
            first = self._entries[0]
            if isinstance(first, GenerationResult):
                return first
            if first.finished:
                return self._result_of(first)
            self._scheduler.advance()
            show(self.totals)
        return None

    def collect(self, *, progress: bool = False) -> list[GenerationResult]:
        """All results that were not taken yet. After Ctrl-C :meth:`interrupt` has what there is.

        Args:
            progress: show finished requests, tokens/s and tokens per cycle on the standard error stream.
        """
        with progress_bar(len(self._entries), shown=progress) as show:
            while True:
                while self._scheduler.busy:
                    self._scheduler.advance()
                    show(self.totals)
                with self._taking, self._adding:  # nothing is added here
                    if all(isinstance(one, GenerationResult) or one.finished for one in self._entries):
                        return self._take_all()
                self._scheduler.advance()

    def _take_all(self) -> list[GenerationResult]:
        """The results of all entries, which stay where they are if this is interrupted."""
        entries = self._entries
        try:
            results = [one if isinstance(one, GenerationResult) else self._result_of(one) for one in entries]
            self._entries = collections.deque()
            return results
        except BaseException:
            self._entries = entries
            raise

    def interrupt(self) -> list[GenerationResult]:
        """Ends the run, and returns what there is: the text so far of a request that was under way.

        Such a result has the ``finish_reason`` ``interrupted``.
        """
        with self._taking, self._adding:
            given = self._take_all()
            totals, self._scheduler = self.totals, self._make_scheduler()
            self._scheduler.totals = totals
            self._programs.save_costs()
            return given

    def _result_of(self, sequence: RunningSequence) -> GenerationResult:
        return result_of(sequence, self._plan, self.totals, tokenizer=self._intake.tokenizer, kernels=self._kernels)

"""A session: one conversation after another in a row of the cache that stays, so that no turn is read twice.

Its requests go on with one another's text (:mod:`qspec_jax.engine.held_texts`). On a CPU a cycle reads the whole
capacity of the cache, so there the row begins small, and grows with what is asked: its entries are copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from qspec_jax.decoding.chunks import chunk_width
from qspec_jax.decoding.plan import Plan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingFeatures, SamplingParams
from qspec_jax.decoding.values import at_least_1
from qspec_jax.engine.intake import Intake
from qspec_jax.engine.outcome import result_of
from qspec_jax.engine.prompts import Prompt
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import GenerationResult, RunTotals
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.engine.uncopied import Uncopied

_LEAST_CAPACITY = 256


class Session(Uncopied):
    """Answers one prompt after the other. Made by :meth:`LanguageModel.session`. For one thread, but for ``stop``.

    Of each prompt only the tokens are read with which it goes on after what was there before, its own answers
    included. An answer that was ended early, by :meth:`stop`, by closing the stream or by Ctrl-C, disturbs nothing.

    Attributes:
        max_seq_len: tokens that a prompt and its answer may have together.
    """

    def __init__(
        self,
        intake: Intake,
        programs: Programs,
        plan: Plan,
        *,
        kernels: str,
        capacity: int,
        on_event: Callable[[str], None] | None = None,
    ):
        """See :meth:`LanguageModel.session`."""
        self.max_seq_len = min(capacity, intake.config.max_position_embeddings)
        self._intake, self._programs, self._kernels = intake, programs, kernels
        self._asked_plan, self._most, self._on_event = plan, capacity, on_event
        self._scheduler: Scheduler | None = None
        self._plan = plan
        self._running: RunningSequence | None = None
        self._is_stopping = False
        self._number = 0  # of the texts that began anew

    @property
    def totals(self) -> RunTotals:
        """Figures of all that ran so far."""
        return RunTotals(rows=1) if self._scheduler is None else self._scheduler.totals

    def num_tokens(self, prompt: Prompt, *, chat: bool | Any = None) -> int:
        """Tokens of a prompt, chat template included.

        Raises:
            UsageError: it is no prompt, or needs a tokenizer or template that is missing.
        """
        return len(self._intake.encode_prompts(prompt, chat=chat)[1][0])

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | Any = 128,
        sampling: SamplingParams | Mapping[str, Any] | Any = None,
        chat: bool | Any = None,
        cycles_per_step: int | Any = 1,
    ) -> Iterator[str | GenerationResult]:
        """Yields pieces of the answer as they come, then the result; arguments as in :meth:`LanguageModel.stream`.

        An answer that was not taken to its end is given up.

        Raises:
            UsageError: an argument makes no sense, or the prompt and its new tokens do not fit.
            OutOfMemoryError: the cache does not fit the device.
        """
        request = self._request(prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat)
        cycles = at_least_1("cycles_per_step", cycles_per_step)
        self._give_up()
        self._is_stopping = False
        return self._answer(request, cycles)

    def generate(self, prompt: Prompt, **options: Any) -> GenerationResult:
        """The result alone; arguments and errors as of :meth:`stream`."""
        *_, result = self.stream(prompt, **options)
        assert isinstance(result, GenerationResult)
        return result

    def compile(self, prompt: Prompt, **options: Any) -> None:
        """Compiles what a prompt like this one needs, and a short turn after it; see :meth:`stream`.

        Otherwise they wait for their answers.
        """
        request = self._request(prompt, **options)
        scheduler = self._scheduler_for(request)
        scheduler.expect({*request.widths(), chunk_width(1)}, SamplingFeatures.of([request.sampling]))
        scheduler.compile()

    def stop(self) -> None:
        """Ends the answer that is being streamed: its result, ``interrupted``, comes next. For any thread or signal."""
        self._is_stopping = True

    def reset(self) -> None:
        """Forgets the text: the next prompt yields what it would in a new session."""
        self._give_up()
        self._number += 1

    def _request(self, prompt: Prompt, **options: Any) -> Request:
        return self._intake.request(prompt, max_seq_len=self.max_seq_len, session=str(self._number), **options)

    def _give_up(self) -> None:
        """Ends what is left of an answer."""
        if self._running is not None and self._scheduler is not None:
            self._scheduler.cancel(self._running)
        self._running = None

    def _answer(self, request: Request, cycles: int) -> Iterator[str | GenerationResult]:
        scheduler = self._scheduler_for(request)
        self._running = sequence = scheduler.add(watched(request, self._intake))
        try:
            for piece in pieces(scheduler, sequence, cycles):
                if piece:
                    yield piece
                if self._is_stopping:
                    break
            result = result_of(
                sequence, self._plan, scheduler.totals, tokenizer=self._intake.tokenizer, kernels=self._kernels
            )
        finally:
            if not sequence.finished:
                scheduler.cancel(sequence)
            self._programs.save_costs()
        yield result

    def _scheduler_for(self, request: Request) -> Scheduler:
        """The row, which is made larger where it must be."""
        needed = len(request.token_ids) + request.max_new_tokens
        old = self._scheduler
        if old is not None and old.shape.capacity >= min(needed, self._most):
            return old
        capacity = capacity_for(needed, self._most, grows=jax.default_backend() == "cpu")
        self._plan = self._asked_plan.in_cache(capacity)
        new = Scheduler(self._programs, self._plan, rows=1, capacity=capacity, on_event=self._on_event)
        if old is not None:
            new.inherit(old)
        self._scheduler = new
        return new


def capacity_for(needed: int, most: int, *, grows: bool) -> int:
    """Positions of a row: all that there may be, or where it can grow, few more than needed, in steps of a half."""
    capacity = _LEAST_CAPACITY if grows else most
    while capacity < needed:
        capacity += capacity // 2 if capacity & (capacity - 1) == 0 else capacity // 3  # 256, 384, 512, 768, ...
    return min(capacity, most)


def watched(request: Request, intake: Intake) -> Request:
    """A request whose text is known as it comes."""
    return dataclasses.replace(request, watch=request.watch or intake.watch(request.sampling))


def pieces(scheduler: Scheduler, sequence: RunningSequence, cycles_per_step: int) -> Iterator[str]:
    """Runs a sequence of :func:`watched` alone: its text as it comes, in pieces that end at a character, or empty."""
    shown = 0
    assert sequence.watch is not None
    while not sequence.finished:
        scheduler.advance(cycles_per_step)
        end = len(sequence.watch.text) if sequence.finished else sequence.watch.num_certain()
        yield sequence.watch.text[shown:end]
        shown = max(shown, end)

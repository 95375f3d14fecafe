"""Requests that come at any time, each answered as its tokens are made: a batch with a thread that runs it.

The thread alone asks the device for anything. Others talk to it through :class:`qspec_jax.engine.answer.Answer`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qspec_jax.decoding.chunks import CHUNK_WIDTHS, chunk_width
from qspec_jax.decoding.plan import Plan
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingFeatures, SamplingParams
from qspec_jax.engine.answer import Answer
from qspec_jax.engine.intake import Intake
from qspec_jax.engine.outcome import result_of
from qspec_jax.engine.prompts import Prompt
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import GenerationResult, RunTotals
from qspec_jax.engine.scheduler import Scheduler
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.engine.uncopied import Uncopied
from qspec_jax.errors import QSpecError

# Tokens come to those who wait for them after each burst, and so does the turn of a request that has just come.
_BURST_S = 0.1
_AFTER_FAILURE_S = 0.1  # before the device is asked again
_USUAL_SAMPLING = SamplingFeatures(draws=True, truncates=True)
_ALL_SAMPLING = _USUAL_SAMPLING._replace(penalises=True, biases=True, scores=True)


class Service(Uncopied):
    """Answers requests as they come. Made by :meth:`LanguageModel.service`; close it, or use it as a context.

    Any thread may use it. An answer that fails, or that nobody takes, holds up no other. What one yields does not
    depend on the others.
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
        burst_s: float = _BURST_S,
        on_event: Callable[[str], None] | None = None,
        on_end: Callable[[Answer], None] | None = None,
    ) -> None:
        """See :meth:`LanguageModel.service`; ``on_end`` is called by the service's thread with each that is done."""
        self.max_seq_len = min(capacity, intake.config.max_position_embeddings)
        self.batch_size = batch_size
        self._intake, self._plan, self._kernels = intake, plan, kernels
        self._scheduler = Scheduler(
            programs, plan, rows=batch_size, capacity=capacity, burst_s=burst_s, on_event=on_event, serves=True
        )
        self._on_event: Callable[[str], None] = on_event or (lambda _: None)
        self._on_end = on_end
        self._answers: dict[RunningSequence, Answer] = {}
        self._cancelled: list[tuple[Answer, BaseException | None]] = []
        self._changed = threading.Condition()  # held for a moment, never while the device works
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def intake(self) -> Intake:
        """What checks and tokenises its requests."""
        return self._intake

    @property
    def totals(self) -> RunTotals:
        """Figures of all that ran so far."""
        return self._scheduler.totals

    @property
    def healthy(self) -> bool:
        """It takes requests, and they are served."""
        return not self._closed and (self._thread is None or self._thread.is_alive())

    @property
    def num_rows_in_use(self) -> int:
        """Rows that a request has, those included that were cancelled a moment ago."""
        return self._scheduler.num_rows_in_use

    @property
    def num_waiting(self) -> int:
        """Requests that have no row yet."""
        return self._scheduler.num_waiting

    def __len__(self) -> int:
        """Answers that are not done."""
        return len(self._answers)

    def compile(self, *, everything: bool = False) -> None:
        """Compiles what requests of any length need, which otherwise waits for the first of them.

        Prompts are read without chunks of a width that cannot be compiled, of which ``on_event`` is told.

        Args:
            everything: penalties, biases and log-probabilities, too, which are else compiled once a request has them.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`LanguageModel.generate`.
        """
        longest = chunk_width(min(self.max_seq_len, CHUNK_WIDTHS[-1]))
        widths = [width for width in CHUNK_WIDTHS if width <= longest]
        self._scheduler.expect(widths, _ALL_SAMPLING if everything else _USUAL_SAMPLING)
        self._scheduler.compile()

    def allocate(self) -> None:
        """Makes the cache, and compiles what is not yet, which otherwise waits for the first request.

        Raises:
            OutOfMemoryError, UsageError: as :meth:`LanguageModel.generate`.
        """
        self._scheduler.allocate()

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | Any = 128,
        sampling: SamplingParams | Mapping[str, Any] | Any = None,
        chat: bool | Any = None,
        on_change: Callable[[], None] | None = None,
    ) -> Answer:
        """Asks for an answer, and returns at once.

        Args:
            prompt: a text, token ids (a list or an array), or the messages of a conversation.
            max_new_tokens, sampling, chat: as in :meth:`Pipeline.submit`.
            on_change: called by the service's thread whenever there is something to take. It must return at once. If
                it fails, so does the answer.

        Raises:
            UsageError: the request cannot be served.
            QSpecError: the service is closed.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "chat": chat}
        return self.add(self._intake.request(prompt, max_seq_len=self.max_seq_len, **options), on_change=on_change)

    def add(self, request: Request, *, on_change: Callable[[], None] | None = None) -> Answer:
        """As :meth:`submit`, of a request that was checked (:meth:`Intake.request`).

        Raises:
            QSpecError: the service is closed.
        """
        # A stop string is looked for before the next burst; all other text is made while that runs.
        needs_own = request.watch is None and self._intake.tokenizer is not None
        own = self._intake.watch(request.sampling)() if needs_own else None
        with self._changed:
            if self._closed:
                raise QSpecError("the service is closed; make another one")
            sequence = self._scheduler.add(request)
            answer = self._answers[sequence] = Answer(
                request, sequence, watch=own, on_change=on_change, cancel=self.cancel, result_of=self._result_of
            )
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qspec_jax service", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return answer

    def cancel(self, answer: Answer, error: BaseException | None = None) -> None:
        """Ends an answer that is not done; with an ``error``, it has failed."""
        with self._changed:
            self._cancelled.append((answer, error))
            self._changed.notify_all()

    def cancel_all(self, error: BaseException | None = None) -> None:
        """Ends all answers that are not done, as :meth:`cancel`."""
        with self._changed:
            self._cancelled += [(answer, error) for answer in self._answers.values()]
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more requests, ends those that are not done, and waits for the device.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Returns:
            whether the device has nothing to do any more.
        """
        with self._changed:
            self._closed = True
            self._cancelled += [(answer, None) for answer in self._answers.values()]
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _result_of(self, sequence: RunningSequence) -> GenerationResult:
        options: dict[str, Any] = {"tokenizer": self._intake.tokenizer, "kernels": self._kernels}
        return result_of(sequence, self._plan, self.totals, **options)

    # ---- the thread

    def _run(self) -> None:
        failures = 0
        while self._wait():
            try:
                changed = self._scheduler.advance()
            except BaseException as error:  # of the device; the next step computes again what was under way
                failures += 1
                if failures > 1:
                    failures = 0 if self._fail(error) else failures
                    time.sleep(_AFTER_FAILURE_S)
                continue
            answers = self._answers_of(changed)
            for error in {str(one.sequence.error) for one in answers if one.sequence.error is not None}:
                self._say(f"requests have failed: {error}")
            for answer in answers:
                if self._hand_out(answer):
                    failures = 0

    def _fail(self, error: BaseException) -> bool:
        """Ends those that need what has never run, and may be why steps fail; all if there are none.

        Nobody has to end if that is what reads chunks of one width.

        Returns:
            whether the others go on.
        """
        if self._scheduler.leave_out_width(error):
            return True
        self._say(f"requests have failed: {error}")
        suspects = self._answers_of(self._scheduler.suspects())
        for answer in suspects:
            self.cancel(answer, error)
        if not suspects:
            self.cancel_all(error)
        return bool(suspects)

    def _answers_of(self, sequences: Iterable[RunningSequence]) -> list[Answer]:
        """Those of some sequences. One that is added just now may have been taken by the step already."""
        with self._changed:
            return [self._answers[one] for one in sequences if one in self._answers]

    def _wait(self) -> bool:
        """Waits until there is something to do, and ends what was cancelled; False once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._cancelled or self._answers or self._scheduler.busy)
            cancelled, self._cancelled = self._cancelled, []
        for answer, error in cancelled:
            self._end(answer, error)
        return not self._closed or self._scheduler.busy

    def _hand_out(self, answer: Answer) -> bool:
        """Tells who waits for an answer; whether it has more than ever before."""
        is_more = False
        if answer.sequence.error is not None:
            self._end(answer, answer.sequence.error)
            return False
        try:
            is_more = answer.receive()
        except Exception as error:  # of a tokenizer, say, which is no reason to fail the others
            self._end(answer, error)
        if answer.done:
            self._forget(answer)
        return is_more

    def _end(self, answer: Answer, error: BaseException | None) -> None:
        if not answer.done:
            self._scheduler.cancel(answer.sequence)
            answer.end(error)
            self._forget(answer)

    def _forget(self, answer: Answer) -> None:
        with self._changed:
            known = self._answers.pop(answer.sequence, None)
        if known is not None and self._on_end is not None:
            try:
                self._on_end(answer)
            except Exception as error:  # the thread goes on, for all others
                self._say(f"on_end has failed: {type(error).__name__}: {error}")

    def _say(self, event: str) -> None:
        """Tells whoever wants to know; the thread goes on if that fails."""
        with contextlib.suppress(Exception):
            self._on_event(event)

"""A request under way, as whoever asked for it sees it: what has come so far, what is new, and a way to end it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

from qspec_jax.engine.outcome import finish_reason_of
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import FinishReason, GenerationResult
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.engine.uncopied import Uncopied
from qspec_jax.errors import QSpecError
from qspec_jax.tokenizer.watch import TextWatch


@dataclasses.dataclass(frozen=True)
class Piece:
    """What has come of an answer since the piece before it.

    Attributes:
        text: that no stop string can take back any more; it never ends inside a character, and may be empty.
        token_ids: new tokens. Their text may be that of a later piece.
        logprobs, top_logprobs: of each of them, if the request asks for them.
        finished: it is the last piece.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finished: bool


class Answer(Uncopied):
    """A request under way. Made by :meth:`Service.submit`.

    One thread takes its pieces; any may cancel it, or wait for the result. What nobody takes yet is kept as one piece,
    however long that lasts.

    Attributes:
        request: what was asked for.
        submitted_s: when that was, by ``time.perf_counter``.
        sequence: what the engine knows of it; others may read it once the answer is done.
        error: why it ended without a result; None otherwise.
    """

    def __init__(
        self,
        request: Request,
        sequence: RunningSequence,
        *,
        watch: TextWatch | None,
        on_change: Callable[[], None] | None,
        cancel: Callable[[Answer], None],
        result_of: Callable[[RunningSequence], GenerationResult],
    ) -> None:
        """See :meth:`Service.submit`; ``watch`` makes the text where the engine does not."""
        self.request, self.sequence, self.submitted_s = request, sequence, time.perf_counter()
        self.error: BaseException | None = None
        self._watch, self._on_change, self._cancel, self._result_of = watch, on_change, cancel, result_of
        self._changed = threading.Condition()
        # What has come; the sequence itself forgets it where the engine computes it again.
        self._text, self._ended = "", False
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[dict[int, float]] = []
        self._shown_text = self._shown_tokens = 0  # of it, taken
        self._told_of_end = False

    @property
    def done(self) -> bool:
        """No more comes: it is finished, was cancelled, or has failed."""
        return self._ended

    @property
    def finish_reason(self) -> FinishReason:
        """Why no more comes of one that is done."""
        return "error" if self.error is not None else finish_reason_of(self.sequence)

    def take(self) -> Piece | None:
        """What is new; None if there is nothing.

        Raises:
            QSpecError: the answer has failed, and all that had come before was taken.
        """
        with self._changed:
            return self._take()

    def _take(self) -> Piece | None:
        text, tokens = self._text[self._shown_text :], slice(self._shown_tokens, len(self._token_ids))
        if not text and tokens.start == tokens.stop:
            if self.error is not None:
                raise self.failure()
            if not self._ended or self._told_of_end:
                return None
        self._shown_text, self._shown_tokens = len(self._text), tokens.stop
        self._told_of_end = self._ended and self.error is None
        scores = self._logprobs[tokens], self._top_logprobs[tokens]
        return Piece(text, self._token_ids[tokens], *scores, finished=self._told_of_end)

    def __iter__(self) -> Iterator[Piece]:
        """Yields pieces as they come, up to the last one.

        Raises:
            QSpecError: as :meth:`take`.
        """
        while not self._told_of_end:
            with self._changed:
                while (piece := self._take()) is None:
                    if self._told_of_end:
                        return
                    self._changed.wait()
            yield piece

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Waits for the end; what has come by then. One that was cancelled has the ``finish_reason`` ``interrupted``.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: it is not done by then.
            QSpecError: the answer has failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the answer is not done after {timeout} s")
        if self.error is not None:
            raise self.failure()
        return self._result_of(self.sequence)

    def cancel(self) -> None:
        """Ends it: its row is free by the next burst, and no more comes. Nothing happens to one that is done."""
        self._cancel(self)

    def failure(self) -> QSpecError:
        """What :meth:`take` and :meth:`result` raise of one that has failed; a new one each time."""
        failed = QSpecError(f"the request failed: {self.error}")
        failed.__cause__ = self.error
        return failed

    # ---- for the service

    def receive(self) -> bool:
        """Takes what the engine has made, which may be less than came before while it computes that again.

        Returns:
            whether it is more.
        """
        sequence, come = self.sequence, len(self._token_ids)
        if self._watch is not None:
            self._watch.push(sequence.token_ids[come:])
            if sequence.finished:
                self._watch.finish()
        watch = self._watch or sequence.watch
        certain = "" if watch is None else watch.text if sequence.finished else watch.text[: watch.num_certain()]
        with self._changed:
            self._text = max(self._text, certain, key=len)
            self._token_ids += sequence.token_ids[come:]
            self._logprobs += sequence.logprobs[come:]
            self._top_logprobs += sequence.top_logprobs[come:]
            self._ended = self._ended or sequence.finished
            self._changed.notify_all()
        self._tell()
        return self._ended or len(self._token_ids) > come

    def end(self, error: BaseException | None = None) -> None:
        """Ends it without its last tokens."""
        with self._changed:
            self._ended, self.error = True, error
            self._changed.notify_all()
        with contextlib.suppress(Exception):  # nothing is left that could fail
            self._tell()

    def _tell(self) -> None:
        told = self._on_change
        self._on_change = None  # if it fails, it is not called again
        if told is not None:
            told()
        self._on_change = told

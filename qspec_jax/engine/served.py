"""Which kinds of sampling a batch that serves can run now: who needs others waits for their programs, or is refused.

A kind whose programs cannot be compiled is refused to those that ask for it, and to nobody else. Whoever asks later has
it tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.device.failures import explained
from qspec_jax.engine.compile_beside import NextPrograms
from qspec_jax.engine.request_queue import RequestQueue, features_of
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.errors import QSpecError
from qspec_jax.model.cache import restart_multiple

_OPTIONS = {
    "draws": "temperature",
    "truncates": "top_k, top_p or min_p",
    "penalises": "penalties",
    "biases": "logit_bias or min_new_tokens",
    "scores": "logprobs",
    "typical": "typical_acceptance",
}


class Served:
    """Of a batch that serves.

    Attributes:
        refused: sequences that cannot be served, whose ``error`` says why; they wait no more.
    """

    def __init__(
        self, next_programs: NextPrograms, programs: Programs, queue: RequestQueue, on_event: Callable[[str], None]
    ) -> None:
        """For those of a queue; ``on_event`` is told what the batch does without."""
        self.refused: list[RunningSequence] = []
        self._next, self._programs, self._queue, self._on_event = next_programs, programs, queue, on_event
        # What was said to come, and what a burst has run: more than that may be why steps fail.
        self._expected = self._proven = SamplingFeatures()
        self._of_one: SamplingFeatures | None = None  # tried by themselves, as those of all could not be compiled

    def features(self, shape: Shape) -> SamplingFeatures:
        """Those that may be needed by who enters: of the programs that are there, or of the next ones once they are.

        Two tries fail before somebody is refused: with what all need that wait, and with what the first of them needs.
        """
        present, needed = shape.features, self._queue.features
        if present.cover(needed):
            return present
        wanted = self._of_one or needed
        try:
            if not self._next.are_there(shape._replace(features=wanted), self._queue.widths.needed):
                return present
        except Exception as error:
            self._has_failed(present, wanted, error)
            return present
        self._of_one = None
        return wanted

    def _has_failed(self, present: SamplingFeatures, wanted: SamplingFeatures, error: Exception) -> None:
        waiting = self._queue.beyond(present)
        if self._of_one is None and waiting:
            self._of_one = present.union(features_of(waiting[0]))
            return
        self._of_one = None
        for sequence in waiting:
            if present.union(features_of(sequence)) == wanted:
                sequence.error, sequence.finished = _why_not(present, wanted, error), True
                self._queue.drop(sequence)
                self.refused.append(sequence)
        self._queue.forget(present)

    @property
    def restart_multiple(self) -> int:
        """Of tokens, by which rows may share a text."""
        return restart_multiple(self._programs.decoder.kv)

    def expect(self, widths: Iterable[int], features: SamplingFeatures) -> None:
        """Notes what requests to come need."""
        self._expected = self._expected.union(features)
        self._queue.expect(widths, features)

    def ran(self, features: SamplingFeatures) -> None:
        """Notes what programs have that did not fail."""
        self._proven = features

    def suspects(self) -> list[RunningSequence]:
        """See :meth:`Scheduler.suspects`."""
        known = self._expected.union(self._proven)
        found = [one for one in self._queue.unfinished() if not known.cover(features_of(one))]
        if found:
            self._queue.features = known
        return found

    def compile(
        self, compile_widths: Callable[[Iterable[int]], None], entered: Sequence[RunningSequence] | None
    ) -> None:
        """Compiles for chunks of the widths that are needed, and does without those that cannot be compiled.

        Args:
            compile_widths: compiles what reads chunks of some widths, and the loop.
            entered: sequences that have just got rows, whose prompts are then cut into other chunks; None where it is
                to do without nothing.

        Raises:
            Exception: the loop cannot be compiled, or what has read chunks already, or nothing is left to read by.
        """
        widths = self._queue.widths
        while True:
            try:
                return compile_widths(widths.needed)
            except Exception:
                if entered is None:
                    raise
                options = {"longest_packed": self._programs.longest_packed, "multiple": self.restart_multiple}
                failed = widths.leave_out_uncompiled(compile_widths, **options)
                if not failed:
                    raise
                for width, why in failed.items():
                    self._on_event(f"{_without(width)}: its program cannot be compiled: {_reason(why)}")
            for sequence in entered:
                sequence.cut(widths.usable)
                self._queue.expect_of(sequence)

    def leave_out_width(self, error: BaseException) -> bool:
        """See :meth:`Scheduler.leave_out_width`."""
        width = self._queue.widths.leave_out_failed(multiple=self.restart_multiple)
        if width is not None:
            self._on_event(f"{_without(width)}: its program has failed: {_reason(error)}")
        return width is not None


def _without(width: int) -> str:
    return f"prompts are read without chunks of {width} tokens"


def _reason(error: BaseException) -> str:
    """Of a failure, in one line."""
    known = error if isinstance(error, QSpecError) else explained(error)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason is given")
    return str(known or f"{type(error).__name__}: {line}")


def _why_not(present: SamplingFeatures, wanted: SamplingFeatures, error: Exception) -> QSpecError:
    """What those are told that need programs which cannot be compiled."""
    options = [one for name, one in _OPTIONS.items() if getattr(wanted, name) and not getattr(present, name)]
    named = " and ".join(options)
    failed = QSpecError(
        f"programs for {named} cannot be compiled: {_reason(error)}. Requests without {named} are served"
    )
    failed.__cause__ = error
    return failed

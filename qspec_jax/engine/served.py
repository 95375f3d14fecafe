"""Which kinds of sampling a batch that serves can run now: who needs others waits for their programs, or is refused.

A kind whose programs cannot be compiled is refused to those that ask for it, and to nobody else. Whoever asks later has
it tried again.
"""

from __future__ import annotations

from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.sampling_params import SamplingFeatures
from qspec_jax.device.failures import explained
from qspec_jax.engine.compile_beside import NextPrograms
from qspec_jax.engine.request_queue import RequestQueue, features_of
from qspec_jax.engine.sequence import RunningSequence
from qspec_jax.errors import QSpecError

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

    def __init__(self, programs: NextPrograms, queue: RequestQueue) -> None:
        """For those of a queue."""
        self.refused: list[RunningSequence] = []
        self._programs, self._queue = programs, queue
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
            if not self._programs.are_there(shape._replace(features=wanted), self._queue.widths):
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


def _why_not(present: SamplingFeatures, wanted: SamplingFeatures, error: Exception) -> QSpecError:
    """What those are told that need programs which cannot be compiled."""
    options = [one for name, one in _OPTIONS.items() if getattr(wanted, name) and not getattr(present, name)]
    known = error if isinstance(error, QSpecError) else explained(error)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason is given")
    reason = str(known or f"{type(error).__name__}: {line}")
    named = " and ".join(options)
    failed = QSpecError(f"programs for {named} cannot be compiled: {reason}. Requests without {named} are served")
    failed.__cause__ = error
    return failed

"""The errors a user can cause, and warnings. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations


class QSpecError(Exception):
    """A failure with a known cause; the command line exits with code 1."""


class UsageError(QSpecError, ValueError):
    """An argument that makes no sense; the command line exits with code 2."""


class TooLongError(UsageError):
    """A prompt that leaves no room for its new tokens.

    Attributes:
        num_tokens: of the prompt, where they were counted.
    """

    def __init__(self, message: str, *, num_tokens: int | None = None) -> None:
        """See the class; ``message`` is for people."""
        super().__init__(message)
        self.num_tokens = num_tokens


class UnsupportedModelError(QSpecError, ValueError):
    """A checkpoint of an architecture, or with an option, that is not supported."""


class CheckpointError(QSpecError):
    """A checkpoint that cannot be found, or that is incomplete, damaged or contradicts its config."""


class OutOfMemoryError(QSpecError):
    """A model or a cache that does not fit into the memory of the device."""


class DeviceError(QSpecError):
    """A device that cannot be used: none is there, or its driver or JAX's plugin for it does not fit."""


class OutputError(QSpecError):
    """What a command prints cannot be written."""


class DeviceWarning(UserWarning):
    """Another device than the one that is there, or one without kernels: slower than it could be."""


class RequantizationWarning(UserWarning):
    """Weights that were quantised already, or kept from it, are rounded onto the 4-bit grid of this library."""


class CheckpointWarning(UserWarning):
    """A checkpoint that says two things, of which one is taken, or one that looks as if it were not whole."""

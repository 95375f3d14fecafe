"""Whether a file of weights ends in zeros, as one does whose room was taken before a download that was interrupted."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from qspec_jax.errors import CheckpointWarning

_TAIL = 4096  # bytes: more than formats pad with, and less than a part of a download


def warn_of_zero_tail(file: Path) -> None:
    """Looks at the end of a file of weights, whose size and header are right.

    It does not refuse: a model may have zeros there, such as rows that fill up a linear. Tensors that are zero as a
    whole are named when they are read (:func:`qspec_jax.weights.source.check_entries`).

    Warns:
        CheckpointWarning: the last bytes are all zero.
    """
    try:
        with file.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) <= _TAIL:
                return
            stream.seek(-_TAIL, os.SEEK_END)
            if any(stream.read(_TAIL)):
                return
    except OSError:
        return  # said by who reads its tensors
    warnings.warn(
        f"{file}: its last {_TAIL:,} bytes are all zero, as a download leaves a file that was interrupted; compare its "
        "checksum with that of where it comes from, or fetch it again",
        CheckpointWarning,
        stacklevel=2,
    )

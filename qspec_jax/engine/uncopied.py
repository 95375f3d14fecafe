"""What of the engine is neither pickled nor copied: it holds programs, arrays or threads of one process.

Results, plans and parameters are values, and go through both.
"""

from __future__ import annotations

from typing import ClassVar, NoReturn


class Uncopied:
    """Refuses ``pickle``, ``copy.copy`` and ``copy.deepcopy``, and says what to do instead."""

    _instead: ClassVar[str] = "make it from the model where it is needed"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Called by :mod:`pickle` and :mod:`copy`.

        Raises:
            TypeError: always, as of what Python itself does not pickle.
        """
        held = "it holds what one process has of a device"
        raise TypeError(f"{type(self).__name__} cannot be pickled or copied, as {held}; {self._instead}")

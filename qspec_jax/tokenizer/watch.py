"""The text of a sequence while it grows: what may be shown of it, and whether a stop string has ended it.

A stop string may begin and end inside tokens, so it is looked for in the text, on the host. The tokens that come until
the device hears of it are dropped: where a text ends depends on its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import StreamDecoder


class TextWatch:
    """Turns the tokens of one sequence into text, one by one.

    Attributes:
        text: what is certain so far, without a stop string that ended it.
        stopped: a stop string has ended it.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = (), *, min_new_tokens: int = 0):
        """Watches for any of the strings ``stop``, but not in the first ``min_new_tokens`` tokens."""
        self._decoder, self._stop, self._min_new_tokens = decoder, tuple(stop), min_new_tokens
        self._num_tokens = 0
        self.text = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> int:
        """Takes the next tokens, and returns how many of them belong to the text: all, unless it ends with one."""
        if not self._stop:
            self.text += self._decoder.push(tokens)
            return len(tokens)
        for count, token in enumerate(tokens, 1):
            self._num_tokens += 1
            self._append(self._decoder.push([token]))
            if self.stopped:
                return count
        return len(tokens)

    def finish(self) -> None:
        """Adds the text that was held back for tokens to come."""
        if not self.stopped:
            self._append(self._decoder.finish())

    def num_certain(self) -> int:
        """Characters that no stop string can take back any more."""
        if self.stopped:
            return len(self.text)
        longest = max(map(len, self._stop), default=1) - 1
        for start in range(max(0, len(self.text) - longest), len(self.text)):
            if any(string.startswith(self.text[start:]) for string in self._stop):
                return start
        return len(self.text)

    def _append(self, new: str) -> None:
        searched = len(self.text) - max(map(len, self._stop), default=0) + 1
        self.text += new
        if not new or self._num_tokens < self._min_new_tokens:
            return
        found = [place for string in self._stop if (place := self.text.find(string, max(0, searched))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

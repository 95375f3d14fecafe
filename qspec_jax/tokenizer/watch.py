"""The text of a sequence while it grows: what may be shown of it, and whether a stop string has ended it.

A stop string may begin and end inside tokens, so it is looked for in the text, on the host. The tokens that come until
the device hears of it are dropped: where a text ends depends on its own tokens alone. Special tokens are no part of the
text; a stop string that names one is looked for in the text with special tokens in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import StreamDecoder


class _Searched:
    """A text in which some strings are looked for, and which has parts that are not shown."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self._text = strings, ""
        self._longest = max(map(len, strings), default=1)
        self._hidden: list[tuple[int, int, int]] = []  # start and end of each part, and hidden characters before it

    def append(self, new: str, *, hidden: bool = False, minded: bool) -> int | None:
        """Adds text. The shown characters before the first string that ends in it, None where none does."""
        before = len(self._text)
        self._text += new
        if hidden:
            self._hidden.append((before, len(self._text), before - self._shown(before)))
        if not new or not minded:
            return None
        # Each from where it may begin if it ends in what is new: none that ended before it was minded counts.
        places = [self._text.find(string, max(0, before - len(string) + 1)) for string in self.strings]
        return min((self._shown(place) for place in places if place >= 0), default=None)

    def num_certain(self) -> int:
        """Shown characters that cannot be the beginning of one of the strings."""
        for start in range(max(0, len(self._text) - self._longest + 1), len(self._text)):
            rest = len(self._text) - start
            if any(len(string) > rest and self._text.endswith(string[:rest]) for string in self.strings):
                return self._shown(start)
        return self._shown(len(self._text))

    def _shown(self, place: int) -> int:
        """Shown characters before a place."""
        hidden = (so_far + min(place, end) - start for start, end, so_far in self._hidden if start < place)
        return place - max(hidden, default=0)


class TextWatch:
    """Turns the tokens of one sequence into text, one by one.

    Attributes:
        text: what is certain so far, without a stop string that ended it.
        stopped: a stop string has ended it.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = (), *, min_new_tokens: int = 0):
        """Watches for any of the strings ``stop`` that ends after the first ``min_new_tokens - 1`` tokens."""
        self._decoder, self._min_new_tokens = decoder, min_new_tokens
        special = tuple(decoder.special_tokens.values()) if stop else ()
        named = [string for string in stop if any(text in string for text in special)]
        self._plain = _Searched([string for string in stop if string not in named])
        self._whole = _Searched(named) if named else None  # with special tokens in it
        self._searches = bool(stop)
        self._num_tokens = 0
        self.text = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> int:
        """Takes the next tokens, and returns how many of them belong to the text: all, unless it ends with one."""
        if not self._searches:
            self.text += self._decoder.push(tokens)
            return len(tokens)
        for count, token in enumerate(tokens, 1):
            self._num_tokens += 1
            self._append(self._decoder.push([token]))
            if self._whole is not None and token in self._decoder.special_tokens and not self.stopped:
                name = self._decoder.special_tokens[token]
                self._stop_at(self._whole.append(name, hidden=True, minded=self._minded))
            if self.stopped:
                return count
        return len(tokens)

    def finish(self) -> None:
        """Adds the text that was held back for tokens to come."""
        if not self.stopped:
            self._append(self._decoder.finish())

    def num_certain(self) -> int:
        """Characters that no stop string can take back any more."""
        if self.stopped or not self._searches:
            return len(self.text)
        return min(searched.num_certain() for searched in (self._plain, self._whole) if searched is not None)

    @property
    def _minded(self) -> bool:
        return self._num_tokens >= self._min_new_tokens

    def _append(self, new: str) -> None:
        self.text += new
        if self._searches:
            tracks = [searched for searched in (self._plain, self._whole) if searched is not None]
            found = [searched.append(new, minded=self._minded) for searched in tracks]
            self._stop_at(min((place for place in found if place is not None), default=None))

    def _stop_at(self, place: int | None) -> None:
        if place is not None:
            self.text, self.stopped = self.text[:place], True

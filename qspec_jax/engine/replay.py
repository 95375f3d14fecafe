"""What lookup would have drafted of a text that other plans yield: told by the text alone, without the device.

A text is the same whatever plan runs, and lookup proposes what the text says (:mod:`qspec_jax.decoding.lookup`). So the
host can run its cycles afterwards: from a token on, what followed the newest n-gram when it last stood there, compared
with what came. Greedy drafts are accepted where they are equal. Sampled tokens equal a draft as often as it would have
been accepted, so that counts tell the same of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qspec_jax.decoding.lookup import LONGEST


def looked_up(text: np.ndarray, newest: int, count: int) -> np.ndarray:
    """The tokens that :func:`qspec_jax.decoding.lookup.look_up` proposes.

    Args:
        text: int32 ``[tokens]``.
        newest: the position of the newest token; what comes behind it is not read.
        count: how many.
    """
    (ends,) = (text[:newest] == text[newest]).nonzero()
    for back in range(1, LONGEST):
        reach = ends[1:] if len(ends) and ends[0] < back else ends  # one at most does not
        longer = reach[text[reach - back] == text[newest - back]]
        if not len(longer):
            break
        ends = longer
    place = int(ends[-1]) if len(ends) else newest - 1
    if (period := newest - place) >= count:
        return text[place + 1 : place + 1 + count]
    return text[place + 1 + np.arange(count) % max(1, period)]


class Replay:
    """Cycles of lookup on the new tokens of a text, each once."""

    def __init__(self, prompt: Sequence[int], max_new_tokens: int):
        """Of a text that begins with a prompt."""
        self._text = np.zeros(len(prompt) + max_new_tokens, np.int32)
        self._text[: len(prompt)] = prompt
        self._prompt = self._newest = len(prompt)
        self._known = 0  # new tokens

    def go_on(self, tokens: Sequence[int], draft_length: int, *, most: int) -> list[int]:
        """Runs cycles until one could accept more tokens than there are.

        Args:
            tokens: all new ones of the text so far.
            draft_length: of the cycles.
            most: cycles; where there could be more, the next ones begin with the newest token.

        Returns:
            cycles by how many of their drafts were accepted, from none to all of them.
        """
        end = self._prompt + len(tokens)
        self._text[self._prompt + self._known : end] = tokens[self._known :]
        self._known, counts = len(tokens), [0] * (draft_length + 1)
        while self._newest + draft_length < end and most:
            drafts = looked_up(self._text, self._newest, draft_length)
            wrong = drafts != self._text[self._newest + 1 : self._newest + 1 + draft_length]
            accepted = int(wrong.argmax()) if wrong.any() else draft_length
            counts[accepted] += 1
            self._newest += accepted + 1
            most -= 1
        if not most:
            self.skip(tokens)
        return counts

    def skip(self, tokens: Sequence[int]) -> None:
        """Goes on behind these tokens, which lookup itself has yielded, or of which nobody asks."""
        self._newest = max(self._newest, self._prompt + len(tokens) - 1)

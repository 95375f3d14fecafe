"""Sessions: requests that go on with one another's text, of which nothing that a row holds is read again.

What a row holds of a session is the prompt that it read last and what was generated after it: verification has written
its keys and values, all but those of the newest token. The next prompt of the session keeps the tokens that it begins
with as well, one by one, whatever comes first: an answer that is tokenised differently as a part of the next prompt, a
message that was taken back, or a text that somebody changed.

A request of no session never uses such a text, only chunks that are bit for bit what it would compute itself
(:mod:`qspec_jax.engine.prefixes`). One of a session depends on what was there before it in its own session, in the last
bits of its keys and values, and on nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class HeldTexts:
    """The text of a session that each row holds, if it holds one. Rows that are at work hold none."""

    def __init__(self, rows: int):
        self._held: list[tuple[str, Sequence[int]] | None] = [None] * rows

    def note(self, row: int, session: str, token_ids: Sequence[int]) -> None:
        """A row is idle, and holds the keys and values of some tokens. What others hold of the session is older."""
        for other, held in enumerate(self._held):
            if held is not None and held[0] == session:
                self._held[other] = None
        self._held[row] = session, token_ids

    def forget(self, row: int) -> None:
        """A row is given to another text."""
        self._held[row] = None

    def has(self, session: str | None) -> bool:
        """Whether a row holds a text of a session."""
        return session is not None and any(held is not None and held[0] == session for held in self._held)

    def sizes(self) -> list[int]:
        """Tokens that each row holds for a session."""
        return [0 if held is None else len(held[1]) for held in self._held]

    def find(self, session: str | None, token_ids: Sequence[int]) -> tuple[int, int]:
        """The row that holds a text of a session, and how many tokens a prompt may keep of it; row -1 and 0 if none.

        The last token of the prompt is read in any case: the first new one comes from it.
        """
        for row, held in enumerate(() if session is None else self._held):
            if held is not None and held[0] == session:
                return row, num_in_common(held[1], token_ids[:-1])
        return -1, 0


def num_in_common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(some, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

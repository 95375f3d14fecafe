"""What the cycles of a sequence drafted, token by token, with text to look at (shown by ``draft_view.py``)."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what stands for bytes that are no whole character


class Kind(enum.StrEnum):
    """What became of a token.

    ``FIRST`` was chosen as the prompt was read, ``PLAIN`` in a cycle without drafts. The target chose the
    ``CORRECTION`` where it rejected a draft, and the ``BONUS`` after it had accepted all of them. ``CUT`` drafts were
    accepted, but the text ended before them.
    """

    FIRST = "first"
    ACCEPTED = "accepted"
    CORRECTION = "correction"
    BONUS = "bonus"
    REJECTED = "rejected"
    CUT = "cut"
    PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class DraftedCycle:
    """A cycle of one sequence.

    Attributes:
        drafts: token ids, none of a plain cycle.
        accepted: how many of them the verification agreed with, from the first on.
        tokens: what the sequence got, which may end before the accepted ones do.
    """

    drafts: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]

    def steps(self) -> Iterator[tuple[Kind, int]]:
        """Its tokens and what became of them, the rejected ones before the one that took their place."""
        yield from ((Kind.ACCEPTED, token) for token in self.tokens[: self.accepted])
        yield from ((Kind.CUT, token) for token in self.drafts[len(self.tokens) : self.accepted])
        yield from ((Kind.REJECTED, token) for token in self.drafts[self.accepted :])
        yield from ((self._last_kind, token) for token in self.tokens[self.accepted :])

    def to_dict(self) -> dict[str, int | list[int]]:
        """For JSON."""
        return {"drafts": list(self.drafts), "accepted": self.accepted, "tokens": list(self.tokens)}

    @property
    def _last_kind(self) -> Kind:
        if not self.drafts:
            return Kind.PLAIN
        return Kind.BONUS if self.accepted == len(self.drafts) else Kind.CORRECTION


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of one token, or of several that make up a character together.

    Attributes:
        kind: what became of them; of several kept ones, of the first that was not accepted.
        text: as it stands among the others. A special token has its name.
        token_ids: in order.
        cycle: counted from 1; 0 of the token that came with the prompt.
    """

    kind: Kind
    text: str
    token_ids: tuple[int, ...]
    cycle: int


@dataclasses.dataclass(frozen=True)
class Drafts:
    """What was drafted for a sequence.

    Attributes:
        cycles: in order.
        pieces: of the text and of what was drafted beside it, in order.
    """

    cycles: tuple[DraftedCycle, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, token_ids: Sequence[int], cycles: Sequence[DraftedCycle], tokenizer: Tokenizer | None) -> Drafts:
        """Of a sequence's new tokens, the first of which came with its prompt."""
        return cls(tuple(cycles), tuple(_pieces(token_ids[:1], cycles, tokenizer)))

    def by_position(self) -> list[tuple[int, int]]:
        """For each place in the draft, from the first on: how many drafts were accepted there, and how many made."""
        longest = max((len(cycle.drafts) for cycle in self.cycles), default=0)
        return [
            (
                sum(cycle.accepted >= place for cycle in self.cycles),
                sum(len(cycle.drafts) >= place for cycle in self.cycles),
            )
            for place in range(1, longest + 1)
        ]


def _pieces(first: Sequence[int], cycles: Sequence[DraftedCycle], tokenizer: Tokenizer | None) -> Iterator[Piece]:
    kept, number = _Text(tokenizer), 0
    steps = [[(Kind.FIRST, token) for token in first], *(list(cycle.steps()) for cycle in cycles)]
    for number, of_cycle in enumerate(steps):
        beside = kept.copy()
        for kind, token in of_cycle:
            if kind in (Kind.REJECTED, Kind.CUT):
                yield from beside.push(kind, token, number)
            else:
                yield from beside.rest(number)
                yield from kept.push(kind, token, number)
                beside = kept.copy()
        yield from beside.rest(number)
    yield from kept.rest(number)


class _Text:
    """Turns tokens into pieces of whole characters, each read behind the one before: a token may begin or end inside.

    Of a token that leaves a character unfinished comes nothing; the piece that finishes it has both.
    """

    def __init__(self, tokenizer: Tokenizer | None, context: Sequence[int] = (), others: Sequence[int] = ()) -> None:
        """Text behind the tokens of a piece (``context``), and behind unfinished ones that are in no piece of it."""
        self._tokenizer, self._context, self._others = tokenizer, list(context), list(others)
        self._kinds: list[Kind] = []
        self._pending: list[int] = []

    def copy(self) -> _Text:
        """For tokens that were drafted here, and did not come."""
        return _Text(self._tokenizer, self._context, self._others + self._pending)

    def push(self, kind: Kind, token: int, cycle: int) -> Iterator[Piece]:
        """The piece that a token finishes, if it does."""
        name = self._name(token)
        if name is not None:
            yield from self.rest(cycle)
        self._kinds.append(kind)
        self._pending.append(token)
        text = self._new_text() if name is None else name
        if name is not None or (text and not text.endswith(_REPLACEMENT)):
            yield self._take(text, cycle, seen=name is None)

    def rest(self, cycle: int) -> Iterator[Piece]:
        """What no token has finished."""
        if self._pending:
            yield self._take(self._new_text(), cycle)

    def _take(self, text: str, cycle: int, *, seen: bool = True) -> Piece:
        kind = next((kind for kind in self._kinds if kind is not Kind.ACCEPTED), Kind.ACCEPTED)
        piece = Piece(kind, text, tuple(self._pending), cycle)
        if seen:
            self._context = self._others + self._pending
        self._kinds, self._pending, self._others = [], [], []
        return piece

    def _new_text(self) -> str:
        assert self._tokenizer is not None
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._others + self._pending)[len(before) :]

    def _name(self, token: int) -> str | None:
        """What stands for a token that is no text."""
        if self._tokenizer is None:
            return f" {token}"
        return self._tokenizer.name_of_textless(token)

"""Log-probabilities as OpenAI's API has them: of the tokens whose text begins within the text that is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qspec_jax.engine.answer import Piece
from qspec_jax.serving.asked import Kind
from qspec_jax.tokenizer.tokenizer import Tokenizer

_LEAST = -9999.0  # that stands for less in OpenAI's API, as JSON has no infinity


class Scored(NamedTuple):
    """A token.

    Attributes:
        token_id: of it.
        offset: characters of the text before it.
        logprob: of it.
        top: of the most likely ones, by token id.
    """

    token_id: int
    offset: int
    logprob: float
    top: Mapping[int, float]


class Scores:
    """Holds back tokens whose text is not shown yet. Those of a stop string, or that end the text, never are."""

    def __init__(self, tokenizer: Tokenizer, *, num_top: int):
        """For an answer with the log-probabilities of ``num_top`` most likely tokens."""
        self._tokenizer, self._num_top = tokenizer, num_top
        self._decoder = tokenizer.stream_decoder()
        self._made = self._shown = 0  # characters of tokens that have come, and of text that is shown
        self._held: list[Scored] = []

    def take(self, piece: Piece) -> list[Scored]:
        """The tokens that may be shown with a piece."""
        tops = piece.top_logprobs or [{}] * len(piece.token_ids)
        for token_id, logprob, top in zip(piece.token_ids, piece.logprobs, tops, strict=True):
            before = self._made
            self._made += len(self._decoder.push([token_id]))
            # It may come with what is left of a character that never ended.
            offset = max(before, self._made - len(self._text(token_id)))
            self._held.append(Scored(token_id, offset, _finite(logprob), {one: _finite(top[one]) for one in top}))
        self._shown += len(piece.text)
        taken = [one for one in self._held if one.offset < self._shown]
        self._held = self._held[len(taken) :]
        return taken

    def to_dict(self, scored: Iterable[Scored], kind: Kind) -> dict[str, Any]:
        """The object ``logprobs`` of a choice."""
        if kind is Kind.CHAT:
            return {"content": [self._entry(one) for one in scored], "refusal": None}
        entries = [(self._text(one.token_id), one) for one in scored]
        tops = [self._by_text(one) for _, one in entries]
        return {
            "tokens": [text for text, _ in entries],
            "token_logprobs": [one.logprob for _, one in entries],
            "top_logprobs": tops if self._num_top else None,
            "text_offset": [one.offset for _, one in entries],
        }

    def _entry(self, one: Scored) -> dict[str, Any]:
        tops = [self._described(token, value) for token, value in one.top.items()]
        return {**self._described(one.token_id, one.logprob), "top_logprobs": tops}

    def _by_text(self, one: Scored) -> dict[str, float]:
        """The most likely tokens, and the chosen one. Of pieces of characters, which are of one text, the likeliest."""
        found: dict[str, float] = {}
        for token in sorted(one.top, key=one.top.__getitem__, reverse=True):
            found.setdefault(self._text(token), one.top[token])
        found.setdefault(self._text(one.token_id), one.logprob)
        return found

    def _described(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        # A piece of a character has bytes that nobody knows here.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_text(token_id)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST) if logprob == logprob else _LEAST

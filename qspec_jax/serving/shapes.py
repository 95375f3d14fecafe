"""Answers as objects of OpenAI's API, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import qspec_jax
from qspec_jax.engine.answer import Answer, Piece
from qspec_jax.serving.asked import Asked, Kind
from qspec_jax.serving.scores import Scores
from qspec_jax.tokenizer.tokenizer import Tokenizer

FINGERPRINT = f"qspec-jax-{qspec_jax.__version__}"
_OBJECTS = {Kind.TEXT: ("cmpl", "text_completion"), Kind.CHAT: ("chatcmpl", "chat.completion")}


class Shapes:
    """Makes the objects of one request's answers."""

    def __init__(self, asked: Asked, *, model: str, tokenizer: Tokenizer) -> None:
        """For a request to a model of some name."""
        self._asked = asked
        prefix, name = _OBJECTS[asked.kind]
        chunks = asked.stream and asked.kind is Kind.CHAT
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": f"{name}.chunk" if chunks else name,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        num_top = asked.sampling.logprobs
        made = [None if num_top is None else Scores(tokenizer, num_top=num_top) for _ in range(asked.num_answers)]
        self._scores: list[Scores | None] = made

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers, which are done.

        Raises:
            QSpecError: one of them has failed.
        """
        choices = []
        for index, answer in enumerate(answers):
            if answer.error is not None:
                raise answer.failure()
            piece = answer.take() or Piece("", [], [], [], finished=True)
            message: dict[str, Any] = {"text": piece.text}
            if self._asked.kind is Kind.CHAT:
                message = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            choices.append(_choice(index, message, self._logprobs(index, piece), answer.finish_reason))
        return {**self._head, "choices": choices, "usage": self._usage(answers)}

    def first(self) -> list[dict[str, Any]]:
        """What comes before all pieces."""
        if self._asked.kind is Kind.TEXT:
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk([_choice(index, {"delta": delta})]) for index in range(self._asked.num_answers)]

    def piece(self, index: int, piece: Piece, answer: Answer) -> list[dict[str, Any]]:
        """What comes with a piece of one answer; nothing with one that shows nothing."""
        logprobs, is_text = self._logprobs(index, piece), self._asked.kind is Kind.TEXT
        chunks = []
        if piece.text or any((logprobs or {}).values()):
            body: dict[str, Any] = {"text": piece.text} if is_text else {"delta": {"content": piece.text}}
            chunks.append(self._chunk([_choice(index, body, logprobs)]))
        if piece.finished:
            end = {"text": ""} if is_text else {"delta": {}}
            chunks.append(self._chunk([_choice(index, end, finish_reason=answer.finish_reason)]))
        return chunks

    def last(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """What comes after all pieces."""
        return [{**self._head, "choices": [], "usage": self._usage(answers)}] if self._asked.include_usage else []

    def _logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        scores = self._scores[index]
        return None if scores is None else scores.to_dict(scores.take(piece), self._asked.kind)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._head, "choices": choices, **usage}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Tokens of each prompt once, and of all answers, those that ended them included."""
        prompts = sum(len(answer.request.token_ids) for answer in answers[:: self._asked.num_choices])
        made = sum(len(answer.sequence.token_ids) for answer in answers)
        return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made}


def _choice(
    index: int, body: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}

"""A session without a model: it says what it was asked, in pieces, and counts characters as tokens."""

from __future__ import annotations

import dataclasses
import time

from qspec_jax.engine import session
from qspec_jax.engine.results import GenerationResult, GenerationStats, RunTotals
from qspec_jax.errors import UsageError

STATS = GenerationStats("auto", None, 3, (1, 0, 2, 0), 7, 9, 0.25, 0.5, 0.0, "cpu", "reference", choices={"w4a16": 3})
_MOST_S = 60


class Session(session.Session):
    """As its parent, of which it has nothing.

    Attributes:
        asked: the messages, seed and limit of each answer.
        fails_after: pieces, after which the device fails.
    """

    def __init__(self, max_seq_len=200, *, holds=None, has_system=True):
        """``holds`` is a word: an answer with it goes on to that word, and no further until it is stopped."""
        self.max_seq_len = max_seq_len
        self.holds, self.has_system = holds, has_system
        self.asked, self.resets, self.fails_after, self.is_stopping = [], 0, None, False

    @property
    def totals(self):
        return RunTotals(rows=1, requests=2, tokens=7, computed_prompt_tokens=5)

    def num_tokens(self, messages):
        if not self.has_system and messages[0]["role"] == "system":
            raise UsageError("the chat template refuses the messages: no system prompt")
        return sum(len(message["content"]) + 1 for message in messages)

    def stream(self, messages, *, max_new_tokens, sampling):
        self.asked.append((messages, sampling["seed"], max_new_tokens))
        self.is_stopping = False
        return self._answer(messages, max_new_tokens)

    def _answer(self, messages, limit):
        text = f"you said {messages[-1]['content']}"
        said, reason = "", "stop" if len(text) < limit else "length"
        for place in range(0, min(limit, len(text)), 4):
            if self.fails_after is not None and place >= self.fails_after:
                raise KeyboardInterrupt if self.fails_after < 0 else UsageError("the device failed")
            self._hold(text, place)
            if self.is_stopping:
                reason = "interrupted"
                break
            piece = text[place : min(limit, place + 4)]
            said += piece
            yield piece
        stats = dataclasses.replace(STATS, reused_prompt_tokens=3)
        ids = [*range(len(said))]
        yield GenerationResult(None, [1] * self.num_tokens(messages), said, ids, reason, stats)

    def _hold(self, text, place):
        end = time.monotonic() + _MOST_S
        while self.holds and self.holds in text[: place + 4] and not self.is_stopping and time.monotonic() < end:
            time.sleep(0.01)

    def stop(self):
        self.is_stopping = True

    def reset(self):
        self.resets += 1

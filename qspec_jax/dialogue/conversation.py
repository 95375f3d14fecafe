"""A conversation with a model: its messages, and one answer after the other. Knows no terminal.

Messages are those of OpenAI, a system prompt first if there is one. The text of earlier turns is in the session's row
of the cache; what is changed here is found there by what the next prompt has in common with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qspec_jax.decoding.sampling_params import seed_after
from qspec_jax.engine.results import GenerationResult
from qspec_jax.engine.session import Session
from qspec_jax.errors import UsageError

Message = dict[str, Any]
WARN_AT = 0.8  # of the context


class Conversation:
    """Messages, and a session that answers them.

    Attributes:
        session: that answers.
        messages: so far, the system prompt included.
        last: the result of the last answer, None before the first.
    """

    def __init__(
        self,
        session: Session,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        """Begins a conversation.

        Args:
            session: that answers.
            system: the system prompt.
            max_new_tokens: of each answer.
            sampling: fields of ``SamplingParams``; the seed counts up from answer to answer.
            context: of the model, if the session may have less.
        """
        self.session = session
        self.messages: list[Message] = []
        self.last: GenerationResult | None = None
        self.max_new_tokens = max_new_tokens
        self._sampling = dict(sampling or {})
        self._context = context or session.max_seq_len
        self._num_answers = 0
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt."""
        messages = list(itertools.takewhile(_is_system, self.messages))
        return "\n".join(message["content"] for message in messages) if messages else None

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt; an empty one is none.

        Raises:
            UsageError: the model's chat template has no place for one.
        """
        others = list(itertools.dropwhile(_is_system, self.messages))
        messages = [{"role": "system", "content": text}, *others] if text else others
        if text:
            self.check([*messages, *([] if others else [user("")])])
        self.messages = messages

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a message, piece by piece; both belong to the conversation then.

        What was said before an answer was stopped stays. Where nothing was said, the message is taken back.

        Raises:
            UsageError: the message has no room, or the chat template refuses it; nothing has changed.
        """
        return self._answer([*self.messages, user(text)])

    def retry(self) -> Iterator[str]:
        """Another answer to the last message of the user, in place of the one that is there; as :meth:`ask`."""
        return self._answer(self.messages[: self._last_question("answer again") + 1])

    def undo(self) -> str:
        """Takes the last message of the user back, and all that followed it. Its text.

        Raises:
            UsageError: there is none.
        """
        place = self._last_question("take back")
        question = self.messages[place]["content"]
        self.messages = self.messages[:place]
        return question

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.messages = list(itertools.takewhile(_is_system, self.messages))
        self.session.reset()

    def take(self, messages: Sequence[Message]) -> None:
        """Goes on with other messages.

        Raises:
            UsageError: the chat template refuses them, or they leave no room; the conversation is as it was.
        """
        self._room(list(messages))
        self.messages = list(messages)

    def check(self, messages: Sequence[Message]) -> None:
        """Raises UsageError where the chat template refuses messages."""
        self.session.num_tokens(list(messages))

    @property
    def num_tokens(self) -> int:
        """Tokens of the context that the conversation has, up to where the next answer would begin."""
        return self.session.num_tokens(self.messages) if any(map(_is_question, self.messages)) else 0

    def warning(self) -> str | None:
        """What to do about an answer that was cut, or a context that is nearly full; None if nothing."""
        used, most = self.num_tokens, self.session.max_seq_len
        was_cut = self.last is not None and self.last.finish_reason == "length"
        if was_cut and used + 1 >= most:
            return f"the answer was cut: the context of {most} tokens is full; {self.remedy}"
        if used >= WARN_AT * most:
            return f"{used} of {most} tokens of the context are used; {self.remedy}"
        if was_cut:
            return f"the answer was cut at {self.max_new_tokens} tokens (--max-new-tokens); ask to go on"
        return None

    @property
    def remedy(self) -> str:
        """How a conversation gets more room."""
        more = f"; start with --max-seq-len up to {self._context} for more, and /load it"
        here = "/undo takes the last turn back, /reset begins anew, /save FILE keeps it"
        return here + (more if self.session.max_seq_len < self._context else "")

    def _last_question(self, what: str) -> int:
        places = [place for place, message in enumerate(self.messages) if _is_question(message)]
        if not places:
            raise UsageError(f"there is nothing to {what}; write a message first")
        return places[-1]

    def _room(self, messages: Sequence[Message]) -> int:
        """Tokens that an answer may have."""
        used, most = self.session.num_tokens(messages), self.session.max_seq_len
        if used >= most:
            raise UsageError(f"that makes {used} tokens, and the context has {most}; shorten it, or: {self.remedy}")
        return min(self.max_new_tokens, most - used)

    def _answer(self, messages: list[Message]) -> Iterator[str]:
        sampling = {**self._sampling, "seed": seed_after(self._sampling.get("seed", 0), self._num_answers)}
        stream = self.session.stream(messages, max_new_tokens=self._room(messages), sampling=sampling)
        self._num_answers += 1
        return self._follow(stream, messages)

    def _follow(self, stream: Iterator[str | GenerationResult], messages: list[Message]) -> Iterator[str]:
        said, is_whole = "", False
        try:
            for piece in stream:
                if isinstance(piece, GenerationResult):
                    self.last, is_whole = piece, piece.finish_reason != "interrupted"
                else:
                    said += piece
                    yield piece
        finally:
            if said or is_whole:
                self.messages = [*messages, {"role": "assistant", "content": said}]


def user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def _is_system(message: Message) -> bool:
    return message["role"] == "system"


def _is_question(message: Message) -> bool:
    return message["role"] == "user"

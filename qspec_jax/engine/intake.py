"""What a user asks for, checked and tokenised: the way from prompts and options to requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from qspec_jax.decoding import values
from qspec_jax.decoding.request_options import check_chat, check_max_new_tokens
from qspec_jax.decoding.sampling_params import SamplingParams, all_stop_tokens
from qspec_jax.engine.outcome import failure
from qspec_jax.engine.prompts import Prompt, prompts_of, read_prompt
from qspec_jax.engine.requests import Request
from qspec_jax.engine.results import GenerationResult, GenerationStats
from qspec_jax.errors import TooLongError, UsageError
from qspec_jax.model.config import ModelConfig
from qspec_jax.tokenizer.watch import TextWatch

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer


def require_some(requests: Sequence[Request | GenerationResult]) -> None:
    """Refuses requests of which none can be served.

    Raises:
        UsageError: the error of the first of them.
    """
    if not any(isinstance(request, Request) for request in requests):
        raise UsageError(next((one.error for one in requests if isinstance(one, GenerationResult)), None))


def check_length(num_tokens: int, max_new_tokens: int, *, max_seq_len: Any, context: int) -> None:
    """Refuses a prompt that has no room for its new tokens.

    Args:
        num_tokens: of the prompt.
        max_new_tokens: that are to follow.
        max_seq_len: cache positions; None for as many as the model allows.
        context: that the model allows.

    Raises:
        TooLongError: it does not fit.
        UsageError: ``max_seq_len`` makes no sense.
    """
    if max_seq_len is not None:
        values.between("max_seq_len", max_seq_len, 1, context, f"between 1 and the model's context of {context}")
    if num_tokens + max_new_tokens > (max_seq_len or context):
        what = f"max_seq_len={max_seq_len}" if max_seq_len else f"the model's context of {context}"
        raise TooLongError(
            f"a prompt of {num_tokens} tokens and max_new_tokens={max_new_tokens} do not fit {what}; "
            f"shorten the prompt, lower max_new_tokens" + (" or raise max_seq_len" if max_seq_len else ""),
            num_tokens=num_tokens,
        )


@dataclasses.dataclass(frozen=True)
class Intake:
    """Checks and tokenises what is asked of a model.

    Attributes:
        config: of the model.
        tokenizer: None if prompts can only be token ids.
        stop_tokens: token ids that end every sequence.
        name: of the model, for messages.
        restart: of which the tokens must be a multiple that prompts share (``model/cache.py``).
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    stop_tokens: tuple[int, ...]
    name: str
    restart: int = 1

    def request(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: Any = 128,
        sampling: Any = None,
        seeds_later: int = 0,
        chat: Any = None,
        max_seq_len: Any = None,
        session: Any = None,
        what: str = "the prompt",
    ) -> Request:
        """Checks what is asked for one prompt; arguments as in :meth:`LanguageModel.generate`, :meth:`Pipeline.submit`.

        Raises:
            UsageError: the prompt is no prompt, is empty, needs a tokenizer or template that is missing, or does not
                fit, or an option makes no sense. ``what`` names the prompt, whose seed is ``seeds_later`` after that
                of ``sampling``.
        """
        chat = check_chat(chat)
        if session is not None:
            session = values.text("session", session, "a text that names it, or None")
        read, token_ids = self._tokens_of(prompt, chat, what)
        sampling = SamplingParams.of({} if sampling is None else sampling).with_seed_after(seeds_later)
        max_new_tokens = check_max_new_tokens(max_new_tokens)
        stop_tokens = all_stop_tokens(sampling, self.stop_tokens, self.config.vocab_size)
        check_length(
            len(token_ids), max_new_tokens, max_seq_len=max_seq_len, context=self.config.max_position_embeddings
        )
        watch = self.watch(sampling) if sampling.stop else None
        sampling = dataclasses.replace(sampling, stop_token_ids=stop_tokens)
        text, messages = (read, []) if isinstance(read, str) else (None, read)
        prefix_length = self._require_tokenizer().system_length(messages, token_ids) if _are_messages(messages) else 0
        prefix_length -= prefix_length % self.restart
        more: dict[str, Any] = {"prompt": text, "watch": watch, "prefix_length": prefix_length, "session": session}
        return Request(token_ids, max_new_tokens, sampling, **more)

    def attempt(self, prompt: Prompt, stats: GenerationStats, **options: Any) -> Request | GenerationResult:
        """As :meth:`request`, but an error becomes a result, with the ``stats`` of a request that never ran."""
        try:
            return self.request(prompt, **options)
        except UsageError as error:
            return failure(prompt, error, stats)

    def encode_prompts(
        self, prompts: Prompt | Sequence[Prompt], *, chat: bool | None = None
    ) -> tuple[list[str | None], list[list[int]]]:
        """Texts (None for a prompt given otherwise) and token ids of prompts.

        Raises:
            UsageError: there is no prompt, one is empty or none, or it needs a tokenizer or template that is missing.
        """
        pairs = [self._tokens_of(one, chat, f"prompt {place}") for place, one in enumerate(prompts_of(prompts), 1)]
        return [read if isinstance(read, str) else None for read, _ in pairs], [token_ids for _, token_ids in pairs]

    def _tokens_of(self, prompt: Prompt, chat: bool | None, what: str) -> tuple[Any, list[int]]:
        """A prompt as :func:`read_prompt` reads it, and its tokens."""
        read: Any = read_prompt(prompt, what)
        if isinstance(read, str):
            ids = self._encode(read, chat, what)
        elif _are_messages(read):
            ids = self._require_tokenizer().apply_chat(read)
        else:
            ids = read
        if not ids:
            raise UsageError(f"{what} is empty; give it some text")
        self._check_ids(ids, what, tokenised=ids is not read)
        return read, ids

    def _check_ids(self, ids: Sequence[int], what: str, *, tokenised: bool) -> None:
        """Raises UsageError if the model has not all of the tokens that were given, or made of a text."""
        if tokenised and max(ids) >= self.config.vocab_size:
            raise UsageError(
                f"{what} has token {max(ids)} of the tokenizer of {self.name}, and the last of the model is "
                f"{self.config.vocab_size - 1}: the tokenizer is of another model, or has tokens that were never added"
            )
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UsageError(f"{what} has a token id outside 0..{self.config.vocab_size - 1}")

    def _encode(self, text: str, chat: bool | None, what: str) -> list[int]:
        tokenizer = self._require_tokenizer()
        if chat and not tokenizer.has_chat_template:
            raise UsageError(f"{self.name} has no chat template; use chat=False (--no-chat)")
        if chat or (chat is None and tokenizer.has_chat_template):
            if not text.strip():
                raise UsageError(f"{what} is empty; give it some text, or use chat=False (--no-chat) for blanks alone")
            return tokenizer.apply_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text)

    def watch(self, sampling: SamplingParams) -> Callable[[], TextWatch]:
        """Makes what follows the text of a sequence."""
        tokenizer = self._require_tokenizer()
        return lambda: TextWatch(tokenizer.stream_decoder(), sampling.stop, min_new_tokens=sampling.min_new_tokens)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(f"{self.name} was made without a tokenizer; give prompts as token ids")
        return self.tokenizer


def _are_messages(read: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(read, list) and bool(read) and isinstance(read[0], dict)

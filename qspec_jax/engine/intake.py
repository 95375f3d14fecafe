"""What a user asks for, checked and tokenised: the way from prompts and options to requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from qspec_jax.decoding.sampling_params import MAX_STOP_TOKENS, SamplingParams
from qspec_jax.engine.outcome import failure
from qspec_jax.engine.requests import Prompt, Request
from qspec_jax.engine.results import GenerationResult, GenerationStats
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig
from qspec_jax.tokenizer.watch import TextWatch

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer


def is_conversation(prompt: Prompt | Sequence[Prompt]) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a prompt is a list of messages."""
    return not isinstance(prompt, str) and bool(prompt) and all(isinstance(one, Mapping) for one in prompt)


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """Prompts as a list; a text or a conversation is one.

    Raises:
        UsageError: there is none.
    """
    given: list[Any] = [prompts] if isinstance(prompts, str) or is_conversation(prompts) else list(prompts)
    if not given:
        raise UsageError("there is no prompt; give at least one")
    return given


def require_some(requests: Sequence[Request | GenerationResult]) -> None:
    """Refuses requests of which none can be served.

    Raises:
        UsageError: the error of the first of them.
    """
    if not any(isinstance(request, Request) for request in requests):
        raise UsageError(next((one.error for one in requests if isinstance(one, GenerationResult)), None))


def sampling_of_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int, num_samples: int = 1
) -> list[SamplingParams]:
    """The parameters of each sample of each prompt. Seeds count up: over all that share parameters.

    Raises:
        UsageError: there are some for another number of prompts.
    """
    given = SamplingParams() if sampling is None else sampling
    if isinstance(given, SamplingParams):
        return [_with_seed_after(given, row) for row in range(num_prompts * num_samples)]
    if len(given) != num_prompts:
        raise UsageError(f"there are {len(given)} sampling parameters for {num_prompts} prompts; give one for each")
    return [_with_seed_after(one, sample) for one in given for sample in range(num_samples)]


def _with_seed_after(sampling: SamplingParams, count: int) -> SamplingParams:
    return dataclasses.replace(sampling, seed=(sampling.seed + count) % 2**32)


def check_length(num_tokens: int, max_new_tokens: int, *, max_seq_len: int | None, context: int) -> None:
    """Refuses a prompt that has no room for its new tokens.

    Args:
        num_tokens: of the prompt.
        max_new_tokens: that are to follow.
        max_seq_len: cache positions; None for as many as the model allows.
        context: that the model allows.

    Raises:
        UsageError: it does not fit, or ``max_seq_len`` makes no sense.
    """
    if max_seq_len is not None and not 1 <= max_seq_len <= context:
        raise UsageError(f"max_seq_len={max_seq_len} must be between 1 and the model's context of {context}")
    if num_tokens + max_new_tokens > (max_seq_len or context):
        what = f"max_seq_len={max_seq_len}" if max_seq_len else f"the model's context of {context}"
        raise UsageError(
            f"a prompt of {num_tokens} tokens and max_new_tokens={max_new_tokens} do not fit {what}; "
            f"shorten the prompt, lower max_new_tokens" + (" or raise max_seq_len" if max_seq_len else "")
        )


@dataclasses.dataclass(frozen=True)
class Intake:
    """Checks and tokenises what is asked of a model.

    Attributes:
        config: of the model.
        tokenizer: None if prompts can only be token ids.
        stop_tokens: token ids that end every sequence.
        name: of the model, for messages.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    stop_tokens: tuple[int, ...]
    name: str

    def request(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: Any = 128,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        chat: bool | None = None,
        max_seq_len: int | None = None,
        what: str = "the prompt",
    ) -> Request:
        """Checks what is asked for one prompt; arguments as in :meth:`LanguageModel.generate`.

        Raises:
            UsageError: the prompt is empty, needs a tokenizer or template that is missing, or does not fit, or an
                option makes no sense. ``what`` names the prompt.
        """
        text, token_ids = self._tokens_of(prompt, chat, what)
        sampling = sampling if isinstance(sampling, SamplingParams) else SamplingParams.of(sampling or {})
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens} must be at least 1")
        stop_tokens = tuple(dict.fromkeys([*self.stop_tokens, *sampling.stop_token_ids]))
        if len(stop_tokens) > MAX_STOP_TOKENS:
            raise UsageError(f"there are {len(stop_tokens)} stop tokens, those of the model included; use up to 16")
        if outside := [token for token in sampling.logit_bias if not 0 <= token < self.config.vocab_size]:
            raise UsageError(f"logit_bias has token {outside[0]}; use 0..{self.config.vocab_size - 1}")
        check_length(
            len(token_ids), max_new_tokens, max_seq_len=max_seq_len, context=self.config.max_position_embeddings
        )
        watch = self.watch(sampling) if sampling.stop else None
        sampling = dataclasses.replace(sampling, stop_token_ids=stop_tokens)
        prefix_length = 0
        if is_conversation(prompt):  # whoever has tokenised one has a tokenizer
            prefix_length = self._require_tokenizer().system_length(prompt, token_ids)
        return Request(token_ids, max_new_tokens, sampling, prompt=text, watch=watch, prefix_length=prefix_length)

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
            UsageError: there is no prompt, one is empty, or it needs a tokenizer or template that is missing.
        """
        pairs = [self._tokens_of(prompt, chat, f"prompt {index}") for index, prompt in enumerate(listed(prompts), 1)]
        return [text for text, _ in pairs], [token_ids for _, token_ids in pairs]

    def _tokens_of(self, prompt: Prompt, chat: bool | None, what: str) -> tuple[str | None, list[int]]:
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            ids = self._encode(text, chat) if text.strip() else []
        elif is_conversation(prompt):
            ids = self._require_tokenizer().apply_chat(list(prompt))
        else:
            token_ids: Any = prompt  # whatever converts to integers: lists, NumPy arrays
            ids = [int(token) for token in token_ids]
        if not ids:
            raise UsageError(f"{what} is empty; give it some text")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UsageError(f"{what} has a token id outside 0..{self.config.vocab_size - 1}")
        return text, ids

    def _encode(self, text: str, chat: bool | None) -> list[int]:
        tokenizer = self._require_tokenizer()
        if chat and not tokenizer.has_chat_template:
            raise UsageError(f"{self.name} has no chat template; use chat=False (--no-chat)")
        if chat or (chat is None and tokenizer.has_chat_template):
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

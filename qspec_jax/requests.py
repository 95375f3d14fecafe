"""What a user asks for one sequence, and what it takes to be served."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qspec_jax import programs
from qspec_jax.errors import UsageError
from qspec_jax.prefixes import Piece
from qspec_jax.results import GenerationResult, GenerationStats
from qspec_jax.sampling_params import SamplingParams
from qspec_jax.tokenizer.watch import TextWatch

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a conversation."""

# A prompt is cut after its prefix where what is left is read in pieces narrower by so many tokens: a GPU reads that
# many in little more time than one (docs/performance.md), and the cut costs a piece where nobody shares the prefix.
LEAST_SAVED = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """A sequence to be generated, checked.

    Attributes:
        token_ids: the prompt, at least one token.
        max_new_tokens: at least 1.
        sampling: how tokens are drawn; its ``stop_token_ids`` are all that end the sequence, the model's own included.
        prompt: the text of the prompt if it was given as one.
        watch: makes what follows the text of the sequence; None if nothing in it matters before the end.
        prefix_length: tokens with which other prompts may begin as well: those of a system prompt.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams
    prompt: str | None = None
    watch: Callable[[], TextWatch] | None = None
    prefix_length: int = 0

    def pieces(self) -> list[Piece]:
        """Start and tokens of each piece of the prompt, as long as can be from the beginning and from a cut on.

        A cut after the prefix makes all of it a piece or some, which rows may share (:mod:`qspec_jax.prefixes`).
        """
        longest, end = programs.PIECE_WIDTHS[-1], len(self.token_ids)
        cut = self.prefix_length if self._is_cut() else 0
        starts = [*range(0, cut, longest), *range(cut, end, longest), end]
        return [(start, tuple(self.token_ids[start:stop])) for start, stop in itertools.pairwise(starts)]

    def _is_cut(self) -> bool:
        longest, rest = programs.PIECE_WIDTHS[-1], len(self.token_ids) - self.prefix_length
        # Whole pieces of the prefix may be shared without a cut.
        return _padded(self.prefix_length % longest + rest) - _padded(rest) >= LEAST_SAVED

    def put_piece(self, fields: Mapping[str, Any], place: int, piece: Piece) -> None:
        """Sets the fields of a piece at a place among those of :func:`qspec_jax.programs.empty_pieces`."""
        (start, tokens), stop_tokens = piece, self.sampling.stop_token_ids
        fields["tokens"][place, : len(tokens)] = tokens
        fields["num_tokens"][place], fields["start"][place] = len(tokens), start
        fields["last"][place] = start + len(tokens) == len(self.token_ids)
        fields["max_new_tokens"][place] = self.max_new_tokens
        fields["stop_tokens"][place, : len(stop_tokens)] = stop_tokens
        if fields["prompt"] is not None:
            fields["prompt"][place, : len(self.token_ids)] = self.token_ids

    def widths(self) -> set[int]:
        """What its pieces are padded to."""
        return {programs.piece_width(len(tokens)) for _, tokens in self.pieces()}


def _padded(num_tokens: int) -> int:
    """The widths of all pieces of a text."""
    whole, rest = divmod(num_tokens, programs.PIECE_WIDTHS[-1])
    return whole * programs.PIECE_WIDTHS[-1] + (programs.piece_width(rest) if rest else 0)


def is_conversation(prompt: Prompt | Sequence[Prompt]) -> bool:
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


def failure(prompt: Prompt, error: UsageError, stats: GenerationStats) -> GenerationResult:
    """The result of a request that cannot be served."""
    text = prompt if isinstance(prompt, str) else None
    return GenerationResult(text, [], "", [], "error", stats, error=str(error))

"""What a user asks for one sequence, and what it takes to be served."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qspec_jax.decoding import chunks
from qspec_jax.decoding.sampling_params import SamplingParams
from qspec_jax.engine.prefixes import Chunk
from qspec_jax.tokenizer.watch import TextWatch

# A prompt is cut after its prefix where what is left is then read in chunks narrower by so many tokens.
# Example: a system prompt of 300 tokens and a question of 40. Read at once, 340 tokens are padded to 512. Cut, others
# that share the system prompt read 40 tokens, padded to 64: 448 fewer, so it is cut. With a system prompt of 20 tokens,
# 60 are padded to 64 either way, and a cut would only cost a chunk where nobody shares the prefix.
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
        session: whose text it goes on with (:mod:`qspec_jax.engine.held_texts`); None if its tokens are to depend on
            nothing else.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams
    prompt: str | None = None
    watch: Callable[[], TextWatch] | None = None
    prefix_length: int = 0
    session: str | None = None

    def __repr__(self) -> str:
        return f"Request({len(self.token_ids)} tokens, {self.max_new_tokens} new ones at most, {self.sampling})"

    def chunks(self, widths: Sequence[int] | None = None) -> list[Chunk]:
        """Start and tokens of each chunk of the prompt, as long as can be from the beginning and from a cut on.

        A cut after the prefix makes all of it a chunk or some, which rows may share (:mod:`qspec_jax.engine.prefixes`).

        Args:
            widths: that chunks may have, in order; None for all there are.
        """
        widths = widths or chunks.CHUNK_WIDTHS
        longest, end = widths[-1], len(self.token_ids)
        cut = self.prefix_length if self._is_cut(widths) else 0
        starts = [*range(0, cut, longest), *range(cut, end, longest), end]
        return self._cut(starts)

    def chunks_after(self, num_tokens: int, widths: Sequence[int] | None = None) -> list[Chunk]:
        """The same of what comes after so many tokens, at least one less than there are."""
        end = len(self.token_ids)
        return self._cut([*range(num_tokens, end, (widths or chunks.CHUNK_WIDTHS)[-1]), end])

    def _cut(self, starts: Sequence[int]) -> list[Chunk]:
        return [(start, tuple(self.token_ids[start:stop])) for start, stop in itertools.pairwise(starts)]

    def _is_cut(self, widths: Sequence[int]) -> bool:
        longest, rest = widths[-1], len(self.token_ids) - self.prefix_length
        # Whole chunks of the prefix may be shared without a cut.
        return _padded(self.prefix_length % longest + rest, widths) - _padded(rest, widths) >= LEAST_SAVED

    def put_chunk(self, fields: Mapping[str, Any], place: int, chunk: Chunk) -> None:
        """Sets the fields of a chunk at a place among those of :func:`qspec_jax.decoding.chunks.empty_chunks`.

        Where these are chunks of no width, its tokens are elsewhere.
        """
        (start, tokens), stop_tokens = chunk, self.sampling.stop_token_ids
        if fields["tokens"].shape[1]:
            fields["tokens"][place, : len(tokens)] = tokens
        fields["num_tokens"][place], fields["start"][place] = len(tokens), start
        fields["last"][place] = start + len(tokens) == len(self.token_ids)
        fields["max_new_tokens"][place] = self.max_new_tokens
        fields["stop_tokens"][place, : len(stop_tokens)] = stop_tokens
        if fields["prompt"] is not None:
            fields["prompt"][place, : len(self.token_ids)] = self.token_ids

    def widths(self) -> set[int]:
        """What its chunks are padded to."""
        return widths_of(self.chunks())


def widths_of(some: Sequence[Chunk], widths: Sequence[int] | None = None) -> set[int]:
    """What some chunks are padded to, of some widths in order; None for all there are."""
    return {chunks.chunk_width(len(tokens), widths) for _, tokens in some}


def _padded(num_tokens: int, widths: Sequence[int]) -> int:
    """The widths of all chunks of a text."""
    whole, rest = divmod(num_tokens, widths[-1])
    return whole * widths[-1] + (chunks.chunk_width(rest, widths) if rest else 0)

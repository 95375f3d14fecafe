"""What a generation returns."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """Figures of one sequence. Times are those of the batch it ran in.

    Attributes:
        mode: ``qspec`` or the precision of plain decoding.
        draft: precision of the drafts, None for plain decoding.
        draft_length: drafts per cycle, 0 for plain decoding.
        accepted_lengths: cycles run before the sequence finished, by how many drafts the verification agreed
            with (0 to ``draft_length``), including those of the last cycle beyond a stop token or the token
            limit; plain decoding has one token per cycle.
        num_tokens: tokens generated, the one from prefill included.
        prefill_s: seconds from the call to the first token, without compiling.
        decode_s: seconds of the loop.
        compile_s: seconds spent compiling in this call; 0 once the shape is known.
        device: kind of the device.
        kernels: implementation of the matmuls.
    """

    mode: str
    draft: str | None
    draft_length: int
    accepted_lengths: tuple[int, ...]
    num_tokens: int
    prefill_s: float
    decode_s: float
    compile_s: float
    device: str
    kernels: str

    @property
    def cycles(self) -> int:
        """Cycles run before the sequence finished."""
        return sum(self.accepted_lengths)

    @property
    def drafted(self) -> int:
        """Drafts made in these cycles."""
        return self.cycles * self.draft_length

    @property
    def accepted(self) -> int:
        """Drafts that the verification agreed with."""
        return sum(length * cycles for length, cycles in enumerate(self.accepted_lengths))

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_cycle(self) -> float | None:
        """What a cycle yields: its accepted drafts and the token after them; None without a cycle."""
        return 1 + self.accepted / self.cycles if self.cycles else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of this sequence after the first, per second of the loop; None if there are none."""
        return (self.num_tokens - 1) / self.decode_s if self.num_tokens > 1 and self.decode_s > 0 else None


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """One prompt and what was generated for it.

    Attributes:
        prompt: the text given, None if token ids were.
        prompt_token_ids: what the model read, chat template included.
        text: generated text without special tokens.
        token_ids: generated tokens; a stop token is included.
        finish_reason: ``stop`` at a stop token, ``length`` at the limit.
        stats: figures.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stats: GenerationStats

    def to_dict(self) -> dict[str, Any]:
        """A flat, JSON-serialisable form: one line of ``python -m qspec_jax.generate --json``."""
        stats = self.stats
        return {
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "mode": stats.mode,
            "draft": stats.draft,
            "draft_length": stats.draft_length,
            "cycles": stats.cycles,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "accepted_lengths": list(stats.accepted_lengths),
            "acceptance_rate": stats.acceptance_rate,
            "tokens_per_cycle": stats.tokens_per_cycle,
            "prefill_s": stats.prefill_s,
            "decode_s": stats.decode_s,
            "compile_s": stats.compile_s,
            "tokens_per_s": stats.tokens_per_s,
            "device": stats.device,
            "kernels": stats.kernels,
        }

"""What a generation returns: a result for each prompt, and figures of a whole run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.engine.draft_view import DraftView
from qspec_jax.engine.drafts import Drafts
from qspec_jax.errors import UsageError

FinishReason = Literal["stop", "length", "error", "interrupted"]


def acceptance_by_position(accepted_lengths: Sequence[int]) -> tuple[float, ...]:
    """Share of cycles in which the first, second, ... draft was accepted, of cycles by number of accepted drafts.

    One over the one before is the share of the cycles that came so far.
    """
    at_least = list(itertools.accumulate(reversed(accepted_lengths)))[::-1]
    return tuple(count / at_least[0] for count in at_least[1:]) if at_least and at_least[0] else ()


_MOST_CHARACTERS = 60  # of a text in a line


def _beginning(text: str) -> str:
    """A text in quotes, cut off where it is long."""
    return repr(text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}...")


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """Figures of one sequence. Its times are those of the clock on the wall, also while others were waited for.

    Attributes:
        mode: ``auto``, ``qspec`` or the precision of plain decoding.
        draft: what the drafts read, None for plain decoding; ``auto`` where that was chosen.
        draft_length: drafts per cycle, 0 for plain decoding; the most of those to choose from.
        accepted_lengths: cycles run before the sequence finished, by how many drafts the verification agreed
            with (0 to ``draft_length``), including those of the last cycle beyond a stop token or the token
            limit; plain decoding has one token per cycle.
        num_tokens: tokens generated, the one from prefill included.
        drafted: drafts made in its cycles.
        prefill_s: seconds from when it got a row of the batch to its first token, without compiling.
        decode_s: seconds from there to its end.
        compile_s: seconds spent compiling in this call so far; 0 once the shapes are known.
        device: kind of the device.
        kernels: implementation of the matmuls.
        waited_s: seconds before it got a row.
        choices: cycles by the name of the plan that they ran.
        reused_prompt_tokens: tokens of its prompt that were not read, since a row of the cache held them.
    """

    mode: str
    draft: str | None
    draft_length: int
    accepted_lengths: tuple[int, ...]
    num_tokens: int
    drafted: int
    prefill_s: float
    decode_s: float
    compile_s: float
    device: str
    kernels: str
    waited_s: float = 0.0
    choices: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reused_prompt_tokens: int = 0

    def __repr__(self) -> str:
        figures = {"tokens/s": self.tokens_per_s, "acceptance": self.acceptance_rate}
        listed = [f"{value:.2f} {name}" for name, value in figures.items() if value is not None]
        drafts = f"{self.draft} drafts of {self.draft_length}" if self.draft else None
        parts = [self.mode, drafts, f"{self.num_tokens} tokens", *listed, self.device, f"{self.kernels} kernels"]
        return f"GenerationStats({', '.join(part for part in parts if part)})"

    @property
    def cycles(self) -> int:
        """Cycles run before the sequence finished."""
        return sum(self.accepted_lengths)

    @property
    def accepted(self) -> int:
        """Drafts that the verification agreed with."""
        return sum(length * cycles for length, cycles in enumerate(self.accepted_lengths))

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of all cycles in which the first, second, ... draft was accepted; empty where none was made."""
        return acceptance_by_position(self.accepted_lengths) if self.drafted else ()

    @property
    def tokens_per_cycle(self) -> float | None:
        """What a cycle yields: its accepted drafts and the token after them; None without a cycle."""
        return 1 + self.accepted / self.cycles if self.cycles else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of this sequence after the first, per second of decoding; None if there are none."""
        return (self.num_tokens - 1) / self.decode_s if self.num_tokens > 1 and self.decode_s > 0 else None


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """One prompt and what was generated for it.

    Attributes:
        prompt: the text given, None if token ids were.
        prompt_token_ids: what the model read, chat template included.
        text: generated text without special tokens.
        token_ids: generated tokens; a stop token is included.
        finish_reason: ``stop`` at a stop token, ``length`` at the limit, ``error`` where the request could not be
            served, ``interrupted`` where the user ended the run before the text was complete.
        stats: figures.
        error: what was wrong with the request, otherwise None.
        logprobs: log-probability of each of ``token_ids`` at the verify precision, None where it was not asked for.
        top_logprobs: for each of them, those of the most likely tokens by token id; None likewise.
        drafts: what its cycles drafted; None likewise (``keep_drafts``).
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats
    error: str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    drafts: Drafts | None = dataclasses.field(default=None, repr=False)

    def show(self) -> DraftView:
        """The text with what became of each draft, coloured in a notebook.

        Raises:
            UsageError: drafts were made, and not kept.
        """
        stats = self.stats
        if self.error is not None:
            return DraftView.without_drafts("", f"There is no text: {self.error}")
        if self.drafts is not None:
            return DraftView.of(self.drafts)
        if not self.token_ids:
            return DraftView.without_drafts("", "There is no text: it was interrupted before its first token.")
        if stats.draft_length:
            raise UsageError("the drafts of this text were not kept; generate it with keep_drafts=True")
        return DraftView.without_drafts(self.text, f"{stats.mode} is plain decoding: there are no drafts to show.")

    def __repr__(self) -> str:
        end = f"{self.finish_reason}: {self.error}" if self.error else self.finish_reason
        return f"GenerationResult({_beginning(self.text)}, {len(self.token_ids)} tokens, {end})"

    def to_dict(self) -> dict[str, Any]:
        """A flat, JSON-serialisable form: one line of ``python -m qspec_jax.generate --json``.

        It has ``drafts``, those of each cycle, where they were kept.
        """
        stats = self.stats
        kept = {} if self.drafts is None else {"drafts": [one.to_dict() for one in self.drafts.cycles]}
        return {
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "error": self.error,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "mode": stats.mode,
            "draft": stats.draft,
            "draft_length": stats.draft_length,
            "cycles": stats.cycles,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "accepted_lengths": list(stats.accepted_lengths),
            "choices": dict(stats.choices),
            "reused_prompt_tokens": stats.reused_prompt_tokens,
            "acceptance_rate": stats.acceptance_rate,
            "tokens_per_cycle": stats.tokens_per_cycle,
            "waited_s": stats.waited_s,
            "prefill_s": stats.prefill_s,
            "decode_s": stats.decode_s,
            "compile_s": stats.compile_s,
            "tokens_per_s": stats.tokens_per_s,
            "device": stats.device,
            "kernels": stats.kernels,
            **kept,
        }


@dataclasses.dataclass
class PlanTotals:
    """What a plan ran of a batch.

    Attributes:
        draft_length: of the plan.
        bursts, cycles, seconds: of the device.
        sequence_cycles, accepted: cycles of all sequences, and the drafts accepted in them.
        why: it was chosen, the last time; empty where there was nothing to choose.
    """

    draft_length: int
    bursts: int = 0
    cycles: int = 0
    seconds: float = 0.0
    sequence_cycles: int = 0
    accepted: int = 0
    why: str = ""

    @property
    def tokens_per_cycle(self) -> float | None:
        """What a cycle yields for a sequence; None without a cycle."""
        return 1 + self.accepted / self.sequence_cycles if self.sequence_cycles else None


@dataclasses.dataclass
class RunTotals:
    """Figures of all sequences that ran through a batch together.

    Attributes:
        rows: sequences that run together.
        requests: finished ones.
        tokens: generated ones.
        computed_prompt_tokens, reused_prompt_tokens: tokens of prompts that were read, and those that another prompt's
            row had already.
        choices: what each plan ran, by its name.
        accepted_lengths: cycles of all sequences by number of accepted drafts.
        cycles: run by the device, each for all rows.
        prefill_s, decode_s: seconds that the device filled rows and ran cycles.
        gap_s: seconds between these in which it waited for the host.
        compile_s: seconds spent compiling, which are not in ``gap_s``.
    """

    rows: int
    requests: int = 0
    tokens: int = 0
    choices: dict[str, PlanTotals] = dataclasses.field(default_factory=dict)
    computed_prompt_tokens: int = 0
    reused_prompt_tokens: int = 0
    accepted_lengths: list[int] = dataclasses.field(default_factory=list)
    cycles: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    gap_s: float = 0.0
    compile_s: float = 0.0

    def __repr__(self) -> str:
        figures = {"tokens/s": self.tokens_per_s, "tokens/cycle": self.tokens_per_cycle}
        listed = [f"{value:.2f} {name}" for name, value in figures.items() if value is not None]
        parts = [f"{self.rows} rows", f"{self.requests} requests", f"{self.tokens} tokens", *listed]
        return f"RunTotals({', '.join(parts)})"

    def count_burst(
        self, plan: DecodingPlan, cycles: int, seconds: float, histogram: Sequence[int], *, why: str
    ) -> None:
        """Adds a burst: cycles of the device, and those of sequences by number of accepted drafts."""
        of_plan = self.choices.setdefault(plan.label, PlanTotals(plan.draft_length))
        of_plan.bursts += 1
        of_plan.cycles += cycles
        of_plan.seconds += seconds
        of_plan.sequence_cycles += sum(histogram)
        of_plan.accepted += sum(length * count for length, count in enumerate(histogram))
        of_plan.why = why or of_plan.why

    @property
    def drafted(self) -> int:
        """Drafts of all sequences."""
        return sum(one.sequence_cycles * one.draft_length for one in self.choices.values())

    def count_cycles(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Adds the cycles of a sequence since it was last looked at."""
        self.accepted_lengths += [0] * (len(after) - len(self.accepted_lengths))
        for length, cycles in enumerate(after):
            self.accepted_lengths[length] += cycles - (before[length] if before else 0)

    @property
    def sequence_cycles(self) -> int:
        """Cycles of all sequences."""
        return sum(self.accepted_lengths)

    @property
    def tokens_per_cycle(self) -> float | None:
        """What a cycle yields for a sequence; None without a cycle."""
        accepted = sum(length * cycles for length, cycles in enumerate(self.accepted_lengths))
        return 1 + accepted / self.sequence_cycles if self.sequence_cycles else None

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share of all cycles in which the first, second, ... draft was accepted; empty where none was made."""
        longest = max((one.draft_length for one in self.choices.values()), default=0)
        return acceptance_by_position(self.accepted_lengths[: longest + 1])

    @property
    def occupancy(self) -> float | None:
        """Share of the rows that held an unfinished sequence, over all cycles; None without a cycle."""
        return self.sequence_cycles / (self.rows * self.cycles) if self.cycles else None

    @property
    def busy_s(self) -> float:
        """Seconds of the whole run, without compiling."""
        return self.prefill_s + self.decode_s + self.gap_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of all sequences per second of the run, without compiling; None before the first."""
        return self.tokens / self.busy_s if self.busy_s > 0 else None

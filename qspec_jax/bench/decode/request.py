"""What ``bench decode`` is asked for, checked before a weight is made or a program compiled."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.models import ModelRequest, asked_model, chosen_model, rotated
from qspec_jax.commands import options as shared
from qspec_jax.commands.prompt_files import read_prompt_file
from qspec_jax.decoding.plan import DRAFTS, MODES
from qspec_jax.errors import UsageError

if TYPE_CHECKING:
    from qspec_jax.engine.language_model import LanguageModel

DECODE_MODES = (*MODES, "lookup")
NEW_TOKENS = 64  # per prompt, to measure acceptance
_PROMPTS = (
    "Explain how a refrigerator keeps food cold.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a list and a tuple in Python?",
    "Give me a recipe for vegetable soup.",
)


@dataclasses.dataclass(frozen=True)
class DecodeRequest(ModelRequest):
    """What is asked for, checked.

    Attributes:
        batches, contexts, modes, drafts, draft_lengths, draft_contexts: what to combine.
        prompts: to measure acceptance with.
    """

    batches: Sequence[int]
    contexts: Sequence[int]
    modes: Sequence[str]
    drafts: Sequence[str]
    draft_lengths: Sequence[int]
    draft_contexts: Sequence[str | int]
    prompts: Sequence[str]

    @property
    def longest_draft(self) -> int:
        """0 without speculation."""
        return max(self.draft_lengths) if _speculates(self.modes) else 0


def read_request(arguments: argparse.Namespace) -> DecodeRequest:
    """Checks everything that can be wrong before a weight is made or a program compiled.

    Raises:
        UsageError: an argument makes no sense.
        CheckpointError, UnsupportedModelError: a checkpoint cannot be opened.
    """
    options.check_report(arguments)
    options.check_at_least(arguments.repeats, 1, option="--repeats")
    options.check_at_least(arguments.steps, 1, option="--steps")
    combined = _combinations(arguments)
    shared.check_weights(arguments, combined["modes"])
    arguments.verify = shared.verify_of(arguments, combined["modes"])
    shared.check_drafts(arguments, combined["drafts"], combined["draft_contexts"], combined["modes"])
    name, config, path = chosen_model(arguments)
    if arguments.hadamard_block is not None:
        name, config = rotated(name, config, arguments.hadamard_block, path)
    request = DecodeRequest(**asked_model(arguments, name, config, path), **combined)
    _check_context(request)
    request.check_device(request.batches, option="--batch")
    return request


def _combinations(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that say what to combine, and its prompts."""
    modes = options.parse_names(arguments.mode, option="--mode", known=DECODE_MODES)
    combined = {
        "batches": options.parse_numbers(arguments.batch, option="--batch"),
        "contexts": options.parse_numbers(arguments.context, option="--context"),
        "modes": modes,
        "drafts": options.parse_names(arguments.draft, option="--draft", known=DRAFTS),
        "draft_lengths": _draft_lengths(arguments, modes),
        "draft_contexts": [shared.parse_draft_context(one) for one in options.split_list([arguments.draft_context])],
        "prompts": _prompts(arguments, modes),
    }
    if arguments.plot and not _speculates(modes):
        raise UsageError("--plot draws the speed-up of speculation; add qspec to --mode, or leave --plot out")
    return combined


def _draft_lengths(arguments: argparse.Namespace, modes: Sequence[str]) -> Sequence[int]:
    lengths = options.parse_numbers(arguments.draft_length, option="--draft-length")
    if _speculates(modes):
        shared.check_draft_length(max(lengths))
    return lengths


def _speculates(modes: Sequence[str]) -> bool:
    return "qspec" in modes or "lookup" in modes


def _prompts(arguments: argparse.Namespace, modes: Sequence[str]) -> Sequence[str]:
    if arguments.prompt_file is None:
        return _PROMPTS if arguments.model is not None else ()
    if arguments.model is None or "qspec" not in modes:
        raise UsageError("--prompt-file measures the acceptance of a real model; give --model, and qspec in --mode")
    prompts = read_prompt_file(arguments.prompt_file)
    if not prompts:
        raise UsageError(f"--prompt-file {arguments.prompt_file} has no prompt")
    return prompts


def _check_context(request: DecodeRequest) -> None:
    limit, cycle = request.config.max_position_embeddings, request.longest_draft + 1
    if max(request.contexts) + cycle > limit:
        raise UsageError(
            f"--context {max(request.contexts)} and {cycle} more tokens do not fit the context of {request.name}, "
            f"{limit}; use at most {limit - cycle}"
        )


def fitting_prompts(model: LanguageModel, request: DecodeRequest) -> Sequence[str]:
    """The prompts, checked before hours of measuring; none for a model without a tokenizer."""
    if not request.prompts or model.tokenizer is None:
        return ()
    _, token_ids = model.intake.encode_prompts(request.prompts)
    longest, limit = max(map(len, token_ids)), request.config.max_position_embeddings
    if longest + NEW_TOKENS > limit:
        raise UsageError(
            f"a prompt of {longest} tokens and {NEW_TOKENS} new ones do not fit the context of {request.name}, "
            f"{limit}; shorten it"
        )
    return request.prompts

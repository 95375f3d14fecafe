"""What ``bench decode`` is asked for, checked before a weight is made or a program compiled."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.presets import PRESETS
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig

if TYPE_CHECKING:
    from qspec_jax.engine.language_model import LanguageModel

NEW_TOKENS = 64  # per prompt, to measure acceptance
_PROMPTS = (
    "Explain how a refrigerator keeps food cold.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a list and a tuple in Python?",
    "Give me a recipe for vegetable soup.",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, checked.

    Attributes:
        name, config, path: the model; ``path`` is None for synthetic weights.
        quantization: of the 4-bit modes; None for what the model brings.
        dtype, kernels: as in :func:`qspec_jax.load`.
        batches, contexts, modes, drafts, draft_lengths: what to combine.
        prompts: to measure acceptance with.
    """

    name: str
    config: ModelConfig
    path: Path | None
    quantization: QuantConfig | None
    dtype: str | None
    kernels: str
    batches: Sequence[int]
    contexts: Sequence[int]
    modes: Sequence[str]
    drafts: Sequence[str]
    draft_lengths: Sequence[int]
    prompts: Sequence[str]

    @property
    def longest_draft(self) -> int:
        """0 without speculation."""
        return max(self.draft_lengths) if "qspec" in self.modes else 0

    def load(self, *, floating_point: bool) -> LanguageModel:
        """The model with 4-bit weights, or in floating point."""
        placement: dict[str, Any] = {"dtype": self.dtype, "kernels": self.kernels}
        if self.path is None:
            from qspec_jax.bench.synthetic import synthetic_model

            quantization = None if floating_point else self.quantization
            return synthetic_model(self.config, quantization=quantization, name=self.name, **placement)
        import qspec_jax

        given = None if floating_point else self.quantization or "auto"
        return qspec_jax.load(self.path, quantization=given, **placement)


def read_request(arguments: argparse.Namespace) -> Request:
    """Checks everything that can be wrong before a weight is made or a program compiled.

    Raises:
        UsageError: an argument makes no sense.
        CheckpointError, UnsupportedModelError: a checkpoint cannot be opened.
    """
    options.check_writable(arguments.json, option="--json")
    options.check_writable(arguments.plot, option="--plot")
    options.check_matplotlib(arguments.plot)
    options.check_at_least(arguments.repeats, 1, option="--repeats")
    options.check_at_least(arguments.steps, 1, option="--steps")
    from qspec_jax.decoding.plan import DRAFTS, MODES
    from qspec_jax.model.placement import decoder_options

    decoder_options(arguments.kernels, arguments.dtype)
    modes = options.parse_names(arguments.mode, option="--mode", known=MODES)
    name, config, path = chosen_model(arguments)
    if arguments.hadamard_block is not None:
        name, config = _rotated(name, config, arguments.hadamard_block, path)
    request = Request(
        name=name,
        config=config,
        path=path,
        quantization=chosen_quantization(arguments, config),
        dtype=arguments.dtype,
        kernels=arguments.kernels,
        batches=options.parse_numbers(arguments.batch, option="--batch"),
        contexts=options.parse_numbers(arguments.context, option="--context"),
        modes=modes,
        drafts=options.parse_names(arguments.draft, option="--draft", known=DRAFTS),
        draft_lengths=options.parse_numbers(arguments.draft_length, option="--draft-length"),
        prompts=_prompts(arguments, modes),
    )
    if arguments.plot and "qspec" not in modes:
        raise UsageError("--plot draws the speed-up of speculation; add qspec to --mode, or leave --plot out")
    _check_context(request)
    return request


def chosen_model(arguments: argparse.Namespace) -> tuple[str, ModelConfig, Path | None]:
    """Name, shape and path of the model asked for; there is no path to synthetic weights."""
    if arguments.model is None:
        import jax

        name = arguments.preset or ("llama-3-8b" if jax.default_backend() == "gpu" else "smollm2-135m")
        if name not in PRESETS:
            raise UsageError(f"--preset {name} is unknown; use one of {', '.join(PRESETS)}, or --model CHECKPOINT")
        return name, PRESETS[name], None
    if arguments.preset is not None or arguments.asymmetric:
        raise UsageError("--preset and --asymmetric choose synthetic weights; leave them out with --model")
    from qspec_jax.weights.resolve import open_source, resolve_model

    path = resolve_model(arguments.model)
    return path.name, open_source(path).config, path


def _rotated(name: str, config: ModelConfig, text: str, path: Path | None) -> tuple[str, ModelConfig]:
    """Name and shape of the model that a rotating recipe makes; random weights need no rotation."""
    from qspec_jax.quantization.rotation import rotated_config

    if path is not None:
        raise UsageError("--hadamard-block is for synthetic weights; rotate a model with a recipe of quantize")
    size = config.intermediate_size
    blocks = [size] if text == options.WHOLE_ROW else options.parse_numbers(text, option="--hadamard-block")
    if len(blocks) > 1 or size % blocks[0]:
        raise UsageError(f"--hadamard-block {text}: use one divisor of the MLP's {size} values, or {options.WHOLE_ROW}")
    return f"{name} with transforms of {blocks[0]}", rotated_config(config, hadamard_block=blocks[0])


def chosen_quantization(arguments: argparse.Namespace, config: ModelConfig) -> QuantConfig | None:
    """How the weights are to be stored; None for what the model brings."""
    from pallas_kernels import check_group_size
    from qspec_jax.model.parameters import linear_inputs

    inputs, text = linear_inputs(config), arguments.group_size
    if arguments.model is not None and text is None:
        return None
    if text is None:
        fitting = (size for size in (128, 64, 32) if not any(k % size for k in inputs.values()))
        group_size = next(fitting, None)
    else:
        group_size = None if text == options.WHOLE_ROW else int(text)
    for name, k in inputs.items():
        try:
            check_group_size(k, group_size or k, what=name)
        except ValueError as error:
            raise UsageError(f"--group-size {text}: {error}") from error
    return QuantConfig(group_size=group_size, symmetric=arguments.model is None and not arguments.asymmetric)


def _prompts(arguments: argparse.Namespace, modes: Sequence[str]) -> Sequence[str]:
    if arguments.prompt_file is None:
        return _PROMPTS if arguments.model is not None else ()
    if arguments.model is None or "qspec" not in modes:
        raise UsageError("--prompt-file measures the acceptance of a real model; give --model, and qspec in --mode")
    from qspec_jax.generate import read_prompt_file

    prompts = read_prompt_file(arguments.prompt_file)
    if not prompts:
        raise UsageError(f"--prompt-file {arguments.prompt_file} has no prompt")
    return prompts


def _check_context(request: Request) -> None:
    from qspec_jax.decoding.plan import MAX_DRAFT_LENGTH

    if request.longest_draft > MAX_DRAFT_LENGTH:
        raise UsageError(f"--draft-length {request.longest_draft} must be at most {MAX_DRAFT_LENGTH}")
    limit, cycle = request.config.max_position_embeddings, request.longest_draft + 1
    if max(request.contexts) + cycle > limit:
        raise UsageError(
            f"--context {max(request.contexts)} and {cycle} more tokens do not fit the context of {request.name}, "
            f"{limit}; use at most {limit - cycle}"
        )


def fitting_prompts(model: LanguageModel, request: Request) -> Sequence[str]:
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

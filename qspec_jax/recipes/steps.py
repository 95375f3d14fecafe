"""The steps that recipes are made of, each from a source of tensors to another one, and what they are told.

A step says beforehand what config its result has, so that memory is estimated before anything runs. What it does is
imported when it runs: the catalogue of recipes is read without JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qspec_jax.device.sizes import size_text
from qspec_jax.errors import UsageError
from qspec_jax.model.config import DTYPES, ModelConfig, QuantConfig

if TYPE_CHECKING:
    from qspec_jax.quantization.principal import ActivationMoments
    from qspec_jax.quantization.rotation import Rotation
    from qspec_jax.recipes.layerwise import Calibration
    from qspec_jax.weights.source import Source


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """What a recipe is told.

    Attributes:
        quantization: grid of the weights that are rounded, the draft activations to store with them, and whether the
            model's own floats are stored besides.
        dtype: in which everything that is not quantised is read; it is stored without further rounding.
        calibration: text (or JSONL of prompts) on which recipes that calibrate run the model.
        calibration_tokens: how much of it.
        said: fields of ``quantization`` that somebody asked for; others may depend on the model.
    """

    quantization: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    dtype: str = "float32"
    calibration: Path | None = None
    calibration_tokens: int = 65536
    said: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.calibration_tokens < 1:
            raise UsageError(f"calibration_tokens={self.calibration_tokens} must be at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype={self.dtype!r} is not supported; use one of {', '.join(DTYPES)}")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Who hears how a recipe is getting on: ``bar`` wraps long iterations, ``say`` takes a line of text."""

    bar: Callable[[Iterable, str], Iterable] = lambda items, _: items
    say: Callable[[str], None] = lambda _: None


@dataclasses.dataclass(frozen=True)
class RecipeContext:
    """What the steps of one run share.

    Attributes:
        options: of the recipe.
        progress: who hears of it.
        text: to run the model on, None if no step needs it.
    """

    options: RecipeOptions
    progress: Progress
    text: Calibration | None = None

    @property
    def calibration(self) -> Calibration:
        """The text, for a step that needs it."""
        assert self.text is not None
        return self.text


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of a recipe.

    Attributes:
        apply: makes the source. Tensors are read as late as can be, at best by who reads the result.
        config: of the model that comes out, from that of the model that goes in. Raises UsageError if the step cannot
            be taken with such a model.
        needs_text: it runs the model on calibration text.
        turns: what linears read and write afterwards is other than in the model that goes in.
    """

    apply: Callable[[Source, RecipeContext], Source]
    config: Callable[[ModelConfig], ModelConfig] = lambda config: config
    needs_text: bool = False
    turns: bool = False


def _keep_codes(source: Source, context: RecipeContext) -> Source:
    kept, _ = _four_bit_linears(source)
    if not kept:
        raise UsageError(
            f"{source.path.name} has no 4-bit weights to keep; use --recipe rtn, which rounds its weights to 4 bits"
        )
    return source  # what is not in 4 bits yet is rounded with a warning


def _as_floats(source: Source, context: RecipeContext) -> Source:
    from qspec_jax.recipes.floats import as_floats

    _warn_of_rounding_again(source, context.progress)
    return as_floats(source)


def _gptq(source: Source, context: RecipeContext) -> Source:
    from qspec_jax.recipes.layerwise import calibration_bytes, head_to_round, quantize_layers

    calibration, progress = context.calibration, context.progress
    _warn_of_rounding_again(source, progress)
    with_head = head_to_round(source, context.options.quantization) is not None
    needed = calibration_bytes(source.config, calibration.tokens.shape, with_head=with_head)
    progress.say(f"calibration: {calibration.tokens.size} tokens, about {size_text(needed)} of memory")
    if calibration.tokens.size < source.config.hidden_size:
        progress.say(
            f"warning: {calibration.tokens.size} tokens say little of linears with {source.config.hidden_size} inputs "
            "and more, whose rounding stays close to that of rtn; use --calibration-tokens with more"
        )
    if finished := calibration.work.num_finished():
        progress.say(f"{finished} of {source.config.num_layers} layers are finished already: {calibration.work.path}")
    return quantize_layers(source, calibration, quantization=context.options.quantization, bar=progress.bar)


def _rotate(source: Source, context: RecipeContext) -> Source:
    from qspec_jax.recipes.rotated import rotate_source

    return rotate_source(source)


def _rotated_config(config: ModelConfig) -> ModelConfig:
    from qspec_jax.quantization.rotation import rotated_config

    return rotated_config(config)


def _sort_channels(source: Source, context: RecipeContext) -> Source:
    from qspec_jax.quantization.principal import salience_order

    return _turned(source, context, salience_order, fold_gains=False)


def _sorted_config(config: ModelConfig) -> ModelConfig:
    from qspec_jax.quantization.rotation import require_unrotated

    require_unrotated(config)
    return config


def _turn_onto_axes(source: Source, context: RecipeContext) -> Source:
    from qspec_jax.quantization.principal import principal_rotation

    return _turned(source, context, principal_rotation, fold_gains=True)


def _principal_config(config: ModelConfig) -> ModelConfig:
    from qspec_jax.quantization.principal import principal_config

    return principal_config(config)


def _turned(
    source: Source,
    context: RecipeContext,
    rotation_of: Callable[[ActivationMoments], Rotation],
    *,
    fold_gains: bool,
) -> Source:
    """The source rotated by matrices that are made from the model's activations on the text."""
    from qspec_jax.recipes.moments import measure_moments
    from qspec_jax.recipes.rotated import rotate_source

    tokens = context.calibration.tokens
    moments = measure_moments(source, tokens, fold_gains=fold_gains, bar=context.progress.bar)
    return rotate_source(source, rotation_of(moments))


def _four_bit_linears(source: Source) -> tuple[int, int]:
    """How many linears of a source are 4-bit codes, and how many there are."""
    linears = [name for name, spec in source.specs.items() if spec.kind == "linear"]
    return sum(source.entries[name].codes is not None for name in linears), len(linears)


def _warn_of_rounding_again(source: Source, progress: Progress) -> None:
    requantised, total = _four_bit_linears(source)
    if requantised:
        progress.say(
            f"warning: {requantised} of {total} linears are quantised already and are rounded once more, which loses "
            "accuracy; --recipe keep leaves them as they are"
        )


# What is still in floats after the last step is rounded to nearest as it is loaded.
KEEP_CODES = Step(_keep_codes)
AS_FLOATS = Step(_as_floats)
GPTQ = Step(_gptq, needs_text=True)
# Of a model that is read as floats.
ROTATE = Step(_rotate, _rotated_config, turns=True)
SORT_CHANNELS = Step(_sort_channels, _sorted_config, needs_text=True, turns=True)
TURN_ONTO_AXES = Step(_turn_onto_axes, _principal_config, needs_text=True, turns=True)

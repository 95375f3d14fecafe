"""Recipes: ways to make 4-bit weights of a model, from the opened source to a checkpoint on disk.

A recipe is a name and a function from a source and options to a decoder. To add one, write its function and
enter it into ``RECIPES``; settings of its own go into ``RecipeOptions``. Files that name one and hold options
are read by :mod:`qspec_jax.recipes.files`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedWeight, dequantize, pack_codes
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ActivationQuantization, ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.placement import DTYPES
from qspec_jax.quantization.principal import (
    GROUP,
    ActivationMoments,
    principal_config,
    principal_rotation,
    salience_order,
)
from qspec_jax.quantization.rotation import Rotation, rotated_config, unrotated_config
from qspec_jax.recipes.layerwise import Calibration, calibration_bytes, quantize_layers
from qspec_jax.recipes.moments import measure_moments
from qspec_jax.recipes.rotated import rotate_source
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.source import QuantizedTensor, Source, TensorEntry

WHOLE_ROW = "row"


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """What a recipe is told.

    Attributes:
        quantization: grid of the weights that are rounded, and the draft activations to store with them.
        dtype: in which everything that is not quantised is read; it is stored without further rounding.
        calibration: text (or JSONL of prompts) on which recipes that calibrate run the model.
        calibration_tokens: how much of it.
    """

    quantization: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    dtype: str = "float32"
    calibration: Path | None = None
    calibration_tokens: int = 65536

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
class Recipe:
    """A way to make 4-bit weights.

    Attributes:
        name: as a user gives it.
        quantize: makes the decoder.
        calibrate: for a recipe that runs the model on text, what comes before: a source whose linears are in 4 bits.
        config: of the model that comes out, from that of the source.
        quantization: grid and draft activations where nobody says otherwise.
    """

    name: str
    quantize: Callable[[Source, RecipeOptions, Progress], Decoder]
    calibrate: Callable[[Source, RecipeOptions, Calibration, Progress], Source] | None = None
    config: Callable[[ModelConfig], ModelConfig] = lambda config: config
    quantization: QuantConfig = dataclasses.field(default_factory=QuantConfig)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did."""

    path: Path
    bytes_before: int
    bytes_after: int
    seconds: float


def _four_bit_linears(source: Source) -> tuple[int, int]:
    """How many linears of a source are 4-bit codes, and how many there are."""
    linears = [name for name, spec in source.specs.items() if spec.kind == "linear"]
    return sum(source.entries[name].four_bit is not None for name in linears), len(linears)


def _keep(source: Source, options: RecipeOptions, progress: Progress) -> Decoder:
    kept, total = _four_bit_linears(source)
    if not kept:
        raise UsageError(
            f"{source.path.name} has no 4-bit weights to keep; use --recipe rtn, which rounds its weights to 4 bits"
        )
    if kept < total:
        progress.say(f"warning: {total - kept} of {total} linears are not in 4 bits yet and are rounded to nearest")
    return _load(source, options, progress)


def _load(source: Source, options: RecipeOptions, progress: Progress) -> Decoder:
    # The stacked arrangement takes the fewest arrays; checkpoints do not depend on it.
    return load_decoder(
        source,
        quantization=options.quantization,
        formats=weight_formats(source, options.quantization),
        dtype=jnp.dtype(options.dtype),
        kernels=REFERENCE,
        scan_layers=True,
        progress=lambda tensors: progress.bar(tensors, "quantising"),
    )


def _round_to_nearest(source: Source, options: RecipeOptions, progress: Progress) -> Decoder:
    return _load(_float_source(source, progress), options, progress)


def _rotate_and_round(source: Source, options: RecipeOptions, progress: Progress) -> Decoder:
    return _load(rotate_source(_float_source(source, progress)), options, progress)


def _float_source(source: Source, progress: Progress) -> Source:
    """The source with all its tensors read as floats; says so if some are 4-bit codes."""
    _warn_of_rounding_again(source, progress)
    return dataclasses.replace(source, entries={name: _as_floats(entry) for name, entry in source.entries.items()})


def _warn_of_rounding_again(source: Source, progress: Progress) -> None:
    requantised, total = _four_bit_linears(source)
    if requantised:
        progress.say(
            f"warning: {requantised} of {total} linears are in 4 bits already and are rounded once more, which loses "
            "accuracy; --recipe keep leaves them as they are"
        )


def _gptq(source: Source, options: RecipeOptions, calibration: Calibration, progress: Progress) -> Source:
    _warn_of_rounding_again(source, progress)
    needed = calibration_bytes(source.config, calibration.tokens.shape)
    progress.say(f"calibration: {calibration.tokens.size} tokens, about {needed / 1e9:.2f} GB of memory")
    if finished := calibration.work.num_finished():
        progress.say(f"{finished} of {source.config.num_layers} layers are finished already: {calibration.work.path}")
    return quantize_layers(source, calibration, quantization=options.quantization, bar=progress.bar)


def _rotate_and_gptq(source: Source, options: RecipeOptions, calibration: Calibration, progress: Progress) -> Source:
    return _gptq(rotate_source(_float_source(source, progress)), options, calibration, progress)


def _turn_and_gptq(
    source: Source,
    options: RecipeOptions,
    calibration: Calibration,
    progress: Progress,
    *,
    rotation_of: Callable[[ActivationMoments], Rotation],
    fold_gains: bool,
) -> Source:
    floats = _float_source(source, progress)
    moments = measure_moments(floats, calibration.tokens, fold_gains=fold_gains, bar=progress.bar)
    return _gptq(rotate_source(floats, rotation_of(moments)), options, calibration, progress)


# One group is much louder than the others: with one scale per token, 8 bits would hardly see those.
_OF_PRINCIPAL_AXES = QuantConfig(
    w4a4=ActivationQuantization(group_size=GROUP, symmetric=False, outlier_groups=10),
    w4a8=ActivationQuantization(group_size=GROUP),
)
_reorder_and_gptq = functools.partial(_turn_and_gptq, rotation_of=salience_order, fold_gains=False)
_principal_and_gptq = functools.partial(_turn_and_gptq, rotation_of=principal_rotation, fold_gains=True)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("keep", _keep),
        Recipe("rtn", _round_to_nearest),
        Recipe("gptq", _load, calibrate=_gptq),
        Recipe("quarot-rtn", _rotate_and_round, config=rotated_config),
        Recipe("quarot-gptq", _load, calibrate=_rotate_and_gptq, config=rotated_config),
        Recipe("atom", _load, calibrate=_reorder_and_gptq, config=unrotated_config),
        Recipe("resq", _load, _principal_and_gptq, principal_config, _OF_PRINCIPAL_AXES),
    )
}


def _as_floats(entry: TensorEntry) -> TensorEntry:
    if entry.four_bit is None:
        return entry

    def read() -> np.ndarray:
        tensor = entry.read()
        assert isinstance(tensor, QuantizedTensor)
        offset = None if tensor.offset is None else jnp.asarray(tensor.offset)
        return np.asarray(_dequantize_codes(jnp.asarray(tensor.codes), jnp.asarray(tensor.scale), offset))

    return TensorEntry(entry.shape, read)


@jax.jit
def _dequantize_codes(codes: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    return dequantize(QuantizedWeight(pack_codes(codes), scale, offset))

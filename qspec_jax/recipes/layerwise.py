"""Quantises a model layer by layer on calibration text, in the memory of one layer, and keeps what is finished.

Each linear is rounded by GPTQ against the inputs it will have: those that the layers before it, and the linears before
it in its own layer, give once they are rounded. So is an LM head in codes, behind them. Every finished layer is a file
in a work folder, whose name is keyed by all that its bytes depend on; a run that was interrupted finds them and goes on
after the last one.

The result is a source like the one that was given, except that its linears are codes already, and its LM head where one
in codes is wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels import QuantizedWeight, dequantize
from qspec_jax.device.memory import check_memory, explain_out_of_memory
from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.model.blocks import DecoderLayer
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.head import head_format
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import HEAD, head_name, layer_anatomy, layer_parameters
from qspec_jax.quantization.gptq import gptq
from qspec_jax.quantization.rtn import check_grid, is_finite
from qspec_jax.recipes.observe import MAX_BATCH, advance, linear_of, moments_of_norms, second_moments
from qspec_jax.recipes.text import CONTEXT, token_windows
from qspec_jax.recipes.work_folder import WorkFolder, fingerprint
from qspec_jax.weights.fill import kept_head, load_layer
from qspec_jax.weights.source import Source, TensorEntry

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer

# Float32 arrays of the shape of a Hessian, and of a linear, that rounding the linear takes.
_HESSIAN_COPIES = 6
_WEIGHT_COPIES = 5
# Of the error of upper nibbles, in a head of 8 bits. Drafts read these alone, and whoever quantises a head in 8 bits
# has precision to give: Qwen2.5-Coder's loses 0.0002 nats so, and 0.014 with the upper nibbles, 0.016 with the share
# that linears have (docs/lab-notebook/066).
HEAD_UPPER_SHARE = 1 / 8
_HEAD = "head"
_PROGRAM_BYTES = 1 << 29  # what compiling takes, measured on a CPU


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A text to run a model on.

    Attributes:
        tokens: ``[windows, T]`` int32.
        work: keeps finished layers, for a run that is interrupted.
    """

    tokens: np.ndarray
    work: WorkFolder


def open_calibration(
    source: Source,
    tokenizer: Tokenizer | None,
    text: Path,
    *,
    num_tokens: int,
    output: Path,
    settings: Mapping[str, Any],
) -> Calibration:
    """Reads a calibration text.

    Args:
        source: the model.
        tokenizer: of the model.
        text: a file as in :func:`token_windows`.
        num_tokens: how much of it.
        output: the checkpoint that is to be written.
        settings: JSON values on which the finished layers depend.

    Raises:
        UsageError: the text cannot be read or is too short, or there is no tokenizer.
    """
    if tokenizer is None:
        raise UsageError(f"{source.path.name} has no tokenizer, without which calibration text cannot be read")
    context = min(CONTEXT, source.config.max_position_embeddings)
    tokens = token_windows(text, tokenizer, num_tokens=num_tokens, context=context)
    return Calibration(tokens, WorkFolder(output, fingerprint(source, tokens, settings)))


def quantize_layers(
    source: Source,
    calibration: Calibration,
    *,
    quantization: QuantConfig,
    bar: Callable[[Iterable[int], str], Iterable[int]] = lambda items, _: items,
) -> Source:
    """Rounds every linear of a model by GPTQ, and an LM head that is to be in codes, or reads what is finished.

    Args:
        source: the model, in floats or in 4 bits. A head that is in codes already, of as many bits, stays as it is.
        calibration: text, and finished layers.
        quantization: the grid of the linears, and the bits of the head.
        bar: wraps the iteration over layers.

    Raises:
        UsageError: a token is not of this model.
        CheckpointError: a tensor cannot be read or rounded, a layer not be written, or activations are not finite.
        OutOfMemoryError: a layer does not fit; raised beforehand where that can be told.
    """
    config, tokens, work = source.config, calibration.tokens, calibration.work
    what = f"calibrating {source.path.name} on {tokens.size} tokens"
    head = head_to_round(source, quantization)
    needed = calibration_bytes(config, tokens.shape, with_head=head is not None)
    check_memory(needed, what=f"the largest layer and its Hessians, for {what},")
    finished = dataclasses.replace(source, entries={**source.entries, **_entries(source, quantization, head, work)})
    rounds_head = head is not None and not work.has(_HEAD)
    with explain_out_of_memory(f"while {what}"):
        streams = embed(source, tokens)
        _check_what_is_read_last(source)
        for index in bar(range(config.num_layers), "calibrating"):
            if not work.has(index):
                layer = load_layer(source, index)
                work.write(index, _quantize_layer(layer, streams, quantization, f"layer {index}"))
            if index + 1 < config.num_layers or rounds_head:
                streams = advance(load_layer(finished, index), streams)
        if head is not None and rounds_head:
            work.write(_HEAD, {HEAD: _quantize_head(source, streams, head)})
    return finished


def head_to_round(source: Source, quantization: QuantConfig) -> WeightFormat | None:
    """The format of the LM head that :func:`quantize_layers` rounds; None where it rounds none."""
    return None if kept_head(source, quantization) is not None else head_format(source.config, quantization)


def calibration_bytes(config: ModelConfig, windows: tuple[int, ...], *, with_head: bool = False) -> int:
    """Bytes at the peak of :func:`quantize_layers`, for ``[windows, T]`` tokens, and for an LM head that it rounds."""
    num_windows, context = windows
    layer = sum(math.prod(spec.shape) for spec in layer_parameters(config, 0))
    rounding = max(
        _HESSIAN_COPIES * linear.num_inputs**2 + _WEIGHT_COPIES * linear.num_outputs * linear.num_inputs
        for linear in layer_anatomy(config).linears.values()
    )
    streams = 2 * num_windows * context * config.hidden_size
    batch = MAX_BATCH * context * (4 * config.intermediate_size + 4 * config.hidden_size + config.num_heads * context)
    embedding = 2 * config.vocab_size * config.hidden_size  # and an LM head, in the dtype of its file and in float32
    head = embedding + streams + rounding if with_head else 0
    return _PROGRAM_BYTES + 4 * max(embedding + streams, layer + streams + max(rounding, batch), head)


def embed(source: Source, tokens: Int32[np.ndarray, "windows T"]) -> list[Array]:
    """The residual streams in front of the first layer, in equal batches.

    Raises:
        UsageError: a token is not of this model.
        CheckpointError: the embedding cannot be read.
    """
    if tokens.min() < 0 or tokens.max() >= source.config.vocab_size:
        raise UsageError(
            f"calibration token {tokens.max()} is not among the {source.config.vocab_size} of the model; its tokenizer "
            "is of another model"
        )
    embedding = source.read("embedding.weight")
    assert isinstance(embedding, np.ndarray)
    batches = np.split(tokens, len(tokens) // math.gcd(len(tokens), MAX_BATCH))
    return [jnp.asarray(embedding[batch].astype(np.float32)) for batch in batches]


def _check_what_is_read_last(source: Source) -> None:
    """Raises CheckpointError if final norm or LM head cannot be read, before the layers have taken their time."""
    for name, spec in source.specs.items():
        if spec.layer is None and name != "embedding.weight":  # which has been read already
            source.read(name)


def _quantize_layer(
    layer: DecoderLayer, streams: list[Array], quantization: QuantConfig, where: str
) -> dict[str, QuantizedWeight]:
    """The linears of a layer in the order in which they run, each after those before it were rounded."""
    rounded: dict[str, QuantizedWeight] = {}
    for name in layer_anatomy(layer.attention.config).linears:
        hessian, linear = second_moments(layer, streams, name), linear_of(layer, name)
        rounded[name] = _rounded(linear.weight.get_value(), hessian, WeightFormat.of(quantization), f"{where} {name}")
        linear.weight.set_value(dequantize(rounded[name]))
    return rounded


def _quantize_head(source: Source, streams: list[Array], stored: WeightFormat) -> QuantizedWeight:
    """The LM head, rounded against the norms that it reads: some outputs at a time, as each is rounded by itself."""
    config, names = source.config, ("final_norm.weight", head_name(source.config))
    gain, floats = (np.asarray(source.read(name), np.float32) for name in names)
    hessian = moments_of_norms(streams, jnp.asarray(gain), epsilon=config.rms_norm_eps)
    linears = layer_anatomy(config).linears.values()
    most = max(linear.num_inputs * linear.num_outputs for linear in linears) // config.hidden_size  # in as much memory
    pieces = np.array_split(floats, -(-len(floats) // most))
    options: dict[str, Any] = {"upper_share": HEAD_UPPER_SHARE}
    rounded = [_rounded(jnp.asarray(one), hessian, stored, "the LM head", **options) for one in pieces]
    low = None if stored.bits == 4 else jnp.concatenate([one.low for one in rounded if one.low is not None])
    scale = jnp.concatenate([one.scale for one in rounded], axis=1)
    return QuantizedWeight(jnp.concatenate([one.packed for one in rounded]), scale, low=low)


def _rounded(floats: Any, hessian: Array, stored: WeightFormat, what: str, **options: Any) -> QuantizedWeight:
    """A weight by GPTQ; ``what`` names it where it, or what it reads, is not finite."""
    if not bool(jnp.isfinite(hessian).all()):
        raise CheckpointError(
            f"the inputs of {what} are not finite on the calibration text; the weights of the model are damaged, or "
            "too large for float32"
        )
    grid: dict[str, Any] = {"group_size": stored.group_size, "symmetric": stored.symmetric, "bits": stored.bits}
    rounded = gptq(floats, hessian, **grid, **options)
    try:
        check_grid(is_finite(floats, rounded))
    except UsageError as error:  # the file says so, not an argument
        raise CheckpointError(f"cannot round {what}: {error}") from error
    return rounded


def _entries(
    source: Source, quantization: QuantConfig, head: WeightFormat | None, work: WorkFolder
) -> dict[str, TensorEntry]:
    """The linears as they will be read from the work folder, and an LM head that is rounded."""
    entries = {}
    for name, spec in source.specs.items():
        if spec.kind == "linear" and spec.layer is not None:  # as every linear is
            codes = WeightFormat(quantization.group_size or spec.shape[1], quantization.symmetric, quantization.bits)
            read = functools.partial(work.read, spec.layer, spec.module, spec.rows)
            entries[name] = TensorEntry(spec.shape, read, codes)
    if head is not None:
        name = head_name(source.config)
        read_head = functools.partial(work.read, _HEAD, HEAD, slice(None))
        entries[name] = dataclasses.replace(source.entries[name], read_head=read_head, head_codes=head)
    return entries

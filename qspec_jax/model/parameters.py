"""The anatomy of a decoder: which linears and norms a layer has, and which parameters follow from that.

It is stated here and nowhere else. Modules are built, tensors are put into their places, checkpoints are named and
models are rotated by what :func:`layer_anatomy` says. Names are *canonical*: one for each projection, whatever shares
an array, and independent of any file format.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from qspec_jax.errors import UsageError
from qspec_jax.model.config import GROUP_SIZES, ActivationQuantization, ModelConfig

HEAD = "quantized_head"  # the LM head in codes, also among the formats of linears
FLOATS = "floats"  # of a quantised linear, the array that holds its weight as the checkpoint does


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """One linear of a layer: projections of the same inputs, whose rows follow each other in one array.

    Attributes:
        parts: canonical name of each projection to its outputs, in the order of rows.
        num_inputs: of all of them.
        bias: whether they add one.
        norm_before: the norm whose result they read; None where they read something else.
        writes_stream: what they give is added to the residual stream.
    """

    parts: Mapping[str, int]
    num_inputs: int
    bias: bool
    norm_before: str | None = None
    writes_stream: bool = False

    @property
    def num_outputs(self) -> int:
        """Rows of the array."""
        return sum(self.parts.values())


class LayerAnatomy(NamedTuple):
    """What a layer is made of, by the path of each module in the layer.

    Attributes:
        linears: in the order in which they run.
        stream_norms: sizes of the norms of the residual stream.
        head_norms: sizes of the norms of single heads.
    """

    linears: Mapping[str, LinearSpec]
    stream_norms: Mapping[str, int]
    head_norms: Mapping[str, int]

    @property
    def norms(self) -> dict[str, int]:
        """Sizes of all norms."""
        return {**self.stream_norms, **self.head_norms}


@functools.cache
def layer_anatomy(config: ModelConfig) -> LayerAnatomy:
    """What every layer of the model that ``config`` describes is made of."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key, value = config.qkv_sizes
    linears = {
        "attention.qkv": LinearSpec(
            parts={"attention.query": query, "attention.key": key, "attention.value": value},
            num_inputs=hidden,
            bias=config.qkv_bias,
            norm_before="attention_norm",
        ),
        "attention.output": LinearSpec(
            parts={"attention.output": hidden}, num_inputs=query, bias=config.output_bias, writes_stream=True
        ),
        "mlp.gate_up": LinearSpec(
            parts={"mlp.gate": mlp, "mlp.up": mlp}, num_inputs=hidden, bias=config.mlp_bias, norm_before="mlp_norm"
        ),
        "mlp.down": LinearSpec(parts={"mlp.down": hidden}, num_inputs=mlp, bias=config.mlp_bias, writes_stream=True),
    }
    heads = ("attention.query_norm", "attention.key_norm") if config.qk_norm else ()
    return LayerAnatomy(
        linears,
        stream_norms={"attention_norm": hidden, "mlp_norm": hidden},
        head_norms=dict.fromkeys(heads, config.head_dim),
    )


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a model.

    Attributes:
        name: canonical name.
        shape: of the float parameter; a linear is ``[N, K]``, outputs first.
        kind: only a ``linear`` is ever quantised. The LM head counts as an ``embedding``.
        module: that holds it, by its path in the layer or, outside of layers, in the decoder.
        layer: that it is in, None if in none.
        first_row: where it starts in the array of ``module``.
        norm_before: of a weight, canonical name of the gain that is multiplied into what it reads.
        stream: whether it reads the residual stream or is added to it, None for neither.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "embedding", "norm", "bias"]
    module: str
    layer: int | None = None
    first_row: int = 0
    norm_before: str | None = None
    stream: Literal["reads", "writes"] | None = None

    @property
    def part(self) -> str:
        """What it is a weight or bias of, by canonical name in its layer: ``attention.query``, ``embedding``."""
        return self.name.removeprefix(f"layers.{self.layer}.").rpartition(".")[0]

    @property
    def array(self) -> str:
        """Path of the array that holds it, as that of ``module``."""
        if self.kind == "embedding":  # an array of the decoder itself
            return self.module
        return f"{self.module}.{self.name.rpartition('.')[2]}"

    @property
    def path(self) -> str:
        """Of that array in a decoder whose layers are unrolled: ``layers.3.attention.qkv.weight``."""
        return self.array if self.layer is None else f"layers.{self.layer}.{self.array}"

    @property
    def floats(self) -> ParameterSpec:
        """Of the weight of a linear: the same in floating point, where a model has both."""
        return dataclasses.replace(self, name=f"{self.name.rpartition('.')[0]}.{FLOATS}")

    @property
    def rows(self) -> slice:
        """Where it is in that array."""
        return slice(self.first_row, self.first_row + self.shape[0])


def expected_parameters(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of the model that ``config`` describes, by canonical name."""
    hidden, matrix = config.hidden_size, (config.vocab_size, config.hidden_size)
    specs = [ParameterSpec("embedding.weight", matrix, "embedding", "embedding", stream="writes")]
    for layer in range(config.num_layers):
        specs += layer_parameters(config, layer)
    final = ParameterSpec("final_norm.weight", (hidden,), "norm", "final_norm", stream="reads")
    specs.append(final)
    if not config.tie_word_embeddings:
        head = ParameterSpec("lm_head.weight", matrix, "embedding", "lm_head", norm_before=final.name, stream="reads")
        specs.append(head)
    return {spec.name: spec for spec in specs}


def largest_group_size(config: ModelConfig) -> int | None:
    """The largest group of inputs that divides those of every linear; None for the whole row."""
    sizes = [linear.num_inputs for linear in layer_anatomy(config).linears.values()]
    return next((size for size in sorted(GROUP_SIZES, reverse=True) if not any(k % size for k in sizes)), None)


def head_name(config: ModelConfig) -> str:
    """The canonical name of the tensor that is the LM head."""
    return "embedding.weight" if config.tie_word_embeddings else "lm_head.weight"


def layer_parameters(config: ModelConfig, layer: int) -> list[ParameterSpec]:
    """Those of one layer."""
    anatomy = layer_anatomy(config)
    specs = [_norm(layer, path, size, stream="reads") for path, size in anatomy.stream_norms.items()]
    specs += [_norm(layer, path, size, stream=None) for path, size in anatomy.head_norms.items()]
    for path, linear in anatomy.linears.items():
        specs += _parameters_of(linear, path, layer)
    return specs


def _norm(layer: int, path: str, size: int, *, stream: Literal["reads"] | None) -> ParameterSpec:
    return ParameterSpec(f"layers.{layer}.{path}.weight", (size,), "norm", path, layer, stream=stream)


def _parameters_of(linear: LinearSpec, path: str, layer: int) -> Iterator[ParameterSpec]:
    """Weight and bias of each part of a linear."""
    gain = None if linear.norm_before is None else f"layers.{layer}.{linear.norm_before}.weight"
    reads, writes = (None if gain is None else "reads"), ("writes" if linear.writes_stream else None)
    first_row = 0
    for part, num_outputs in linear.parts.items():
        name, place = f"layers.{layer}.{part}", {"module": path, "layer": layer, "first_row": first_row}
        shape = (num_outputs, linear.num_inputs)
        yield ParameterSpec(f"{name}.weight", shape, "linear", norm_before=gain, stream=reads or writes, **place)
        if linear.bias:
            yield ParameterSpec(f"{name}.bias", (num_outputs,), "bias", stream=writes, **place)
        first_row += num_outputs


def check_activation_groups(config: ModelConfig, activations: ActivationQuantization | None, *, what: str) -> None:
    """Refuses groups of activations that the inputs of some linear do not fall into.

    Args:
        config: of the model.
        activations: how they are quantised; None where they are not.
        what: quantises them, for the message.

    Raises:
        UsageError: the group size does not divide the inputs of a linear.
    """
    size = None if activations is None else activations.group_size
    if size is None:
        return
    for path, linear in layer_anatomy(config).linears.items():
        if linear.num_inputs % size:
            raise UsageError(
                f"{what} quantises activations in groups of {size}, which do not divide the {linear.num_inputs} inputs "
                f"of {path}; use another group_size of activations, or None for one scale per token"
            )

"""The model that a benchmark runs: a checkpoint, or synthetic weights of a known shape."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.presets import PRESETS
from qspec_jax.commands.options import heads_of
from qspec_jax.decoding.plan import AUTO, MODES
from qspec_jax.device.mesh import make_mesh, shape_of
from qspec_jax.errors import UsageError
from qspec_jax.model.config import WHOLE_ROW, ModelConfig, QuantConfig, parse_group_size
from qspec_jax.model.parameters import largest_group_size, layer_anatomy
from qspec_jax.weights.resolve import open_source, resolve_model

if TYPE_CHECKING:
    from qspec_jax.engine.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """The model that is asked for, checked.

    Attributes:
        name, config, path: the model; ``path`` is None for synthetic weights.
        given: what it was asked for by, which other processes know it by.
        quantization: of the 4-bit modes; None for what the model brings.
        verify, draft_model, dtype, kernels, kv, mesh: as in :func:`qspec_jax.load`.
        heads: ``head_bits`` and ``draft_head`` there, as far as they are given.
    """

    name: str
    config: ModelConfig
    path: Path | None
    given: str | None
    quantization: QuantConfig | None
    dtype: str | None
    kernels: str
    kv: str
    mesh: str | None
    verify: str
    draft_model: str | None
    heads: Mapping[str, int | None]

    def passes(self, modes: Sequence[str]) -> list[list[str]]:
        """The modes by the models that they need: floats alone only where nothing is verified with them."""
        if self.verify == "float":
            return [list(modes)]
        in_float = [mode for mode in modes if mode == "float"]
        return [some for some in ([mode for mode in modes if mode != "float"], in_float) if some]

    def check_device(self, batches: Sequence[int], *, option: str) -> None:
        """Raises UsageError where its options make no sense on the devices here, or for the batches of an option."""
        from qspec_jax.model.linear import complete_formats
        from qspec_jax.model.placement import decoder_options, kv_format
        from qspec_jax.model.sharding import check_split

        mesh, dtype = make_mesh(self.mesh), decoder_options(self.kernels, self.dtype)["dtype"]
        kv_format(self.kv, dtype=dtype)
        if mesh is None:
            return
        shape, formats = shape_of(mesh), complete_formats(layer_anatomy(self.config).linears, self.quantization, None)
        check_split(self.config, shape.model, quantization=self.quantization, formats=formats)
        if uneven := [batch for batch in batches if batch % shape.data]:
            raise UsageError(f"{option} {uneven[0]} is no multiple of the {shape.data} parts that --mesh {shape} makes")

    def load(self, *, floating_point: bool) -> LanguageModel:
        """The model with 4-bit weights, or in floating point."""
        placement: dict[str, Any] = {"dtype": self.dtype, "kernels": self.kernels, "kv": self.kv, "mesh": self.mesh}
        if self.path is None:
            from qspec_jax.bench.synthetic import synthetic_model

            quantization = None if floating_point else self.quantization
            if quantization is not None and self.verify == "float":
                quantization = dataclasses.replace(quantization, keep_floats=True)
            return synthetic_model(self.config, quantization=quantization, name=self.name, **placement)
        import qspec_jax

        if floating_point:
            return qspec_jax.load(self.given, quantization=None, **placement)
        weights: dict[str, Any] = {"verify": self.verify, "draft_model": self.draft_model, **self.heads}
        return qspec_jax.load(self.given, quantization=self.quantization or "auto", **weights, **placement)


def verification(mode: str, verify: str) -> dict[str, str]:
    """``verify`` of the plan of a mode, of which a plain one is its own target."""
    return {"verify": AUTO if mode in MODES and mode != "qspec" else verify}


def chosen_model(arguments: argparse.Namespace) -> tuple[str, ModelConfig, Path | None]:
    """Name, shape and path of the model asked for; there is no path to synthetic weights."""
    if arguments.model is None:
        if arguments.draft_model is not None:
            raise UsageError("--draft-model drafts for a real model; give --model, or leave it out")
        name = arguments.preset or options.default_preset()
        if name not in PRESETS:
            raise UsageError(f"--preset {name} is unknown; use one of {', '.join(PRESETS)}, or --model CHECKPOINT")
        return name, PRESETS[name], None
    if arguments.preset is not None or arguments.asymmetric:
        raise UsageError("--preset and --asymmetric choose synthetic weights; leave them out with --model")
    path = resolve_model(arguments.model)
    return path.name, open_source(path).config, path


def rotated(name: str, config: ModelConfig, text: str, path: Path | None) -> tuple[str, ModelConfig]:
    """Name and shape of the model that a rotating recipe makes; random weights need no rotation."""
    if path is not None:
        raise UsageError("--hadamard-block is for synthetic weights; rotate a model with a recipe of quantize")
    size = config.intermediate_size
    blocks = [size] if text == WHOLE_ROW else options.parse_numbers(text, option="--hadamard-block")
    if len(blocks) > 1 or size % blocks[0]:
        raise UsageError(f"--hadamard-block {text}: use one divisor of the MLP's {size} values, or {WHOLE_ROW}")
    from qspec_jax.quantization.rotation import rotated_config

    return f"{name} with transforms of {blocks[0]}", rotated_config(config, hadamard_block=blocks[0])


def chosen_quantization(arguments: argparse.Namespace, config: ModelConfig) -> QuantConfig | None:
    """How the weights are to be stored; None for what the model brings."""
    text = arguments.group_size
    inputs = {path: linear.num_inputs for path, linear in layer_anatomy(config).linears.items()}
    if arguments.model is not None and text is None:
        return None
    group_size = largest_group_size(config) if text is None else parse_group_size(text)
    for name, k in inputs.items():
        options.check_group_size(k, group_size, text=text, what=name)
    symmetric = arguments.model is None and not arguments.asymmetric
    heads: dict[str, Any] = {name: None if bits == 16 else bits for name, bits in heads_of(arguments).items()}
    bits = 8 if arguments.verify == "w8a16" else 4
    return QuantConfig(group_size=group_size, symmetric=symmetric, bits=bits, **heads)


def asked_model(arguments: argparse.Namespace, name: str, config: ModelConfig, path: Path | None) -> dict[str, Any]:
    """The fields of a :class:`ModelRequest` for the model of :func:`chosen_model`.

    Raises:
        UsageError: its linears cannot be stored as asked.
    """
    return {
        "name": name,
        "config": config,
        "path": path,
        "given": arguments.model,
        "quantization": chosen_quantization(arguments, config),
        "dtype": arguments.dtype,
        "kernels": arguments.kernels,
        "kv": arguments.kv,
        "mesh": arguments.mesh,
        "verify": arguments.verify,
        "draft_model": arguments.draft_model,
        "heads": heads_of(arguments),
    }

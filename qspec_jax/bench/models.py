"""The model that a benchmark runs: a checkpoint, or synthetic weights of a known shape."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.presets import PRESETS
from qspec_jax.device.mesh import make_mesh, shape_of
from qspec_jax.errors import UsageError
from qspec_jax.model.config import WHOLE_ROW, ModelConfig, QuantConfig, parse_group_size
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.weights.resolve import open_source, resolve_model

if TYPE_CHECKING:
    from qspec_jax.engine.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """The model that is asked for, checked.

    Attributes:
        name, config, path: the model; ``path`` is None for synthetic weights.
        quantization: of the 4-bit modes; None for what the model brings.
        dtype, kernels, kv, mesh: as in :func:`qspec_jax.load`.
    """

    name: str
    config: ModelConfig
    path: Path | None
    quantization: QuantConfig | None
    dtype: str | None
    kernels: str
    kv: str
    mesh: str | None

    def check_device(self, batches: Sequence[int] = ()) -> None:
        """Raises UsageError where its options make no sense on the devices here, or for some batches."""
        from qspec_jax.model.linear import complete_formats
        from qspec_jax.model.placement import decoder_options, kv_format
        from qspec_jax.model.sharding import check_split

        mesh, dtype = make_mesh(self.mesh), decoder_options(self.kernels, self.dtype)["dtype"]
        kv_format(self.kv, dtype=dtype, kernels=self.kernels, mesh=mesh)
        if mesh is None:
            return
        shape, formats = shape_of(mesh), complete_formats(layer_anatomy(self.config).linears, self.quantization, None)
        check_split(self.config, shape.model, quantization=self.quantization, formats=formats)
        if uneven := [batch for batch in batches if batch % shape.data]:
            raise UsageError(f"--batch {uneven[0]} is no multiple of the {shape.data} parts that --mesh {shape} makes")

    def load(self, *, floating_point: bool) -> LanguageModel:
        """The model with 4-bit weights, or in floating point."""
        placement: dict[str, Any] = {"dtype": self.dtype, "kernels": self.kernels, "kv": self.kv, "mesh": self.mesh}
        if self.path is None:
            from qspec_jax.bench.synthetic import synthetic_model

            quantization = None if floating_point else self.quantization
            return synthetic_model(self.config, quantization=quantization, name=self.name, **placement)
        import qspec_jax

        given = None if floating_point else self.quantization or "auto"
        return qspec_jax.load(self.path, quantization=given, **placement)


def chosen_model(arguments: argparse.Namespace) -> tuple[str, ModelConfig, Path | None]:
    """Name, shape and path of the model asked for; there is no path to synthetic weights."""
    if arguments.model is None:
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
    if text is None:
        fitting = (size for size in (128, 64, 32) if not any(k % size for k in inputs.values()))
        group_size = next(fitting, None)
    else:
        group_size = parse_group_size(text)
    for name, k in inputs.items():
        options.check_group_size(k, group_size, text=text, what=name)
    return QuantConfig(group_size=group_size, symmetric=arguments.model is None and not arguments.asymmetric)


def asked_model(arguments: argparse.Namespace, name: str, config: ModelConfig, path: Path | None) -> dict[str, Any]:
    """The fields of a :class:`ModelRequest` for the model of :func:`chosen_model`.

    Raises:
        UsageError: its linears cannot be stored as asked.
    """
    return {
        "name": name,
        "config": config,
        "path": path,
        "quantization": chosen_quantization(arguments, config),
        "dtype": arguments.dtype,
        "kernels": arguments.kernels,
        "kv": arguments.kv,
        "mesh": arguments.mesh,
    }

"""Models of a given shape with random 4-bit weights: as fast as real ones, and there in seconds.

A decoder is arranged exactly as :func:`qspec_jax.load` arranges it, and filled array by array on the device, so that
memory holds the model and the random bits of one array. On a mesh each device makes its own part. What a model
generates is noise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import QuantizedWeight, dequantize
from qspec_jax.bench.random_arrays import random_normal, random_weight
from qspec_jax.decoding.led_programs import tell_load
from qspec_jax.device.memory import explain_out_of_memory
from qspec_jax.device.mesh import MODEL, make_mesh, told_mesh
from qspec_jax.device.sizes import size_text
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder
from qspec_jax.model.layouts import linears
from qspec_jax.model.parameters import FLOATS
from qspec_jax.model.placement import decoder_options, kernels_in_use, kv_format
from qspec_jax.model.shards import Shards, parameters
from qspec_jax.weights.placing import MeshPlacing, Placing


def synthetic_model(
    config: ModelConfig,
    *,
    quantization: QuantConfig | None,
    dtype: str | None = None,
    kernels: str = "auto",
    kv: str = "model",
    name: str = "synthetic",
    mesh: Mesh | str | None = None,
) -> LanguageModel:
    """A model without a tokenizer. Weights are of about ``1 / sqrt(K)``, which keeps activations finite.

    Args:
        config: the shape.
        quantization: how weights are stored; None for floating point.
        dtype: of what is not quantised, as in :func:`qspec_jax.load`.
        kernels, kv: as in :func:`qspec_jax.load`.
        name: of the model.
        mesh: as in :func:`qspec_jax.load`.

    Raises:
        UsageError: ``dtype``, ``kernels``, ``kv`` or ``mesh`` make no sense here.
        OutOfMemoryError: the model does not fit; raised before anything is made where that can be told.
    """
    arrangement = decoder_options(kernels, dtype)
    on = make_mesh(mesh)
    kv = kv_format(kv, dtype=arrangement["dtype"])
    shapes: dict[str, Any] = {"quantization": quantization, "formats": None, **arrangement}
    shards = None if on is None else Shards.of(config, on, **shapes)
    decoder = abstract_decoder(config, **shapes) if shards is None else shards.shapes()
    if on is not None:
        given = {"config": config, "quantization": quantization, "dtype": dtype, "kernels": kernels, "kv": kv}
        tell_load(synthetic_model, {**given, "name": name, "mesh": told_mesh(mesh, on)})
    placing = Placing() if shards is None else MeshPlacing(shards)
    placing.check_memory(decoder, name=name)
    keys = _Keys()
    with explain_out_of_memory(f"while making {name}, whose weights take {size_text(placing.num_bytes(decoder))}"):
        likes = parameters(decoder if shards is None else shards.local)
        for (path, parameter), (_, like) in zip(list(parameters(decoder)), likes, strict=True):
            made = _random_like if on is None else functools.partial(_on_mesh, on, parameter.get_value())
            if path.endswith(f".{FLOATS}"):
                continue
            # One after the other: allocation would otherwise run ahead of the temporary arrays that are freed.
            parameter.set_value(jax.block_until_ready(made(keys.next(), like.get_value(), kind=_kind(path))))
        _fill_floats(decoder, on)
    in_use, decoder.kv = kernels_in_use(decoder, kernels), kv
    return LanguageModel(decoder, None, quantization=quantization, kernels=in_use, name=name, mesh=on)


def _fill_floats(decoder: Decoder, mesh: Mesh | None) -> None:
    """Gives linears that keep floats those that their codes mean: drafts are as good as a 4-bit copy's."""
    for linear in linears(decoder):
        if linear.floats is None:
            continue
        weight: Any = linear.weight.get_value()
        like: Any = linear.floats.get_value()
        lies = None if mesh is None else (mesh, *_specs_of(weight), like.sharding.spec)
        linear.floats.set_value(jax.block_until_ready(_floats(like.dtype, lies)(weight)))


@functools.cache
def _floats(dtype: DTypeLike, lies: tuple[Mesh, Any, Any, PartitionSpec] | None) -> Callable[[Any], Array]:
    """What makes floats of weights alike; on a mesh, as weight and floats lie there, those of each device's part."""
    made = functools.partial(dequantize, dtype=dtype)
    if lies is not None:
        mesh, specs, structure, out = lies
        in_specs = (jax.tree.unflatten(structure, specs),)
        made = jax.shard_map(made, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=False)
    return jax.jit(made)


def _specs_of(whole: Any) -> tuple[tuple[PartitionSpec, ...], Any]:
    """How the arrays of a parameter lie on a mesh, and its structure."""
    leaves, structure = jax.tree.flatten(whole)
    return tuple(leaf.sharding.spec for leaf in leaves), structure


def _on_mesh(mesh: Mesh, whole: Any, key: Array, like: Any, *, kind: str) -> Any:
    """A parameter of which each device makes its own part, like ``like``; of what all have, that of the first."""
    leaves, structure = jax.tree.flatten(like)
    likes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return _maker_on_mesh(mesh, likes, structure, *_specs_of(whole), kind)(key)


@functools.cache
def _maker_on_mesh(mesh: Mesh, likes: Any, structure: Any, specs: Any, whole: Any, kind: str) -> Callable[[Array], Any]:
    """The program of all parameters alike: a GPU's compiler takes a second for each."""
    like, out_specs = jax.tree.unflatten(structure, likes), jax.tree.unflatten(whole, specs)

    def make(key: Array) -> Any:
        value = _random_like(jax.random.fold_in(key, lax.axis_index(MODEL)), like, kind=kind)
        return jax.tree.map(
            lambda leaf, spec: leaf if MODEL in spec else lax.all_gather(leaf, MODEL)[0], value, out_specs
        )

    return jax.jit(jax.shard_map(make, mesh=mesh, in_specs=PartitionSpec(), out_specs=out_specs, check_vma=False))


class _Keys:
    """Keys one after the other, of the generator that is fast and needs least memory for large arrays."""

    def __init__(self) -> None:
        self._key = jax.random.key(0, impl="rbg")

    def next(self) -> Array:
        self._key, key = jax.random.split(self._key)
        return key


def _kind(path: str) -> str:
    """``norm``, ``bias`` or ``matrix``, by the path of a parameter in the decoder."""
    names = path.split(".")
    if any(name.endswith("norm") for name in names):
        return "norm"
    return "bias" if "bias" in names else "matrix"


def _random_like(key: Array, like: Any, *, kind: str) -> Any:
    if isinstance(like, QuantizedWeight):
        sizes = {"k": like.num_inputs, "n": like.num_outputs, "group_size": like.group_size}
        weight = random_weight(key, symmetric=like.symmetric, layers=like.packed.shape[:-2], bits=like.bits, **sizes)
        return dataclasses.replace(weight, layout=like.layout)  # codes are as random in any order
    if kind == "norm":
        return jnp.ones(like.shape, like.dtype)
    deviation = 0.02 if kind == "bias" else 1 / math.sqrt(like.shape[-1])
    return random_normal(key, like.shape, like.dtype, deviation)

"""The order in memory of a decoder's 4-bit weights, as a set of views needs it.

On a mesh the order is that of each device's part of a weight, and its sums are those over the inputs that it has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import Layout, QuantizedWeight, with_group_sums, with_layout
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.device.mesh import MODEL
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.linear import Linear
from qspec_jax.model.view import View


def lay_out(decoder: Decoder, views: Sequence[View], mesh: Mesh | None = None) -> bool:
    """Lays every 4-bit linear out for kernels that serve the views; True if any was not.

    It becomes PLANES if a kernel of the views cannot read its order: PLANES is the order that every kernel but Mosaic
    reads. A weight never goes back to its first order: that would mean to compile every program again whenever two
    plans alternate.
    """
    changed = False
    for linear, weight in _quantized(decoder):
        if weight.layout is Layout.PLANES:
            continue
        layout = linear.layout_for(_of_device(weight, mesh), views)
        if layout is not weight.layout:
            linear.weight.set_value(_on_each_device(_with_layout, layout, weight, mesh, linear.sum_over))
            changed = True
    return changed


def linears(decoder: Decoder) -> list[Linear]:
    """All linears of a decoder, layer by layer."""
    return [module for _, module in nnx.iter_modules(decoder) if isinstance(module, Linear)]


def rounds_in_vain(decoder: Decoder) -> bool:
    """Whether a step takes longer with 8-bit activations than with 16-bit ones, as SmolLM2's did on an H200.

    So it is with Triton's kernels where each weight has an offset: the codes of activations are made, and summed by
    groups, for matmuls that are no faster (docs/lab-notebook/058-what-a-draft-need-not-round.md).
    """
    if jax.default_backend() != "gpu" or decoder.dtype.itemsize != 2:
        return False
    found = list(_quantized(decoder))
    by_triton = all(weight.layout is Layout.PLANES and linear.kernels != REFERENCE for linear, weight in found)
    return bool(found) and by_triton and not any(weight.symmetric for _, weight in found)


def num_bytes(value: Any) -> int:
    """Of the arrays of a parameter, which may be shapes; on a mesh, of what one device has of them."""

    def of_device(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of_device, jax.tree.leaves(value)))


def outside_bytes(decoder: Decoder) -> int:
    """Of the embedding and all LM heads, as :func:`num_bytes`."""
    outside = (decoder.embedding, decoder.lm_head, decoder.quantized_head)
    return sum(num_bytes(parameter.get_value()) for parameter in outside if parameter is not None)


def unread_bytes(decoder: Decoder, view: View) -> int:
    """Of the arrays of linears that a view leaves alone, where a model has nested or two sets of weights."""

    def held(linear: Linear) -> int:
        floats = 0 if linear.floats is None else num_bytes(linear.floats.get_value())
        return floats + num_bytes(linear.weight.get_value())

    return sum(held(linear) - num_bytes(linear.read_by(view)) for linear in linears(decoder))


def add_group_sums(decoder: Decoder, mesh: Mesh | None = None) -> bool:
    """Gives every 4-bit linear the group sums that its asymmetric draft activations need; True if any was missing."""
    changed = False
    for linear, weight in _quantized(decoder):
        if linear.quantization is None or weight.group_sum is not None:
            continue
        num_inputs = _of_device(weight, mesh).num_inputs
        recipes = (linear.quantization.w4a4, linear.quantization.w4a8)
        if sizes := [recipe.group_size or num_inputs for recipe in recipes if not recipe.symmetric]:
            linear.weight.set_value(_on_each_device(_with_group_sums, min(sizes), weight, mesh, linear.sum_over))
            changed = True
    return changed


def _quantized(decoder: Decoder) -> Iterator[tuple[Linear, Any]]:
    for linear in linears(decoder):
        if isinstance(weight := linear.weight.get_value(), QuantizedWeight):
            yield linear, weight


def _of_device(weight: Any, mesh: Mesh | None) -> Any:
    """The shapes of what one device has of a weight."""
    if mesh is None:
        return weight
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype), weight)


_with_layout = jax.jit(with_layout, static_argnums=1, donate_argnums=0)
_with_group_sums = jax.jit(with_group_sums, static_argnums=1)


def _on_each_device(
    function: Callable[[Any, Any], Any], option: Any, weight: Any, mesh: Mesh | None, sum_over: str | None
) -> Any:
    """``function(weight, option)`` of what each device has of a weight."""
    if mesh is None:
        return function(weight, option)
    specs = jax.tree.map(lambda array: array.sharding.spec, weight)
    leaves, structure = jax.tree.flatten(specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    num_stacks = weight.packed.ndim - 2
    return _mapped(function, option, mesh, tuple(leaves), structure, sum_over, num_stacks)(weight)


@functools.cache
def _mapped(
    function: Callable[[Any, Any], Any],
    option: Any,
    mesh: Mesh,
    leaves: tuple[PartitionSpec, ...],
    structure: Any,
    sum_over: str | None,
    num_stacks: int,
) -> Callable[[Any], Any]:
    """That function on a mesh, for weights that lie as these specs say, with so many axes of layers in front."""
    specs = jax.tree.unflatten(structure, leaves)
    if function is _with_group_sums:
        per_group = (MODEL, None) if sum_over is not None else (None, MODEL)
        out_specs = dataclasses.replace(specs, group_sum=PartitionSpec(*[None] * num_stacks, *per_group))
    else:
        out_specs = dataclasses.replace(specs, layout=option)

    def of_device(weight: QuantizedWeight) -> QuantizedWeight:
        return function(weight, option)

    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False))

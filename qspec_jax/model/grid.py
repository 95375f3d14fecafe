"""The grid that a model's linears are on, as a ``QuantConfig`` says it: read from the codes, whatever was asked for."""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Mapping

from pallas_kernels import QuantizedWeight
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.linear import Linear, WeightFormat
from qspec_jax.model.parameters import layer_anatomy


def with_grid_of(
    quantization: QuantConfig, formats: Mapping[str, WeightFormat] | None, config: ModelConfig
) -> QuantConfig:
    """The configuration with the bits, group size and symmetry that linears are stored in.

    Of linears in several formats, it says the most bits, and the grid that most of the linears with these are on.

    Args:
        quantization: what was asked for; of two ways to say one grid (a group may be the whole row), its own is kept.
        formats: of each linear, by its path in a layer; without any, ``quantization`` is returned.
        config: of the model.

    Raises:
        UsageError: no ``QuantConfig`` can say such a group size.
    """
    linears = {path: one for path, one in (formats or {}).items() if path in layer_anatomy(config).linears}
    if not linears:
        return quantization
    bits = max(one.bits for one in linears.values())
    votes: collections.Counter[tuple[int | None, bool]] = collections.Counter()
    for path, one in linears.items():
        is_whole_row = one.group_size in (None, layer_anatomy(config).linears[path].num_inputs)
        sizes = {None: 1, one.group_size: 1} if is_whole_row else {one.group_size: 1}
        votes.update((size, one.symmetric) for size in sizes if one.bits == bits)
    asked = (quantization.group_size, quantization.symmetric)
    group_size, symmetric = max(votes, key=lambda grid: (votes[grid], grid == asked))
    return dataclasses.replace(quantization, group_size=group_size, symmetric=symmetric, bits=bits)


def formats_in(decoder: Decoder) -> dict[str, WeightFormat]:
    """The format of each linear of a layer, from the weights themselves; of those in codes alone."""
    formats = {}
    for name in layer_anatomy(decoder.config).linears:
        linear: Linear = operator.attrgetter(name)(decoder.layers[0])
        weight = linear.weight.get_value()
        if isinstance(weight, QuantizedWeight):
            is_wide = weight.scale.dtype.itemsize > 2
            formats[name] = WeightFormat(weight.group_size, weight.symmetric, weight.bits, is_wide)
    return formats

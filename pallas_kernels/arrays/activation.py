"""Activations as small integers: what ``quantize_activations`` returns and ``w4a4_matmul`` multiplies.

An activation ``x: [..., K]`` is stored as signed codes with one scale, and if it is asymmetric one
offset, per token and per group of consecutive inputs (one group: per token)::

    x[m, k] = scale[m, g] * codes[m, k] - offset[m, g],      g = k // group_size

With a weight ``w[n, k] = ws[g, n] * (c[n, k] - 8) - wo[g, n]`` (``wo`` the offset left after the zero
point 8 is taken out; zero for a symmetric weight) the product needs integer sums only::

    y[m, n] = sum_g  scale[m, g] * ws[g, n] * sum_k codes[m, k] * (c[n, k] - 8)
                   - scale[m, g] * wo[g, n] * sum_k codes[m, k]
                   - offset[m, g] * group_sum[g, n]

where ``g`` runs over the finer of the two groupings and ``group_sum[g, n] = sum_k w[n, k]``, known in
advance, over any grouping at least as fine as the activations'.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

from pallas_kernels.arrays.arguments import checked
from pallas_kernels.arrays.shown import with_shapes
from pallas_kernels.arrays.weight import Layout, order_activation_codes


@typing.no_type_check  # as a pytree it also holds shapes and other stand-ins for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedActivation:
    """Activations in 4 or 8 bits.

    Attributes:
        codes: ``[..., K]`` int8. Codes of 4 bits use one byte each and lie in ``[-8, 7]``.
        scale: ``[..., G]`` float32.
        offset: ``[..., G]`` float32, or None for symmetric activations.
        bits: 4 or 8; outlier groups may have 8 where the others have 4.
        layout: the order of the codes: that of the inputs, unless they are to meet a weight of another layout.
    """

    codes: Shaped[Array, "*batch K"]
    scale: Float32[Array, "*batch G"]
    offset: Float32[Array, "*batch G"] | None
    bits: int = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(default=Layout.PLANES, metadata={"static": True})

    def __repr__(self) -> str:
        return with_shapes(self)

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[-1]

    @property
    def num_groups(self) -> int:
        return self.scale.shape[-1]

    @property
    def group_size(self) -> int:
        return self.num_inputs // self.num_groups

    @property
    def symmetric(self) -> bool:
        return self.offset is None


@checked
def dequantize_activation(x: QuantizedActivation) -> Float32[Array, "*batch K"]:
    """The activation as float32: the definition."""
    codes = order_activation_codes(x.codes, x.layout, inverse=True)
    groups = codes.astype(jnp.float32).reshape(*x.codes.shape[:-1], x.num_groups, x.group_size)
    floats = groups * x.scale[..., None]
    if x.offset is not None:
        floats = floats - x.offset[..., None]
    return floats.reshape(x.codes.shape)

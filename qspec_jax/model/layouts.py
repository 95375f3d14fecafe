"""The order in memory of a decoder's 4-bit weights, as a set of precisions needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from pallas_kernels import with_group_sums
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.linear import Linear
from qspec_jax.model.precision import Precision

_with_group_sums = jax.jit(with_group_sums, static_argnums=1)


def lay_out(decoder: Decoder, precisions: Sequence[Precision]) -> bool:
    """Lays every 4-bit linear out for kernels that serve the precisions; True if any was not."""
    return sum(linear.lay_out_for(precisions) for linear in _linears(decoder)) > 0


def _linears(decoder: Decoder) -> list[Linear]:
    return [module for _, module in nnx.iter_modules(decoder) if isinstance(module, Linear)]


def add_group_sums(decoder: Decoder) -> bool:
    """Gives every 4-bit linear the group sums that its asymmetric draft activations need; True if any was missing."""
    changed = False
    for _, module in nnx.iter_modules(decoder):
        if not isinstance(module, Linear) or module.quantization is None:
            continue
        weight: Any = module.weight.get_value()
        recipes = (module.quantization.w4a4, module.quantization.w4a8)
        sizes = [recipe.group_size or weight.num_inputs for recipe in recipes if not recipe.symmetric]
        if sizes and weight.group_sum is None:
            module.weight.set_value(_with_group_sums(weight, min(sizes)))
            changed = True
    return changed

"""The order in memory of a decoder's 4-bit weights, as a set of views needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from pallas_kernels import with_group_sums
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.linear import Linear
from qspec_jax.model.view import View

_with_group_sums = jax.jit(with_group_sums, static_argnums=1)


def lay_out(decoder: Decoder, views: Sequence[View]) -> bool:
    """Lays every 4-bit linear out for kernels that serve the views; True if any was not."""
    return sum(linear.lay_out_for(views) for linear in linears(decoder)) > 0


def linears(decoder: Decoder) -> list[Linear]:
    """All linears of a decoder, layer by layer."""
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

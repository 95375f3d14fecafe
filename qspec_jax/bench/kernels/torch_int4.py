"""Torch's 4-bit matmul (tinygemm), as a yardstick where torch with CUDA is installed.

Its weight is ``scale * (code - 8) + zero``, so ``zero = 8 * scale - offset``.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import Layout, QuantizedWeight, unpack_codes, with_layout
from pallas_kernels.arrays.weight import SYMMETRIC_ZERO_POINT

_INNER_K_TILES = 8
_GROUP_SIZES = (32, 64, 128, 256)


def available() -> bool:
    """Torch is installed and sees a CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def measure(
    x: Float[Array, "M K"], weights: Sequence[QuantizedWeight], *, repeats: int
) -> tuple[Float[Array, "M N"], float]:
    """The product of ``x`` with the first weight, and the median kernel time of a call in microseconds.

    Raises:
        NotImplementedError: torch's kernel does not serve this weight.
    """
    import torch

    weight = weights[0]
    if weight.group_size not in _GROUP_SIZES or weight.num_outputs % 8 or weight.num_inputs % (16 * _INNER_K_TILES):
        raise NotImplementedError(
            f"needs groups of {', '.join(map(str, _GROUP_SIZES))}, N a multiple of 8 and K of {16 * _INNER_K_TILES}"
        )
    rows = torch.from_numpy(np.array(x.astype(jnp.float32))).cuda().to(torch.bfloat16)
    packed = [_packed(torch, one) for one in weights]

    def call_all() -> list[Any]:
        multiply = torch.ops.aten._weight_int4pack_mm
        return [multiply(rows, codes, weight.group_size, scales_and_zeros) for codes, scales_and_zeros in packed]

    out = call_all()[0].float().cpu().numpy()
    microseconds = statistics.median(_kernel_us(torch, call_all) for _ in range(repeats))
    return jnp.asarray(out, x.dtype), microseconds / len(packed)


def _packed(torch: Any, weight: QuantizedWeight) -> tuple[Any, Any]:
    """Codes in tinygemm's order, and ``[G, N, 2]`` scales and zeros."""
    codes = np.asarray(unpack_codes(with_layout(weight, Layout.PLANES).packed))
    pairs = torch.from_numpy((codes[:, ::2] << 4) | codes[:, 1::2]).cuda()
    scale = weight.scale.astype(jnp.float32)
    zero = jnp.zeros_like(scale)
    if weight.offset is not None:
        zero = SYMMETRIC_ZERO_POINT * scale - weight.offset.astype(jnp.float32)
    both = torch.from_numpy(np.array(jnp.stack([scale, zero], axis=-1))).cuda().to(torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES), both


def _kernel_us(torch: Any, function: Any) -> float:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in profile.key_averages())
    if not total:
        raise RuntimeError("its profiler recorded no kernel")
    return total

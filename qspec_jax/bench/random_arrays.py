"""Random arrays for benchmarks, made on the device."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import QuantizedWeight


@functools.partial(jax.jit, static_argnames=("k", "n", "group_size", "symmetric", "layers", "bits"))
def random_weight(
    key: Array, *, k: int, n: int, group_size: int, symmetric: bool, layers: tuple[int, ...] = (), bits: int = 4
) -> QuantizedWeight:
    """One ``[N, K]`` weight, or a stack with leading axes ``layers``; in 8 bits it is nested."""
    code_key, scale_key, offset_key = jax.random.split(key, 3)
    packed = jax.random.bits(code_key, (*layers, n, k // 2), jnp.uint8)
    shape = (*layers, k // group_size, n)
    scale = jax.random.uniform(scale_key, shape, minval=0.5, maxval=1.5) / (4 * math.sqrt(k))
    offset = scale * jax.random.uniform(offset_key, scale.shape, minval=5.0, maxval=10.0)
    low = None if bits == 4 else jax.random.bits(jax.random.fold_in(code_key, 1), packed.shape, jnp.uint8)
    offset = None if symmetric else offset.astype(jnp.float16)
    return QuantizedWeight(packed, scale.astype(jnp.float16), offset, low=low)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "deviation"))
def random_normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike, deviation: float) -> Array:
    """Normal numbers of any dtype, made on the device."""
    return (jax.random.normal(key, shape) * deviation).astype(dtype)

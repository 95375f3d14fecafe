"""Random arrays for benchmarks, made on the device."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
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


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "deviation", "sharding"))
def random_normal(
    key: Array, shape: tuple[int, ...], dtype: DTypeLike, deviation: float, sharding: Sharding | None = None
) -> Array:
    """Normal numbers of any dtype, made on the device, or where a sharding says."""
    return _lying((jax.random.normal(key, shape) * deviation).astype(dtype), sharding)


@functools.partial(jax.jit, static_argnames=("shape", "sharding"))
def random_codes(key: Array, shape: tuple[int, ...], sharding: Sharding | None = None) -> Array:
    """Numbers of int8 from -127 on, made where :func:`random_normal` makes them."""
    return _lying(jax.random.randint(key, shape, -127, 128, jnp.int8), sharding)


def _lying(array: Array, sharding: Sharding | None) -> Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)

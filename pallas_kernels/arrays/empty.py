"""Arrays that are made by the dozen whenever a batch begins."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Zeros of a shape, as ``jnp.zeros`` makes them.

    That one sends a zero to the device each time, and takes twenty times as long to ask for it.
    """
    return _zeros(shape, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape, dtype):
    return jnp.zeros(shape, dtype)

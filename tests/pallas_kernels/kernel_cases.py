"""Arrays, independent float64 formulas and model shapes that the kernel tests share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantizedActivation, QuantizedWeight, pack_codes, with_group_sums
from pallas_kernels.accuracy import relative_error as relative_error
from pallas_kernels.accuracy import tensor_core_error as tensor_core_error

# (K, N) of the fused linears.
DEMO_MODEL = ((576, 960), (576, 576), (576, 3072), (1536, 576))
LLAMA_3_8B = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))

# Arguments of kernels and references that are no arrays.
STATIC = ("bits", "group_size", "symmetric", "clip_ratio", "outlier_groups", "layout", "block", "epsilon")
STATIC += ("implementation", "dtype", "config", "window", "block_size", "most_groups", "alike", "prefill", "integers")
STATIC += ("interpret",)


def in_one_program(function: Callable) -> Callable:
    """An operation as models run it, but rounded where it says so; by itself each of its operations is a program."""
    taken = inspect.signature(function).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    static = [name for name in STATIC if takes_all or name in taken]
    return jax.jit(function, static_argnames=static, compiler_options={"xla_allow_excess_precision": False})


def newest_jax_by_feature(
    cases: Iterable[tuple], features: Callable[..., tuple[Hashable, ...]] = lambda *case: case
) -> list[Any]:
    """Cases, of which the newest JAX gets those that are the first with a value of one of their features.

    A version of JAX lowers features otherwise than another, and hardly one shape that has them otherwise than the next.
    Unless told, what a case consists of are its features.
    """
    seen: set[tuple[int, Hashable]] = set()
    parameters = []
    for case in cases:
        found = set(enumerate(features(*case)))
        parameters.append(pytest.param(*case, marks=[] if found <= seen else [pytest.mark.newest_jax]))
        seen |= found
    return parameters


@functools.cache
def random_weight(
    n: int, k: int, group_size: int, *, symmetric: bool, scale_dtype: jnp.dtype = jnp.float16, seed: int = 0
) -> QuantizedWeight:
    """A weight whose codes use all 16 values and whose entries are about 1 / sqrt(K).

    Of a symmetric one half of the scales are negative: where a group has its larger weights above zero.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scale = rng.uniform(0.5, 1.5, (k // group_size, n)) / np.sqrt(k) / 4
    if symmetric:
        scale *= np.random.default_rng(100 + seed).choice([-1, 1], scale.shape)
    offset = None if symmetric else _rounded(scale * rng.uniform(5, 10, scale.shape), scale_dtype)
    return _packed(codes, _rounded(scale, scale_dtype), offset)


def _rounded(array: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """By NumPy, as JAX does it, which would compile that for each shape."""
    return array.astype(np.float32).astype(dtype)


@jax.jit  # one program, not one for each operation
def _packed(codes, scale, offset):
    return with_group_sums(QuantizedWeight(pack_codes(codes), scale, offset))


_with_sums = jax.jit(with_group_sums)


@functools.cache
def random_nested_weight(
    n: int, k: int, group_size: int, *, symmetric: bool, scale_dtype: jnp.dtype = jnp.float16, seed: int = 0
) -> QuantizedWeight:
    """A weight in 8 bits, with the scales and the upper nibbles of :func:`random_weight`."""
    upper = random_weight(n, k, group_size, symmetric=symmetric, scale_dtype=scale_dtype, seed=seed)
    low = jnp.asarray(np.random.default_rng(2 + seed).integers(0, 256, upper.packed.shape, dtype=np.uint8))
    return _with_sums(dataclasses.replace(upper, low=low))


@functools.cache
def random_rows(*shape: int, dtype: jnp.dtype = jnp.float32, seed: int = 1) -> jax.Array:
    """Normal values with a mean, so that zero points matter."""
    return jax.device_put(_rounded(np.random.default_rng(seed).standard_normal(shape) + 0.25, dtype))


def weight_in_float64(weight: QuantizedWeight) -> np.ndarray:
    """``[N, K]`` from the definition, one group at a time."""
    arrays = [np.asarray(array) for array in (weight.packed, weight.low) if array is not None]
    half = arrays[0].shape[1]
    scales = np.asarray(weight.scale, np.float64)
    offsets = None if weight.offset is None else np.asarray(weight.offset, np.float64)
    out = np.empty((weight.num_outputs, weight.num_inputs))
    for k in range(weight.num_inputs):
        nibbles = [(array[:, k] & 0xF) if k < half else (array[:, k - half] >> 4) for array in arrays]
        code = sum(nibble / 16**place for place, nibble in enumerate(nibbles)) + weight.truncated / 2
        group = k // weight.group_size
        zero_point = 8 if weight.low is None else 8.5
        offset = zero_point * scales[group] if offsets is None else offsets[group]
        out[:, k] = scales[group] * code - offset
    return out


def activation_in_float64(x: QuantizedActivation) -> np.ndarray:
    """``[M, K]`` from the definition, one group at a time."""
    out, scale = np.asarray(x.codes, np.float64), np.asarray(x.scale, np.float64)
    offset = None if x.offset is None else np.asarray(x.offset, np.float64)
    for group in range(x.num_groups):
        columns = slice(group * x.group_size, (group + 1) * x.group_size)
        out[:, columns] *= scale[:, [group]]
        if offset is not None:
            out[:, columns] -= offset[:, [group]]
    return out


def rms_norm_in_float64(x: jax.Array, gain: jax.Array, epsilon: float) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    return wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + epsilon) * np.asarray(gain, np.float64)


def swiglu_in_float64(gate_up: jax.Array) -> np.ndarray:
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def assert_rounded_once(out: jax.Array, exact: np.ndarray) -> None:
    """``out`` is ``exact``, computed in float32 by a few operations and rounded to the dtype of ``out`` at the end.

    The operations move a value by units in the last place of float32: in 16 bits a few that were nearly a tie.
    """
    limits = jnp.finfo(out.dtype)
    # The interpreter rounds what is smaller than the smallest normal number to zero.
    near = {"rtol": 0.501 * float(limits.eps) + 2e-6, "atol": float(limits.smallest_normal)}
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, **near)
    if out.dtype != jnp.float32:
        assert np.mean(np.asarray(out) == exact.astype(np.float32).astype(out.dtype)) > 0.99


def assert_the_same(out: QuantizedActivation, expected: QuantizedActivation) -> None:
    """Codes, scales and offsets, bit for bit."""
    assert (out.bits, out.symmetric) == (expected.bits, expected.symmetric)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def assert_nearly_the_same(
    out: QuantizedActivation, expected: QuantizedActivation, dtype: jnp.dtype, *, equal_codes: float
) -> None:
    """For kernels that add in another order before they round and quantise.

    A value that was nearly a tie may then be rounded to its neighbour in ``dtype``, and once more where it is
    rounded twice. That moves it, or the scale, by ``2 * eps`` at most, and a code, up to 256 steps from zero, by
    a step or two in bfloat16 and by none in float16 and float32; a code or zero point that was nearly a tie
    itself moves by one. The fraction ``equal_codes`` of them does not move.
    """
    assert (out.bits, out.symmetric) == (expected.bits, expected.symmetric)
    rounding = 0.0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    integers = [(np.asarray(out.codes, np.int32), np.asarray(expected.codes, np.int32))]
    if not expected.symmetric:  # zero points are whole numbers of steps
        integers.append((np.rint(out.offset / out.scale), np.rint(expected.offset / expected.scale)))
    for ours, theirs in integers:
        assert np.abs(ours - theirs).max() <= 1 + int(256 * rounding)
        assert np.mean(ours == theirs) >= equal_codes
    np.testing.assert_allclose(out.scale, expected.scale, rtol=2e-6 + 2 * rounding)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Sizes of a decode: new tokens, heads, key/value heads, head dimension, slots, window."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    slots: int
    window: int | None = None

    def arrays(self, batch: int, dtype: jnp.dtype, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values; logits are about normal."""
        shapes = [(self.num_tokens, self.num_heads), *[(self.slots, self.num_kv_heads)] * 2]
        return tuple(
            random_rows(batch, *shape, self.head_dim, dtype=dtype, seed=seed + index)
            for index, shape in enumerate(shapes)
        )


def attention_in_float64(
    query: jax.Array, keys: jax.Array, values: jax.Array, lengths: list[int], window: int | None
) -> np.ndarray:
    """``[B, T, H, HD]`` from the definition, one token and head at a time."""
    q, k, v = (np.asarray(array, np.float64) for array in (query, keys, values))
    group = q.shape[2] // k.shape[2]
    out = np.empty(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        position = lengths[b] + t
        seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
        logits = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(q.shape[3])
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out

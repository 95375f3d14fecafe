"""How near to the reference an implementation has to be: stated here, for tests and for the self-test alike.

Errors are relative, of all numbers of a result together, unless something else is said. What 16 bits round is most of
them: rounding a result to bfloat16 costs 1.7e-3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.arrays.activation import QuantizedActivation
from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.backends.triton import tiles
from pallas_kernels.dispatch import REFERENCE, TPU, TRITON

W4A16 = {"float32": 2e-6, "bfloat16": 3e-3, "float16": 3e-3}
W4A16_ROUNDED_WEIGHTS = 4e-3  # of kernels that round the scaled weight to 16 bits as well
INTEGER_MATMUL = 5e-6  # of float32 results: sums of integers are exact
# Weights are rounded to the dtype as well as the result.
ATTENTION = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 3e-6}
TRANSFORM_FLOAT32 = 2e-5
EQUAL_CODES = 0.995  # of kernels that add in another order before they round and quantise
REFERENCE_EQUAL_CODES = 0.75  # of the reference, where XLA rounds to 16 bits after every operation of a gate
_HALF_ROUNDING = 0.6  # of an epsilon: one rounding at the end
_FLOAT32 = 2e-6
_ONE_CODE = 9e-5  # of int8 among thousands that was nearly a tie


def relative_error(out: np.ndarray | jax.Array, expected: np.ndarray | jax.Array) -> float:
    """``||out - expected|| / ||expected||``; NaN propagates and fails any bound."""
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected))


def tensor_core_error(num_inputs: int) -> float:
    """The relative error to expect of float32 sums of ``num_inputs`` exact products in tensor cores.

    They cut off what does not fit instead of rounding it (Fasi et al., 2021, doi:10.7717/peerj-cs.330): each step of
    16 products loses half a unit in the last place on average, always towards zero.
    """
    return num_inputs / 16 * 2.0**-24


def allowed_error(
    op: str, dtype: DTypeLike, *, num_inputs: int, implementation: str, weight: QuantizedWeight | None = None
) -> float:
    """The relative error that a result in floating point may have.

    Args:
        op: name of the operation.
        dtype: of what it reads.
        num_inputs: that it adds up.
        implementation: which of them.
        weight: that it multiplies by. Triton's kernels round some kinds, and are exact with others.
    """
    name, rounding = jnp.dtype(dtype).name, float(jnp.finfo(dtype).eps)
    transformed = TRANSFORM_FLOAT32 if name == "float32" else _HALF_ROUNDING * rounding
    rounds_weights = name != "float32" and _rounds_weights(implementation, weight)
    limits = {
        "w4a16_matmul": W4A16_ROUNDED_WEIGHTS if rounds_weights else W4A16[name],
        "w4a16_swiglu": 2 * (W4A16[name] if name == "float32" else W4A16_ROUNDED_WEIGHTS),  # of gate and of up
        "w4a4_matmul": INTEGER_MATMUL,
        "float_matmul": tensor_core_error(num_inputs),
        "decode_attention": ATTENTION[name],
        "block_attention": 2 * ATTENTION[name],
        # Queries times scales of keys, and weights times scales of values, are rounded as well.
        "decode_attention_int8": 2 * ATTENTION[name],
        "rotate_and_write_int8": max(rounding, _ONE_CODE),
        "prefill_attention_int8": max(2 * ATTENTION[name], _ONE_CODE),  # with the entries, in one
        "hadamard": transformed,
        "swiglu_hadamard": max(transformed, rounding) if implementation == REFERENCE else transformed,
    }
    # Norms, gates and rotations round once or twice, and XLA perhaps after every operation.
    return limits.get(op, max(rounding, _FLOAT32))


def _rounds_weights(implementation: str, weight: QuantizedWeight | None) -> bool:
    if implementation != TRITON:
        return implementation != REFERENCE
    if weight is None:
        return False
    sizes = weight.num_inputs, weight.group_size
    return tiles.rounds_weights(*sizes, symmetric=weight.symmetric, bits=weight.bits)


def equal_codes(op: str, *, implementation: str) -> float:
    """The share of codes in 16 bits that have to be those of the reference.

    Args:
        op: name of the operation.
        implementation: which of them. That for TPUs leaves the gate of ``swiglu_hadamard_quantize`` to XLA, as the
            reference does.
    """
    gates_by_xla = implementation == TPU and op == "swiglu_hadamard_quantize"
    return REFERENCE_EQUAL_CODES if implementation == REFERENCE or gates_by_xla else EQUAL_CODES


def differing_codes(out: QuantizedActivation, expected: QuantizedActivation, dtype: DTypeLike) -> float:
    """The share of codes that differ; 1 where one differs by more than roundings explain, or a scale does.

    A value that was nearly a tie may be rounded to its neighbour in ``dtype``, and once more where it is rounded twice.
    That moves it, or the scale, by ``2 * eps`` at most, and a code, up to 256 steps from zero, by a step or two in
    bfloat16 and by none in float16 and float32; a code that was nearly a tie itself moves by one.
    """
    rounding = 0.0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    steps = np.abs(np.asarray(out.codes, np.int32) - np.asarray(expected.codes, np.int32))
    is_scaled_alike = np.allclose(out.scale, expected.scale, rtol=2e-6 + 2 * rounding, atol=0)
    if steps.max() > 1 + int(256 * rounding) or not is_scaled_alike:
        return 1.0
    return float(np.mean(steps > 0))

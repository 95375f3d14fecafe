"""The Hadamard transform on an NVIDIA GPU at the MLP sizes of real models, against its definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hadamard
from pallas_kernels.hadamard.matrices import core_order, hadamard_matrix
from tests.pallas_kernels.kernel_cases import random_rows, relative_error, tensor_core_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

ROWS = (1, 5, 64, 257)
SIZES = [32, 1536, 4096, 14336, 11008, 13824, 18944, 29568]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_definition_and_each_token_stands_alone(size, dtype):
    x = random_rows(max(ROWS), size, dtype=dtype)
    outputs = {m: np.asarray(hadamard(x[:m], implementation="triton")) for m in ROWS}
    few = 8  # rows, since float64 is slow
    expected = np.asarray(x[:few], np.float64) @ hadamard_matrix(size).T.astype(np.float64) / np.sqrt(size)
    # Three bfloat16 parts of a float32, in sums over A and over B, of which A * B = size and B <= 128.
    power = min(size // core_order(size), 128)
    exact = tensor_core_error(3 * (size // power + power))
    bound = exact if dtype == jnp.float32 else 0.6 * float(jnp.finfo(dtype).eps)
    assert relative_error(outputs[max(ROWS)][:few], expected) < bound
    for num_rows, out in outputs.items():
        np.testing.assert_array_equal(out, outputs[max(ROWS)][:num_rows])


@pytest.mark.parametrize(("implementation", "num_kernels"), [(None, 1), ("triton", 1), ("reference", 0)])
def test_none_takes_triton(implementation, num_kernels):
    x = random_rows(3, 1536, dtype=jnp.bfloat16)
    program = jax.jit(lambda x: hadamard(x, implementation=implementation)).lower(x).as_text()
    assert program.count("__gpu$xla.gpu.triton") == num_kernels

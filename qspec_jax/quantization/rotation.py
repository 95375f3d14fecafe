"""QuaRot (Ashkboos et al., 2024, arXiv 2404.00456): rotate a model so that its activations have no outliers.

The network stays the same function, but for rounding:

- **Gains.** The gain of a norm moves into the linears that read the norm, so that what is left commutes with rotations.
- **Residual stream.** ``x' = R @ x`` with one orthogonal matrix R for the whole model: what writes into the stream
  (embedding, output and down projections) is rotated, and what reads it undoes that. An LM head that was the embedding
  becomes a tensor of its own, since the two differ from now on.
- **Values.** Each head's values are rotated, and the output projection undoes that: attention only mixes tokens.
- **MLP.** ``silu(gate) * up`` commutes with no rotation. The inputs of the down projection are rotated as they are
  computed, by ``pallas_kernels.hadamard`` (``ModelConfig.down_hadamard``), at every precision.

R is a Hadamard matrix with random signs. QuaRot's online transform across heads is left out: it would only add to
what the rotation of each head does. Pure functions of one tensor at a time, under the names of ``loading.parameters``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pallas_kernels import hadamard
from pallas_kernels.dispatch import REFERENCE
from pallas_kernels.hadamard.matrices import core_order, kronecker_factors
from pallas_kernels.hadamard.reference import multiply_kronecker
from qspec_jax.config import ModelConfig
from qspec_jax.errors import UsageError

_BLOCK_VALUES = 1 << 25  # of a large tensor that are rotated at once, to bound the memory that takes
_NORM_BEFORE = {
    "attention.query": "attention_norm",
    "attention.key": "attention_norm",
    "attention.value": "attention_norm",
    "mlp.gate": "mlp_norm",
    "mlp.up": "mlp_norm",
    "lm_head": "final_norm",
}
_WRITES_STREAM = ("attention.output", "mlp.down")


@dataclasses.dataclass(frozen=True, eq=False)
class OrthogonalMatrix:
    """``(factors[0] x factors[1] x ...) @ diag(signs)``.

    Attributes:
        signs: ``[n]``, plus and minus one.
        factors: orthogonal matrices, whose Kronecker product is ``[n, n]``.
    """

    signs: Float32[np.ndarray, " n"]
    factors: tuple[Float32[np.ndarray, "_ _"], ...]

    def __call__(self, x: Float[np.ndarray, "*batch n"]) -> Float32[np.ndarray, "*batch n"]:
        """The product with each vector along the last axis."""
        return _by_blocks(lambda rows: _product(rows, self.signs, self.factors), x)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """The matrices of one model: of the residual stream, and of the values of a head."""

    stream: OrthogonalMatrix
    value: OrthogonalMatrix


def rotated_config(config: ModelConfig) -> ModelConfig:
    """The config of the rotated model.

    Raises:
        UsageError: the model is rotated already, or its MLP has a size without a Hadamard matrix.
    """
    if config.down_hadamard:
        raise UsageError("this model is rotated already; use a recipe that does not rotate, rtn for example")
    try:
        core_order(config.intermediate_size)
    except ValueError as error:
        raise UsageError(f"cannot rotate this model (intermediate_size={config.intermediate_size}): {error}") from error
    return dataclasses.replace(config, tie_word_embeddings=False, down_hadamard=True)


def random_rotation(config: ModelConfig, *, seed: int = 0) -> Rotation:
    """The matrices for a model of this shape; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return Rotation(random_orthogonal(config.hidden_size, generator), random_orthogonal(config.head_dim, generator))


def random_orthogonal(size: int, generator: np.random.Generator) -> OrthogonalMatrix:
    """A Hadamard matrix with random signs; where there is none, with a random orthogonal matrix as its core."""
    signs = generator.choice(np.array([-1, 1], np.float32), size)
    try:
        factors = kronecker_factors(size)
    except ValueError:
        power = size & -size
        core, _ = np.linalg.qr(generator.standard_normal((size // power, size // power)))
        return OrthogonalMatrix(signs, (core.astype(np.float32), *_normalised(kronecker_factors(power))))
    return OrthogonalMatrix(signs, _normalised(factors))


def gain_folded_into(name: str) -> str | None:
    """Name of the norm's gain that moves into the tensor ``name``; None if there is none."""
    module = _module(name)
    if module not in _NORM_BEFORE or not name.endswith(".weight"):
        return None
    return name.removesuffix(f"{module}.weight") + f"{_NORM_BEFORE[module]}.weight"


def rotate_parameter(
    name: str,
    tensor: Float[np.ndarray, "*shape"],
    rotation: Rotation,
    *,
    gain: Float[np.ndarray, " D"] | None,
) -> Float32[np.ndarray, "*shape"]:
    """One tensor of the rotated model.

    Args:
        name: its canonical name.
        tensor: of the model as it was; for ``lm_head.weight`` the embedding if the two were tied.
        rotation: of the model.
        gain: the tensor that :func:`gain_folded_into` names.
    """
    module = _module(name)
    if module in _NORM_BEFORE.values():
        return np.ones(tensor.shape, np.float32)
    tensor = tensor.astype(np.float32)
    if not name.endswith(".bias"):
        tensor = _rotate_inputs(module, tensor, rotation, gain)
    if module == "attention.value":
        return _per_head(tensor.T, rotation.value).T
    return rotation.stream(tensor.T).T if module in _WRITES_STREAM else tensor


def _rotate_inputs(module: str, tensor: np.ndarray, rotation: Rotation, gain: np.ndarray | None) -> np.ndarray:
    if gain is not None:
        return rotation.stream(tensor * gain.astype(np.float32))
    if module == "embedding":
        return rotation.stream(tensor)
    if module == "attention.output":
        return _per_head(tensor, rotation.value)
    if module == "mlp.down":
        return _by_blocks(lambda rows: hadamard(rows, implementation=REFERENCE), tensor)
    return tensor


def _per_head(x: np.ndarray, matrix: OrthogonalMatrix) -> np.ndarray:
    """The product with each run of a head's values along the last axis."""
    return matrix(x.reshape(*x.shape[:-1], -1, matrix.signs.size)).reshape(x.shape)


def _by_blocks(function: Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """``function`` of the vectors along the last axis, a block of them at a time."""
    rows = x.reshape(-1, x.shape[-1])
    out = np.empty(rows.shape, np.float32)
    step = max(1, _BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = jnp.asarray(rows[start : start + step], jnp.float32)
        out[start : start + step] = function(block)
    return out.reshape(x.shape)


@jax.jit
def _product(x: Array, signs: Array, factors: tuple[Array, ...]) -> Array:
    return multiply_kronecker(x * signs, factors)


def _normalised(factors: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple((factor / math.sqrt(len(factor))).astype(np.float32) for factor in factors)


def _module(name: str) -> str:
    """``layers.3.mlp.down.weight`` is of ``mlp.down``, ``embedding.weight`` of ``embedding``."""
    path = name.rsplit(".", 1)[0]
    return path.split(".", 2)[2] if path.startswith("layers.") else path

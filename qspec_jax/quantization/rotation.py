"""QuaRot (Ashkboos et al., 2024, arXiv 2404.00456): rotate a model so that its activations have no outliers.

The network stays the same function, but for rounding:

- **Gains.** The gain of a norm moves into the linears that read the norm, so that what is left commutes with rotations.
- **Residual stream.** ``x' = R @ x`` with one orthogonal matrix R for the whole model: what writes into the stream
  (embedding, output and down projections) is rotated, and what reads it undoes that. An LM head that was the embedding
  becomes a tensor of its own, since the two differ from now on.
- **Values.** Each head's values are rotated, and the output projection undoes that: attention only mixes tokens.
- **MLP.** ``silu(gate) * up`` commutes with no rotation. The inputs of the down projection are rotated as they are
  computed, by ``pallas_kernels.hadamard`` (``ModelConfig.down_hadamard``), at every precision.

R is a Hadamard matrix with random signs in QuaRot; :mod:`.principal` makes matrices from calibration text, with which
the channels of the MLP are reordered too. QuaRot's online transform across heads is left out: in a simulation of
SmolLM2-135M, W4A4 drafts diverge no less from W4A16 with it (0.067 nats per token) than with the rotation of each head
alone (0.065). Pure functions of one tensor at a time, under the names of ``model.parameters``.
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
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.parameters import ParameterSpec

_BLOCK_VALUES = 1 << 25  # of a large tensor that are rotated at once, to bound the memory that takes


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
    """The matrices of one model.

    Attributes:
        stream: of the residual stream.
        values: of the values of each key/value head, by layer and head.
        mlp_orders: of the channels between up and down projection, by layer: ``[F]`` old positions. None to keep them.
        down_hadamard: the channels then go through Hadamard transforms.
        hadamard_block: consecutive channels per transform, None for one of them all.
        fold_gains: gains of norms move into the linears after them. Only permutations of the stream work without.
    """

    stream: OrthogonalMatrix
    values: tuple[tuple[OrthogonalMatrix, ...], ...]
    mlp_orders: tuple[np.ndarray, ...] | None = None
    down_hadamard: bool = True
    hadamard_block: int | None = None
    fold_gains: bool = True


def require_unrotated(config: ModelConfig) -> None:
    """Raises UsageError if the model is rotated already."""
    if config.down_hadamard:
        raise UsageError("this model is rotated already; use a recipe that does not rotate, rtn for example")


def rotated_config(config: ModelConfig, *, hadamard_block: int | None = None) -> ModelConfig:
    """The config of the model rotated with folded gains and transforms of ``hadamard_block`` (None: all) channels.

    Raises:
        UsageError: the model is rotated already, or its MLP has a size without a Hadamard matrix.
    """
    require_unrotated(config)
    try:
        core_order(hadamard_block or config.intermediate_size)
    except ValueError as error:
        raise UsageError(f"cannot rotate this model (intermediate_size={config.intermediate_size}): {error}") from error
    changes = {"tie_word_embeddings": False, "down_hadamard": True, "hadamard_block": hadamard_block}
    return dataclasses.replace(config, **changes)


def random_rotation(config: ModelConfig, *, seed: int = 0) -> Rotation:
    """QuaRot's matrices for a model of this shape; the same for the same seed."""
    generator = np.random.default_rng(seed)
    stream, value = (random_orthogonal(size, generator) for size in (config.hidden_size, config.head_dim))
    return Rotation(stream, ((value,) * config.num_kv_heads,) * config.num_layers)


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


def rotate_parameter(
    spec: ParameterSpec,
    tensor: Float[np.ndarray, "*shape"],
    rotation: Rotation,
    *,
    gain: Float[np.ndarray, " D"] | None,
) -> Float32[np.ndarray, "*shape"]:
    """One tensor of the rotated model.

    Args:
        spec: what it is in the rotated model.
        tensor: of the model as it was; for ``lm_head.weight`` the embedding if the two were tied.
        rotation: of the model.
        gain: the tensor that ``spec.norm_before`` names; None if gains are not folded.
    """
    tensor = tensor.astype(np.float32)
    if spec.kind == "norm":
        if spec.stream is None:
            return tensor
        return np.ones(tensor.shape, np.float32) if rotation.fold_gains else rotation.stream(tensor)
    if gain is not None:
        tensor = tensor * gain.astype(np.float32)
    if spec.kind == "embedding":
        return rotation.stream(tensor)  # [V, D], whether it writes the stream or reads it
    if spec.kind == "linear":
        tensor = _rotate_inputs(spec, tensor, rotation)
    return _rotate_outputs(spec, tensor, rotation)


def _rotate_inputs(spec: ParameterSpec, tensor: np.ndarray, rotation: Rotation) -> np.ndarray:
    if spec.stream == "reads":
        return rotation.stream(tensor)
    if spec.part == "attention.output":
        return _per_head(tensor, rotation.values[_layer(spec)])
    if spec.part == "mlp.down":
        if rotation.mlp_orders is not None:
            tensor = tensor[:, rotation.mlp_orders[_layer(spec)]]
        return _by_blocks(lambda rows: hadamard_of_blocks(rows, rotation), tensor)
    return tensor


def _rotate_outputs(spec: ParameterSpec, tensor: np.ndarray, rotation: Rotation) -> np.ndarray:
    if spec.part == "attention.value":
        return _per_head(tensor.T, rotation.values[_layer(spec)]).T
    if spec.part in ("mlp.gate", "mlp.up") and rotation.mlp_orders is not None:
        return tensor[rotation.mlp_orders[_layer(spec)]]
    return rotation.stream(tensor.T).T if spec.stream == "writes" else tensor


def hadamard_of_blocks(x: Float[Array, "*batch F"], rotation: Rotation) -> Float[Array, "*batch F"]:
    """What the channels of the MLP go through before the down projection."""
    if not rotation.down_hadamard:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, rotation.hadamard_block or x.shape[-1])
    return hadamard(blocks, implementation=REFERENCE).reshape(x.shape)


def _per_head(x: np.ndarray, matrices: tuple[OrthogonalMatrix, ...]) -> np.ndarray:
    """The product with each run of a head's values along the last axis; query heads share those of their group."""
    size = matrices[0].signs.size
    heads = x.reshape(*x.shape[:-1], -1, size)
    repeats = heads.shape[-2] // len(matrices)
    rotated = [matrices[head // repeats](heads[..., head, :]) for head in range(heads.shape[-2])]
    return np.stack(rotated, axis=-2).reshape(x.shape)


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


def _layer(spec: ParameterSpec) -> int:
    assert spec.layer is not None, spec.name
    return spec.layer

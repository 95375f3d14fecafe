"""Rotations and orders of channels made from calibration text, so that few groups of a token hold most of it.

A draft in 4 bits gives its widest groups 8 bits (``ActivationQuantization.outlier_groups``). What helps most is
therefore to gather what is loud in few groups, the same in every token:

- :func:`principal_rotation`, after ResQ (Saxena et al., 2024, arXiv 2412.14363): the residual stream is turned onto the
  principal axes of what the norms give, averaged over all layers, and the values of each head onto theirs; channels of
  the MLP are sorted by their energy. Within a group, neighbours on that scale are then mixed by a Hadamard transform,
  which takes the outliers out of the group (the block-wise rotations of DuQuant, Lin et al., 2024, arXiv 2406.01721).
  ResQ mixes whole subspaces, and the channels of the MLP as QuaRot does; on SmolLM2-135M groups diverge less.
- :func:`salience_order`, after Atom (Zhao et al., 2023, arXiv 2310.19102): channels are sorted by their energy and
  nothing is mixed. One order serves the whole residual stream, which has no gather in front of each linear.

Moments, and what is made of them, are float64 in host memory: pure functions of arrays.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float64

from pallas_kernels.hadamard.matrices import hadamard_matrix
from qspec_jax.model.config import ACTIVATION_GROUP, ModelConfig
from qspec_jax.quantization.rotation import OrthogonalMatrix, Rotation, rotated_config


@dataclasses.dataclass(frozen=True)
class ActivationMoments:
    """Means over the tokens of a text.

    Attributes:
        stream: ``x x^T`` of what linears read from the residual stream, summed over them in shares of their energy.
        values: ``v v^T`` of what the output projection reads, by layer and key/value head.
        mlp: the squares of what the down projection reads, by layer.
    """

    stream: Float64[np.ndarray, "D D"]
    values: tuple[Float64[np.ndarray, "KH HD HD"], ...]
    mlp: tuple[Float64[np.ndarray, " F"], ...]


def principal_rotation(moments: ActivationMoments) -> Rotation:
    """Principal axes by decreasing energy, mixed within groups."""
    return Rotation(
        stream=_mixed_principal_axes(moments.stream),
        values=tuple(tuple(map(_mixed_principal_axes, heads)) for heads in moments.values),
        mlp_orders=tuple(map(_descending, moments.mlp)),
        hadamard_block=_block(len(moments.mlp[0])),
    )


def salience_order(moments: ActivationMoments) -> Rotation:
    """Channels by decreasing energy, as permutations."""
    return Rotation(
        stream=_permutation(np.diag(moments.stream)),
        values=tuple(tuple(_permutation(np.diag(head)) for head in heads) for heads in moments.values),
        mlp_orders=tuple(map(_descending, moments.mlp)),
        down_hadamard=False,
        fold_gains=False,
    )


def principal_config(config: ModelConfig) -> ModelConfig:
    """The config of a model rotated by :func:`principal_rotation`.

    Raises:
        UsageError: the model is rotated already.
    """
    return rotated_config(config, hadamard_block=_block(config.intermediate_size))


def _block(size: int) -> int:
    """Neighbours that are mixed: those of a group, or as many as divide ``size``; a power of two."""
    return math.gcd(ACTIVATION_GROUP, size)


def _mixed_principal_axes(moment: Float64[np.ndarray, "n n"]) -> OrthogonalMatrix:
    _, vectors = np.linalg.eigh(moment)
    axes = vectors[:, ::-1].T
    block = _block(len(axes))
    mixing = hadamard_matrix(block) / math.sqrt(block)
    return _dense(np.einsum("ij,bjn->bin", mixing, axes.reshape(-1, block, len(axes))).reshape(axes.shape))


def _permutation(energy: Float64[np.ndarray, " n"]) -> OrthogonalMatrix:
    return _dense(np.eye(len(energy))[_descending(energy)])


def _descending(energy: Float64[np.ndarray, " n"]) -> np.ndarray:
    return np.argsort(-energy, kind="stable")


def _dense(matrix: np.ndarray) -> OrthogonalMatrix:
    return OrthogonalMatrix(np.ones(len(matrix), np.float32), (matrix.astype(np.float32),))

"""The angles of rotary position embedding (Su et al., 2021); ``pallas_kernels.rotate_and_write`` turns by them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from qspec_jax.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Float32[np.ndarray, " half_HD"]:
    """Radians per position of each rotary pair, after the config's scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    return (frequencies * llama3_multipliers(frequencies, scaling)).astype(np.float32)


def llama3_multipliers(
    frequencies: Float[np.ndarray, " half_HD"], scaling: RopeScaling
) -> Float[np.ndarray, " half_HD"]:
    """What ``llama3`` scaling multiplies each frequency by, in the dtype of the frequencies.

    It follows the Llama 3.1 release: wavelengths beyond ``original_max_position_embeddings / low_freq_factor`` are
    stretched by ``factor``, those below ``original_max_position_embeddings / high_freq_factor`` are kept, and those
    between are blended.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep + (1 - keep) / scaling.factor


def rotation(
    positions: Int32[Array, "B T"], frequencies: Float32[np.ndarray, " half_HD"]
) -> tuple[Float32[Array, "B T half_HD"], Float32[Array, "B T half_HD"]]:
    """Cosine and sine of every token's rotation, by pair."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    return jnp.cos(angles), jnp.sin(angles)

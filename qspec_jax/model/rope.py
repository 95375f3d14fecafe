"""The angles of rotary position embedding (Su et al., 2021); ``pallas_kernels.rotate_and_write`` turns by them."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from qspec_jax.model.config import ModelConfig
from qspec_jax.model.rope_scaling import RopeScaling


def inverse_frequencies(config: ModelConfig) -> Float32[np.ndarray, " half_HD"]:
    """Radians per position of each rotary pair, after the config's scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    if scaling.kind == "yarn":
        return (frequencies * _yarn_multipliers(config, scaling)).astype(np.float32)
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


def _yarn_multipliers(config: ModelConfig, scaling: RopeScaling) -> Float32[np.ndarray, " half_HD"]:
    """What ``yarn`` scaling multiplies each frequency by (Peng et al., 2023, section 3.2).

    Pairs that turn more than ``beta_fast`` times over the original length are kept, those that turn less than
    ``beta_slow`` times are stretched by ``factor``, and those between are blended.
    """
    size = config.head_dim

    def pair_that_turns(times: float) -> float:
        turns = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(config.rope_theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    stretched = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1)
    return (1 - stretched) + stretched / np.float32(scaling.factor)


def rotation(
    positions: Int32[Array, "B T"], config: ModelConfig
) -> tuple[Float32[Array, "B T half_HD"], Float32[Array, "B T half_HD"]]:
    """Cosine and sine of every token's rotation, by pair; ``yarn`` scaling stretches both."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config))
    magnitude = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    if magnitude == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * jnp.float32(magnitude), jnp.sin(angles) * jnp.float32(magnitude)

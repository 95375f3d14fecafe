"""The LM head of a checkpoint: as it is stored, or rounded as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.head import head_format
from qspec_jax.weights.codes import rounded
from qspec_jax.weights.placing import parts_of

_QUANTIZED, _FLOATS, _TABLE = "quantized_head", "lm_head", "embedding"


def head_of(quantization: QuantConfig) -> dict[str, int | None]:
    """What a configuration says of the head, as its fields."""
    return {"head_bits": quantization.head_bits, "draft_head": quantization.draft_head}


def check_head(path: Path, config: ModelConfig, stored: QuantConfig, asked: QuantConfig) -> None:
    """Raises UsageError where a head cannot be made of the one that a checkpoint has."""
    has_floats = config.tie_word_embeddings or stored.head_bits is None
    if not has_floats and asked.head_bits != stored.head_bits:
        raise UsageError(
            f"head_bits={asked.head_bits or 16}: the LM head of {path.name} is stored in {stored.head_bits} bits "
            "alone; leave head_bits out, or quantise the model again"
        )


def with_head(
    arrays: Mapping[str, Shaped[np.ndarray, ...]], decoder: Decoder, stored: QuantConfig, asked: QuantConfig
) -> dict[str, Shaped[np.ndarray, ...]]:
    """The arrays of a checkpoint outside of its layers, with the head that was asked for in place of the one stored.

    Args:
        arrays: by name.
        decoder: that they are for.
        stored, asked: of the checkpoint and of ``decoder``, which :func:`check_head` lets through.
    """
    config = decoder.config
    before, wanted = head_format(config, stored), head_format(config, asked)
    made = {name: array for name, array in arrays.items() if before == wanted or not name.startswith(_QUANTIZED)}
    if wanted is not None and before != wanted:
        floats = arrays[_TABLE if config.tie_word_embeddings else _FLOATS]
        weight = rounded(np.asarray(floats, np.float32), wanted)
        made |= {f"{_QUANTIZED}{part}": array for part, array in parts_of(weight).items()}
    if decoder.lm_head is None:
        made.pop(_FLOATS, None)
    return made

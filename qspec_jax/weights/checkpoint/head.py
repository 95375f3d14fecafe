"""The LM head of a checkpoint: as it is stored, or rounded as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.model.config import HeadFields, ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.head import head_format
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import HEAD
from qspec_jax.weights.checkpoint.manifest import Manifest
from qspec_jax.weights.codes import rounded
from qspec_jax.weights.placing import parts_of

_FLOATS, _TABLE = "lm_head", "embedding"


def head_of(quantization: QuantConfig) -> HeadFields:
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


def formats_of(manifest: Manifest, asked: QuantConfig) -> dict[str, WeightFormat]:
    """The formats of a checkpoint for a decoder of ``asked``: a head of other bits has none of the file's own."""
    kept = asked.head_bits == manifest.quantization.head_bits
    return {path: one for path, one in manifest.formats.items() if kept or path != HEAD}


def with_head(
    arrays: Mapping[str, Shaped[np.ndarray, ...]], decoder: Decoder, manifest: Manifest, asked: QuantConfig
) -> dict[str, Shaped[np.ndarray, ...]]:
    """The arrays of a checkpoint outside of its layers, with the head that was asked for in place of the one stored.

    Args:
        arrays: by name.
        decoder: that they are for.
        manifest: of the checkpoint.
        asked: of ``decoder``, which :func:`check_head` lets through.

    Raises:
        CheckpointError: a head cannot be rounded.
    """
    config = decoder.config
    before = head_format(config, manifest.quantization, manifest.formats)
    wanted = head_format(config, asked, formats_of(manifest, asked))
    made = {name: array for name, array in arrays.items() if before == wanted or not name.startswith(HEAD)}
    if wanted is not None and before != wanted:
        floats = arrays[_TABLE if config.tie_word_embeddings else _FLOATS]
        try:
            weight = rounded(np.asarray(floats, np.float32), wanted)
        except UsageError as error:  # the file says so, not an argument
            raise CheckpointError(f"cannot round the LM head: {error}") from error
        made |= {f"{HEAD}{part}": array for part, array in parts_of(weight).items()}
    if decoder.lm_head is None:
        made.pop(_FLOATS, None)
    return made

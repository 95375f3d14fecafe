"""Two sets of weights for one model: the floats of its checkpoint, which verify, and a 4-bit copy, which drafts.

The copy is rounded as the floats are read, or comes from a quantised checkpoint of the same model. What is output
depends on the floats alone; a copy that fits badly costs drafts. So the copy is rounded to symmetric groups as large as
they come: fewer scales to read for each draft, which is worth more than the few drafts that small asymmetric groups
save. Everything but the linears is shared, and is that of the floats: a copy that expects other inputs is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dequantize
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.grid import with_grid_of
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import largest_group_size
from qspec_jax.weights.checkpoint.manifest import is_checkpoint, read_manifest
from qspec_jax.weights.codes import packed
from qspec_jax.weights.fill import weight_formats
from qspec_jax.weights.resolve import open_source
from qspec_jax.weights.source import QuantizedTensor, Source

# Of the config, what decides what linears read and write. Two files of one model may say the rest in two ways.
_COMPARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("rope_theta", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "down_hadamard", "hadamard_block"),
)
_SAMPLES = ("attention.query.weight", "attention.output.weight", "mlp.down.weight")
_SAMPLED_ROWS = 256
_FAR = 0.5  # relative distance from the floats; rounding to 4 bits leaves 0.1 to 0.2, another model 1.4
_CLOSE = 0.02  # of norms and biases, which nobody rounds to less than 8 bits


@dataclasses.dataclass(frozen=True)
class ExactModel:
    """An opened model of which floats and a 4-bit copy are to be loaded.

    Attributes:
        source: of the floats, and of all that is not a linear.
        drafts: of the 4-bit copy; None where it is made of ``source``.
        quantization: of the copy.
        formats: of its linears.
    """

    source: Source
    drafts: Source | None
    quantization: QuantConfig
    formats: Mapping[str, WeightFormat]


def open_exact(path: Path, quantization: QuantConfig | Literal["auto"], draft_path: Path | None = None) -> ExactModel:
    """Opens the two, and checks that they are of one model; reads no more than a few tensors.

    Args:
        path: of the model, as ``resolve_model`` finds it.
        quantization: of the copy where it is rounded, and of draft activations; ``auto`` for what a checkpoint of this
            library says, or symmetric groups as large as fit.
        draft_path: of a quantised checkpoint of the same model; None to round the floats.

    Raises:
        UsageError: the copy is none in 4 bits or of another model, or the linears cannot be rounded so.
        CheckpointError, UnsupportedModelError: a checkpoint cannot be opened.
    """
    source = open_source(path)
    drafts = None if draft_path is None else _open_drafts(draft_path, source)
    copied, copied_path = (source, path) if drafts is None or draft_path is None else (drafts, draft_path)
    if isinstance(quantization, QuantConfig):
        chosen = quantization
    elif is_checkpoint(copied_path):
        chosen = dataclasses.replace(read_manifest(copied_path).quantization, head_bits=None)
    elif any(entry.codes is not None for entry in copied.entries.values()):
        chosen = QuantConfig()  # of linears that are not in codes; the others keep their own grid
    else:
        chosen = QuantConfig(group_size=largest_group_size(source.config), symmetric=True)
    chosen = dataclasses.replace(chosen, bits=4, keep_floats=True)
    if drafts is not None and chosen.head_bits is None:  # else a head of the copy would verify
        source = source.with_head_codes_of(drafts)
    formats = copy_formats(copied, chosen)
    return ExactModel(source, drafts, with_grid_of(chosen, formats, source.config), formats)


def copy_formats(copied: Source, quantization: QuantConfig) -> dict[str, WeightFormat]:
    """The format of each linear of a 4-bit copy of some tensors.

    Raises:
        UsageError: the group size does not divide a linear's inputs.
    """
    formats = weight_formats(copied, quantization)
    assert formats is not None
    # Codes of 8 bits are rounded like floats: nobody would read their lower nibbles.
    return {name: dataclasses.replace(one, bits=4, wide=one.wide and one.bits == 4) for name, one in formats.items()}


def _open_drafts(path: Path, source: Source) -> Source:
    """The checkpoint of a copy, which fits."""
    drafts = open_source(path, floats=False)
    name = f"draft_model={drafts.path.name}"
    if not any(entry.codes is not None for entry in drafts.entries.values()):
        raise UsageError(
            f"{name} has no 4-bit weights; leave it out, for a copy that is rounded as {source.path.name} is read"
        )
    problems = list(_differences(source.config, drafts.config)) or list(_misfits(source, drafts))
    if problems:
        raise UsageError(
            f"{name} does not fit {source.path.name}: {'; '.join(problems)}. Give a 4-bit checkpoint of the same "
            "model, or leave it out, for a copy that is rounded at load"
        )
    return drafts


def _differences(config: ModelConfig, drafts: ModelConfig) -> Iterator[str]:
    """What two configs say differently of the linears."""
    for field in _COMPARED:
        ours, theirs = getattr(config, field), getattr(drafts, field)
        is_same = math.isclose(ours, theirs, rel_tol=1e-5) if isinstance(ours, float) else ours == theirs
        if not is_same:
            yield f"its {field} is {theirs}, not {ours}"


def _misfits(source: Source, drafts: Source) -> Iterator[str]:
    """How what is in the first layer of the copy differs from the floats, where it is the same elsewhere."""
    for name, spec in source.specs.items():
        if spec.layer == 0 and spec.kind in ("norm", "bias"):
            ours, theirs = (_floats(one.read(name)) for one in (source, drafts))
            if not np.allclose(ours, theirs, rtol=_CLOSE, atol=_CLOSE * float(np.abs(ours).max())):
                yield f"its {name} has other values, so that its linears expect other inputs (AWQ, or another model)"
                return
    for name in _SAMPLES:
        ours, theirs = (_floats(one.read(f"layers.0.{name}")) for one in (source, drafts))
        if not np.linalg.norm(theirs - ours) <= _FAR * np.linalg.norm(ours):
            yield f"its layers.0.{name} is no rounding of the same weight (rotated, scaled, or of another model)"
            return


def _floats(tensor: np.ndarray | QuantizedTensor) -> np.ndarray:
    """The first rows of a tensor in float32."""
    if not isinstance(tensor, QuantizedTensor):
        return np.asarray(tensor[:_SAMPLED_ROWS], np.float32)
    rows, columns = slice(_SAMPLED_ROWS), (slice(None), slice(_SAMPLED_ROWS))
    offset = None if tensor.offset is None else tensor.offset[columns]
    some = dataclasses.replace(tensor, codes=tensor.codes[rows], scale=tensor.scale[columns], offset=offset)
    return np.asarray(dequantize(jax.tree.map(jnp.asarray, packed(some))))

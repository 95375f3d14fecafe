"""``qspec.json``: everything a checkpoint says about itself, and the hashes that it is checked against."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qspec_jax.device.sizes import size_text
from qspec_jax.errors import CheckpointError, QSpecError
from qspec_jax.model.config import ActivationQuantization, ModelConfig, QuantConfig, RopeScaling
from qspec_jax.model.grid import with_grid_of
from qspec_jax.model.head import IMPORTED_HEAD
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import HEAD, layer_anatomy

FILE_NAME = "qspec.json"
DATA_PREFIX = "data-"
FORMAT = "qspec-jax checkpoint"
# 1: 4-bit weights and LM heads in floating point alone; 2: 8-bit weights, and LM heads in codes
FORMAT_VERSION = 3  # floats beside a 4-bit copy of them, and LM heads with the codes of Q8_0
_CHECKSUM = "sha256"
_BLOCK_BYTES = 1 << 20
_WRITE_AGAIN = "write the checkpoint again with python -m qspec_jax.quantize, or fetch it again"


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """Of one array: shape, dtype name, and the hash that :func:`hash_array` gives."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Of one file: length and hash of its bytes."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of ``qspec.json``.

    Attributes:
        model: shape and options of the decoder.
        quantization: how draft activations are quantised, and the grid of the weights: read as that of ``formats``, for
            older versions may have written what was asked for instead.
        formats: the format of each linear of a layer, as it is stored, and of an LM head whose codes a file brought.
        recipe: name and settings of what made the weights.
        data: name of the directory that holds arrays and tokenizer.
        tokenizer_eos_token_ids: ending tokens of the tokenizer, None where there is no tokenizer.
        arrays: name (see ``arrays.py``) to record.
        files: path below the data directory to record.
    """

    model: ModelConfig
    quantization: QuantConfig
    formats: Mapping[str, WeightFormat]
    recipe: Mapping[str, Any]
    data: str
    tokenizer_eos_token_ids: tuple[int, ...] | None
    arrays: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord]

    def __repr__(self) -> str:
        return f"Manifest({self.recipe.get('name')}, {len(self.arrays)} arrays, {size_text(self.num_bytes)})"

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.num_bytes for record in self.files.values())

    @property
    def _version(self) -> int:
        """The oldest format that can say all this."""
        if self.quantization.keep_floats or HEAD in self.formats:
            return FORMAT_VERSION
        has_new_codes = any(one.bits == 8 for one in self.formats.values()) or self.quantization.has_quantized_head
        return 2 if has_new_codes else 1

    def to_json(self) -> str:
        """The text of ``qspec.json``, with its own checksum."""
        version = self._version
        content: dict[str, Any] = {"format": FORMAT, "format_version": version, **dataclasses.asdict(self)}
        content["formats"].pop(HEAD, None)  # its arrays say that it is there
        for fields in () if version > 1 else (content["quantization"], *content["formats"].values()):
            for name in ("bits", "head_bits", "draft_head"):  # for versions that know 4 bits and float heads alone
                fields.pop(name, None)
        for fields in content["formats"].values():
            del fields["wide"]  # the records of its arrays say so
        if version < FORMAT_VERSION:
            del content["quantization"]["keep_floats"]  # which older versions do not know
        return json.dumps({_CHECKSUM: checksum(content), **content}, indent=1) + "\n"


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a checkpoint directory; says nothing about its state."""
    return (Path(path) / FILE_NAME).is_file()


def read_manifest(path: Path) -> Manifest:
    """Reads and checks ``qspec.json`` of the directory ``path``; opens no other file.

    Raises:
        CheckpointError: it is missing, damaged, altered, of a newer format, or no such file at all.
    """
    content = read_content(path)
    version = content.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path / FILE_NAME} has no valid format_version ({version!r}); {_WRITE_AGAIN}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written in format {version} by a newer version of qspec-jax; this one reads formats up to "
            f"{FORMAT_VERSION}. Upgrade with pip install --upgrade qspec-jax"
        )
    if content.pop(_CHECKSUM, None) != checksum(content):
        raise CheckpointError(f"{path / FILE_NAME} has been altered: its checksum does not match; {_WRITE_AGAIN}")
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError, QSpecError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path / FILE_NAME} cannot be understood ({reason}); {_WRITE_AGAIN}") from error


def read_content(path: Path) -> dict[str, Any]:
    """The JSON object in ``qspec.json`` of the directory ``path``, known only to be of this format.

    Raises:
        CheckpointError: it is missing, is not JSON, or is of another format.
    """
    file = path / FILE_NAME
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is not a qspec-jax checkpoint: it has no {FILE_NAME}; give a directory that "
            "python -m qspec_jax.quantize wrote"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is truncated or damaged (not valid JSON: {error}); {_WRITE_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a qspec-jax checkpoint: its {FILE_NAME} is something else's")
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order and spacing it is written in."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_array(array: np.ndarray) -> str:
    """SHA-256 of an array's dtype, shape and values in C order."""
    contiguous = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{contiguous.dtype.name}{list(array.shape)}".encode())
    digest.update(contiguous.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _parse(content: dict[str, Any]) -> Manifest:
    """Undoes ``dataclasses.asdict``. Fields with defaults may be missing: older versions did not have them."""
    model: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content["model"].items()
    }
    if model.get("rope_scaling") is not None:
        model["rope_scaling"] = RopeScaling(**model["rope_scaling"])
    quantization: dict[str, Any] = dict(content["quantization"])
    for precision in ("w4a4", "w4a8"):
        quantization[precision] = ActivationQuantization(**quantization[precision])
    eos_token_ids = content["tokenizer_eos_token_ids"]
    data = content["data"]
    if Path(data).name != data or not data.startswith(DATA_PREFIX):
        raise ValueError(f"data={data!r} is not the name of a data directory")
    if outside := [name for name in content["files"] if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"files are outside of the checkpoint: {outside[0]}")
    config = ModelConfig(**model)
    if content["formats"].keys() != layer_anatomy(config).linears.keys():
        raise ValueError(f"formats are of {', '.join(content['formats'])}, not of the linears of a layer")
    arrays = {
        name: ArrayRecord(tuple(fields["shape"]), fields["dtype"], fields["sha256"])
        for name, fields in content["arrays"].items()
    }
    wide = {name for name, record in arrays.items() if name.endswith(".scale") and record.dtype == "float32"}
    wide_linears = {name.split(".", 2)[-1].removesuffix(".weight.scale") for name in wide}
    formats = {name: WeightFormat(**fields, wide=name in wide_linears) for name, fields in content["formats"].items()}
    return Manifest(
        model=config,
        quantization=with_grid_of(QuantConfig(**quantization), formats, config),
        formats=formats | ({HEAD: IMPORTED_HEAD} if f"{HEAD}.offset" in arrays else {}),
        recipe=dict(content["recipe"]),
        data=data,
        tokenizer_eos_token_ids=None if eos_token_ids is None else tuple(eos_token_ids),
        arrays=arrays,
        files={name: FileRecord(**fields) for name, fields in content["files"].items()},
    )

"""A parsed GGUF file (llama.cpp): its metadata, and its tensors in the memory-mapped file.

A tensor that is not read costs nothing. A model that is split into several files is one :class:`GGUFFile`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.errors import CheckpointError, UnsupportedModelError
from qspec_jax.weights.gguf.ends import end_token_ids
from qspec_jax.weights.gguf.parts import check_parts, in_order, is_part, may_be_parts, parts_of
from qspec_jax.weights.listing import piece_remedy
from qspec_jax.weights.tails import warn_of_zero_tail

if TYPE_CHECKING:
    from gguf import ReaderTensor

    from qspec_jax.weights.gguf.reader import Reader

# Mistral files say "llama".
HF_ARCHITECTURE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What a file that is not GGUF may be instead, by how it begins.
_OTHER_FORMATS = {
    b"vers": "a Git LFS pointer; run `git lfs pull` for the file itself",
    b"tjgg": "a GGML file of 2023 (ggjt), which is not read; convert the model anew",
    b"fmgg": "a GGML file of 2023 (ggmf), which is not read; convert the model anew",
    b"lmgg": "a GGML file of 2023 (ggml), which is not read; convert the model anew",
}
_VERSIONS = (2, 3)

_open_files: weakref.WeakValueDictionary[tuple, GGUFFile] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """A parsed GGUF file: all metadata decoded, all tensors mapped.

    Attributes:
        path: of the file, or of the first of its parts.
        metadata: key to number, string, bool, or list of these.
        tensors: name to tensor, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Parses ``path``, or returns the object that still exists for the same unchanged file.

        Raises:
            CheckpointError: the file cannot be read, is not GGUF, or is damaged, or is a part of a model and others
                are missing or are of another model.
            UnsupportedModelError: it is of a version, or has tensors of a type, that is not read.

        Warns:
            CheckpointWarning: a file ends in zeros.
        """
        parts = parts_of(Path(path))
        try:
            status = [part.stat() for part in parts]
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        key = (str(parts[0].resolve()), *((one.st_mtime_ns, one.st_size) for one in status))
        file = _open_files.get(key)
        if file is None:
            file = _open_files[key] = _joined([_parse(part) for part in parts])
            for part in parts:
                warn_of_zero_tail(part)
        return file

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            UnsupportedModelError: it is not supported.
        """
        architecture = self.metadata.get("general.architecture")
        if (kind := self.metadata.get("general.type", "model")) != "model":
            raise UnsupportedModelError(f"{self.path} is a GGUF file of type {kind!r}, not a model; give the model's")
        if not isinstance(architecture, str) or architecture not in HF_ARCHITECTURE:
            raise UnsupportedModelError(
                f"{self.path}: GGUF architecture {architecture!r} is not supported; supported: "
                f"{', '.join(HF_ARCHITECTURE)} (Mistral files say llama)"
            )
        return architecture

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text or a turn."""
        return end_token_ids(self.metadata)


def _joined(parts: list[GGUFFile]) -> GGUFFile:
    """The parts of a model as one file."""
    if len(parts) == 1 and is_part(parts[0].metadata):
        parts = _renamed_parts(parts[0])
    metadata = [part.metadata for part in parts]
    check_parts([part.path for part in parts], metadata, [list(part.tensors) for part in parts])
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return dataclasses.replace(parts[0], tensors=tensors)


def _renamed_parts(part: GGUFFile) -> list[GGUFFile]:
    """The parts of a split whose names say nothing, in their order; the one alone if they are not all beside it."""
    found = {part.path: part}
    for path in may_be_parts(part.path):
        if path not in found:
            with contextlib.suppress(CheckpointError, UnsupportedModelError):  # then it is no part
                found[path] = _parse(path)
    return [found[path] for path in in_order({path: file.metadata for path, file in found.items()}, part.path)]


def _parse(path: Path) -> GGUFFile:
    from qspec_jax.weights.gguf.reader import Reader

    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; give the path of a GGUF file or of a model's directory")
    try:
        with path.open("rb") as stream:
            beginning = stream.read(8)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    _check_beginning(path, beginning)
    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    except Exception as error:
        # The reader takes slices without checking them: what it raises on a cut-off file is accidental.
        reason = f"{type(error).__name__}: {error}"
        if (remedy := piece_remedy(path)) is not None:
            raise CheckpointError(f"{path} cannot be read: {remedy}") from error
        raise CheckpointError(f"{path} is truncated or damaged; fetch the file again ({reason})") from error
    _check_spans(path, reader)
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def _check_spans(path: Path, reader: Reader) -> None:
    """Raises CheckpointError unless tensors follow one another, each padded, as llama.cpp demands (``gguf.cpp``)."""
    end = int(reader.data_offset)
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        if (start := int(tensor.data_offset)) != end:
            what = "overlaps the one before" if start < end else f"leaves {start - end} bytes before it unused"
            raise CheckpointError(f"{path} is damaged: tensor {tensor.name} {what}; fetch the file again")
        end += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(reader.alignment)


def _check_beginning(path: Path, beginning: bytes) -> None:
    magic, version = beginning[:4], int.from_bytes(beginning[4:8], "little")
    if magic in _OTHER_FORMATS:
        raise CheckpointError(f"{path} is not a GGUF file: it is {_OTHER_FORMATS[magic]}")
    if not magic:
        raise CheckpointError(f"{path} is not a GGUF file: it is empty; fetch the file again")
    if magic != b"GGUF" and (remedy := piece_remedy(path)) is not None:
        raise CheckpointError(f"{path} does not begin as a GGUF file does: {remedy}")
    if magic != b"GGUF":
        is_of_directory = path.suffix in (".safetensors", ".json", ".bin") or (path.parent / "config.json").exists()
        hint = f"; for a model of several files give its directory, {path.parent}" if is_of_directory else ""
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'{hint}")
    if len(beginning) < 8 or version in _VERSIONS:
        return
    if version & 0xFFFF == 0:
        raise UnsupportedModelError(f"{path} is a big-endian GGUF file; supported: little-endian")
    if version < 100:
        raise UnsupportedModelError(
            f"{path} is a GGUF file of version {version}; supported: {', '.join(map(str, _VERSIONS))}. Convert the "
            "model anew with a llama.cpp of today"
        )

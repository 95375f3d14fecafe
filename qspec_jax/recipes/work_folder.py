"""Finished parts of a long quantisation on disk, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from pallas_kernels import Layout, QuantizedWeight, unpack_codes, unpack_nested, with_layout
from qspec_jax.errors import CheckpointError
from qspec_jax.weights.checkpoint.save import layers_prefix
from qspec_jax.weights.placing import parts_of
from qspec_jax.weights.source import QuantizedTensor, Source

Part = int | Literal["head"]  # a layer by its number, or the LM head


class WorkFolder:
    """Finished layers and LM head on disk, beside the checkpoint that they will become, or in it where nobody may write
    beside it.

    A file is written under another name, flushed and renamed: there is a whole one or none. The folder is made when
    the first layer is written.
    """

    def __init__(self, output: Path, key: str) -> None:
        """Of the checkpoint ``output``, for a run that ``key`` identifies."""
        beside = output.parent / f"{layers_prefix(output)}{key}"
        may = beside.exists() or not output.is_dir() or os.access(output.parent, os.W_OK | os.X_OK)
        self.path = beside if may else output / beside.name

    def num_finished(self) -> int:
        """How many layers are there."""
        return len(list(self.path.glob("layer-*.npz")))

    def has(self, part: Part) -> bool:
        """Whether a part is finished."""
        return self._file(part).exists()

    def write(self, part: Part, linears: Mapping[str, QuantizedWeight]) -> None:
        """Keeps a finished part.

        Raises:
            CheckpointError: it cannot be written.
        """
        arrays = {}
        for name, weight in linears.items():
            weight = with_layout(weight, Layout.PLANES)
            arrays |= {f"{name}{suffix}": np.asarray(array) for suffix, array in parts_of(weight).items()}
        file = self._file(part)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with file.with_suffix(".unfinished").open("wb") as stream:
                np.savez(stream, **arrays)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(stream.name, file)
        except OSError as error:
            raise CheckpointError(
                f"cannot keep {_name(part)} in {file}: {error.strerror}; the same command goes on with the layers "
                "before it"
            ) from error

    def read(self, part: Part, linear: str, rows: slice) -> QuantizedTensor:
        """Some rows of a linear of a finished part.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        file = self._file(part)
        try:
            with file.open("rb") as stream, np.load(stream) as arrays:
                packed, scale = arrays[f"{linear}.packed"][rows], arrays[f"{linear}.scale"][:, rows]
                offset = arrays[f"{linear}.offset"][:, rows] if f"{linear}.offset" in arrays else None
                low = jnp.asarray(arrays[f"{linear}.low"][rows]) if f"{linear}.low" in arrays else None
        except zipfile.BadZipFile as error:
            raise ValueError(f"{file} is damaged ({error}); remove it and run the same command again") from error
        codes = unpack_codes(jnp.asarray(packed)) if low is None else unpack_nested(jnp.asarray(packed), low)
        return QuantizedTensor(np.asarray(codes), scale, offset, bits=4 if low is None else 8)

    def _file(self, part: Part) -> Path:
        return self.path / f"{f'layer-{part:04}' if isinstance(part, int) else part}.npz"


def _name(part: Part) -> str:
    return f"layer {part}" if isinstance(part, int) else f"the {part}"


def remove_work_folders(output: Path) -> None:
    """Removes what is left of any run that was to write the checkpoint ``output``."""
    for folder in _folders(output):
        shutil.rmtree(folder, ignore_errors=True)


def kept_bytes(output: Path) -> int:
    """What runs that were to write the checkpoint ``output`` have left on disk."""
    return sum(file.stat().st_size for folder in _folders(output) for file in folder.glob("*.npz"))


def _folders(output: Path) -> Iterator[Path]:
    for place in (output.parent, output):
        yield from place.glob(f"{glob.escape(layers_prefix(output))}*")


def fingerprint(source: Source, tokens: Int32[np.ndarray, "windows T"], settings: Mapping[str, Any]) -> str:
    """A key of all that the layers of a run depend on: the model's files by name, size and time, text and settings.

    Hidden files are none of a model's: a download leaves some, and a writer of a checkpoint that was killed.
    """
    files = [source.path] if source.path.is_file() else sorted(source.path.rglob("*"))
    files = [file for file in files if not any(part[0] == "." for part in file.relative_to(source.path).parts)]
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    described = json.dumps([states, dataclasses.asdict(source.config), list(tokens.shape), dict(settings)])
    return hashlib.sha256(described.encode() + tokens.tobytes()).hexdigest()[:16]

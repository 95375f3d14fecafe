"""Opens a checkpoint and restores a decoder from it, checked on the way.

Opening checks everything but the arrays: version, config, presence and length of all files, hashes of the
small ones. Restoring reads a few layers at a time into host memory, compares the hash of each array with the
manifest, and puts it onto its device, or into its place in a stack of layers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qspec_jax.device.memory import explain_out_of_memory
from qspec_jax.device.sizes import size_text
from qspec_jax.errors import CheckpointError
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.decoder import Decoder
from qspec_jax.tokenizer.tokenizer import Tokenizer
from qspec_jax.weights.checkpoint.arrays import MODEL_GROUP, dtype_fits, expected_shapes, fill, group_of
from qspec_jax.weights.checkpoint.head import formats_of, with_head
from qspec_jax.weights.checkpoint.manifest import Manifest, hash_array, hash_file, read_manifest
from qspec_jax.weights.checkpoint.plain_path import plain_path
from qspec_jax.weights.placing import Placing
from qspec_jax.weights.tokenizers import load_tokenizer

_SMALL_BYTES = 1 << 20
_MAX_LISTED = 8
_DEFAULT = Placing()
_REMEDY = "fetch the checkpoint again, or write it again with python -m qspec_jax.quantize"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. Made by :func:`open_checkpoint`.

    Attributes:
        path: of the directory.
        manifest: what it says about itself.
    """

    path: Path
    manifest: Manifest

    @property
    def data(self) -> Path:
        """The directory of arrays and tokenizer."""
        return self.path / self.manifest.data

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None if the model was saved without one.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        ending = self.manifest.tokenizer_eos_token_ids
        return None if ending is None else load_tokenizer(self.data / "tokenizer", eos_token_ids=ending)

    def read_group(self, group: str) -> dict[str, np.ndarray]:
        """Reads and checks the arrays of one group.

        Raises:
            CheckpointError: they cannot be read, or are not those that were written.
        """
        names = [name for name in self.manifest.arrays if group_of(name) == group]
        try:
            arrays = _read_arrays(self.data / "arrays" / group, names)
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise everything
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise CheckpointError(
                f"{self.path}: cannot read the arrays of {group}: {self._changed_files(group)}{_REMEDY} "
                f"({type(error).__name__}: {reason})"
            ) from error
        with ThreadPoolExecutor() as pool:
            as_written = pool.map(lambda name: self._is_as_written(name, arrays[name]), names)
            altered = [name for name, is_as_written in zip(names, as_written, strict=True) if not is_as_written]
        if altered:
            raise CheckpointError(
                f"{self.path}: altered since it was written (hash mismatch): {_listed(altered)}; {_REMEDY}"
            )
        return arrays

    def _is_as_written(self, name: str, array: np.ndarray) -> bool:
        return hash_array(array) == self.manifest.arrays[name].sha256

    def _changed_files(self, group: str) -> str:
        prefix = f"arrays/{group}/"
        changed = [name for name in self.manifest.files if name.startswith(prefix) and self._problem(name, full=True)]
        return f"altered files: {_listed(changed)}; " if changed else ""

    def _problem(self, name: str, *, full: bool) -> str | None:
        """What is wrong with a file; its hash is taken if it is small, or if ``full``."""
        record, file = self.manifest.files[name], self.data / name
        try:
            size = file.stat().st_size
            if size != record.num_bytes:
                how = "truncated" if size < record.num_bytes else "too long"
                return f"{how}: {name} ({size} of {record.num_bytes} bytes)"
            if (full or size <= _SMALL_BYTES) and hash_file(file) != record.sha256:
                return f"altered: {name} (hash mismatch)"
        except FileNotFoundError:
            return f"missing: {name}"
        except OSError as error:
            return f"unreadable: {name} ({error.strerror})"
        return None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a directory that :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: it is no such directory, of a newer format, incomplete, damaged, or contradicts itself.
    """
    path = Path(os.path.abspath(path))
    checkpoint = Checkpoint(path, read_manifest(path))
    if problems := [found for name in checkpoint.manifest.files if (found := checkpoint._problem(name, full=False))]:
        raise CheckpointError(f"{path} is damaged: {_listed(problems)}; {_REMEDY}")
    _check_arrays(path, checkpoint.manifest)
    return checkpoint


def restore_decoder(
    checkpoint: Checkpoint,
    *,
    quantization: QuantConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    kernels: str | None = None,
    scan_layers: bool = True,
    placing: Placing = _DEFAULT,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Decoder:
    """Restores the decoder, with its weights bit for bit as they were saved.

    Args:
        checkpoint: an opened one.
        quantization: how draft activations are quantised, and whether floats that it has beside a 4-bit copy are read;
            None for what is stored with the weights.
        dtype: of everything that is not quantised.
        kernels: implementation name for the matmuls, None for the best that works.
        scan_layers: see ``Decoder``; independent of how the saved model was arranged.
        placing: puts each array where it belongs: the default device, or a mesh.
        progress: wraps the iteration over the parts of the model.

    Raises:
        CheckpointError: an array cannot be read, or is not the one that was written.
        OutOfMemoryError: the model does not fit; raised before reading where that can be told.
    """
    manifest, name = checkpoint.manifest, checkpoint.path.name
    quantization = quantization or manifest.quantization
    decoder = placing.whole(
        manifest.model,
        quantization=quantization,
        formats=formats_of(manifest, quantization),
        dtype=dtype,
        scan_layers=scan_layers,
        kernels=kernels,
    )
    placing.check_memory(decoder, name=name)

    def read_group(group: str) -> dict[str, np.ndarray]:
        arrays = checkpoint.read_group(group)
        return with_head(arrays, decoder, manifest, quantization) if group == MODEL_GROUP else arrays

    size = size_text(placing.num_bytes(decoder))
    with explain_out_of_memory(f"while restoring {name}, whose weights take {size}"):
        fill(decoder, read_group, placing, progress)
        return jax.block_until_ready(placing.finished(decoder))


def _read_arrays(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, plain_path(folder) as plain:
        return checkpointer.restore(plain, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _check_arrays(path: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless the arrays listed are those of the config."""
    expected = expected_shapes(manifest.model, quantization=manifest.quantization, formats=manifest.formats)
    problems = [f"{name} is missing" for name in expected if name not in manifest.arrays]
    problems += [f"{name} is unknown" for name in manifest.arrays if name not in expected]
    for name, record in manifest.arrays.items():
        if name in expected and record.shape != expected[name]:
            problems.append(f"{name} is {list(record.shape)}, expected {list(expected[name])}")
        if not dtype_fits(name, record):
            problems.append(f"{name} is {record.dtype}")
    if problems:
        raise CheckpointError(f"{path}: its arrays do not fit its config: {_listed(problems)}; {_REMEDY}")


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more

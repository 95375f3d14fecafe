"""Writes a checkpoint so that whoever opens it, whenever, finds a complete one.

All files are written into a temporary directory and flushed to disk. For a new directory it lies beside that, and is
renamed into place. In a directory that is there already, empty or a checkpoint, it lies within, since that may be a
disk of its own: the new data directory is moved in beside the old one, ``qspec.json`` is replaced, which is the step
that counts, and the old data are removed. What a process that was killed left behind is removed by the next one that
writes there. Two at once to one place are not supported: who calls holds the lock of :mod:`qspec_jax.files.lock`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from qspec_jax.device.sizes import size_text
from qspec_jax.errors import CheckpointError, UsageError
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.decoder import Decoder, num_bytes
from qspec_jax.model.grid import formats_in, with_grid_of
from qspec_jax.model.head import IMPORTED_HEAD
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import HEAD, layer_anatomy
from qspec_jax.weights.checkpoint.arrays import group_names, keeps_floats, stored_arrays
from qspec_jax.weights.checkpoint.late_errors import OS_ERROR, WRITING, LateErrors
from qspec_jax.weights.checkpoint.manifest import (
    DATA_PREFIX,
    FILE_NAME,
    ArrayRecord,
    FileRecord,
    Manifest,
    hash_array,
    hash_file,
    is_checkpoint,
    read_content,
)
from qspec_jax.weights.checkpoint.plain_path import plain_path

if TYPE_CHECKING:
    from qspec_jax.tokenizer.tokenizer import Tokenizer

ARRAYS, TOKENIZER = "arrays", "tokenizer"
_DATA_NAME = re.compile(DATA_PREFIX + r"[0-9a-f]{16}")
_METADATA_BYTES = 1 << 20  # what Orbax and the tokenizer add, generously
_LOOKS, _LOOKS_WITHOUT, _PAUSE_S = 500, 10, 0.02  # at whether what was removed is made anew
_late_errors = LateErrors()
_NO_RECIPE: Mapping[str, Any] = {"name": "unknown"}


def save_checkpoint(
    path: str | os.PathLike[str],
    decoder: Decoder,
    *,
    tokenizer: Tokenizer | None,
    quantization: QuantConfig | None,
    recipe: Mapping[str, Any] = _NO_RECIPE,
    overwrite: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Manifest:
    """Writes a quantised model as a checkpoint directory.

    Args:
        path: of the directory.
        decoder: with quantised weights, and maybe their floats besides, in either arrangement of its layers. Floats
            are written exactly, and what lies on a mesh as if it lay on one device.
        tokenizer: of the model, if it has one.
        quantization: of the decoder; the grid that is recorded is that of its weights.
        recipe: ``name`` and settings of what made the weights, as JSON values; only recorded.
        overwrite: replace a checkpoint that is there. It stays what it is until the new one is complete.
        progress: wraps the iteration over the parts of the model.

    Returns:
        what was written into ``qspec.json``.

    Raises:
        UsageError: the weights are floating point, in part or all, or on devices of several processes, or there is a
            checkpoint and ``overwrite`` is not set.
        CheckpointError: something else is in the way, the disk is too small, or a file cannot be written.
    """
    if quantization is None:
        raise UsageError("only quantised weights are saved; load the model with a QuantConfig")
    if jax.process_count() > 1:
        raise UsageError("a model is saved by one process, and this is one of several; load and save it in one alone")
    path, formats = Path(os.path.realpath(path)), _formats(decoder)
    check_destination(path, num_bytes(decoder), overwrite=overwrite)
    try:
        with _late_errors.silenced(), _temporary_directory(path) as temporary:
            data = temporary / f"{DATA_PREFIX}{secrets.token_hex(8)}"
            arrays = _write_arrays(data / ARRAYS, decoder, progress)
            if tokenizer is not None:
                tokenizer.save(data / TOKENIZER)
            manifest = Manifest(
                model=decoder.config,
                quantization=with_grid_of(quantization, formats, decoder.config),
                formats=formats,
                recipe=recipe,
                data=data.name,
                tokenizer_eos_token_ids=None if tokenizer is None else tokenizer.eos_token_ids,
                arrays=arrays,
                files=_describe_files(data),
            )
            (temporary / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
            _flush(temporary)
            _commit(temporary, path, data.name)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
    return manifest


def check_destination(path: str | os.PathLike[str], needed_bytes: int, *, overwrite: bool) -> None:
    """Checks, before anything long is started, that a checkpoint can be written.

    Args:
        path: of the directory.
        needed_bytes: of the model's arrays.
        overwrite: replacing a checkpoint is wanted.

    Raises:
        UsageError: there is a checkpoint, and ``overwrite`` is not set.
        CheckpointError: something else is there, the disk is too small, or nobody can write there.
    """
    path = Path(os.path.realpath(path))
    try:
        is_taken = path.exists() and not _is_empty(path)
    except OSError as error:  # its name is too long, or nobody may look into it
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; give another path"
        ) from error
    if is_taken:
        if not is_checkpoint(path):
            raise CheckpointError(
                f"{path} exists and is not a qspec-jax checkpoint, so it is not overwritten; give another path, or "
                "remove it yourself"
            )
        read_content(path)
        if not overwrite:
            raise UsageError(f"{path} is a checkpoint already; give another path, or --overwrite (overwrite=True)")
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = (
            "cannot be written (its disk is read-only, or this user may not)" if parent.is_dir() else "is no directory"
        )
        raise CheckpointError(f"cannot write the checkpoint {path}: {parent} {why}; give another path")
    _try_out(path, parent)
    free = shutil.disk_usage(parent).free
    if needed_bytes + _METADATA_BYTES > free:
        kept = "; a checkpoint is only removed after its successor is complete" if is_checkpoint(path) else ""
        raise CheckpointError(
            f"the checkpoint {path} needs up to {size_text(needed_bytes + _METADATA_BYTES)} and {parent} has "
            f"{size_text(free)} free"
            f"{kept}; free space, or give a path on another disk"
        )


def _try_out(path: Path, folder: Path) -> None:
    """Makes a directory as the writer of a checkpoint does, and removes it: what is in its way is in all of its ways.

    Raises:
        CheckpointError: it cannot be made, or what is at ``path`` could not be replaced.
    """
    try:
        if path.is_symlink():  # one that leads nowhere else
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        made = folder / _temporary_name(path)
        made.mkdir()
        made.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; give another path"
        ) from error


def _is_empty(path: Path) -> bool:
    """Whether a directory has nothing but what a disk has at first, and what a writer that was killed left there."""
    return path.is_dir() and all(
        file.name == "lost+found"
        or file.name.startswith((_temporary_prefix(path), layers_prefix(path)))
        or _DATA_NAME.fullmatch(file.name)
        for file in path.iterdir()
    )


def _formats(decoder: Decoder) -> dict[str, WeightFormat]:
    """The format of each linear of a layer, and of a head that has its file's codes."""
    formats = formats_in(decoder)
    if in_float := [name for name in layer_anatomy(decoder.config).linears if name not in formats]:
        raise UsageError(
            f"only quantised weights are saved, and {in_float[0]} is floating point; load with a QuantConfig"
        )
    head = None if decoder.quantized_head is None else decoder.quantized_head.get_value()
    return formats if head is None or head.symmetric else {**formats, HEAD: IMPORTED_HEAD}


def _write_arrays(folder: Path, decoder: Decoder, progress: Callable[[Iterable], Iterable]) -> dict[str, ArrayRecord]:
    import orbax.checkpoint as ocp

    records: dict[str, ArrayRecord] = {}
    # Uncompressed: codes and scales do not shrink, and reading is then the disk's own speed.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    folder.mkdir(parents=True)
    with ocp.Checkpointer(handler) as checkpointer, ThreadPoolExecutor() as pool, plain_path(folder) as plain:
        for group in progress(group_names(decoder.config, keep_floats=keeps_floats(decoder))):
            arrays = stored_arrays(decoder, group)
            hashes = pool.map(hash_array, arrays.values())  # while they are written
            with _errors_of_the_system():
                checkpointer.save(plain / group, args=ocp.args.PyTreeSave(arrays))
            for (name, array), its_hash in zip(arrays.items(), hashes, strict=True):
                records[name] = ArrayRecord(array.shape, array.dtype.name, its_hash)
    return records


@contextlib.contextmanager
def _errors_of_the_system() -> Generator[None]:
    """Raises what TensorStore reports of a full disk as the OSError that it is, which Orbax logs with tracebacks."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    except (ValueError, RuntimeError) as error:
        code = OS_ERROR.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    finally:
        logger.disabled = before


def _describe_files(data: Path) -> dict[str, FileRecord]:
    files = [file for file in sorted(data.rglob("*")) if file.is_file()]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_file, files))
    return {
        file.relative_to(data).as_posix(): FileRecord(file.stat().st_size, its_hash)
        for file, its_hash in zip(files, hashes, strict=True)
    }


def _commit(temporary: Path, path: Path, data: str) -> None:
    """Puts what is complete in its place; the last step but cleaning up is one that cannot be half done."""
    if not path.exists():
        os.rename(temporary, path)
        _flush_directory(path.parent)
        return
    os.rename(temporary / data, path / data)
    _flush_directory(path)
    os.replace(temporary / FILE_NAME, path / FILE_NAME)
    _flush_directory(path)
    _remove_other_data(path, keep=data)


def _remove_other_data(path: Path, *, keep: str) -> None:
    for folder in path.glob(f"{DATA_PREFIX}*"):
        if folder.name != keep and _DATA_NAME.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}{WRITING}"


def _temporary_name(path: Path) -> str:
    return f"{_temporary_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}"


def layers_prefix(path: Path) -> str:
    """How folders begin that a long quantisation keeps finished layers in, for a checkpoint at some path."""
    return f".{path.name}.layers-"


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Generator[Path]:
    """A directory on the disk of ``path`` that is gone afterwards, unless it was renamed or this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = _temporary_prefix(path)
    for folder in (path, path.parent):
        for left in folder.glob(f"{glob.escape(prefix)}*"):
            if not _is_running(left.name.removeprefix(prefix).split("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
    temporary = (path if path.exists() else path.parent) / _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        _remove_for_good(temporary)
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _remove_for_good(folder: Path) -> None:
    """Removes a directory that threads of TensorStore may go on writing into, and make anew, after one has failed."""
    looks_without = 0
    for _ in range(_LOOKS):
        looks_without = 0 if folder.exists() else looks_without + 1
        if looks_without == _LOOKS_WITHOUT:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_PAUSE_S)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def _flush(folder: Path) -> None:
    """Writes every file and directory below through to the disk."""
    for current, _, files in os.walk(folder):
        for file in files:
            descriptor = os.open(os.path.join(current, file), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _flush_directory(Path(current))


def _flush_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

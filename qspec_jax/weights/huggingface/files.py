"""The files of a Hugging Face directory: which of them hold the weights, and the safetensors format.

Only the headers are read up front. They are parsed here: the format is eight bytes of length and a JSON
object, and the safetensors library needs another framework for bfloat16. PyTorch pickles are not read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qspec_jax.errors import CheckpointError, CheckpointWarning
from qspec_jax.weights.listing import missing_weights, safetensors_files
from qspec_jax.weights.source import StoredTensor

_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        raw = path.read_bytes()
        if raw.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer; run `git lfs pull` for the file itself")
        parsed = json.loads(raw)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__}, not an object; fetch the file again")
    return parsed


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the model: the one file that holds it, else those of its index, else all there are.

    As in transformers the one file comes first. It does not where it lacks tensors that the index places in shards
    which are all there.

    Raises:
        CheckpointError: there are none, or some are missing, or there are several models.
        UnsupportedModelError: there are weights of another format only.

    Warns:
        CheckpointWarning: there are other weights too.
    """
    files = _chosen_files(path)
    names = {file.name for file in files}
    if left := [file.name for file in safetensors_files(path) if file.name not in names]:
        read = files[0].name if len(files) == 1 else f"{len(files)} shards of {_INDEX}"
        listed = ", ".join(left[:8])
        warnings.warn(
            f"{path} holds more weights than the model's: {read} read, {listed} left out; remove what is older",
            CheckpointWarning,
            stacklevel=2,
        )
    return files


def _chosen_files(path: Path) -> list[Path]:
    single, index = path / _SINGLE, path / _INDEX
    if not index.exists():
        return [single] if single.exists() else _files_without_index(path)
    weight_map: dict[str, str] = {}
    try:
        weight_map = _read_index(index)
        shards = _shards_of(path, weight_map)
    except CheckpointError:
        if single.exists():
            return [single]
        if any(os.path.isfile(path / name) for name in weight_map.values()) or not (
            weight_map and safetensors_files(path)
        ):
            raise
        return _files_without_index(path)  # the index is of other files than these
    if not single.exists() or single in shards:
        return shards
    held = {tensor.name for tensor in stored_tensors(single)}
    return [single] if held >= weight_map.keys() else shards


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and weight_map
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; fetch it again")
    if outside := sorted({name for name in weight_map.values() if not re.fullmatch(r"[^/\\\0]+", name)}):
        raise CheckpointError(f"{index} names {outside[0]!r}, which is no file of its directory; fetch it again")
    return weight_map


def _shards_of(path: Path, weight_map: dict[str, str]) -> list[Path]:
    files = [path / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} shards named in {_INDEX} are missing: "
            f"{', '.join(missing[:8])}; fetch them again"
        )
    return files


def _files_without_index(path: Path) -> list[Path]:
    files = safetensors_files(path)
    if not files:
        raise missing_weights(path, "has a config.json but no *.safetensors; fetch the weights too")
    names = {file.name for file in files}
    models: dict[str, list[Path]] = {}
    for file in files:
        matched = _SHARD.fullmatch(file.name)
        models.setdefault(f"{matched[1]}*-of-{matched[3]}.safetensors" if matched else file.name, []).append(file)
        if matched is not None:
            _refuse_missing_shards(path, matched, names)
    _refuse_several_models(path, models)
    return files


def _refuse_missing_shards(path: Path, matched: re.Match[str], names: Collection[str]) -> None:
    expected = [f"{matched[1]}{part:05}-of-{matched[3]}.safetensors" for part in range(1, int(matched[3]) + 1)]
    if missing := [name for name in expected if name not in names]:
        listed = ", ".join(missing[:8])
        raise CheckpointError(f"{path}: {len(missing)} of {len(expected)} shards are missing: {listed}; fetch them")


def _refuse_several_models(path: Path, models: Mapping[str, Sequence[Path]]) -> None:
    """Raises CheckpointError if files that are not shards of one another hold tensors of the same name."""
    owners: dict[str, str] = {}
    for model, files in models.items() if len(models) > 1 else ():
        for name in [tensor.name for file in files for tensor in stored_tensors(file)]:
            if (other := owners.setdefault(name, model)) != model:
                raise CheckpointError(
                    f"{path} holds weights more than once: {name} is in {other} and in {model}; remove one of them"
                )


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """The tensors that a safetensors file lists.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    header, data_start = _read_header(file)
    data_bytes, spans = file.stat().st_size - data_start, []
    for name, description in header.items():
        if name != "__metadata__":
            tensor, span = _stored_tensor(file, name, description, data_start, data_bytes)
            spans.append(span)
            yield tensor
    _check_spans(file, spans, data_bytes)


def _check_spans(file: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    """Raises CheckpointError unless tensors follow one another up to the end, as the format demands."""
    end = 0
    for start, next_end in [*sorted(spans), (data_bytes, data_bytes)]:
        if start != end:
            what = "overlap" if start < end else f"leave a gap of {start - end} bytes"
            raise CheckpointError(f"{file} is damaged: its tensors {what} at byte {start} of its data; fetch it again")
        end = next_end


def _stored_tensor(
    file: Path, name: str, description: Any, data_start: int, data_bytes: int
) -> tuple[StoredTensor, tuple[int, int]]:
    """The tensor, and where its bytes lie in the data."""
    try:
        dtype_name, shape = description["dtype"], tuple(int(size) for size in description["shape"])
        start, end = (int(offset) for offset in description["data_offsets"])
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {list(shape)}")
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: the header is damaged at tensor {name}; fetch the file again") from error
    if not 0 <= start <= end <= data_bytes:
        raise CheckpointError(
            f"{file} is truncated: its header places {name} at bytes {start} to {end} of its data, which are "
            f"{data_bytes} bytes; fetch the file again"
        )
    dtype = _DTYPES.get(str(dtype_name))
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: the header is damaged: {name} is {dtype_name} {list(shape)} but takes {end - start} bytes"
        )
    read = functools.partial(_read_tensor, file, dtype or np.dtype(np.uint8), shape, data_start + start)
    return StoredTensor(name, str(dtype_name), shape, read), (start, end)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data start."""
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer; run `git lfs pull` for the file itself")
            if len(prefix) < 8 or not 0 < length <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} is truncated or is not a safetensors file; fetch the file again")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if len(raw) < length:
        raise CheckpointError(f"{file} is truncated within its header; fetch the file again")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}; fetch the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object; fetch the file again")
    return header, 8 + length


def _read_tensor(file: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Reads one tensor, in the dtype of the file."""
    flat = np.fromfile(file, dtype, count=math.prod(shape), offset=offset)
    return flat.reshape(shape)  # ValueError if the file has become shorter since its header was read

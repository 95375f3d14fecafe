"""Which GGUF files make up a model: one, or the parts that llama.cpp's ``gguf-split`` cuts it into.

The parts are named ``NAME-00001-of-00003.gguf``; the first has the metadata, and each says which part it is. Beside a
model there may be files that are none: a projector of images (mmproj), an importance matrix, an adapter.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qspec_jax.errors import CheckpointError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_NO_MODEL = re.compile(rb"general\.type\x08\0\0\0.\0\0\0\0\0\0\0(mmproj|imatrix|adapter)", re.DOTALL)
_BEGINNING = 1 << 16  # bytes among which a file says what it is
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


def model_files(directory: Path) -> list[Path]:
    """The models of a directory, each by its one file or by the first of its parts that is there."""
    models: dict[str, Path] = {}
    for file in sorted(directory.glob("*.gguf")):
        matched = _PART.fullmatch(file.name)
        if _is_model(file):
            models.setdefault(f"{matched[1]} {matched[3]}" if matched else file.name, file)
    return list(models.values())


def _is_model(file: Path) -> bool:
    if "mmproj" in file.name.lower():
        return False
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return _NO_MODEL.search(stream.read(_BEGINNING)) is None
    return True  # what is wrong with it is said when it is opened


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that a file is, or is one part of, in their order.

    Raises:
        CheckpointError: some of them are missing.
    """
    matched = _PART.fullmatch(path.name)
    if matched is None or not int(matched[2]):
        return [path]
    parts = [path.with_name(f"{matched[1]}-{part:05}-of-{matched[3]}.gguf") for part in range(1, int(matched[3]) + 1)]
    if path not in parts:
        return [path]
    if missing := [part.name for part in parts if not part.exists()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {len(parts)} parts of this model are missing: {', '.join(missing[:8])}; "
            "put them beside it"
        )
    return parts


def check_parts(parts: Sequence[Path], metadata: Sequence[Mapping[str, Any]], tensors: Sequence[Sequence[str]]) -> None:
    """Checks that files are the parts of one model.

    Args:
        parts: the files, in their order.
        metadata: of each.
        tensors: the names of the tensors of each.

    Raises:
        CheckpointError: one is of another model, or a part lies alone under another name.
    """
    if len(parts) == 1:
        count = metadata[0].get(_COUNT)
        if isinstance(count, int) and count > 1:
            raise CheckpointError(
                f"{parts[0]} is one of {count} parts of a model; name them NAME-00001-of-{count:05}.gguf and so on, "
                "as they were, so that the others are found"
            )
        return
    said = [(values.get(_COUNT), values.get(_NUMBER), values.get(_TENSORS)) for values in metadata]
    names = [name for part in tensors for name in part]
    total = said[0][2] if said[0][2] is not None else len(names)
    for number, (path, (count, own, of_all)) in enumerate(zip(parts, said, strict=True)):
        if (count, own) != (len(parts), number) or of_all not in (None, total):
            raise CheckpointError(
                f"{path.name} says that it is part {own} of {count}, with {of_all} tensors in all; expected part "
                f"{number} of {len(parts)}, with {total}. It is of another split of the model, or of another model"
            )
    if len(set(names)) < len(names) or len(names) != total:
        raise CheckpointError(
            f"{parts[0]}: its {len(parts)} parts hold {len(names)} tensors of {len(set(names))} names, and say that "
            f"there are {total}; they are of different splits. Fetch all of one"
        )

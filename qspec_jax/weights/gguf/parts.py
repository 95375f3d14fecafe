"""Which GGUF files make up a model: one, or the parts that llama.cpp's ``gguf-split`` cuts it into.

The parts are named ``NAME-00001-of-00003.gguf``; the first has the metadata, and each says which part it is. Beside a
model there may be files that are none: a projector of images (mmproj), an importance matrix, an adapter.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qspec_jax.errors import CheckpointError
from qspec_jax.weights.listing import gguf_files

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_NO_MODEL = re.compile(
    rb"general\.(?:type\x08\0\0\0.\0\0\0\0\0\0\0(?:mmproj|imatrix|adapter)"
    rb"|architecture\x08\0\0\0\x04\0\0\0\0\0\0\0clip)",
    re.DOTALL,
)
_BEGINNING = 1 << 16  # bytes among which a file says what it is
_LATER_PART = re.compile(rb"split\.no\x02\0\0\0(?!\0\0)")
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


def model_files(directory: Path) -> list[Path]:
    """The models of a directory, each by its one file or by the first of its parts that is there."""
    models: dict[str, Path] = {}
    for file in gguf_files(directory):
        matched = _PART.fullmatch(file.name)
        if _is_model(file, whatever_its_name=matched is None):
            models.setdefault(f"{matched[1]} {matched[3]}" if matched else file.name, file)
    return list(models.values())


def _is_model(file: Path, *, whatever_its_name: bool) -> bool:
    """Whether a file is a model's; one that is not named as a part, but says that it is a later one, is not."""
    if "mmproj" in file.name.lower():
        return False
    if not file.is_file():  # nothing is read of a pipe
        return True
    with contextlib.suppress(OSError), file.open("rb") as stream:
        beginning = stream.read(_BEGINNING)
        return not (_NO_MODEL.search(beginning) or (whatever_its_name and _LATER_PART.search(beginning)))
    return True  # what is wrong with it is said when it is opened


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that a file is, or is one part of, in their order.

    Raises:
        CheckpointError: some of them are missing.
    """
    linked = Path(os.path.realpath(path))  # unlike resolve(), it does not mind a circle of links
    if _PART.fullmatch(path.name) is None and _PART.fullmatch(linked.name):
        path = linked
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


def may_be_parts(path: Path) -> list[Path]:
    """The files among which the parts of a model are, of which ``path`` is one that was renamed."""
    return [file for file in gguf_files(path.parent) if file.is_file()]


def in_order(metadata: Mapping[Path, Mapping[str, Any]], path: Path) -> list[Path]:
    """The files of one split with ``path`` by what they say of themselves; ``path`` alone if they are not all there.

    Args:
        metadata: of all files among which they are.
        path: one of them.
    """
    own = metadata[path]
    alike = [
        file for file, said in metadata.items() if all(said.get(key) == own.get(key) for key in (_COUNT, _TENSORS))
    ]
    numbered = {number: file for file in alike if isinstance(number := metadata[file].get(_NUMBER), int)}
    if len(alike) != own[_COUNT] or numbered.keys() != set(range(own[_COUNT])):
        return [path]
    return [file for _, file in sorted(numbered.items())]


def is_part(metadata: Mapping[str, Any]) -> bool:
    """Whether a file says that it is one of several."""
    count = metadata.get(_COUNT)
    return isinstance(count, int) and not isinstance(count, bool) and count > 1


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
        if is_part(metadata[0]):
            count = metadata[0][_COUNT]
            raise CheckpointError(
                f"{parts[0]} is one of {count} parts of a model, and the others are not beside it; put them there, "
                f"named NAME-00001-of-{count:05}.gguf and so on as they were"
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

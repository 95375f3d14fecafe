"""The tensors of a model on their way in: :class:`Source`, and the check that nothing is missing and everything fits.

Names are the canonical ones of :mod:`qspec_jax.model.parameters`. Each format maps its own names onto them with one
table and reports everything that does not fit at once (:func:`check_entries`). This file reads no file and quantises
nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from qspec_jax.errors import CheckpointError, CheckpointWarning, UnsupportedModelError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import ParameterSpec, head_name

MAX_LISTED = 8
_PIECE = 1 << 20
_PROBLEM_KINDS = ("unknown", "missing", "duplicate", "wrong shape", "wrong dtype", "quantised parts")


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A linear's codes as they stand in a file: ``w[n, k] = scale[g, n] * code[n, k] - offset[g, n]``.

    Codes of 8 bits are 16ths here, as in a nested ``QuantizedWeight``: their scale is that of 16 steps.

    Attributes:
        codes: ``[N, K]``, 0 to 15, or to 255 in 8 bits, in the natural order of K.
        scale: ``[G, N]``, float16, or float32 where that holds more than float16 can.
        offset: ``[G, N]`` in the dtype of ``scale``, or None for ``8 * scale``.
        bits: 4 or 8.
    """

    codes: UInt8[np.ndarray, "N K"]
    scale: Float[np.ndarray, "G N"]
    offset: Float[np.ndarray, "G N"] | None
    bits: int = 4


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor that can be read.

    Attributes:
        shape: of the float tensor.
        read: reads this one tensor now; float32, float16 or bfloat16, or the codes if it has a format of them.
            Raises OSError or ValueError if the file has become unreadable.
        codes: the format of the codes that ``read`` returns, with a number for its group size; None where it
            returns floats.
        requantized_from: the quantised type in the file that ``read`` turns into floats, None if there is none.
        read_head: reads what may be an LM head in codes as those, which ``read`` turns into floats or which are kept
            beside these; None if there are none.
        head_codes: the format of the codes that ``read_head`` returns, None with it.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray | QuantizedTensor]
    codes: WeightFormat | None = None
    requantized_from: str | None = None
    read_head: Callable[[], QuantizedTensor] | None = None
    head_codes: WeightFormat | None = None

    def without_head_codes(self) -> TensorEntry:
        """The tensor, of which a head is made anew."""
        return dataclasses.replace(self, read_head=None, head_codes=None)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is opened: its tensors are known to fit its config, and none of them has been read yet.

    Whatever was opened, and whatever a recipe makes of it before the tensors are read, is one of these.

    Attributes:
        config: of the model.
        path: the file or directory.
        entries: canonical name to tensor.
        specs: what each of them is: :func:`expected_parameters` of ``config``, computed once when it was opened.
    """

    config: ModelConfig
    path: Path
    entries: Mapping[str, TensorEntry]
    specs: Mapping[str, ParameterSpec]

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Reads a tensor now.

        Raises:
            CheckpointError: it cannot be read; the message names it.
        """
        return read_entry(name, self.entries[name])

    def with_head_codes_of(self, other: Source) -> Source:
        """The same tensors with the codes of another source's LM head, where that has any."""
        name = head_name(self.config)
        codes = other.entries[head_name(other.config)]
        if codes.read_head is None:
            return self
        entry = dataclasses.replace(self.entries[name], read_head=codes.read_head, head_codes=codes.head_codes)
        return dataclasses.replace(self, entries={**self.entries, name: entry})

    def __repr__(self) -> str:
        return f"Source({str(self.path)!r}, {len(self.entries)} tensors)"


def read_entry(name: str, entry: TensorEntry) -> np.ndarray | QuantizedTensor:
    """Reads a tensor now.

    Raises:
        CheckpointError: it cannot be read; the message says ``name``.
    """
    try:
        return entry.read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read tensor {name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file lists it, before it is known what it is.

    Attributes:
        name: its name in the file.
        dtype: its type, by the name that safetensors gives it.
        shape: of the array in the file.
        read: reads it now. Raises OSError or ValueError if the file has become unreadable.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class FoundTensor:
    """A parameter as a file holds it, before it is known to fit.

    Attributes:
        source_name: its name in the file.
        name: its canonical name, None if no table entry matches.
        entry: how to read it.
        problem: why it cannot be read (say, its type), None if it can.
        misfits: which of the arrays that hold it, if they are several, are missing or do not fit.
    """

    source_name: str
    name: str | None
    entry: TensorEntry
    problem: str | None = None
    misfits: tuple[str, ...] = ()


def around_zero(codes: UInt8[np.ndarray, "N K"], step: Float[np.ndarray, "G N"]) -> QuantizedTensor:
    """Codes of 8 bits with zero point 128 as those of a nested weight whose upper nibbles have a zero, exactly.

    With zero point 136 the upper nibble 8 means 0. A group takes it, upside down if need be, unless it has codes of
    more than 119 steps on both sides.

    Args:
        codes: ``w = step * (code - 128)``.
        step: of each group, float32.
    """
    groups = codes.reshape(len(codes), len(step), -1).astype(np.int16) - 128
    upright, upside_down = groups.max(-1) <= 119, groups.min(-1) >= -119
    sign = np.where(upright | ~upside_down, 1, -1).astype(np.int16)
    zero = np.where(upright | upside_down, 136, 128).astype(np.int16)
    moved = (groups * sign[..., None] + zero[..., None]).astype(np.uint8).reshape(codes.shape)
    step = step.astype(np.float32) * sign.T
    return QuantizedTensor(moved, np.float32(16) * step, step * zero.T.astype(np.float32), bits=8)


def check_finite(values: np.ndarray, *, what: str = "its values") -> None:
    """Raises ValueError if floats are not all finite numbers. It looks at exponents, which is the fastest."""
    exponent = {2: 0x7C00 if values.dtype == np.float16 else 0x7F80, 4: 0x7F800000, 8: 0x7FF << 52}[values.itemsize]
    words = np.ascontiguousarray(values).reshape(-1).view(f"u{values.itemsize}")
    # In pieces, so that no second array of its size is made.
    for start in range(0, words.size, _PIECE):
        if np.bitwise_and(words[start : start + _PIECE], exponent).max() == exponent:
            raise ValueError(f"{what} are not all finite; fetch the file again")


def canonical_name(source_name: str, table: Mapping[str, str]) -> str | None:
    """The canonical name of a tensor, by the first pattern of ``table`` that matches its whole name.

    Args:
        source_name: name in the file.
        table: regular expression to the canonical name, as a template of ``re.Match.expand``.
    """
    for pattern, template in _compiled(tuple(table.items())):
        if matched := pattern.fullmatch(source_name):
            return matched.expand(template)
    return None


@functools.cache
def _compiled(table: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Of a table: looking up each pattern by its text costs more than matching it."""
    return tuple((re.compile(pattern), template) for pattern, template in table)


def check_entries(
    expected: Mapping[str, ParameterSpec], found: Iterable[FoundTensor], *, path: Path
) -> dict[str, TensorEntry]:
    """Checks that the tensors found are exactly those of a model.

    Args:
        expected: :func:`expected_parameters` of its config.
        found: every tensor of the checkpoint but those known to be no parameters.
        path: of the checkpoint, for the message.

    Returns:
        canonical name to entry, in the order of ``expected``.

    Raises:
        CheckpointError: lists all unknown, missing, duplicate, misshapen and unreadable tensors at once.
        UnsupportedModelError: nothing is wrong but the types of some.

    Warns:
        CheckpointWarning: a tensor is read that is zero, where those of a trained model never are; for the first one.
    """
    entries: dict[str, FoundTensor] = {}
    problems: dict[str, list[str]] = {kind: [] for kind in _PROBLEM_KINDS}
    for tensor in found:
        if tensor.name is None or tensor.name not in expected:
            problems["unknown"].append(tensor.source_name)
            continue
        if tensor.name in entries:
            problems["duplicate"].append(f"{tensor.source_name} (as {entries[tensor.name].source_name})")
            continue
        entries[tensor.name] = tensor
        if tensor.entry.shape != expected[tensor.name].shape:
            shapes = f"{list(tensor.entry.shape)}, expected {list(expected[tensor.name].shape)}"
            problems["wrong shape"].append(f"{tensor.source_name} is {shapes}")
        if tensor.problem is not None:
            problems["wrong dtype"].append(f"{tensor.source_name} {tensor.problem}")
        problems["quantised parts"] += tensor.misfits
    problems["missing"] = [name for name in expected if name not in entries]
    if lines := [_describe(kind, names) for kind, names in problems.items() if names]:
        raise _misfit(path, {kind for kind, names in problems.items() if names}, "\n".join(lines))
    unsaid = [path]
    return {name: _looked_at(entries[name].entry, name, spec, unsaid) for name, spec in expected.items()}


def _looked_at(entry: TensorEntry, name: str, spec: ParameterSpec, unsaid: list[Path]) -> TensorEntry:
    """The tensor, named when it is read and found empty: a download that was interrupted leaves zeros.

    A bias may be zero, and so may a linear that writes the residual stream: of layers that are put in, to be trained.
    """
    if spec.kind == "bias" or (spec.kind == "linear" and spec.stream == "writes"):
        return entry
    look = functools.partial(_read_and_look, name=name, unsaid=unsaid)
    head = None if entry.read_head is None else functools.partial(look, entry.read_head)
    return dataclasses.replace(entry, read=functools.partial(look, entry.read), read_head=head)


def _read_and_look(read: Callable[[], Any], *, name: str, unsaid: list[Path]) -> Any:
    tensor = read()
    if not unsaid or (empty := _what_is_empty(tensor)) is None:
        return tensor
    try:
        path = unsaid.pop()
    except IndexError:  # another thread has said it
        return tensor
    warnings.warn(
        f"{path}: all {empty} of {name}, as a download that was interrupted leaves them, maybe of others too; compare "
        "the checksum with that of where it comes from, or fetch it again",
        CheckpointWarning,
        stacklevel=2,
    )
    return tensor


def _what_is_empty(tensor: Any) -> str | None:
    if isinstance(tensor, np.ndarray):
        return None if tensor[:1].any() or tensor.any() else "values are zero"  # all of float16 takes long
    if not (tensor.scale.any() or (tensor.offset is not None and tensor.offset.any())):
        return "scales are zero"
    # Some formats keep codes and scales apart. Zeros of 8 bits may have been moved.
    return "codes are the same" if _are_the_same(tensor.codes) else None


def _are_the_same(codes: np.ndarray) -> bool:
    return bool((codes[:1] == codes[0, 0]).all() and (codes == codes[0, 0]).all())


def _misfit(path: Path, kinds: set[str], listed: str) -> CheckpointError | UnsupportedModelError:
    """The error of tensors that do not fit, which are not damaged wherever nothing else is wrong with them."""
    if kinds == {"wrong dtype"}:
        return UnsupportedModelError(
            f"{path}: its tensors are of types that are not read; convert them to float32, float16 or bfloat16 (of a "
            f"Hugging Face directory with transformers: from_pretrained and save_pretrained):\n{listed}"
        )
    if kinds == {"unknown"}:
        return CheckpointError(
            f"{path}: it has tensors that the architecture of its config has not. Left out, they would change what the "
            "model says; its config lacks an option (attention_bias, mlp_bias), or it is of another "
            f"architecture:\n{listed}"
        )
    return CheckpointError(
        f"{path}: its tensors are not those of its config; "
        f"the checkpoint is incomplete, damaged or of another architecture:\n{listed}"
    )


def _describe(kind: str, names: Sequence[str]) -> str:
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"  {kind} ({len(names)}): {', '.join(names[:MAX_LISTED])}{more}"

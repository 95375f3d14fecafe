"""Which tensors of a Hugging Face directory make up a quantised linear.

:func:`found_linears` puts the tensors of a linear together by the layout that :mod:`.formats` has read. Each is
unpacked (:mod:`.unpack`) when it is read, one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import ParameterSpec
from qspec_jax.weights.huggingface import unpack as prequantized
from qspec_jax.weights.huggingface.formats import FLOATS, PackedFormat
from qspec_jax.weights.source import FoundTensor, QuantizedTensor, StoredTensor, TensorEntry


def is_part(layout: PackedFormat, tensor: StoredTensor, module: str) -> bool:
    """Whether a tensor is part of a quantised linear of that name."""
    name, _, part = tensor.name.rpartition(".")
    return name == module and part in layout.part_names and not (part == "weight" and tensor.dtype in FLOATS)


def found_linears(
    layout: PackedFormat,
    stored: Iterable[StoredTensor],
    specs: Mapping[str, ParameterSpec],
    name_of: Callable[[str], str | None],
) -> tuple[list[FoundTensor], list[StoredTensor]]:
    """Puts the tensors of quantised linears together.

    Args:
        layout: of the checkpoint.
        stored: all of its tensors.
        specs: the parameters of the model.
        name_of: the canonical name of a tensor of an unquantised checkpoint.

    Returns:
        the linears, an LM head among them if it is quantised too, and the tensors that belong to none.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    twice, others = [], []
    for tensor in stored:
        module, _, part = tensor.name.rpartition(".")
        if not is_part(layout, tensor, module):
            others.append(tensor)
        elif part in modules.setdefault(module, {}):
            twice.append(FoundTensor(tensor.name, name_of(f"{module}.weight"), TensorEntry(tensor.shape, tensor.read)))
        else:
            modules[module][part] = tensor
    linears = [_linear(layout, module, parts, specs, name_of) for module, parts in modules.items()]
    return linears + twice, others


def _linear(
    layout: PackedFormat,
    module: str,
    parts: Mapping[str, StoredTensor],
    specs: Mapping[str, ParameterSpec],
    name_of: Callable[[str], str | None],
) -> FoundTensor:
    name = name_of(f"{module}.weight")
    source_name = parts[layout.codes].name if layout.codes in parts else next(iter(parts.values())).name
    spec = specs.get(name or "")
    read = functools.partial(_read, layout, parts, keep_codes=spec is not None and spec.kind == "linear")
    if spec is None or len(spec.shape) != 2:
        return FoundTensor(source_name, None, TensorEntry((), read))
    symmetric = layout.symmetric and layout.bits == 4  # those of 8 get zero points of their own
    # An offset is a product of a scale and a zero point, which seldom fits float16.
    codes = WeightFormat(layout.group_size or spec.shape[1], symmetric, layout.bits, wide=not symmetric)
    misfits = tuple(_misfits(layout, module, parts, spec.shape))
    return FoundTensor(
        source_name, name, TensorEntry(spec.shape, read, codes if spec.kind == "linear" else None), misfits=misfits
    )


def _misfits(
    layout: PackedFormat, module: str, parts: Mapping[str, StoredTensor], shape: tuple[int, ...]
) -> Iterator[str]:
    """What is wrong with the parts of a ``[N, K]`` linear, as far as their headers tell."""
    n, k = shape
    group_size = layout.group_size or k
    if k % group_size:
        yield f"{module} has {k} inputs, which groups of {group_size} do not divide"
        return
    if n % layout.per_word or k % layout.per_word:
        yield f"{module} is {list(shape)}, not multiples of the {layout.per_word} codes of a word"
        return
    for part, expected in layout.parts(n, k, k // group_size).items():
        if part not in parts:
            if not expected.optional:
                yield f"{module}.{part} is missing"
            continue
        tensor = parts[part]
        if tensor.shape != expected.shape or tensor.dtype not in expected.dtypes:
            wanted = f"{' or '.join(expected.dtypes)} {list(expected.shape)}"
            yield f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected {wanted}"


def _read(layout: PackedFormat, parts: Mapping[str, StoredTensor], *, keep_codes: bool) -> np.ndarray | QuantizedTensor:
    unpacked = layout.unpack({name: tensor.read() for name, tensor in parts.items()})
    tensor = prequantized.quantized_tensor(unpacked, symmetric=layout.symmetric, bits=layout.bits)
    return tensor if keep_codes else prequantized.dequantized(tensor)


def completed(
    layout: PackedFormat, found: Iterable[FoundTensor], specs: Mapping[str, ParameterSpec]
) -> list[FoundTensor]:
    """The parameters found, without those that a library adds to a model and with those that it folds away.

    AutoGPTQ gives every linear a bias, zero where the model has none. A file of the QSpec format has no norms: their
    gains are in the linears after them (``third-party/QuaRot/e2e/checkpoint_utils/quantize_llama_checkpoint.py``).
    """
    found = [tensor for tensor in found if tensor.name in specs or not _is_zero_bias(tensor)]
    if layout.method != "qspec":
        return found
    there = {tensor.name for tensor in found}
    return found + [
        FoundTensor(name, name, TensorEntry(spec.shape, functools.partial(np.ones, spec.shape, np.float32)))
        for name, spec in specs.items()
        if spec.kind == "norm" and name not in there
    ]


def _is_zero_bias(tensor: FoundTensor) -> bool:
    if not tensor.source_name.endswith(".bias") or tensor.problem is not None:
        return False
    try:
        values = tensor.entry.read()
    except (OSError, ValueError):
        return False  # whatever is wrong with it is said when it is read
    return isinstance(values, np.ndarray) and not values.any()

"""Which tensors of a Hugging Face directory make up a 4-bit linear, by its ``quantization_config``.

:func:`read_layout` turns the config into a layout or refuses it; :func:`found_tensors` puts the tensors of a linear
together by that layout. Each is unpacked (:mod:`.prequantized`) when it is read, one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qspec_jax.errors import UnsupportedModelError
from qspec_jax.model.config import quantization_config
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import ParameterSpec
from qspec_jax.weights.huggingface import unpack as prequantized
from qspec_jax.weights.huggingface.unpack import Unpacked
from qspec_jax.weights.source import FoundTensor, QuantizedTensor, StoredTensor, TensorEntry

GROUP_SIZES = (32, 64, 128)
_ONLINE_HADAMARD = (
    "{} say that linears read inputs rotated by an online Hadamard transform (QuaRot), as in the checkpoints of the "
    "QSpec release; that is not supported yet. Use another checkpoint of the model: unquantised, GPTQ, AWQ, "
    "compressed-tensors or GGUF"
)
_HADAMARD_BUFFER = "had_rem_dim"  # of QuaRot's OnlineHadamard
_INT32, _FLOATS = ("I32",), ("F16", "BF16", "F32")
_PER_WORD = 8  # codes of 4 bits in 32


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the tensors of a linear. ``optional`` ones are only checked where they are."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class PackedFormat:
    """How a checkpoint stores its 4-bit linears.

    Attributes:
        method: the name of the format.
        codes: which part holds the codes.
        parts: the parts of a ``[N, K]`` weight in ``G`` groups, by the end of their names.
        unpack: puts them together.
        group_size: inputs per scale, None for the whole row.
        symmetric: every zero point is 8.
    """

    method: str
    codes: str
    parts: Callable[[int, int, int], dict[str, Part]]
    unpack: Callable[[Mapping[str, np.ndarray]], Unpacked]
    group_size: int | None
    symmetric: bool

    @property
    def part_names(self) -> tuple[str, ...]:
        """How the names of all parts end."""
        return tuple(self.parts(_PER_WORD, _PER_WORD, 1))


def read_layout(config: Mapping[str, Any], stored: Iterable[StoredTensor]) -> PackedFormat | None:
    """The layout of a checkpoint's linears; None if they are not quantised.

    Args:
        config: a parsed ``config.json``, which names every format but that of the QSpec release.
        stored: the tensors, which tell that one.

    Raises:
        UnsupportedModelError: the format, or an option of it, is not supported; all options are named at once.
    """
    settings = quantization_config(config)
    if settings is None:
        names = {tensor.name.rpartition(".")[2] for tensor in stored}
        if _HADAMARD_BUFFER in names:
            raise UnsupportedModelError(_ONLINE_HADAMARD.format(f"its tensors named {_HADAMARD_BUFFER}"))
        if packed := names & {"qweight", "weight_packed"}:
            raise UnsupportedModelError(
                f"config.json has no quantization_config, but tensors are named {packed.pop()}; add it with its "
                "quant_method (older libraries wrote it to quantize_config.json or quant_config.json)"
            )
        return _qspec_layout() if "weight_scales" in names else None
    method = str(settings.get("quant_method"))
    problems: list[str] = []
    layout = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed}[method](settings, problems)
    if problems:
        raise UnsupportedModelError(f"config.json: its {method} quantization_config asks for {'; '.join(problems)}")
    return layout


def refuse_online_hadamard(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError if ``config`` names a model class of the QSpec release or of QuaRot.

    Both (``vllm/model_executor/models/quarot_llama.py``, ``qwen2_quarot.py``) always transform online.
    """
    named = [*(config.get("architectures") or []), config.get("model_type") or ""]
    if rotated := [name for name in named if "quarot" in name.lower()]:
        raise UnsupportedModelError(_ONLINE_HADAMARD.format(f"config.json: {', '.join(rotated)}"))


def _read_gptq(settings: Mapping[str, Any], problems: list[str]) -> PackedFormat:
    stored = _one_of(settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"), problems)
    _one_of(settings, ("bits",), (4,), problems)
    _one_of(settings, ("pack_dtype",), ("int32",), problems)
    if overridden := [name for name in settings.get("dynamic") or {} if not name.startswith("-")]:
        problems.append(f"dynamic={', '.join(overridden[:4])} (supported: one setting for all modules)")
    group_size = _group_size(settings, ("group_size",), problems)
    ordered = bool(settings.get("desc_act")) and group_size is not None

    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        return {
            "qweight": Part((k // _PER_WORD, n), _INT32),
            "qzeros": Part((groups, n // _PER_WORD), _INT32),
            "scales": Part((groups, n), _FLOATS),
            "g_idx": Part((k,), _INT32, optional=not ordered),
        }

    def unpack(stored_parts: Mapping[str, np.ndarray]) -> Unpacked:
        qweight, qzeros, scales = (stored_parts[name] for name in ("qweight", "qzeros", "scales"))
        if "g_idx" in stored_parts:
            prequantized.check_group_index(stored_parts["g_idx"], group_size=group_size or len(stored_parts["g_idx"]))
        return prequantized.unpack_gptq(qweight, qzeros, scales, zeros_less_one=stored != "gptq_v2")

    return PackedFormat("gptq", "qweight", parts, unpack, group_size, symmetric=settings.get("sym") is True)


def _read_awq(settings: Mapping[str, Any], problems: list[str]) -> PackedFormat:
    for key in ("version", "format", "checkpoint_format"):
        _one_of(settings, (key,), ("gemm",), problems)
    _one_of(settings, ("backend",), ("auto", "autoawq"), problems)
    _one_of(settings, ("bits", "w_bit"), (4,), problems)

    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        return {
            "qweight": Part((k, n // _PER_WORD), _INT32),
            "qzeros": Part((groups, n // _PER_WORD), _INT32),
            "scales": Part((groups, n), _FLOATS),
        }

    def unpack(stored_parts: Mapping[str, np.ndarray]) -> Unpacked:
        return prequantized.unpack_awq(*(stored_parts[name] for name in ("qweight", "qzeros", "scales")))

    group_size = _group_size(settings, ("group_size", "q_group_size"), problems)
    return PackedFormat("awq", "qweight", parts, unpack, group_size, symmetric=False)


def _read_compressed(settings: Mapping[str, Any], problems: list[str]) -> PackedFormat:
    _one_of(settings, ("format",), ("pack-quantized",), problems, required=True)
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            problems.append(f"{key} (supported: none)")
    _one_of(settings.get("sparsity_config") or {}, ("format",), ("dense",), problems)
    schemes = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    for key in ("input_activations", "output_activations"):
        if any(scheme.get(key) for scheme in schemes):
            problems.append(f"{key} (supported: none; how drafts quantise activations is a QuantConfig)")
    weights = [scheme.get("weights") or {} for scheme in schemes]
    if not weights or any(other != weights[0] for other in weights):
        problems.append(f"{len(weights)} config_groups with different weights (supported: one scheme for all linears)")
    weights = weights[0] if weights else {}
    symmetric = bool(weights.get("symmetric", True))

    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        found = {
            "weight_packed": Part((n, k // _PER_WORD), _INT32),
            "weight_scale": Part((n, groups), _FLOATS),
            "weight_shape": Part((2,), ("I64", "I32")),
        }
        return found if symmetric else found | {"weight_zero_point": Part((n // _PER_WORD, groups), _INT32)}

    group_size = _compressed_group_size(weights, problems)
    return PackedFormat("compressed-tensors", "weight_packed", parts, _unpack_compressed, group_size, symmetric)


def _unpack_compressed(stored_parts: Mapping[str, np.ndarray]) -> Unpacked:
    packed = stored_parts["weight_packed"]
    shape, expected = stored_parts["weight_shape"].tolist(), [len(packed), packed.shape[1] * _PER_WORD]
    if shape != expected:
        raise ValueError(f"weight_shape says {shape}, but weight_packed holds {expected}; fetch the file again")
    return prequantized.unpack_compressed(packed, stored_parts["weight_scale"], stored_parts.get("weight_zero_point"))


def _compressed_group_size(weights: Mapping[str, Any], problems: list[str]) -> int | None:
    """Checks the ``weights`` of a scheme and returns their group size."""
    _one_of(weights, ("num_bits",), (4,), problems, required=True)
    _one_of(weights, ("type",), ("int",), problems)
    _one_of(weights, ("dynamic",), (False,), problems)
    # "weight" and its alias "static" order the calibration alone; with "group" the file has a weight_g_idx.
    _one_of(weights, ("actorder",), ("weight", "static", False), problems)
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
    _one_of({"strategy": strategy}, ("strategy",), ("group", "channel"), problems)
    return _group_size(weights, ("group_size",), problems, required=True) if strategy == "group" else None


def _qspec_layout() -> PackedFormat:
    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        return {"weight": Part((n, k // 2), ("U8",)), "weight_scales": Part((n, groups), _FLOATS)}

    def unpack(stored_parts: Mapping[str, np.ndarray]) -> Unpacked:
        return prequantized.unpack_qspec(stored_parts["weight"], stored_parts["weight_scales"])

    return PackedFormat("qspec", "weight", parts, unpack, None, symmetric=True)


def _one_of(
    settings: Mapping[str, Any],
    keys: tuple[str, ...],
    allowed: tuple[Any, ...],
    problems: list[str],
    *,
    required: bool = False,
) -> Any:
    """The value under the first key that has one, noted as a problem if it is not allowed."""
    key, value = next(((key, settings[key]) for key in keys if settings.get(key) is not None), (keys[0], None))
    known = value.lower() if isinstance(value, str) else value
    if (required or value is not None) and known not in allowed:
        problems.append(f"{key}={value!r} (supported: {', '.join(map(str, allowed))})")
    return known


def _group_size(
    settings: Mapping[str, Any], keys: tuple[str, ...], problems: list[str], *, required: bool = False
) -> int | None:
    value = _one_of(settings, keys, GROUP_SIZES if required else (*GROUP_SIZES, -1), problems, required=True)
    return None if value == -1 else value


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
        if part not in layout.part_names or (part == "weight" and tensor.dtype in _FLOATS):
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
    four_bit = WeightFormat(layout.group_size or spec.shape[1], layout.symmetric) if spec.kind == "linear" else None
    misfits = tuple(_misfits(layout, module, parts, spec.shape))
    return FoundTensor(source_name, name, TensorEntry(spec.shape, read, four_bit), misfits=misfits)


def _misfits(
    layout: PackedFormat, module: str, parts: Mapping[str, StoredTensor], shape: tuple[int, ...]
) -> Iterator[str]:
    """What is wrong with the parts of a ``[N, K]`` linear, as far as their headers tell."""
    n, k = shape
    group_size = layout.group_size or k
    if k % group_size:
        yield f"{module} has {k} inputs, which groups of {group_size} do not divide"
        return
    if n % _PER_WORD or k % _PER_WORD:
        yield f"{module} is {list(shape)}, not multiples of the {_PER_WORD} codes of a word"
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
    tensor = prequantized.quantized_tensor(unpacked, symmetric=layout.symmetric)
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
    if tensor.name is None or not tensor.name.endswith(".bias") or tensor.problem is not None:
        return False
    values = tensor.entry.read()
    return isinstance(values, np.ndarray) and not values.any()

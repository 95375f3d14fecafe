"""How a quantised checkpoint stores a linear, by its ``quantization_config``: :func:`read_layout` reads it or not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from qspec_jax.errors import UnsupportedModelError
from qspec_jax.model.config import quantization_config, quantization_method
from qspec_jax.weights.huggingface import unpack as prequantized
from qspec_jax.weights.huggingface.settings import refuse_foreign_tensors
from qspec_jax.weights.huggingface.unpack import Unpacked
from qspec_jax.weights.source import StoredTensor

GROUP_SIZES = (32, 64, 128)
_INT32, FLOATS = ("I32",), ("F16", "BF16", "F32")
PER_WORD = 8  # codes of 4 bits in 32
_BITS = (4, 8)  # those of 8 are kept as nested weights


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the tensors of a linear. ``optional`` ones are only checked where they are."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class PackedFormat:
    """How a checkpoint stores its quantised linears.

    Attributes:
        method: the name of the format.
        codes: which part holds the codes.
        parts: the parts of a ``[N, K]`` weight in ``G`` groups, by the end of their names.
        unpack: puts them together.
        group_size: inputs per scale, None for the whole row.
        symmetric: every zero point is 8, or 128 of codes of 8 bits.
        bits: of a code.
    """

    method: str
    codes: str
    parts: Callable[[int, int, int], dict[str, Part]]
    unpack: Callable[[Mapping[str, np.ndarray]], Unpacked]
    group_size: int | None
    symmetric: bool
    bits: int = 4

    @property
    def per_word(self) -> int:
        """Codes in 32 bits."""
        return 32 // self.bits

    @property
    def part_names(self) -> tuple[str, ...]:
        """How the names of all parts end."""
        return tuple(self.parts(PER_WORD, PER_WORD, 1))


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
        stored = list(stored)
        refuse_foreign_tensors(stored)
        is_qspec = any(tensor.name.endswith(".weight_scales") for tensor in stored)
        return _qspec_layout() if is_qspec else None
    method, problems = quantization_method(settings), []
    try:
        layout = _READERS[method](settings, problems)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"config.json: its {method} quantization_config cannot be understood ({error})"
        ) from error
    if problems:
        raise UnsupportedModelError(f"config.json: its {method} quantization_config asks for {'; '.join(problems)}")
    return layout


def _read_gptq(settings: Mapping[str, Any], problems: list[str]) -> PackedFormat:
    stored = _one_of(settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"), problems)
    bits = _one_of(settings, ("bits",), _BITS, problems)
    bits = bits if bits in _BITS else 4
    per_word = 32 // bits
    _one_of(settings, ("pack_dtype",), ("int32",), problems)
    _one_of(settings, ("is_marlin_format",), (False,), problems)
    if settings.get("rotation"):  # activations are rotated, too, where it was made
        problems.append(f"rotation={settings['rotation']!r} (supported: none)")
    if overridden := [name for name in settings.get("dynamic") or {} if not name.startswith("-")]:
        problems.append(f"dynamic={', '.join(overridden[:4])} (supported: one setting for all modules)")
    group_size = _group_size(settings, ("group_size",), problems)
    ordered = bool(settings.get("desc_act")) and group_size is not None

    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        return {
            "qweight": Part((k // per_word, n), _INT32),
            "qzeros": Part((groups, n // per_word), _INT32),
            "scales": Part((groups, n), FLOATS),
            "g_idx": Part((k,), _INT32, optional=not ordered),
        }

    def unpack(stored_parts: Mapping[str, np.ndarray]) -> Unpacked:
        qweight, qzeros, scales = (stored_parts[name] for name in ("qweight", "qzeros", "scales"))
        if "g_idx" in stored_parts:
            prequantized.check_group_index(stored_parts["g_idx"], group_size=group_size or len(stored_parts["g_idx"]))
        return prequantized.unpack_gptq(qweight, qzeros, scales, zeros_less_one=stored != "gptq_v2", bits=bits)

    return PackedFormat("gptq", "qweight", parts, unpack, group_size, settings.get("sym") is True, bits)


def _read_auto_round(settings: Mapping[str, Any], problems: list[str]) -> PackedFormat:
    """AutoRound packs as GPTQ or AWQ do (``auto_round/inference/backend.py``), and names single modules' settings."""
    packings = {"auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq"}
    packings |= {"auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2"}
    as_awq = ("auto_round:auto_awq", "auto_round:awq")
    if settings.get("packing_format") is None:  # transformers' default; what older files packed for is in `backend`
        _one_of(settings, ("backend",), ("auto",), problems)
        settings = {**settings, "packing_format": "auto_round:gptq"}
    packing = _one_of(settings, ("packing_format",), (*packings, *as_awq), problems, required=True)
    _one_of(settings, ("data_type",), ("int",), problems)
    _one_of(settings, ("act_bits",), (16, 32), problems)
    changed = settings.get("extra_config") or {}
    if overridden := [name for name, own in changed.items() if own.get("bits", 16) < 16]:
        problems.append(f"extra_config of {', '.join(overridden[:4])} (supported: one setting for all modules)")
    named = {key: settings.get(key) for key in ("bits", "group_size", "sym")}
    if packing in as_awq:
        return _read_awq(named, problems)
    return _read_gptq({**named, "checkpoint_format": packings.get(packing, "gptq")}, problems)


def _read_awq(settings: Mapping[str, Any], problems: list[str]) -> PackedFormat:
    for key in ("version", "format", "checkpoint_format"):
        _one_of(settings, (key,), ("gemm",), problems)
    _one_of(settings, ("backend",), ("auto", "autoawq"), problems)
    _one_of(settings, ("bits", "w_bit"), (4,), problems)

    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        return {
            "qweight": Part((k, n // PER_WORD), _INT32),
            "qzeros": Part((groups, n // PER_WORD), _INT32),
            "scales": Part((groups, n), FLOATS),
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
    for scheme in schemes:  # each may have a format of its own
        _one_of(scheme, ("format",), ("pack-quantized",), problems)
    for key in ("input_activations", "output_activations"):
        if any(scheme.get(key) for scheme in schemes):
            problems.append(f"{key} (supported: none; how drafts quantise activations is a QuantConfig)")
    weights = [scheme.get("weights") or {} for scheme in schemes]
    if not weights or any(other != weights[0] for other in weights):
        problems.append(f"{len(weights)} config_groups with different weights (supported: one scheme for all linears)")
    weights = weights[0] if weights else {}
    symmetric, bits = weights.get("symmetric") not in (False, 0), 8 if weights.get("num_bits") == 8 else 4
    per_word = 32 // bits

    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        found = {
            "weight_packed": Part((n, k // per_word), _INT32),
            "weight_scale": Part((n, groups), FLOATS),
            "weight_shape": Part((2,), ("I64", "I32")),
        }
        return found if symmetric else found | {"weight_zero_point": Part((n // per_word, groups), _INT32)}

    group_size = _compressed_group_size(weights, problems)
    unpack = functools.partial(_unpack_compressed, bits=bits)
    return PackedFormat("compressed-tensors", "weight_packed", parts, unpack, group_size, symmetric, bits)


def _unpack_compressed(stored_parts: Mapping[str, np.ndarray], *, bits: int) -> Unpacked:
    packed = stored_parts["weight_packed"]
    shape, expected = stored_parts["weight_shape"].tolist(), [len(packed), packed.shape[1] * 32 // bits]
    if shape != expected:
        raise ValueError(f"weight_shape says {shape}, but weight_packed holds {expected}; fetch the file again")
    zero_point = stored_parts.get("weight_zero_point")
    return prequantized.unpack_compressed(packed, stored_parts["weight_scale"], zero_point, bits=bits)


def _compressed_group_size(weights: Mapping[str, Any], problems: list[str]) -> int | None:
    """Checks the ``weights`` of a scheme and returns their group size."""
    _one_of(weights, ("num_bits",), _BITS, problems, required=True)
    _one_of(weights, ("type",), ("int",), problems)
    _one_of(weights, ("dynamic",), (False,), problems)
    # "weight" and its alias "static" order the calibration alone; with "group" the file has a weight_g_idx.
    _one_of(weights, ("actorder",), ("weight", "static", False), problems)
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
    strategy = _one_of({"strategy": strategy}, ("strategy",), ("group", "channel"), problems)
    return _group_size(weights, ("group_size",), problems, required=True) if strategy == "group" else None


def _qspec_layout() -> PackedFormat:
    def parts(n: int, k: int, groups: int) -> dict[str, Part]:
        return {"weight": Part((n, k // 2), ("U8",)), "weight_scales": Part((n, groups), FLOATS)}

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
    return None if value == -1 or value not in GROUP_SIZES else int(value)


_READERS: dict[str, Callable[[Mapping[str, Any], list[str]], PackedFormat]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
    "auto-round": _read_auto_round,
}

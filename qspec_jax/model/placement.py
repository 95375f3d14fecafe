"""Where and how a decoder runs: dtype, kernels and arrangement of the layers, from what a person asks for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import pallas_kernels
from pallas_kernels import Layout, QuantizedWeight
from pallas_kernels.dispatch import MOSAIC, REFERENCE
from qspec_jax.errors import UsageError
from qspec_jax.model.cache import KV_INT8, KV_OF_MODEL
from qspec_jax.model.config import DTYPES, KV_NAMES
from qspec_jax.model.decoder import Decoder
from qspec_jax.model.linear import Linear


def decoder_options(kernels: str, dtype: str | None) -> dict[str, Any]:
    """``kernels``, ``dtype`` and ``scan_layers`` of a :class:`Decoder` on this device, for arguments of ``load``.

    Raises:
        UsageError: an argument makes no sense here.
    """
    resolved = resolve_kernels(kernels)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    # A named implementation is used for every matmul or refused; auto may differ where a shape does not fit.
    named = None if kernels == "auto" else kernels
    return {
        "dtype": jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")),
        "kernels": REFERENCE if resolved == REFERENCE else named,
        "scan_layers": resolved == REFERENCE,
    }


def kv_format(kv: Any, *, dtype: DTypeLike) -> str:
    """What keys and values are kept as, one of ``KV_FORMATS``, from the name that a person gives.

    Args:
        kv: ``model``, ``int8``, or ``bf16`` for that of a model in bfloat16.
        dtype: of the model.

    Raises:
        UsageError: there is no such format, or not in this dtype.
    """
    if kv not in KV_NAMES:
        raise UsageError(f"kv={kv!r} is not supported; use one of {', '.join(KV_NAMES)}")
    if kv == "bf16" and jnp.dtype(dtype) != jnp.bfloat16:
        raise UsageError(
            f"kv='bf16' is the cache of a model in bfloat16; this one runs in {jnp.dtype(dtype)}: use kv='model' for a "
            "cache of its dtype, or dtype='bfloat16'"
        )
    return KV_INT8 if kv == KV_INT8 else KV_OF_MODEL


def kernels_in_use(decoder: Decoder, kernels: str) -> str:
    """Names for people: what ``kernels`` means on this device, after what ``auto`` picks for large weights."""
    resolved = resolve_kernels(kernels)
    weights = (module.weight.get_value() for _, module in nnx.iter_modules(decoder) if isinstance(module, Linear))
    large = any(isinstance(weight, QuantizedWeight) and weight.layout is Layout.WGMMA for weight in weights)
    return f"{MOSAIC}, {resolved}" if large and resolved != MOSAIC else resolved


def resolve_kernels(kernels: str) -> str:
    """The implementation that ``kernels`` means on this device; the one preferred where ``auto`` picks by shape.

    Raises:
        UsageError: the name is unknown, or does not work on this device.
    """
    available = pallas_kernels.available_implementations()
    if kernels == "auto":
        return available[0]
    if kernels not in pallas_kernels.IMPLEMENTATIONS:
        raise UsageError(f"kernels={kernels!r} is unknown; use auto or one of {', '.join(sorted(available))}")
    if kernels not in available:
        raise UsageError(
            f"kernels={kernels!r} does not work on this {jax.default_backend()} device; use auto or one of "
            f"{', '.join(available)}"
        )
    return kernels

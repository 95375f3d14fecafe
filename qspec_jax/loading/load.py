"""``qspec_jax.load``: from the name of a model to one that generates."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.config import QuantConfig
from qspec_jax.engine import LanguageModel
from qspec_jax.errors import UsageError
from qspec_jax.loading.decoder import load_decoder, weight_formats
from qspec_jax.loading.resolve import open_source, resolve_model
from qspec_jax.tokenizer import load_tokenizer

DTYPES = ("float32", "bfloat16")


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    quantization: QuantConfig | None = QuantConfig(),  # noqa: B008 - frozen
    dtype: str | None = None,
    kernels: str = "auto",
    progress: bool = False,
) -> LanguageModel:
    """Loads a model onto the default device, quantising it tensor by tensor.

    Args:
        model: a Hugging Face hub id, a local directory with ``config.json`` and safetensors, or a GGUF
            file, whose 4-bit codes are kept as they are; None for the demo model, SmolLM2-135M-Instruct.
        quantization: how to store weights and quantise draft activations; None to keep the weights in
            floating point (mode ``float`` only).
        dtype: of everything that is not quantised; None for float32 on the CPU and bfloat16 elsewhere.
        kernels: ``auto``, ``reference``, ``triton``, or ``mosaic`` (Hopper; its matmuls only).
        progress: show a bar on the standard error stream.

    Returns:
        a model ready to :meth:`~qspec_jax.LanguageModel.generate`.

    Raises:
        UsageError: an argument makes no sense here.
        CheckpointError, UnsupportedModelError, OutOfMemoryError: the model cannot be loaded.
    """
    # A named implementation is used for every matmul or refused; auto may differ where a shape does not fit.
    named, kernels = (None if kernels == "auto" else kernels), resolve_kernels(kernels)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    path = resolve_model(model)
    source = open_source(path)
    formats = weight_formats(source, quantization)
    tokenizer = load_tokenizer(path)
    decoder = load_decoder(
        source,
        quantization=quantization,
        formats=formats,
        dtype=jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")),
        kernels=REFERENCE if kernels == REFERENCE else named,
        scan_layers=kernels == REFERENCE,
        progress=_progress_bar(f"loading {path.name}") if progress else iter,
    )
    return LanguageModel(decoder, tokenizer, quantization=quantization, kernels=kernels, name=path.name)


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


def _progress_bar(description: str):
    from tqdm import tqdm

    def wrap(tensors: Iterable) -> Iterable:
        return tqdm(tensors, desc=description, unit="tensor", file=sys.stderr, leave=False)

    return wrap

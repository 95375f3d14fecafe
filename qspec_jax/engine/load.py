"""``qspec_jax.load``: from the name of a model to one that generates; ``qspec_jax.save``: to a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from qspec_jax.decoding.programs import Programs
from qspec_jax.device.compilation_cache import enable_compilation_cache
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder
from qspec_jax.model.placement import decoder_options, kernels_in_use
from qspec_jax.tokenizer.tokenizer import Tokenizer
from qspec_jax.weights.checkpoint.manifest import is_checkpoint
from qspec_jax.weights.checkpoint.restore import open_checkpoint, restore_decoder
from qspec_jax.weights.checkpoint.save import save_checkpoint
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.resolve import open_source, open_tokenizer, resolve_model


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    quantization: QuantConfig | Literal["auto"] | None = "auto",
    dtype: str | None = None,
    kernels: str = "auto",
    progress: bool = False,
    meanwhile: Callable[[LanguageModel], None] | None = None,
) -> LanguageModel:
    """Loads a model onto the default device, quantising it tensor by tensor.

    JAX keeps compiled programs in the user's cache folder from then on, unless it has a cache folder already or
    ``QSPEC_JAX_CACHE=off`` is set: see :func:`qspec_jax.enable_compilation_cache`. A folder that cannot be written
    changes nothing.

    Args:
        model: a Hugging Face hub id, a local directory with ``config.json`` and safetensors, or a GGUF
            file, whose 4-bit codes are kept as they are; a checkpoint directory that
            ``python -m qspec_jax.quantize`` or :func:`save` wrote; None for the demo model,
            SmolLM2-135M-Instruct.
        quantization: how to store weights and quantise draft activations. ``auto`` is what a checkpoint
            stores, and ``QuantConfig()`` for all else; the weights of a checkpoint stay as they are
            whatever is given. None to have the weights in floating point (mode ``float`` only).
        dtype: of everything that is not quantised; None for float32 on the CPU and bfloat16 elsewhere.
        kernels: ``auto``, ``reference``, ``triton``, or ``mosaic`` (Hopper; its matmuls only).
        progress: show a bar on the standard error stream.
        meanwhile: called in a thread, while the weights are read, with a model that has only their shapes. What it
            compiles (:meth:`Pipeline.compile`) the loaded model has, too; what goes wrong there comes to nothing.
            JAX's settings of the calling thread (``with jax.default_matmul_precision(...)``) do not hold in it.

    Returns:
        a model ready to :meth:`~qspec_jax.LanguageModel.generate`.

    Raises:
        UsageError: an argument makes no sense here.
        CheckpointError, UnsupportedModelError, OutOfMemoryError: the model cannot be loaded.
    """
    placement = decoder_options(kernels, dtype)
    with contextlib.suppress(OSError):
        enable_compilation_cache()
    path = resolve_model(model)
    shown = _progress_bar(f"loading {path.name}") if progress else iter
    read: Callable[..., Decoder]
    if is_checkpoint(path) and quantization is not None:
        checkpoint = open_checkpoint(path)
        config, formats = checkpoint.manifest.model, checkpoint.manifest.formats
        quantization = checkpoint.manifest.quantization if quantization == "auto" else quantization
        open_its_tokenizer, read = checkpoint.tokenizer, functools.partial(restore_decoder, checkpoint)
    else:
        source = open_source(path)
        quantization = QuantConfig() if quantization == "auto" else quantization
        config, formats = source.config, weight_formats(source, quantization)
        open_its_tokenizer = functools.partial(open_tokenizer, path)
        read = functools.partial(load_decoder, source, formats=formats)

    def model_of(decoder: Decoder, tokenizer: Tokenizer | None) -> LanguageModel:
        in_use = kernels_in_use(decoder, kernels)
        return LanguageModel(decoder, tokenizer, quantization=quantization, kernels=in_use, name=path.name)

    def ahead(tokenizer: Future[Tokenizer | None]) -> Programs | None:
        if meanwhile is None:
            return None
        shell = abstract_decoder(config, quantization=quantization, formats=formats, **placement)
        meanwhile(model := model_of(shell, tokenizer.result()))
        return model.programs

    # Weights and tokenizer wait for the disk (transformers for thousands of small files), and a compiler for neither.
    with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
        tokenizer = pool.submit(open_its_tokenizer)
        compiled = pool.submit(ahead, tokenizer)
        decoder = read(quantization=quantization, progress=while_it_opens(tokenizer, shown), **placement)
    loaded = model_of(decoder, tokenizer.result())
    if compiled.exception() is None and (programs := compiled.result()) is not None:
        loaded.programs.adopt(programs)
    return loaded


def save(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a loaded, quantised model as a checkpoint directory that :func:`load` takes.

    Args:
        model: with 4-bit weights.
        path: of the directory.
        recipe: JSON values to record with it: how the weights were made.
        overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
        UsageError: the weights are floating point, or there is a checkpoint and ``overwrite`` is not set.
        CheckpointError: something else is in the way, the disk is too small, or a file cannot be written.
    """
    save_checkpoint(
        path,
        model.decoder,
        tokenizer=model.tokenizer,
        quantization=model.quantization,
        recipe=recipe or {"name": "unknown"},
        overwrite=overwrite,
    )


def while_it_opens(
    tokenizer: Future[Tokenizer | None], progress: Callable[[Iterable], Iterable]
) -> Callable[[Iterable], Iterable]:
    """``progress`` over the tensors, which ends with the tokenizer's error, if it has one, before the next tensor."""

    def wrap(tensors: Iterable) -> Iterable:
        for tensor in progress(tensors):
            if tokenizer.done():
                tokenizer.result()
            yield tensor

    return wrap


def _progress_bar(description: str):
    from tqdm import tqdm

    def wrap(tensors: Iterable) -> Iterable:
        return tqdm(tensors, desc=description, unit="tensor", file=sys.stderr, leave=False)

    return wrap

"""A model in, a quantised checkpoint out: opens a source, runs a recipe on it, writes what comes out."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import QuantizedWeight
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.device.memory import check_memory
from qspec_jax.device.sizes import size_text
from qspec_jax.device.start import start_device
from qspec_jax.errors import UsageError
from qspec_jax.files.lock import locked
from qspec_jax.model.config import WHOLE_ROW
from qspec_jax.model.decoder import Decoder, abstract_decoder, num_bytes
from qspec_jax.model.grid import formats_in, with_grid_of
from qspec_jax.model.linear import WeightFormat
from qspec_jax.recipes.catalogue import Recipe
from qspec_jax.recipes.floats import as_floats
from qspec_jax.recipes.layerwise import open_calibration
from qspec_jax.recipes.steps import Progress, RecipeContext, RecipeOptions
from qspec_jax.recipes.work_folder import kept_bytes, remove_work_folders
from qspec_jax.weights.checkpoint.manifest import is_checkpoint, read_manifest
from qspec_jax.weights.checkpoint.save import check_destination, save_checkpoint
from qspec_jax.weights.exact import copy_formats
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.resolve import model_bytes, open_source, open_tokenizer, resolve_model
from qspec_jax.weights.source import Source

# Float32 copies of the largest tensor that reading and rounding it take beside the finished model.
_WORKING_COPIES = 4


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did.

    Attributes:
        path: of the checkpoint.
        bytes_before, bytes_after: of the weights on disk, as ``info`` counts them.
        seconds: that it took.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    seconds: float


def convert(
    model: str | os.PathLike[str] | None,
    path: str | os.PathLike[str],
    *,
    recipe: Recipe,
    options: RecipeOptions,
    overwrite: bool = False,
    progress: Progress = Progress(),  # noqa: B008 - frozen
) -> Conversion:
    """Quantises a model and writes it as a checkpoint.

    Args:
        model: what :func:`qspec_jax.load` takes.
        path: of the checkpoint.
        recipe: how.
        options: of the recipe.
        overwrite: replace a checkpoint at ``path``.
        progress: who hears of it.

    Raises:
        UsageError: an argument makes no sense for this model.
        DeviceError: JAX finds no device, or cannot use it.
        CheckpointError, UnsupportedModelError: the model cannot be read, or the checkpoint not be written.
        QSpecError: another run writes there.
        OutOfMemoryError: it cannot fit into memory; said before it is tried.
    """
    start = time.perf_counter()
    start_device()
    _check_calibration(recipe, options)
    if options.quantization.keep_floats:
        recipe.check_floats()
    source_path = resolve_model(model)
    source = open_source(source_path, floats=recipe.name != "keep")
    _check_kept(source, recipe, options)
    estimate = _estimate(source, recipe, options)
    still_kept = max(0, estimate.kept - kept_bytes(Path(os.path.realpath(path))))
    check_destination(path, estimate.finished + still_kept, overwrite=overwrite)
    check_memory(estimate.peak, what=f"the weights of {source_path.name} and the copies that quantising takes")
    needed = f"about {size_text(estimate.peak)} of memory, up to {size_text(estimate.finished + still_kept)} on disk"
    progress.say(f"{source_path.name}: {needed}")
    if recipe.name == "keep" and not options.quantization.keep_floats and _has_floats(source_path):
        progress.say(
            f"warning: the floats that {source_path.name} has beside its 4-bit weights are left out; --keep-floats "
            "keeps them"
        )
    bytes_before = model_bytes(source_path)
    with locked(Path(path)):
        bytes_after = _convert(source, source_path, Path(path), recipe, options, overwrite=overwrite, progress=progress)
    return Conversion(Path(path), bytes_before, bytes_after, time.perf_counter() - start)


def _has_floats(path: Path) -> bool:
    """Whether a model is a checkpoint that has linears in floating point beside their codes."""
    return is_checkpoint(path) and read_manifest(path).quantization.keep_floats


def _convert(
    source: Source,
    source_path: Path,
    path: Path,
    recipe: Recipe,
    options: RecipeOptions,
    *,
    overwrite: bool,
    progress: Progress,
) -> int:
    """Runs the recipe and writes the checkpoint; the bytes of its weights."""
    tokenizer = open_tokenizer(source_path)
    context = RecipeContext(options, progress)
    if recipe.needs_text:
        assert options.calibration is not None
        text = open_calibration(
            source,
            tokenizer,
            options.calibration,
            num_tokens=options.calibration_tokens,
            output=path,
            settings=recorded(recipe, options),
        )
        context = dataclasses.replace(context, text=text)
    made = recipe.apply(source, context)
    floats = open_source(source_path).with_head_codes_of(made) if options.quantization.keep_floats else None
    decoder = _load(made, floats, options, progress)
    quantization = with_grid_of(options.quantization, formats_in(decoder), decoder.config)
    save_checkpoint(
        path,
        decoder,
        tokenizer=tokenizer,
        quantization=quantization,
        recipe=recorded(recipe, dataclasses.replace(options, quantization=quantization)),
        overwrite=overwrite,
        progress=lambda groups: progress.bar(groups, "writing"),
    )
    remove_work_folders(path)
    return model_bytes(path)


def _load(source: Source, floats: Source | None, options: RecipeOptions, progress: Progress) -> Decoder:
    """The decoder that a recipe made the tensors of, with the floats of another source besides if there is one."""
    # The stacked arrangement takes the fewest arrays; checkpoints do not depend on it.
    return load_decoder(
        source if floats is None else floats,
        drafts=source,
        quantization=options.quantization,
        formats=_formats(source, options),
        dtype=jnp.dtype(options.dtype),
        kernels=REFERENCE,
        scan_layers=True,
        progress=lambda tensors: progress.bar(tensors, "quantising"),
    )


def _formats(source: Source, options: RecipeOptions) -> dict[str, WeightFormat] | None:
    """How each linear is stored; beside floats, in 4 bits."""
    of = copy_formats if options.quantization.keep_floats else weight_formats
    return of(source, options.quantization)


def _check_kept(source: Source, recipe: Recipe, options: RecipeOptions) -> None:
    """Refuses codes that are to be kept beside floats, and have more bits than a copy that drafts.

    Raises:
        UsageError: there are such.
    """
    codes = (entry.codes for entry in source.entries.values())
    if (
        recipe.name == "keep"
        and options.quantization.keep_floats
        and any(one is not None and one.bits == 8 for one in codes)
    ):
        raise UsageError(
            f"{source.path.name} has 8-bit weights, and beside floats (--keep-floats) are 4-bit ones; use --recipe "
            "rtn, or leave --keep-floats out: 8-bit weights draft from their own upper 4 bits"
        )


def recorded(recipe: Recipe, options: RecipeOptions) -> dict[str, Any]:
    """The recipe and its settings as JSON values; the draft activations are recorded elsewhere."""
    quantization = options.quantization
    settings = {
        "name": recipe.name,
        "group_size": quantization.group_size or WHOLE_ROW,
        "symmetric": quantization.symmetric,
        **({"bits": quantization.bits} if quantization.bits != 4 else {}),
        **({"head_bits": quantization.head_bits} if quantization.head_bits is not None else {}),
        **({"draft_head": quantization.draft_head} if quantization.draft_head is not None else {}),
        **({"keep_floats": True} if quantization.keep_floats else {}),
        "dtype": options.dtype,
    }
    if options.calibration is not None:
        settings |= {"calibration": options.calibration.name, "calibration_tokens": options.calibration_tokens}
    return settings


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """Bytes of the finished arrays, at the peak of making them, and of those that also lie on disk until the end."""

    finished: int
    peak: int
    kept: int


def _estimate(source: Source, recipe: Recipe, options: RecipeOptions) -> _Estimate:
    config = recipe.config(source.config)
    formats = _formats(_as_far_as_left(source, recipe), options)
    decoder = abstract_decoder(
        config, quantization=options.quantization, formats=formats, dtype=jnp.dtype(options.dtype)
    )
    finished = num_bytes(decoder)
    largest = max(math.prod(spec.shape) for spec in source.specs.values())
    parameters = jax.tree.leaves(nnx.state(decoder), is_leaf=lambda one: isinstance(one, QuantizedWeight))
    codes = jax.tree.leaves([one for one in parameters if isinstance(one, QuantizedWeight)])
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in codes) if recipe.keeps_parts else 0
    return _Estimate(finished, finished + _WORKING_COPIES * 4 * largest, kept)


def _as_far_as_left(source: Source, recipe: Recipe) -> Source:
    """The source with the codes that a recipe leaves: all or none, and those of a head unless it turns the model."""
    if recipe.name == "keep":
        return source
    entries = as_floats(source).entries
    if recipe.turns:
        entries = {name: entry.without_head_codes() for name, entry in entries.items()}
    return dataclasses.replace(source, entries=entries)


def _check_calibration(recipe: Recipe, options: RecipeOptions) -> None:
    if recipe.needs_text and options.calibration is None:
        raise UsageError(
            f"recipe {recipe.name} runs the model on text, and none is given; use --calibration FILE (a text, or JSONL "
            'with {"prompt": TEXT} on each line)'
        )
    if not recipe.needs_text and options.calibration is not None:
        raise UsageError(f"recipe {recipe.name} reads no calibration text; leave out --calibration, or use gptq")

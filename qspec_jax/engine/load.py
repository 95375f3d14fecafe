"""``qspec_jax.load``: from the name of a model to one that generates; ``qspec_jax.save``: to a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from qspec_jax.decoding.led_programs import tell_load
from qspec_jax.decoding.plan import AUTO, check_verify
from qspec_jax.decoding.programs import Programs
from qspec_jax.decoding.values import refuse
from qspec_jax.device import processes
from qspec_jax.device.compilation_cache import enable_compilation_cache
from qspec_jax.device.mesh import make_mesh, told_mesh
from qspec_jax.device.settings import usual_settings
from qspec_jax.device.start import start_device
from qspec_jax.engine.language_model import LanguageModel
from qspec_jax.errors import UsageError
from qspec_jax.files.lock import locked
from qspec_jax.model.config import HeadFields, ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder
from qspec_jax.model.grid import with_grid_of
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.placement import decoder_options, kernels_in_use, kv_format
from qspec_jax.model.shards import Shards
from qspec_jax.tokenizer.tokenizer import Tokenizer
from qspec_jax.weights.checkpoint.head import check_head, formats_of, head_of
from qspec_jax.weights.checkpoint.manifest import is_checkpoint, read_manifest
from qspec_jax.weights.checkpoint.restore import Checkpoint, open_checkpoint, restore_decoder
from qspec_jax.weights.checkpoint.save import save_checkpoint
from qspec_jax.weights.exact import open_exact
from qspec_jax.weights.fill import check_bits, load_decoder, usual_quantization, weight_formats
from qspec_jax.weights.placing import MeshPlacing, Placing
from qspec_jax.weights.resolve import open_source, open_tokenizer, resolve_model
from qspec_jax.weights.source import Source


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model whose list of tensors is checked, and of which nothing else has been read yet.

    Attributes:
        name: of its file or directory.
        config: what it computes.
        quantization: how draft activations are quantised; None for floating-point weights.
        formats: of each linear; None for floating-point weights.
        tokenizer: reads its tokenizer.
        read: reads its weights into a decoder; takes ``progress``, ``placing`` and what :func:`decoder_options`
            returns.
        verify: what drafts of it are verified with, unless a request says otherwise.
        source: what it was opened as.
        drafts: where its 4-bit copy is, if not there.
    """

    name: str
    config: ModelConfig
    quantization: QuantConfig | None
    formats: Mapping[str, WeightFormat] | None
    tokenizer: Callable[[], Tokenizer | None]
    read: Callable[..., Decoder]
    verify: str
    source: Source | Checkpoint
    drafts: Source | None = None

    def shapes(self, placement: Mapping[str, Any]) -> Decoder:
        """The decoder of one device without its arrays; ``placement`` is what :func:`decoder_options` returns."""
        return abstract_decoder(self.config, quantization=self.quantization, formats=self.formats, **placement)

    def shards(self, mesh: Mesh, placement: Mapping[str, Any]) -> Shards:
        """How the model lies on a mesh.

        Raises:
            UsageError: it does not split among so many devices.
        """
        return Shards.of(self.config, mesh, quantization=self.quantization, formats=self.formats, **placement)


def open_model(
    path: Path,
    quantization: QuantConfig | Literal["auto"] | None,
    *,
    verify: str | Any = AUTO,
    draft_path: Path | None = None,
    head_bits: int | None = None,
    draft_head: int | None = None,
) -> OpenedModel:
    """Opens what ``resolve_model`` found: a checkpoint of this library, or a model in another format.

    Args:
        path: of the model.
        quantization, verify, head_bits, draft_head: as in :func:`load`.
        draft_path: of ``draft_model`` there.

    Raises:
        UsageError: the weights cannot be stored so, or do not fit together.
        CheckpointError, UnsupportedModelError: the model cannot be opened.
    """
    heads = _heads(quantization, head_bits, draft_head)
    is_exact = check_weights(quantization, verify, draft_path)
    if is_checkpoint(path) and quantization is not None and draft_path is None:
        saved = read_manifest(path).quantization
        if saved.keep_floats or not is_exact:
            return _open_saved(path, saved if quantization == "auto" else quantization, verify=verify, heads=heads)
    if is_exact:
        assert quantization is not None
        exact = open_exact(path, quantization, draft_path)
        chosen, formats, drafts = dataclasses.replace(exact.quantization, **heads), exact.formats, exact.drafts
        source, tokenizer = exact.source, functools.partial(open_tokenizer, path)
        read = functools.partial(load_decoder, source, quantization=chosen, formats=formats, drafts=drafts)
        return OpenedModel(path.name, source.config, chosen, formats, tokenizer, read, verify, source, drafts)
    source = open_source(path)
    chosen = usual_quantization(source, verify) if quantization == "auto" else quantization
    if chosen is not None and verify == "w8a16":
        chosen = dataclasses.replace(chosen, bits=8)
    chosen = None if chosen is None else dataclasses.replace(chosen, **heads)
    formats = weight_formats(source, chosen)
    chosen = None if chosen is None else with_grid_of(chosen, formats, source.config)
    check_bits(path, chosen, verify)
    read = functools.partial(load_decoder, source, quantization=chosen, formats=formats)
    tokenizer = functools.partial(open_tokenizer, path)
    return OpenedModel(path.name, source.config, chosen, formats, tokenizer, read, verify, source)


def _open_saved(path: Path, quantization: QuantConfig, *, verify: str, heads: HeadFields) -> OpenedModel:
    """A checkpoint of this library, whose weights stay as they are. Arguments and errors of :func:`open_model`."""
    checkpoint = open_checkpoint(path)
    manifest = checkpoint.manifest
    stored = manifest.quantization
    keeps_floats = stored.keep_floats and verify != "w4a16"  # whose copy is all that is read then
    heads = {**head_of(stored), **heads}
    chosen = dataclasses.replace(quantization, bits=4, keep_floats=False)
    chosen = with_grid_of(chosen, manifest.formats, manifest.model)
    chosen = dataclasses.replace(chosen, keep_floats=keeps_floats, **heads)
    check_bits(path, chosen, verify)
    check_head(path, manifest.model, stored, chosen)
    read = functools.partial(restore_decoder, checkpoint, quantization=chosen)
    tokenizer, formats = checkpoint.tokenizer, formats_of(manifest, chosen)
    return OpenedModel(path.name, manifest.model, chosen, formats, tokenizer, read, verify, checkpoint)


def _heads(quantization: Any, head_bits: int | None, draft_head: int | None) -> HeadFields:
    """What is said of the LM head besides a configuration, as its fields.

    Raises:
        UsageError: it makes no sense.
    """
    said: HeadFields = {}
    if head_bits is not None:
        said["head_bits"] = None if head_bits == 16 else head_bits
    if draft_head is not None:
        said["draft_head"] = None if draft_head == 16 else draft_head
    if said and quantization is None:
        raise UsageError(f"{' and '.join(said)} are of models whose linears are quantised; leave quantization=None out")
    QuantConfig(**said)  # refuses other numbers
    return said


def check_weights(quantization: Any, verify: str | Any, draft_model: Any) -> bool:
    """Whether a model is to hold its floats beside a 4-bit copy; arguments as of :func:`load`.

    Raises:
        UsageError: they contradict each other.
    """
    verify = check_verify(verify, "qspec")
    is_auto = isinstance(quantization, str) and quantization == "auto"
    if not (quantization is None or is_auto or isinstance(quantization, QuantConfig)):
        raise UsageError(f'quantization={quantization!r}: use "auto", a QuantConfig, or None for floating point')
    keeps_floats = isinstance(quantization, QuantConfig) and quantization.keep_floats
    if verify not in (AUTO, "float") and (keeps_floats or quantization is None):
        kept = "keep_floats" if keeps_floats else "quantization=None"
        raise UsageError(f"verify={verify!r} reads quantised weights alone; leave {kept} out, or use verify='float'")
    if verify == "float" and quantization is None:
        raise UsageError("verify='float' drafts from a 4-bit copy: leave quantization=None out, or verify='float'")
    is_exact = keeps_floats or verify == "float"
    if draft_model is not None and not is_exact:
        raise UsageError("draft_model is of verify='float', whose drafts it makes; add that, or leave draft_model out")
    return is_exact


@usual_settings()
def load(
    model: str | os.PathLike[str] | Any = None,
    *,
    quantization: QuantConfig | Literal["auto"] | Any = "auto",
    dtype: str | None = None,
    kernels: str = "auto",
    kv: str | Any = "model",
    mesh: Mesh | str | Any = None,
    verify: str | Any = AUTO,
    draft_model: str | os.PathLike[str] | Any = None,
    head_bits: int | Any = None,
    draft_head: int | Any = None,
    progress: bool = False,
    compile_ahead: Callable[[LanguageModel], None] | None = None,
) -> LanguageModel:
    """Loads a model onto the default device, or the devices of a mesh, quantising it tensor by tensor.

    JAX keeps compiled programs in the user's cache folder from then on, unless it has a cache folder already or
    ``QSPEC_JAX_CACHE=off`` is set: see :func:`qspec_jax.enable_compilation_cache`. A folder that cannot be written
    changes nothing.

    Args:
        model: a Hugging Face hub id, a local directory with ``config.json`` and safetensors, or a GGUF
            file, whose 4-bit codes are kept as they are; a checkpoint directory that
            ``python -m qspec_jax.quantize`` or :func:`save` wrote, whose weights come back bit for bit; None for the
            demo model,
            SmolLM2-135M-Instruct.
        quantization: how to store weights and quantise draft activations. ``auto`` is what a checkpoint
            stores, and ``QuantConfig()`` for all else; the weights of a checkpoint stay as they are
            whatever is given. None to have the weights in floating point (mode ``float`` only).
        dtype: of everything that is not quantised; None for float32 on the CPU and bfloat16 elsewhere.
        kernels: ``auto``, ``reference``, ``triton``, or ``mosaic`` (Hopper; its matmuls only).
        kv: how keys and values are kept: ``model`` in its dtype (``bf16`` is the same of a model in bfloat16), or
            ``int8`` in about half of the memory, on one device or a mesh. QSpec yields the tokens of plain decoding
            with the same cache.
        mesh: devices that share the model: ``"data=2,model=4"`` of JAX's first devices, or a ``jax.sharding.Mesh`` with
            one or both of these axes. Rows of a batch are split over ``data``; heads, channels and vocabulary over
            ``model``. No device holds more than its share. None for the default device alone.
        verify: ``float`` to keep the checkpoint's own floats beside a 4-bit copy: the copy drafts, the floats verify,
            and tokens are those of plain decoding with the floats. ``w8a16`` to round to nested 8-bit weights, of
            which drafts read the upper 4 bits. ``w4a16`` for 4-bit weights alone, also of a checkpoint that has floats
            besides; ``auto`` for that, too, unless ``quantization`` or the checkpoint say otherwise. Codes of 8 bits
            stay such whatever is given: with ``w4a16`` their upper 4 bits verify. The model remembers it
            (:attr:`LanguageModel.verify`): whatever drafts is verified so, unless a call or its plan says otherwise.
            Where ``quantization`` is ``auto``, 8-bit weights are symmetric, in groups as large as fit.
        draft_model: a quantised checkpoint of the same model, in any format, that is the 4-bit copy of
            ``verify="float"``. None to round the floats as they are read: with ``auto``, to symmetric groups as large
            as fit, or to asymmetric ones of 32 where a file has some codes already.
        head_bits: 8 or 4 to round the LM head to; 16 for the head as it is; None for what ``quantization`` or the
            checkpoint say. 8 keeps the codes of a GGUF file's head in Q8_0.
        draft_head: 4 for drafts that read an LM head in 4 bits: the upper half of one in 8, or a copy. None likewise.
        progress: show a bar on the standard error stream.
        compile_ahead: called in a thread, while the weights are read, with a model that has only their shapes. What it
            compiles (:meth:`Pipeline.compile`) the loaded model has, too. A :class:`UsageError` in it ends the load, as
            the model cannot do what is asked of it. Another error is ignored: programs are then compiled at their first
            use. JAX's settings of the calling thread (``with
            jax.default_matmul_precision(...)``) do not hold in it.

    Returns:
        a model ready to :meth:`~qspec_jax.LanguageModel.generate`.

    Raises:
        UsageError: an argument makes no sense here, or the mesh does not fit the model or the devices.
        DeviceError: JAX finds no device, or cannot use it.
        CheckpointError, UnsupportedModelError, OutOfMemoryError: the model cannot be loaded.
    """
    start_device()
    placement = decoder_options(kernels, dtype)
    check_weights(quantization, verify, draft_model)
    _heads(quantization, head_bits, draft_head)
    with contextlib.suppress(OSError):
        enable_compilation_cache()
    _check_processes(mesh)
    on = make_mesh(mesh)
    kv = kv_format(kv, dtype=placement["dtype"])
    draft_path = None if draft_model is None else resolve_model(draft_model, what="draft_model")
    heads: dict[str, Any] = {"head_bits": head_bits, "draft_head": draft_head}
    opened = open_model(resolve_model(model), quantization, verify=verify, draft_path=draft_path, **heads)
    shards = None if on is None else opened.shards(on, placement)
    if on is not None:
        given = {"model": model, "draft_model": draft_model, "quantization": quantization, "verify": verify, **heads}
        tell_load(load, {**given, "dtype": dtype, "kernels": kernels, "kv": kv, "mesh": told_mesh(mesh, on)})
    shown = _progress_bar(f"loading {opened.name}") if progress else iter
    # Weights and tokenizer wait for the disk (transformers for thousands of small files), and a compiler for neither.
    pool = ThreadPoolExecutor(2, thread_name_prefix="load")
    try:
        tokenizer = pool.submit(opened.tokenizer)
        programs = pool.submit(_programs_ahead, compile_ahead, opened, tokenizer, (kernels, kv), placement, shards)
        placing = Placing() if shards is None else MeshPlacing(shards)
        decoder = opened.read(progress=ending_with(tokenizer, programs, shown), placing=placing, **placement)
        loaded = _assemble(opened, decoder, tokenizer.result(), (kernels, kv), on)
        if isinstance(error := programs.exception(), UsageError):
            raise error
        if error is None and (compiled := programs.result()) is not None:
            loaded.programs.adopt(compiled)
        return loaded
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an error or an interruption waits for no compiler


def _check_processes(mesh: Any) -> None:
    """Raises UsageError where several processes would not run one model together."""
    count = jax.process_count()
    if count > 1 and mesh is None:
        raise UsageError(f"this is one of {count} processes, which share a mesh; give mesh= over all their devices")
    if processes.current is not None and processes.current.over is not None:
        raise UsageError(processes.current.over)
    if count > 1 and processes.current is None:
        raise UsageError(
            f"this is one of {count} processes, and nobody says what all of them run: load it within "
            "`with qspec_jax.join() as processes:` (docs/mesh.md), or use the commands with --coordinator"
        )


def _assemble(
    opened: OpenedModel,
    decoder: Decoder,
    tokenizer: Tokenizer | None,
    runs: tuple[str, str],
    mesh: Mesh | None,
) -> LanguageModel:
    """A model around a decoder, which may have shapes alone; ``runs`` are the kernels asked for, and its cache."""
    kernels, decoder.kv = runs
    options: dict[str, Any] = {"quantization": opened.quantization, "name": opened.name, "mesh": mesh}
    options["verify"] = opened.verify
    if isinstance(opened.source, Checkpoint):
        options["recipe"] = opened.source.manifest.recipe
    return LanguageModel(decoder, tokenizer, kernels=kernels_in_use(decoder, kernels), **options)


@usual_settings()  # of a thread
def _programs_ahead(
    compile_ahead: Callable[[LanguageModel], None] | None,
    opened: OpenedModel,
    tokenizer: Future[Tokenizer | None],
    runs: tuple[str, str],
    placement: Mapping[str, Any],
    shards: Shards | None,
) -> Programs | None:
    """The programs that ``compile_ahead`` compiles for a model of shapes."""
    if compile_ahead is None or jax.process_count() > 1:  # which compile in an order that all keep
        return None
    shell = opened.shapes(placement) if shards is None else shards.shapes()
    mesh = None if shards is None else shards.mesh
    compile_ahead(model := _assemble(opened, shell, tokenizer.result(), runs, mesh))
    return model.programs


@usual_settings()
def save(
    model: LanguageModel | Any,
    path: str | os.PathLike[str] | Any,
    *,
    recipe: Mapping[str, Any] | Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a loaded, quantised model as a checkpoint directory that :func:`load` takes.

    Args:
        model: with quantised weights. Its floats, which ``verify="float"`` keeps besides, and a head of fewer bits are
            saved as they are.
        path: of the directory.
        recipe: JSON values to record with it: how the weights were made. None for what the checkpoint says that the
            model was loaded from.
        overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
        UsageError: there is no model or no path, the recipe is no JSON, the weights are floating point alone, or there
            is a checkpoint and ``overwrite`` is not set.
        CheckpointError: something else is in the way, the disk is too small, or a file cannot be written.
        QSpecError: another process writes there.
    """
    if not isinstance(model, LanguageModel):
        raise refuse("model", model, "what qspec_jax.load returned")
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise refuse("path", path, "the path of a directory, as a text or a Path")
    known = {"name": "unknown"} if model.recipe is None else model.recipe
    recorded = _as_json("recipe", known if recipe is None else recipe)
    with locked(Path(path)):
        save_checkpoint(
            path,
            model.decoder,
            tokenizer=model.tokenizer,
            quantization=model.quantization,
            recipe=recorded,
            overwrite=overwrite,
        )


def _as_json(name: str, given: Mapping[str, Any] | Any) -> dict[str, Any]:
    """A mapping as it is read again from JSON.

    Raises:
        UsageError: it is none, or holds what JSON has no form for.
    """
    if not isinstance(given, Mapping):
        raise refuse(name, given, "a mapping of JSON values, or None")
    try:
        return json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON: {error}; use texts, finite numbers, lists and mappings") from error


def ending_with(
    tokenizer: Future[Tokenizer | None],
    programs: Future[Programs | None],
    progress: Callable[[Iterable], Iterable],
) -> Callable[[Iterable], Iterable]:
    """``progress`` over the tensors, which ends before the next one with an error that there is meanwhile.

    That is any of the tokenizer, and of programs that what is asked makes no sense of the model.
    """

    def wrap(tensors: Iterable) -> Iterable:
        for tensor in progress(tensors):
            if tokenizer.done():
                tokenizer.result()
            if programs.done() and isinstance(programs.exception(), UsageError):
                programs.result()
            yield tensor

    return wrap


def _progress_bar(description: str):
    from tqdm import tqdm

    def wrap(tensors: Iterable) -> Iterable:
        return tqdm(tensors, desc=description, unit="tensor", file=sys.stderr, leave=False)

    return wrap

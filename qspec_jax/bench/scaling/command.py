"""``python -m qspec_jax.bench scaling``: what a model would take on many devices, by formula. Nothing is run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.presets import PRESETS
from qspec_jax.commands import options as shared
from qspec_jax.commands.output import show
from qspec_jax.decoding.plan import DRAFT_BUDGET
from qspec_jax.device.mesh import MeshShape, parse_mesh
from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig, QuantConfig

if TYPE_CHECKING:
    from qspec_jax.decoding.mesh_costs import Drafting, Hardware
    from qspec_jax.model.decoder import Decoder

NOTICE = "predicted by formula, not measured: docs/scaling.md has the formulas and their inputs"
KINDS = ("h100", "h200", "v5e")
_MOST_DEVICES = 4096
_READS_ALL_OF_INT8 = ("v5e",)  # kinds of device, for drafts with a budget too: docs/tpu.md
_DESCRIPTION = """
Predicts what a model takes on meshes of devices: memory of each device, bytes over its links, and tokens per second,
plain and with W4A8 drafts. Nothing is run, and no such device is needed.
"""
_COLUMNS = "{:<18} {:>6} {:>8} {:>7} {:>6} {:>8} {:>9} {:>9} {:>10} {:>10} {:>5}"


def add_command(commands: Any) -> None:
    """Adds the parser of this command."""
    text = "predict memory, traffic and speed on many devices"
    parser = commands.add_parser("scaling", help=text, description=_DESCRIPTION)
    add = parser.add_argument
    preset = f"shape of a model: {', '.join(PRESETS)} (default: llama-3-8b)"
    add("--preset", choices=sorted(PRESETS), default="llama-3-8b", metavar="NAME", help=preset)
    add("--hardware", choices=KINDS, default="h100", help="kind of device (default: h100)")
    add("--devices", metavar="N,...", help="all meshes of so many devices that fit the model (default: 1,2,8)")
    add("--mesh", action="append", default=[], metavar="AXES", help="such as data=2,model=4; repeatable")
    add("--batch", default="1,16", metavar="B,...", help="sequences of each place of the data axis (default: 1,16)")
    add("--context", type=int, default=4096, metavar="N", help="tokens of each (default: 4096)")
    shared.add_group_size(parser, "inputs per weight scale (default: 128, or the largest that fits)")
    add("--draft-length", type=int, default=3, metavar="N", help="drafts per cycle (default: 3)")
    shared.add_draft_context(parser)
    shared.add_kv(parser)
    add("--acceptance", type=float, default=0.95, metavar="A", help="chance of each draft (default: 0.95)")
    add("--json", type=Path, metavar="FILE", help="write all figures to a file")
    shared.add_debug(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each mesh and batch."""
    batches, meshes = _check(arguments)
    from qspec_jax.bench.scaling.hardware import HARDWARE
    from qspec_jax.decoding.mesh_costs import Drafting
    from qspec_jax.model.cache import KV_INT8

    config, hardware = PRESETS[arguments.preset], HARDWARE[arguments.hardware]
    drafting = Drafting(arguments.draft_length, _budget(arguments), arguments.acceptance)
    decoders = [*_decoders(config, meshes, arguments)]  # all, before a line is printed: one of them may be refused
    about = f"{arguments.preset} on {arguments.hardware}, {arguments.context:,} tokens of each sequence"
    show(f"{NOTICE}\n{about}" + ", in a cache of int8" * (arguments.kv == KV_INT8))
    show(_COLUMNS.format("mesh", "batch", "weights", "cache", "other", "MB/pass", "link ms", "step ms", *_LAST))
    results = []
    for mesh, local in decoders:
        for batch in batches:
            settings = {"rows": batch * mesh.data, "context": arguments.context, "drafting": drafting}
            results.append(_predicted(local, mesh, hardware, **settings))
            show(table_row(results[-1]))
    names = ("preset", "hardware", "context", "group_size", "draft_length", "draft_context", "kv", "acceptance")
    settings = {name: getattr(arguments, name) for name in names}
    options.write_report(arguments.json, {"notice": NOTICE, "settings": settings, "results": results})
    return 0


_LAST = ("tokens/s", "drafting", "gain")


def _budget(arguments: argparse.Namespace) -> int | None:
    """Positions of the cache that a draft reads; None for all, as of int8 on TPUs whatever was asked for."""
    from qspec_jax.model.cache import KV_INT8

    if arguments.kv == KV_INT8 and arguments.hardware in _READS_ALL_OF_INT8:
        return None
    return {"full": None, "auto": DRAFT_BUDGET}.get(arguments.draft_context, arguments.draft_context)


def _check(arguments: argparse.Namespace) -> tuple[list[int], list[tuple[MeshShape, bool]]]:
    """Batches, and meshes with whether each was asked for itself; raises UsageError for what makes no sense."""
    options.check_writable(arguments.json, option="--json")
    options.check_at_least(arguments.context, 1, option="--context")
    shared.check_draft_length(arguments.draft_length)
    if not 0 <= arguments.acceptance <= 1:
        raise UsageError(f"--acceptance {arguments.acceptance} must be between 0 and 1")
    if arguments.mesh and arguments.devices:
        raise UsageError("--mesh and --devices are two ways to say which meshes; use one of them")
    batches = options.parse_numbers(arguments.batch, option="--batch")
    if arguments.mesh:
        return batches, [(parse_mesh(text), True) for text in arguments.mesh]
    counts = options.parse_numbers(arguments.devices or "1,2,8", option="--devices")
    if max(counts) > _MOST_DEVICES:
        raise UsageError(f"--devices {max(counts)} must be at most {_MOST_DEVICES}")
    splits = ((count, split) for count in counts for split in range(1, count + 1) if count % split == 0)
    return batches, [(MeshShape(count // split, split), False) for count, split in splits]


def _decoders(
    config: ModelConfig, meshes: list[tuple[MeshShape, bool]], arguments: argparse.Namespace
) -> Iterator[tuple[MeshShape, Decoder]]:
    """What one device has of the model on each mesh; a mesh that was not asked for itself may not fit the model."""
    from qspec_jax.model.decoder import abstract_decoder
    from qspec_jax.model.linear import complete_formats
    from qspec_jax.model.parameters import layer_anatomy
    from qspec_jax.model.sharding import check_split

    linears = layer_anatomy(config).linears
    for mesh, asked in meshes:
        quantization = _quantization(config, mesh.model, arguments.group_size)
        formats = complete_formats(linears, quantization, None)
        try:
            check_split(config, mesh.model, quantization=quantization, formats=formats)
        except UsageError:
            if asked:
                raise
            continue
        settings: Any = {"dtype": "bfloat16", "kernels": "reference", "scan_layers": True, "split": mesh.model}
        local = abstract_decoder(config, quantization=quantization, formats=None, **settings)
        local.kv = arguments.kv
        yield mesh, local


def _quantization(config: ModelConfig, split: int, group_size: str | None) -> QuantConfig:
    """Of symmetric weights, in the groups asked for, or the largest of 128, 64 and 32 that every device has whole."""
    from qspec_jax.model.config import parse_group_size
    from qspec_jax.model.parameters import layer_anatomy

    if group_size is not None:
        return QuantConfig(group_size=parse_group_size(group_size), symmetric=True)
    linears = layer_anatomy(config).linears.values()
    inputs = [one.num_inputs // (split if one.writes_stream else 1) for one in linears]
    fitting = next((size for size in (128, 64, 32) if not any(k % size for k in inputs)), 32)
    return QuantConfig(group_size=fitting, symmetric=True)


def _predicted(
    local: Decoder, mesh: MeshShape, hardware: Hardware, *, rows: int, context: int, drafting: Drafting
) -> dict[str, Any]:
    from qspec_jax.decoding.mesh_costs import device_bytes, predict

    held = device_bytes(local, mesh, rows=rows, context=context, draft_length=drafting.length)
    found = predict(local, mesh, hardware, rows=rows, context=context, drafting=drafting)
    about = {"mesh": str(mesh), "data": mesh.data, "model": mesh.model, "rows": rows, "batch": rows // mesh.data}
    held_bytes = {f"{name}_bytes": getattr(held, name) for name in ("weights", "cache", "temporaries", "total")}
    return {**about, **held_bytes, "fits": held.total <= hardware.memory_bytes, **found.to_dict()}


def table_row(result: dict[str, Any]) -> str:
    """A mesh and a batch as a line; bytes in GB."""
    sizes = [f"{result[f'{name}_bytes'] / 1e9:.1f}" for name in ("weights", "cache", "temporaries")]
    start = result["mesh"], result["batch"], *sizes
    if not result["fits"]:
        return _COLUMNS.format(*start, *[""] * 6).rstrip() + "  does not fit"
    times = f"{1e3 * result['link_s']:.2f}", f"{1e3 * result['step_s']:.2f}"
    speeds = f"{result['tokens_per_s']:,.0f}", f"{result['drafted_tokens_per_s']:,.0f}", f"{result['gain']:.2f}"
    return _COLUMNS.format(*start, f"{result['traffic']['num_bytes'] / 1e6:,.1f}", *times, *speeds)

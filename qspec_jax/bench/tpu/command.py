"""``python -m qspec_jax.bench tpu``: cycles of the TPU kernels from the machine code that the TPU's compiler prints.

No TPU is needed, and none is used: figures are counts, not times (docs/tpu.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qspec_jax.bench import options
from qspec_jax.bench.presets import PRESETS
from qspec_jax.commands import options as shared
from qspec_jax.commands.output import say, show
from qspec_jax.errors import QSpecError, UsageError

GENERATIONS = ("v5e", "v6e", "7x")
OPS = ("w4a16", "w8a16", "w4a8", "attention", "masses", "blocks", "write", "hadamard", "head")
OPS += ("attention-int8", "masses-int8", "write-int8")
NOTICE = "counted, not measured: bundles of the TPU compiler's machine code, on a machine without a TPU"
_DESCRIPTION = """
Compiles the kernels for TPUs by their own compiler (libtpu), and counts the cycles of its machine code beside those
that the memory needs for the bytes. Nothing is run.
"""
_COLUMNS = "{:<4} {:<14} {:<24} {:>10} {:>10} {:>6} {:>8} {:>10}"


def add_command(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = commands.add_parser("tpu", help="count cycles of the TPU kernels, without a TPU", description=_DESCRIPTION)
    add = parser.add_argument
    add("--generations", default=",".join(GENERATIONS), metavar="G,...", help=f"default: {','.join(GENERATIONS)}")
    add("--ops", default=",".join(OPS), metavar="OP,...", help=f"default: {','.join(OPS)}")
    add("--model", choices=sorted(PRESETS), default="llama-3-8b", help="whose shapes (default: llama-3-8b)")
    add("--rows", type=int, default=8, metavar="N", help="sequences of a decode (default: 8)")
    add("--tokens", type=int, default=4, metavar="N", help="new tokens of each in attention (default: 4)")
    add("--context", type=int, default=2048, metavar="N", help="slots of the cache (default: 2048)")
    add("--group-size", type=int, default=128, metavar="N", help="inputs that share a scale (default: 128)")
    add("--json", type=Path, metavar="FILE", help="write all figures to a file")
    shared.add_debug(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each call and generation; 1 if one does not compile."""
    for name in ("rows", "tokens", "context"):
        options.check_at_least(getattr(arguments, name), 1, option=f"--{name}")
    options.check_writable(arguments.json, option="--json")
    generations = options.parse_names(arguments.generations, option="--generations", known=GENERATIONS)
    ops = options.parse_names(arguments.ops, option="--ops", known=OPS)
    config, size = PRESETS[arguments.model], arguments.group_size
    if size < 1 or config.hidden_size % size or config.intermediate_size % size:
        raise UsageError(f"--group-size {size} does not divide the rows of {arguments.model}; use 32, 64 or 128")
    _check_compiler()
    settings = {name: getattr(arguments, name) for name in ("model", "rows", "tokens", "context", "group_size")}
    show(f"{NOTICE}\n{_COLUMNS.format('', 'op', 'shape', 'cycles', 'of bytes', 'ratio', 'VMEM MB', 'temporary')}")
    results = []
    for generation in generations:
        for result in counted(generation, {**settings, "ops": ops}):
            results.append({"name": generation, **result})
            show(table_row(results[-1]))
        report = {"notice": NOTICE, "settings": settings, "results": results}
        options.write_report(arguments.json, report)
    return 0 if all(result["status"] == "ok" for result in results) else 1


def _check_compiler() -> None:
    if importlib.util.find_spec("libtpu") is None and not Path(os.environ.get("TPU_LIBRARY_PATH", "")).is_file():
        raise QSpecError("the TPU's compiler, libtpu, is not installed; run pip install 'qspec-jax[tpu]'")


def table_row(result: dict[str, Any]) -> str:
    """A call as a line."""
    cells = result["name"], result["op"], result["shape"]
    if result["status"] != "ok":
        return _COLUMNS.format(*cells, "-", "-", "-", "-", "-") + f"  FAILED: {result['error']}"
    ratio = result["cycles"] / result["cycles_of_bytes"]
    vmem = f"{result['vmem_bytes'] / 1e6:.1f}"
    counts = result["cycles"], result["cycles_of_bytes"], f"{ratio:.2f}", vmem, result["temporary_bytes"]
    line = _COLUMNS.format(*cells, *counts)
    return line if result["is_kernel"] else f"{line}  XLA"


def counted(generation: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a process that compiles for a generation reports, call by call.

    Raises:
        QSpecError: the process ended before it was done.
    """
    with tempfile.TemporaryDirectory() as folder:
        printing = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": printing}
        command = [sys.executable, "-m", "qspec_jax.bench.tpu.worker", generation, folder, json.dumps(settings)]
        say(f"{generation} ...")
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
            assert one.stdout is not None
            assert one.stderr is not None
            for line in one.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            errors = one.stderr.read().strip()
        if one.returncode:
            last = errors.splitlines()[-1] if errors else f"exit code {one.returncode}"
            raise QSpecError(f"the compiler for {generation} ended early: {last}")

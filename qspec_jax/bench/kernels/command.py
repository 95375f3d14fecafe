"""``python -m qspec_jax.bench kernels``: what each kernel reaches of the device's measured ceilings.

Parses and prints; :mod:`qspec_jax.bench.kernels.measure` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.bench.kernels.names import IMPLEMENTATIONS, OPS, TORCH
from qspec_jax.commands import options as shared
from qspec_jax.commands.output import say, show

if TYPE_CHECKING:
    from qspec_jax.bench.kernels.ceilings import Ceilings
    from qspec_jax.bench.kernels.measure import Measurement

_DEFAULT_ROWS = "1,16,64,256"
_DESCRIPTION = """
Time of the kernels alone, without dispatch: one program calls a kernel on copies of its weight that together exceed
the L2 cache. TB/s counts weights, scales, activations and outputs once; TOP/s two operations per weight and row.
Operations: w4a16; w8a16, of nested weights; w4a8 and w4a4, the integer matmul with the activations of each draft
precision; bf16, x @ w.T in bfloat16 through XLA and by the kernel of exact mode; quantize_a8 and quantize_a4, which
quantise those activations; swiglu, the gated unit of an MLP, and swiglu_a8 and swiglu_a4, which quantise its result;
and for rotated models hadamard, swiglu_hadamard, swiglu_hadamard_a8 and swiglu_hadamard_a4, with a transform of all K
values. The error of w4a8 and w4a4 is that of the matmul, given the quantised activations; that of swiglu_*_a8 and _a4
includes the rounding to codes.
"""


def add_command(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = commands.add_parser("kernels", help="time the kernels", description=_DESCRIPTION)
    options.add_shape_options(parser)
    add = parser.add_argument
    add("--rows", default=_DEFAULT_ROWS, metavar="M,...", help=f"rows of the activations (default: {_DEFAULT_ROWS})")
    add("--ops", metavar="OP,...", help="some of the operations above (default: all)")
    all_here = "default: all that work here, and torch where it has CUDA; mosaic_pairs: W4A16 by pairs of programs"
    add("--implementations", metavar="NAME,...", help=all_here)
    add("--repeats", type=int, default=5, metavar="N", help="timed runs, of which the median counts (default: 5)")
    shared.add_report(parser, "the roofline")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 if a kernel failed or was wrong."""
    asked = _read(arguments)
    shapes = options.selected_shapes(arguments)
    grouped = [(shape, options.selected_group_sizes(arguments, shape)) for shape in shapes]
    from qspec_jax.bench.environment import environment, header
    from qspec_jax.bench.kernels.ceilings import measure_ceilings
    from qspec_jax.bench.kernels.measure import MeasurementPlan, measure_all
    from qspec_jax.bench.kernels.plot import plot_roofline
    from qspec_jax.bench.timing import WALL_NOTICE, kernel_clock_works

    asked.setdefault("implementations", _all_implementations())
    plan = MeasurementPlan(**asked)
    facts = environment(arguments.argv)
    show(header(facts))
    if not kernel_clock_works():
        show(WALL_NOTICE)
    say("ceilings ...")
    ceilings = measure_ceilings(repeats=plan.repeats)
    show(ceilings_line(ceilings))
    show(table_head("kernel" if kernel_clock_works() else "wall"))
    measurements = []
    for measurement in measure_all(grouped, plan):
        measurements.append(measurement)
        options.write_report(arguments.json, _report(facts, ceilings, measurements))
        show(table_row(measurement, ceilings))
    if arguments.plot:
        plot_roofline(arguments.plot, measurements, ceilings, title=f"{facts['device']}, jax {facts['jax']}")
    return _complain(measurements)


def _read(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a ``measure.MeasurementPlan`` that are asked for, checked without JAX."""
    options.check_report(arguments)
    options.check_at_least(arguments.repeats, 1, option="--repeats")
    asked: dict[str, Any] = {
        "ops": list(OPS) if arguments.ops is None else options.parse_names(arguments.ops, option="--ops", known=OPS),
        "rows": options.parse_numbers(arguments.rows, option="--rows"),
        "symmetric": not arguments.asymmetric,
        "repeats": arguments.repeats,
    }
    if arguments.implementations is not None:
        asked["implementations"] = options.parse_names(
            arguments.implementations, option="--implementations", known=IMPLEMENTATIONS
        )
    return asked


def _all_implementations() -> list[str]:
    """Those that work here."""
    import pallas_kernels
    from qspec_jax.bench.kernels import torch_int4

    return [*pallas_kernels.available_implementations(), *[TORCH] * torch_int4.available()]


def ceilings_line(ceilings: Ceilings) -> str:
    """The measured ceilings."""
    return (
        f"copy {ceilings.copy_tb_per_s:.3g} TB/s, bf16 matmul {ceilings.bf16_top_per_s:.4g} TOP/s, "
        f"int8 matmul {ceilings.int8_top_per_s:.4g} TOP/s"
    )


_COLUMNS = "{:<18} {:<12} {:>12} {:>6} {:>5} {:>10} {:>7} {:>6} {:>8} {:>6} {:>9}"


def table_head(clock: str) -> str:
    """The names of the columns; times are of the ``clock``."""
    names = ("op", "by", "K x N", "group", "M", f"{clock} us", "TB/s", "copy", "TOP/s", "rate", "error")
    return _COLUMNS.format(*names)


def table_row(one: Measurement, ceilings: Ceilings) -> str:
    """A measurement as a line; shares are of the copy bandwidth and of the matmul rate."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    shares = one.to_dict(ceilings)
    shape = f"{one.k}x{one.n}" if one.n else f"{one.k}"
    group = "-" if one.group_size is None else "row" if one.group_size == one.k else str(one.group_size)
    group += "a" * (one.symmetric is False)
    cells = (
        number(one.microseconds, ".2f"),
        number(one.tb_per_s, ".3g"),
        number(shares["share_of_copy_bandwidth"], ".0%"),
        number(one.top_per_s, ".4g"),
        number(shares["share_of_matmul_rate"], ".0%"),
        "WRONG" if one.status == "wrong" else number(one.relative_error, ".1e"),
    )
    line = _COLUMNS.format(one.op, one.implementation, shape, group, one.rows, *cells)
    return line if one.status != "failed" else f"{line}  FAILED"


def _report(facts: dict[str, Any], ceilings: Ceilings, measurements: Sequence[Measurement]) -> dict[str, Any]:
    return {
        "environment": facts,
        "ceilings": dataclasses.asdict(ceilings),
        "measurements": [one.to_dict(ceilings) for one in measurements],
    }


def _complain(measurements: Sequence[Measurement]) -> int:
    """Names what was refused, once per reason, and what is broken."""
    for reason in dict.fromkeys(one.reason for one in measurements if one.status == "unsupported"):
        say(f"-: {reason}")
    broken = [one for one in measurements if one.status in ("wrong", "failed")]
    for one in broken:
        say(f"{one.status}: {one.op} {one.implementation} K={one.k} N={one.n} M={one.rows}: {one.reason}")
    return 1 if broken else 0

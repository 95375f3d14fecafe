"""``python -m qspec_jax.bench tune``: measures tiles of the Triton matmuls and writes the table that ships.

Parses and prints; :mod:`qspec_jax.bench.tune.search` decides and :mod:`qspec_jax.bench.tune.laboratory` measures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qspec_jax.bench import options
from qspec_jax.commands.output import say, show
from qspec_jax.errors import QSpecError, UsageError

if TYPE_CHECKING:
    from pallas_kernels.backends.triton.tuning import TuningTable
    from qspec_jax.bench.tune.search import Outcome, Trial
    from qspec_jax.bench.tune.tile_space import Problem

_DEFAULT_OPS = "w4a16,w4a8"
_DESCRIPTION = """
Finds the fastest tiles of the Triton matmuls among those whose results are the reference's and whose rows have the
same bits for 1 to 256 rows. Entries of the table that are not measured anew are kept, and each new one is written as
soon as it is found.
"""


def add_command(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = commands.add_parser("tune", help="measure tiles of the Triton matmuls", description=_DESCRIPTION)
    options.add_shape_options(parser)
    add = parser.add_argument
    add("--ops", default=_DEFAULT_OPS, metavar="OP,...", help=f"w4a16, w4a8, w4a4 (default: {_DEFAULT_OPS})")
    add("--output", type=Path, metavar="FILE", help="the table (default: the package's for this device)")
    add("--candidates", type=int, default=32, metavar="N", help="tiles tried per bucket of rows (default: 32)")
    add("--time-limit", type=float, metavar="S", help="seconds in total, shared evenly (default: none)")
    add("--repeats", type=int, default=3, metavar="N", help="timed runs of a candidate (default: 3)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tunes and writes; 1 if nothing fit to write was found for a problem."""
    options.check_at_least(arguments.candidates, 1, option="--candidates")
    options.check_at_least(arguments.repeats, 1, option="--repeats")
    options.check_at_least(arguments.time_limit, 1, option="--time-limit")
    options.check_writable(arguments.output, option="--output")
    ops = options.parse_names(arguments.ops, option="--ops", known=("w4a16", "w4a8", "w4a4"))
    shapes = options.selected_shapes(arguments, default="llama-3-8b")
    grouped = [(shape, options.selected_group_sizes(arguments, shape)) for shape in shapes]
    _check_device()
    import jax

    from pallas_kernels.backends.triton.tuning import shipped_table_path
    from qspec_jax.bench.environment import environment, header
    from qspec_jax.bench.tune.tables import open_table
    from qspec_jax.bench.tune.tile_space import Problem

    problems = [
        Problem(op, shape.k, shape.n, group_size, not arguments.asymmetric)
        for shape, group_sizes in grouped
        for group_size in group_sizes
        for op in ops
    ]
    for problem in problems:
        problem.check()
    device_kind = jax.local_devices()[0].device_kind
    path = arguments.output or shipped_table_path(device_kind)
    table = open_table(path, device_kind)
    facts = environment(arguments.argv)
    show(header(facts))
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    measured = f"{str(facts['date']).split()[0]}, jax {facts['jax']}{driver}"
    return tune(problems, table, path, measured=measured, arguments=arguments)


def tune(
    problems: list[Problem], table: TuningTable, path: Path, *, measured: str, arguments: argparse.Namespace
) -> int:
    """Searches problem after problem, each in an even share of the time that is left."""
    from qspec_jax.bench.tune.search import search
    from qspec_jax.bench.tune.tables import entry_of, merged, write_table

    end = float("inf") if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    num_unsolved = 0
    for index, problem in enumerate(problems):
        left = end - time.monotonic()
        if left <= 0:
            say(f"time limit: {len(problems) - index} of {len(problems)} are not done; raise --time-limit")
            break
        say(f"{index + 1}/{len(problems)} {problem} ...")
        laboratory, space = _laboratory_and_space(problem, arguments.repeats)
        deadline = time.monotonic() + left / (len(problems) - index)
        outcome = search(laboratory, space, candidates=arguments.candidates, deadline=deadline)
        show(describe(problem, outcome))
        entry = entry_of(problem, outcome, measured=measured)
        if entry is None:
            num_unsolved += not outcome.keeps_built_in
            continue
        table = merged(table, entry)
        write_table(table, path)
    show(f"{path}: {len(table.entries)} entries")
    return 1 if num_unsolved else 0


def describe(problem: Problem, outcome: Outcome) -> str:
    """The winner's tiles and times beside those of the built-in tiles, and how many candidates lost and why."""
    counts = (
        f"{outcome.num_tried} tried, {outcome.num_failed} did not compile, {outcome.num_wrong} wrong, "
        f"{outcome.num_other_bits} with other bits, {outcome.num_variant} sets not row invariant"
    )
    if outcome.keeps_built_in:
        return f"{problem}: the built-in tiles stay, faster than any set found ({counts})"
    if outcome.winner is None:
        return f"{problem}: nothing to ship ({counts}); raise --candidates or --time-limit"
    block_k, split = outcome.winner.order
    lines = [f"{problem}: block_k {block_k}, split {split} ({counts})"]
    lines += [_line(f"M <= {rows}", rows, trial, outcome) for rows, trial in sorted(outcome.winner.decode.items())]
    if outcome.prefill is not None:
        from qspec_jax.bench.tune.search import PREFILL_ROWS

        tiles = outcome.prefill.tiles
        line = _line(f"M = {PREFILL_ROWS}", PREFILL_ROWS, outcome.prefill, outcome)
        lines.append(f"{line}, block_k {tiles.block_k}, split {tiles.split}")
    return "\n".join(lines)


def _line(label: str, rows: int, trial: Trial, outcome: Outcome) -> str:
    tiles, built_in_us = trial.tiles, outcome.built_in_us.get(rows)
    before = "" if built_in_us is None else f" (built-in {built_in_us:.2f})"
    shape = f"{tiles.block_m} x {tiles.block_n}, {tiles.num_warps} warps, {tiles.num_stages} stages"
    return f"  {label:<9} {trial.microseconds:8.2f} us{before:<20}  {shape}"


def _laboratory_and_space(problem: Problem, repeats: int) -> tuple[Any, Any]:
    import jax

    from qspec_jax.bench.tune.laboratory import TritonLaboratory
    from qspec_jax.bench.tune.tile_space import TileSpace

    num_cores = getattr(jax.local_devices()[0], "core_count", None)
    space = TileSpace(problem) if num_cores is None else TileSpace(problem, num_cores)
    return TritonLaboratory(problem, repeats=repeats), space


def _check_device() -> None:
    import jax

    import pallas_kernels
    from pallas_kernels.dispatch import TRITON
    from qspec_jax.bench.timing import WALL_NOTICE, kernel_clock_works
    from qspec_jax.device.start import start_device

    start_device()
    if TRITON not in pallas_kernels.available_implementations():
        raise UsageError(
            f"tune measures the Triton kernels, which do not work on this {jax.default_backend()} device; run it on "
            "an NVIDIA GPU of compute capability 8.0 or newer"
        )
    if not kernel_clock_works():
        raise QSpecError(f"{WALL_NOTICE}: the profiler (CUPTI) is not available, so nothing can be tuned; install it")

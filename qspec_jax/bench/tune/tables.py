"""Writes tuning tables: entries are merged into what is there, and a file is either the old one or the new one."""

from __future__ import annotations

import json
from pathlib import Path

from pallas_kernels.backends.triton import tuning
from pallas_kernels.backends.triton.tiles import TileConfig
from pallas_kernels.backends.triton.tuning import PrefillTile, TunedEntry, TunedTile, TuningTable
from qspec_jax.bench.tune.search import Outcome, Trial
from qspec_jax.bench.tune.tile_space import Problem
from qspec_jax.errors import QSpecError, UsageError
from qspec_jax.files.whole import replace


def open_table(path: Path, device_kind: str) -> TuningTable:
    """The table at a path, or an empty one.

    Raises:
        UsageError: the table there is damaged, or belongs to another device.
    """
    if not path.exists():
        return TuningTable(device_kind, {})
    try:
        table = tuning.read_table(path)
    except tuning.TuningTableError as error:
        raise UsageError(f"{error}; move the file away or give another --output") from error
    if table.device_kind != device_kind:
        raise UsageError(
            f"--output {path} holds tiles of {table.device_kind!r}, this is {device_kind!r}; give another --output"
        )
    return table


def merged(table: TuningTable, entry: TunedEntry) -> TuningTable:
    """The table with an entry added, or put in the place of the one with its key."""
    return TuningTable(table.device_kind, {**table.entries, entry.key: entry})


def write_table(table: TuningTable, path: Path) -> None:
    """Checks a table and replaces the file in one step.

    Raises:
        TuningTableError: the table is not valid; the file is left alone.
        QSpecError: it cannot be written.
    """
    raw = tuning.table_to_json(table)
    tuning.parse_table(json.loads(json.dumps(raw)))
    text = json.dumps(raw, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text.encode())
    except OSError as error:
        raise QSpecError(f"cannot write {path}: {error.strerror}; give another --output") from error


def entry_of(problem: Problem, outcome: Outcome, *, measured: str) -> TunedEntry | None:
    """The entry of a search; None where it found no winner."""
    if outcome.winner is None:
        return None
    block_k, split = outcome.winner.order
    decode = {rows: TunedTile(*_tile(trial)) for rows, trial in outcome.winner.decode.items()}
    prefill = None
    if outcome.prefill is not None:
        tiles = outcome.prefill.tiles
        prefill = PrefillTile(*_tile(outcome.prefill), block_k=tiles.block_k, split=tiles.split)
    return TunedEntry(
        op=problem.op,
        k=problem.k,
        n=problem.n,
        group_size=problem.group_size,
        symmetric=problem.symmetric,
        block_k=block_k,
        split=split,
        decode=decode,
        prefill=prefill,
        measured=measured,
    )


def _tile(trial: Trial) -> tuple[int, int, int, int, float]:
    tiles: TileConfig = trial.tiles
    assert trial.microseconds is not None
    return tiles.block_m, tiles.block_n, tiles.num_warps, tiles.num_stages, round(trial.microseconds, 2)

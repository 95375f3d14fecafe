"""Measured tiles of the Triton matmuls, by device and shape: how the shipped tables are read.

A table is ``tuned/<device>.json``, written by ``python -m qspec_jax.bench tune``. It has one entry per operation
and weight ``[N, K]``::

    {"op": "w4a16", "k": 4096, "n": 6144, "group_size": 128, "symmetric": true,
     "block_k": 128, "split": 4,
     "decode": {"16": {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3, "microseconds": 8.1}, ...},
     "prefill": {"block_m": 128, "block_n": 64, "block_k": 64, "split": 1, ...} or null,
     "measured": "2026-11-23, jax 0.11.2, driver 580.159"}

Row invariance: a row's bits must not depend on the rows beside it. The order of the sum over K is that of
``block_k`` and ``split``, so all decode buckets share them: the form of an entry admits nothing else. An entry has
every bucket of :data:`DECODE_ROWS` or is refused, since tiles from elsewhere could sum in another order. The buckets of
float products must all take Hopper's wgmma or none, see :func:`takes_wgmma`. More rows than the last bucket are a
prefill, which has tiles of its own.

Operations: ``w4a16`` is ``w4a16_matmul`` with 16-bit rows; ``w4a8`` is ``w4a4_matmul`` with one symmetric
activation scale per token, of 4 or 8 bits alike; ``w4a4`` is ``w4a4_matmul`` with asymmetric activations in
groups of 32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.arrays.weight import QuantizedWeight
from pallas_kernels.backends.triton import tiles
from pallas_kernels.backends.triton.tiles import TileConfig

FORMAT = 1
OPS = ("w4a16", "w4a8", "w4a4")
DECODE_ROWS: tuple[int, ...] = (16, 32, 64, 128, 256)  # a bucket serves the row counts above the one before it
_REMEDY = "regenerate it with `python -m qspec_jax.bench tune`"

EntryKey = tuple[str, int, int, int, bool]  # op, n, k, group_size, symmetric


class TuningTableError(ValueError):
    """A table that is damaged or was written for another version."""


@dataclasses.dataclass(frozen=True)
class TunedTile:
    """Tiles of one row bucket, and the time they took. ``block_k`` and ``split`` are the entry's."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    microseconds: float


@dataclasses.dataclass(frozen=True)
class PrefillTile(TunedTile):
    """Tiles of a prefill, which keeps no rows invariant and so chooses all."""

    block_k: int
    split: int


@dataclasses.dataclass(frozen=True)
class TunedEntry:
    """The tiles of one operation with one weight.

    Attributes:
        op: one of :data:`OPS`.
        k, n, group_size, symmetric: of the weight; ``group_size`` is ``k`` where one scale covers the row.
        block_k, split: of all decode buckets.
        decode: by bucket, all of :data:`DECODE_ROWS`.
        prefill: for more rows than the last bucket; None leaves them to the built-in choice.
        measured: date and versions, for people.
    """

    op: str
    k: int
    n: int
    group_size: int
    symmetric: bool
    block_k: int
    split: int
    decode: Mapping[int, TunedTile]
    prefill: PrefillTile | None
    measured: str

    @property
    def key(self) -> EntryKey:
        return self.op, self.n, self.k, self.group_size, self.symmetric


@dataclasses.dataclass(frozen=True)
class TuningTable:
    """All entries of one device kind."""

    device_kind: str
    entries: Mapping[EntryKey, TunedEntry]


def tuned_tiles(
    op: str, *, m: int, n: int, k: int, group_size: int, symmetric: bool, device_kind: str
) -> TileConfig | None:
    """The measured tiles for a call, or None where nothing was measured.

    Args:
        op: one of :data:`OPS`; the module docstring says what each stands for.
        m, n, k: rows, outputs and inputs.
        group_size: inputs per weight scale; ``k`` where one scale covers the row.
        symmetric: the weight has no offsets.
        device_kind: ``jax.Device.device_kind``, such as ``"NVIDIA H200"``.

    Raises:
        TuningTableError: the shipped table of this device is damaged.
    """
    table = _shipped_table(device_slug(device_kind))
    entry = None if table is None else table.entries.get((op, n, k, group_size, symmetric))
    if entry is None:
        return None
    bucket = next((rows for rows in DECODE_ROWS if m <= rows), None)
    tile = entry.prefill if bucket is None else entry.decode[bucket]
    if tile is None:
        return None
    order = tile if isinstance(tile, PrefillTile) else entry
    return TileConfig(tile.block_m, tile.block_n, order.block_k, order.split, tile.num_warps, tile.num_stages)


def takes_wgmma(left: int, num_warps: int) -> bool:
    """Whether Triton multiplies a tile of such a height by Hopper's instruction for whole warpgroups, or by mma.sync.

    The float sums of the two are rounded differently: so little and so seldom that random rows may not show it in 16
    bits, where a model's rows, whose values differ more in size, do.
    """
    return left >= 64 and num_warps % 4 == 0


def device_slug(device_kind: str) -> str:
    """The file name of a device kind: ``"NVIDIA H200"`` is ``nvidia_h200``."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def shipped_table_path(device_kind: str) -> Path:
    """Where the table of a device kind lies in the package, whether or not there is one."""
    return _path_of(device_slug(device_kind))


def read_table(path: Path) -> TuningTable:
    """Reads a table and checks all of it.

    Raises:
        TuningTableError: the file cannot be read, is not JSON or is not a valid table.
    """
    try:
        return parse_table(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # TuningTableError and JSONDecodeError are ValueErrors
        raise TuningTableError(f"tuning table {path}: {error}; {_REMEDY}") from error


def parse_table(raw: Any) -> TuningTable:
    """The table of a parsed JSON file.

    Raises:
        TuningTableError: something is missing, unknown, of a wrong type, or would give wrong results.
    """
    _check_keys(raw, ("format", "device_kind", "entries"), "the file")
    if raw["format"] != FORMAT:
        raise TuningTableError(f"format {raw['format']!r} is not {FORMAT}")
    if not isinstance(raw["device_kind"], str) or not isinstance(raw["entries"], list):
        raise TuningTableError("device_kind must be a text and entries a list")
    entries: dict[EntryKey, TunedEntry] = {}
    for index, raw_entry in enumerate(raw["entries"]):
        entry = _parse_entry(raw_entry, f"entry {index}")
        if entry.key in entries:
            raise TuningTableError(f"entry {index} repeats {entry.op} K={entry.k} N={entry.n} g={entry.group_size}")
        entries[entry.key] = entry
    return TuningTable(raw["device_kind"], entries)


def table_to_json(table: TuningTable) -> dict[str, Any]:
    """The inverse of :func:`parse_table`, with the entries in order."""
    entries: list[dict[str, Any]] = [dataclasses.asdict(table.entries[key]) for key in sorted(table.entries)]
    for entry in entries:
        entry["decode"] = {str(rows): tile for rows, tile in sorted(entry["decode"].items())}
    return {"format": FORMAT, "device_kind": table.device_kind, "entries": entries}


def _path_of(slug: str) -> Path:
    return Path(__file__).parent / "tuned" / f"{slug}.json"


@functools.cache
def _shipped_table(slug: str) -> TuningTable | None:
    path = _path_of(slug)
    if not path.exists():
        return None
    table = read_table(path)
    if device_slug(table.device_kind) != slug:
        raise TuningTableError(f"tuning table {path}: device_kind is {table.device_kind!r}; {_REMEDY}")
    return table


def _parse_entry(raw: Any, where: str) -> TunedEntry:
    _check_keys(raw, tuple(field.name for field in dataclasses.fields(TunedEntry)), where)
    if raw["op"] not in OPS:
        raise TuningTableError(f"{where}: op is {raw['op']!r}; known are {', '.join(OPS)}")
    if not isinstance(raw["symmetric"], bool) or not isinstance(raw["measured"], str):
        raise TuningTableError(f"{where}: symmetric must be true or false and measured a text")
    for name in ("k", "n", "group_size"):
        _check_positive(raw[name], f"{where}: {name}")
    where = f"{where} ({raw['op']} K={raw['k']} N={raw['n']} g={raw['group_size']})"
    if raw["k"] % 2 or raw["k"] % raw["group_size"]:
        raise TuningTableError(f"{where}: K must be even and a multiple of group_size")
    _check_order(raw, raw, where)
    _check_keys(raw["decode"], tuple(map(str, DECODE_ROWS)), f"{where} decode")
    decode = {rows: _parse_tile(TunedTile, raw["decode"][str(rows)], raw, where) for rows in DECODE_ROWS}
    if raw["op"] == "w4a16":
        rounds = tiles.rounds_weights(raw["k"], raw["group_size"], symmetric=raw["symmetric"])
        left = "block_n" if rounds else "block_m"
        if len({takes_wgmma(getattr(tile, left), tile.num_warps) for tile in decode.values()}) > 1:
            told = f"{left} of 64 and more in whole warpgroups rounds differently from less"
            raise TuningTableError(f"{where} decode: {told}")
    prefill = None
    if raw["prefill"] is not None:
        prefill = _parse_tile(PrefillTile, raw["prefill"], raw, where)
        _check_order(raw["prefill"], raw, f"{where} prefill")
    fields: dict[str, Any] = {**raw, "decode": decode, "prefill": prefill}
    return TunedEntry(**fields)


def _parse_tile(kind: type[Any], raw: Any, entry: dict[str, Any], where: str) -> Any:
    _check_keys(raw, tuple(field.name for field in dataclasses.fields(kind)), f"{where} tile")
    for name in ("block_m", "block_n", "num_warps", "num_stages"):
        _check_positive(raw[name], f"{where}: {name}")
    for name in ("block_m", "block_n", "num_warps"):
        if raw[name] & (raw[name] - 1):
            raise TuningTableError(f"{where}: {name}={raw[name]} is not a power of two")
    if min(raw["block_m"], raw["block_n"]) < 16 or entry["n"] % raw["block_n"]:
        raise TuningTableError(
            f"{where}: block_m={raw['block_m']} and block_n={raw['block_n']} must be at least 16, and block_n divide N"
        )
    microseconds = raw["microseconds"]
    if isinstance(microseconds, bool) or not isinstance(microseconds, (int, float)) or not microseconds > 0:
        raise TuningTableError(f"{where}: microseconds={microseconds!r} must be a positive number")
    return kind(**{**raw, "microseconds": float(microseconds)})


def _check_order(raw: dict[str, Any], entry: dict[str, Any], where: str) -> None:
    """``block_k`` and ``split`` cut a nibble plane evenly, and no step straddles two groups."""
    for name in ("block_k", "split"):
        _check_positive(raw[name], f"{where}: {name}")
    block_k, split = raw["block_k"], raw["split"]
    run = math.gcd(entry["k"] // 2, entry["group_size"])
    if block_k & (block_k - 1) or block_k < 32 or run % block_k or entry["k"] // 2 % (block_k * split):
        raise TuningTableError(
            f"{where}: block_k={block_k} must be a power of two from 32 on that divides the group, "
            f"and block_k times split={split} must divide K/2"
        )


def _check_keys(raw: Any, expected: tuple[str, ...], where: str) -> None:
    if not isinstance(raw, dict):
        raise TuningTableError(f"{where} is a {type(raw).__name__}, not an object")
    if missing := [name for name in expected if name not in raw]:
        raise TuningTableError(f"{where} lacks {', '.join(missing)}")
    if unknown := [str(name) for name in raw if name not in expected]:
        raise TuningTableError(f"{where} has unknown {', '.join(unknown)}")


def _check_positive(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TuningTableError(f"{what}={value!r} must be a positive whole number")


def tuned_config(op: str, m: int, weight: QuantizedWeight) -> TileConfig | None:
    """The measured tiles for a call on the default GPU; None where there are none."""
    if jax.default_backend() != "gpu":
        return None
    return tuned_tiles(
        op,
        m=m,
        n=weight.num_outputs,
        k=weight.num_inputs,
        group_size=weight.group_size,
        symmetric=weight.symmetric,
        device_kind=jax.local_devices()[0].device_kind,
    )

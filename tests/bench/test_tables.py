"""Tuning tables: reading, refusing, merging and writing, and the ``tune`` command around them."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import pytest

from pallas_kernels.backends.triton import tuning
from pallas_kernels.backends.triton.tiles import TileConfig
from pallas_kernels.backends.triton.tuning import (
    DECODE_ROWS,
    PrefillTile,
    TunedEntry,
    TunedTile,
    TuningTable,
    TuningTableError,
)
from qspec_jax.bench.__main__ import main
from qspec_jax.bench.tune import command as tune
from qspec_jax.bench.tune.tables import open_table, write_table
from qspec_jax.bench.tune.tile_space import TileSpace
from qspec_jax.errors import QSpecError, UsageError
from tests.bench.test_search import FakeLaboratory

DEVICE = "NVIDIA H200"


def entry(op="w4a16", *, n=128, split=2, prefill=True):
    decode = {rows: TunedTile(16, 64, 4, 3, rows / 10) for rows in DECODE_ROWS}
    decode[256] = TunedTile(32, min(n, 128), 8, 4, 99.0)
    last = PrefillTile(128, 64, 4, 3, 500.5, block_k=32, split=1) if prefill else None
    return TunedEntry(op, 512, n, 128, True, 64, split, decode, last, "2026-11-23, jax 0.11.2")


def table(*entries):
    return TuningTable(DEVICE, {one.key: one for one in entries})


def raw_table(**changes):
    raw = json.loads(json.dumps(tuning.table_to_json(table(entry()))))
    raw["entries"][0].update(changes)
    return raw


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A place for tables that stands for the package's."""
    monkeypatch.setattr(tuning, "_path_of", lambda slug: tmp_path / f"{slug}.json")
    tuning._shipped_table.cache_clear()
    yield tmp_path
    tuning._shipped_table.cache_clear()


def asked(m, **changes):
    call = {"n": 128, "k": 512, "group_size": 128, "symmetric": True, "device_kind": DEVICE, **changes}
    return tuning.tuned_tiles(call.pop("op", "w4a16"), m=m, **call)


def test_a_table_survives_writing_and_reading(tmp_path):
    written = table(entry(), entry("w4a8", n=64, prefill=False))
    path = tmp_path / "new" / "table.json"
    write_table(written, path)
    assert tuning.read_table(path) == written


def test_calls_find_the_tiles_of_their_bucket(shipped):
    write_table(table(entry()), shipped / "nvidia_h200.json")
    for m in (1, 16, 17, 128):
        assert asked(m) == TileConfig(16, 64, 64, 2, 4, 3)
    assert asked(129) == asked(256) == TileConfig(32, 128, 64, 2, 8, 4)
    assert asked(257) == asked(4096) == TileConfig(128, 64, 32, 1, 4, 3)


def test_what_was_not_measured_has_no_tiles(shipped):
    write_table(table(entry(prefill=False)), shipped / "nvidia_h200.json")
    assert asked(257) is None
    for other in ({"op": "w4a8"}, {"n": 64}, {"k": 256}, {"group_size": 64}, {"symmetric": False}):
        assert asked(1, **other) is None
    assert asked(1, device_kind="NVIDIA H100 80GB HBM3") is None


def test_the_shipped_table_is_read_once(shipped):
    path = shipped / "nvidia_h200.json"
    write_table(table(entry()), path)
    assert asked(1) is not None
    path.unlink()
    assert asked(1) is not None


def test_the_table_of_another_device_is_refused(shipped):
    write_table(table(entry()), shipped / "nvidia_h100.json")
    with pytest.raises(TuningTableError, match="device_kind is 'NVIDIA H200'; regenerate it with"):
        asked(1, device_kind="NVIDIA H100")


def test_file_names_of_devices():
    assert tuning.device_slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    path = tuning.shipped_table_path("NVIDIA H200")
    assert path == Path(tuning.__file__).parent / "tuned" / "nvidia_h200.json"


def test_every_shipped_table_is_valid_and_found():
    paths = list(tuning.shipped_table_path("x").parent.glob("*.json"))
    assert {"nvidia_h100_80gb_hbm3", "nvidia_h200"} <= {path.stem for path in paths}
    for path in paths:
        assert tuning.device_slug(tuning.read_table(path).device_kind) == path.stem


TILE = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3, "microseconds": 1.0}
SMALL_GROUPS_WITH_OFFSETS = {"group_size": 32, "block_k": 32, "symmetric": False}
COMPLETE = {str(rows): TILE for rows in DECODE_ROWS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "w4a2"}, "entry 0: op is 'w4a2'; known are w4a16"),
        ({"k": "512"}, "entry 0: k='512' must be a positive whole number"),
        ({"symmetric": 1}, "symmetric must be true or false"),
        ({"group_size": 96}, "K must be even and a multiple of group_size"),
        ({"block_k": 48}, "block_k=48 must be a power of two from 32 on"),
        ({"block_k": 256}, "block_k=256 must be a power of two from 32 on that divides the group"),
        ({"split": 3}, "block_k times split=3 must divide K/2"),
        ({"split": True}, "split=True must be a positive whole number"),
        ({"colour": "red"}, "entry 0 has unknown colour"),
        ({"decode": {"16": TILE}}, "decode lacks 32, 64, 128, 256"),
        ({"decode": {**COMPLETE, "512": TILE}}, "decode has unknown 512"),
        ({"decode": {**COMPLETE, "32": {**TILE, "block_k": 32}}}, "tile has unknown block_k"),
        ({"decode": {**COMPLETE, "32": {**TILE, "block_n": 256}}}, "block_n divide N"),
        ({"decode": {**COMPLETE, "32": {**TILE, "block_m": 8}}}, "must be at least 16"),
        ({"decode": {**COMPLETE, "32": {**TILE, "num_warps": 3}}}, "num_warps=3 is not a power of two"),
        ({"decode": {**COMPLETE, "32": {**TILE, "microseconds": 0}}}, "microseconds=0 must be a positive number"),
        ({"decode": {**COMPLETE, "128": {**TILE, "block_m": 64}}}, "block_m of 64 and more in whole warpgroups"),
        (
            {**SMALL_GROUPS_WITH_OFFSETS, "decode": {**COMPLETE, "128": {**TILE, "num_warps": 2}}},
            "block_n of 64 and more in whole warpgroups",
        ),
        ({"prefill": {**TILE, "block_k": 64}}, "tile lacks split"),
        ({"prefill": {**TILE, "block_k": 64, "split": 5}}, "prefill: block_k=64"),
    ],
)
def test_a_table_that_would_give_wrong_results_is_refused(tmp_path, changes, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(raw_table(**changes)))
    with pytest.raises(TuningTableError) as error:
        tuning.read_table(path)
    assert str(error.value).startswith(f"tuning table {path}: ")
    assert message in str(error.value)
    assert str(error.value).endswith("; regenerate it with `python -m qspec_jax.bench tune`")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "the file is a list, not an object"),
        ("{}", "the file lacks format, device_kind, entries"),
        (json.dumps({**raw_table(), "format": 2}), "format 2 is not 1"),
        (json.dumps({**raw_table(), "entries": {}}), "entries a list"),
        (json.dumps({**raw_table(), "entries": raw_table()["entries"] * 2}), "entry 1 repeats w4a16 K=512 N=128"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(TuningTableError) as error:
        tuning.read_table(path)
    assert message in str(error.value)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_an_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch, failure):
    path = tmp_path / "table.json"
    write_table(table(entry()), path)
    before = path.read_bytes()

    def fail(*arguments):
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((KeyboardInterrupt, QSpecError)):
        write_table(table(entry(), entry("w4a8")), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_invalid_table_is_never_written(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(TuningTableError, match="split=3 must divide"):
        write_table(table(entry(split=3)), path)
    assert not path.exists()


def test_a_damaged_table_or_one_of_another_device_is_not_overwritten(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.raises(UsageError, match="move the file away or give another --output"):
        open_table(path, DEVICE)
    write_table(table(entry()), path)
    with pytest.raises(UsageError, match="holds tiles of 'NVIDIA H200', this is 'NVIDIA A100'"):
        open_table(path, "NVIDIA A100")


@pytest.fixture
def made_up_device(monkeypatch):
    """A ``tune`` whose device is a ``FakeLaboratory`` per problem."""
    seen = []

    def laboratory_and_space(problem, repeats):
        seen.append(problem)
        return FakeLaboratory(time=lambda rows, tiles: rows + tiles.split + tiles.block_n / 100), TileSpace(problem)

    monkeypatch.setattr(tune, "_check_device", lambda: None)
    monkeypatch.setattr(tune, "_laboratory_and_space", laboratory_and_space)
    return seen


def run_tune(path, *arguments):
    return main(["tune", "--shape", "512x128", "--candidates", "8", "--output", str(path), *arguments])


@pytest.mark.usefixtures("made_up_device")
def test_tune_writes_a_valid_table_and_says_what_it_found(tmp_path, capsys):
    path = tmp_path / "table.json"
    assert run_tune(path) == 0
    written = tuning.read_table(path)
    assert set(written.entries) == {("w4a16", 128, 512, 128, True), ("w4a8", 128, 512, 128, True)}
    out, err = capsys.readouterr()
    assert "python -m qspec_jax.bench tune --shape 512x128" in out
    assert "w4a16 512x128 group 128: block_k" in out
    assert "(built-in" in out
    assert f"{path}: 2 entries" in out
    assert "1/2 w4a16 512x128 group 128 ..." in err


@pytest.mark.usefixtures("made_up_device")
def test_tuning_again_replaces_its_entries_and_keeps_the_others(tmp_path):
    path = tmp_path / "table.json"
    assert run_tune(path, "--ops", "w4a16") == 0
    first = tuning.read_table(path)
    stale = TuningTable(
        first.device_kind, {**first.entries, entry(n=64).key: entry(n=64), entry("w4a8").key: entry("w4a8")}
    )
    write_table(stale, path)
    assert run_tune(path, "--ops", "w4a8") == 0
    second = tuning.read_table(path).entries
    assert second.keys() == stale.entries.keys()
    assert {key for key in second if second[key] != stale.entries[key]} == {entry("w4a8").key}


def test_the_time_limit_ends_the_run_with_what_is_done(tmp_path, capsys, monkeypatch, made_up_device):
    path = tmp_path / "table.json"
    clock = iter([0.0, 0.0, 0.0, 11.0])
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert run_tune(path, "--time-limit", "10") == 0
    assert [problem.op for problem in made_up_device] == ["w4a16"]
    assert len(tuning.read_table(path).entries) == 1
    assert "time limit: 1 of 2 are not done; raise --time-limit" in capsys.readouterr().err


def test_a_problem_without_a_winner_is_named_and_not_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "_check_device", lambda: None)
    laboratory = FakeLaboratory(agree=lambda decode: False)
    monkeypatch.setattr(tune, "_laboratory_and_space", lambda problem, repeats: (laboratory, TileSpace(problem)))
    path = tmp_path / "table.json"
    assert run_tune(path, "--ops", "w4a16") == 1
    assert "w4a16 512x128 group 128: nothing to ship" in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.usefixtures("made_up_device")
def test_a_shape_that_the_kernels_refuse_is_a_usage_error(capsys):
    assert main(["tune", "--shape", "512x24"]) == 2
    assert "needs N to be a multiple of 16; this is 24; leave this shape or group size out" in capsys.readouterr().err

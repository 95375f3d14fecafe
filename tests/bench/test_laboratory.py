"""The tuner's measuring with the kernels interpreted on the CPU: right, wrong, and row-variant tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backends.triton.tiles import TileConfig
from qspec_jax.bench.tune import laboratory as module
from qspec_jax.bench.tune.laboratory import TritonLaboratory
from qspec_jax.bench.tune.tile_space import Problem

TILES = TileConfig(16, 32, 32, 1, 4, 3)
OTHER_ORDER = TileConfig(16, 32, 32, 4, 4, 3)
NEVER = float("inf")


@pytest.fixture(scope="module", params=["w4a16", "w4a4"])
def laboratory(request):
    return TritonLaboratory(Problem(request.param, 256, 32, 64, False), repeats=1, interpret=True)


def one_trial(laboratory, rows, tiles):
    [trial] = laboratory.trials(rows, [tiles], deadline=NEVER)
    return trial


def test_right_tiles_are_right_and_first_rows_keep_their_bits(laboratory):
    trials = [one_trial(laboratory, rows, TILES) for rows in (16, 32)]
    assert all(trial.right and trial.tiles == TILES for trial in trials)
    assert trials[0].bits == trials[1].bits
    assert laboratory.relative_error(21, TILES) < 3e-3


def test_wrong_tiles_are_not_right(laboratory, monkeypatch):
    kernel = laboratory.kernel(TILES)
    monkeypatch.setattr(laboratory, "kernel", lambda tiles: lambda x, weight: kernel(x, weight) * 1.05)
    trial = one_trial(laboratory, 16, TILES)
    assert trial.microseconds is not None
    assert trial.relative_error == pytest.approx(0.05, rel=0.1)
    assert not trial.right
    assert laboratory.relative_error(16, TILES) == pytest.approx(0.05, rel=0.1)


def test_tiles_that_do_not_compile_are_told_apart(laboratory, monkeypatch):
    kernel = laboratory.kernel(TILES)

    def refuse(x, weight):
        raise RuntimeError("shared memory exceeded")

    monkeypatch.setattr(laboratory, "kernel", lambda tiles: refuse if tiles == OTHER_ORDER else kernel)
    failed, fine = laboratory.trials(16, [OTHER_ORDER, TILES], deadline=NEVER)
    assert failed.microseconds is None
    assert not failed.right
    assert fine.right


def test_after_the_deadline_nothing_is_tried(laboratory):
    assert list(laboratory.trials(16, [TILES], deadline=0.0)) == []


def test_rows_agree_with_one_order_and_not_where_a_bucket_rounds_differently(laboratory, monkeypatch):
    monkeypatch.setattr(module, "_CHECKED_ROWS", (3, 16, 20))
    same = dict.fromkeys((16, 32), TILES)
    assert laboratory.rows_agree(same)
    kernel = laboratory.kernel(TILES)

    def one_bit_off(x, weight):
        bits = jax.lax.bitcast_convert_type(kernel(x, weight), jnp.uint16)
        return jax.lax.bitcast_convert_type(bits.at[1, 1].set(bits[1, 1] ^ 1), jnp.bfloat16)

    monkeypatch.setattr(laboratory, "kernel", lambda tiles: one_bit_off if tiles == OTHER_ORDER else kernel)
    assert not laboratory.rows_agree({**same, 32: OTHER_ORDER})
    first, second = (one_trial(laboratory, 16, tiles) for tiles in (TILES, OTHER_ORDER))
    assert second.right
    assert first.bits != second.bits


def test_a_row_whose_bits_depend_on_its_place_is_found(laboratory, monkeypatch):
    monkeypatch.setattr(module, "_CHECKED_ROWS", (3, 16))
    kernel = laboratory.kernel(TILES)
    monkeypatch.setattr(laboratory, "kernel", lambda tiles: lambda x, weight: kernel(x, weight).at[2].multiply(1.01))
    assert not laboratory.rows_agree(dict.fromkeys((16, 32), TILES))


def test_rows_are_also_compared_where_large_products_cancel(monkeypatch):
    """How sums are rounded shows there, and hardly anywhere else."""
    laboratory = TritonLaboratory(Problem("w4a16", 256, 32, 64, False), repeats=1, interpret=True)
    monkeypatch.setattr(module, "_CHECKED_ROWS", (3, 100))
    kernel = laboratory.kernel(TILES)

    def rounds_otherwise(x, weight):
        return kernel(x, weight) + jnp.where((len(x) > 64) & (jnp.abs(x).max() > 1000), 1, 0).astype(jnp.bfloat16)

    monkeypatch.setattr(laboratory, "kernel", lambda tiles: rounds_otherwise)
    assert not laboratory.rows_agree(dict.fromkeys(module.DECODE_ROWS, TILES))
    monkeypatch.setattr(module.operands, "cancelling", lambda rows: rows)
    assert laboratory.rows_agree(dict.fromkeys(module.DECODE_ROWS, TILES))

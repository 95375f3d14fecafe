"""Batches of more rows than a kernel promises to multiply alike are multiplied in pieces of whole sequences."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import PartialSums, value_of
from qspec_jax.model import linear
from qspec_jax.model.config import QuantConfig
from qspec_jax.model.layouts import linears
from qspec_jax.model.linear import PIECE, in_pieces
from qspec_jax.model.view import View
from tests import tiny

WEIGHT = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)


@pytest.fixture
def at_most_six(monkeypatch):
    monkeypatch.setattr(linear, "MAX_ROWS", 6)


def counting(seen, *, parts=lambda rows: 0):
    def product(rows):
        seen.append(rows.shape[:-1])
        count = parts(rows)
        whole = rows @ WEIGHT
        return whole if not count else PartialSums(jnp.stack([whole / count] * count), jnp.float32)

    return product


@pytest.mark.usefixtures("at_most_six")
@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((2, 3), [(2, 3)]),
        ((3, 3), [(2, 3), (1, 3)]),
        ((5, 2), [(3, 2), (2, 2)]),
        ((9, 2), [(3, 2)] * 3),
        ((8, 1), [(4, 1)] * 2),
        ((1, PIECE + 1), [(1, PIECE + 1)]),  # a chunk of a prompt
    ],
)
def test_no_piece_has_more_rows_than_are_alike(shape, pieces):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*shape, 8)), jnp.float32)
    for parts in (lambda rows: 0, lambda rows: 2, lambda rows: len(rows)):
        seen: list[tuple[int, ...]] = []
        out = value_of(in_pieces(counting(seen, parts=parts), x))
        assert seen == pieces
        np.testing.assert_allclose(out, x @ WEIGHT, rtol=1e-5)


@pytest.mark.usefixtures("at_most_six")
def test_partial_sums_stay_partial_where_all_pieces_have_as_many():
    out = in_pieces(counting([], parts=lambda rows: 2), jnp.ones((4, 2, 8), jnp.float32))
    assert isinstance(out, PartialSums)
    assert out.parts.shape == (2, 4, 2, 5)


def test_pieces_of_prompts_are_multiplied_in_pieces_as_well():
    seen: list[tuple[int, ...]] = []
    in_pieces(counting(seen), jnp.ones((9, PIECE, 8), jnp.float32))
    assert seen == [(5, PIECE), (4, PIECE)]


@pytest.mark.parametrize("granted", [256, None])
def test_one_call_multiplies_them_where_rows_are_alike_if_asked(granted, monkeypatch):
    seen = []

    def product(rows, weight, **options):
        seen.append((rows.shape[:2], next((name for name, value in options.items() if value is True), False)))
        return jnp.zeros((*rows.shape[:2], weight.num_outputs), rows.dtype)

    monkeypatch.setattr(pallas_kernels, "w4a16_partial_sums", product)
    monkeypatch.setattr(
        pallas_kernels, "rows_alike", lambda *_, asked=False, prefill=False, **__: granted if asked or prefill else 256
    )
    layer = next(iter(linears(tiny.decoder(kernels=None))))
    num_inputs = layer.weight.get_value().num_inputs
    for shape in ((9, PIECE), (8, PIECE), (1, PIECE), (2, PIECE + 1), (300, 1)):
        layer._product(jnp.zeros((*shape, num_inputs), jnp.float32), View())
    chunks = [((1, PIECE), False), ((2, PIECE + 1), False)]
    in_one = [((9, PIECE), "prefill"), ((8, PIECE), "prefill"), *chunks, ((300, 1), "alike")]
    in_pieces = [((size, PIECE), False) for size in (5, 4, 8)] + chunks + [((150, 1), False)] * 2
    assert seen == (in_one if granted is None else in_pieces)


@pytest.mark.parametrize("kernels", [None, "reference"])
def test_floats_of_packed_prompts_have_tiles_for_any_number_of_rows(kernels, monkeypatch):
    options = {"quantization": QuantConfig(keep_floats=True), "dtype": "bfloat16", "scan_layers": False}
    decoder = tiny.decoder(kernels=kernels, **options)
    one, calls = linears(decoder)[0], []

    def multiply(x, weight, *, dtype, prefill=False, implementation=None):
        calls.append((x.shape[:-1], prefill, implementation))
        return jnp.zeros((*x.shape[:-1], weight.shape[0]), dtype)

    monkeypatch.setattr(pallas_kernels, "float_prefill_is_alike", lambda dtype: dtype == jnp.bfloat16)
    monkeypatch.setattr(pallas_kernels, "float_partial_sums", multiply)
    num_inputs = one.weight.get_value().num_inputs
    for shape in ((64, PIECE), (1, PIECE), (4, 1)):
        one(jnp.zeros((*shape, num_inputs), jnp.bfloat16), view=View(weight_bits=None))
    packed = [((8, PIECE), False, "reference")] * 8 if kernels else [((64, PIECE), True, None)]
    assert calls == [*packed, ((1, PIECE), False, "reference"), ((4, 1), False, kernels)]

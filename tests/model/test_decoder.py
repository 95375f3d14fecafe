"""The decoder against Hugging Face transformers, and against itself in its other arrangements."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import MAX_DECODE_TOKENS
from qspec_jax.errors import UsageError
from qspec_jax.model.blocks import DecoderLayer
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.config import ActivationQuantization, ModelConfig, QuantConfig
from qspec_jax.model.layouts import add_group_sums
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny
from tests.golden import make as golden

TOKENS = jnp.asarray(golden.TOKENS, jnp.int32)


def logits_of(decoder, tokens, precision, *, slots=64):
    return decoder(tokens, decoder.create_cache(batch=tokens.shape[0], capacity=slots), precision=precision)[0]


_unused_slots = itertools.count(1000)


def trace(decoder, precision, tokens=TOKENS):
    """Runs the decoder's Python alone, for a cache as long as no other: nothing is found that was traced before."""
    slots = next(_unused_slots)
    jax.eval_shape(lambda: logits_of(decoder, tokens, precision, slots=slots))


def assert_agree(a, b, precision):
    """Equal to rounding; where activations are integers, one of them may land on the other side of a tie."""
    if View.of(precision).activation_bits is None:
        np.testing.assert_allclose(a, b, atol=2e-4)
    else:
        assert float(np.median(np.abs(np.asarray(a) - np.asarray(b)))) < 2e-4


@pytest.mark.contract
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float_logits_equal_the_recorded_ones_of_transformers(family):
    decoder = tiny.decoder(ModelConfig.from_hf(tiny.hf_config(family)), quantization=None)
    expected = np.load(golden.GOLDEN)[family]
    np.testing.assert_allclose(logits_of(decoder, TOKENS, Precision.FLOAT), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recorded_logits_are_those_of_the_installed_transformers(family):
    pytest.importorskip("torch", reason="needs torch, the oracle")
    np.testing.assert_allclose(golden.hf_logits(family), np.load(golden.GOLDEN)[family], rtol=2e-4, atol=2e-4)


def test_families_differ_from_plain_llama():
    """The recorded logits could not be met by ignoring an option."""
    recorded = np.load(golden.GOLDEN)
    for family in set(tiny.FAMILIES) - {"llama2"}:
        assert np.abs(recorded[family] - recorded["llama2"]).max() > 1e-2, family


def read_by(precision):
    """Weights that a precision reads."""
    return QuantConfig(bits=8 if precision is Precision.W8A16 else 4)


@pytest.mark.parametrize("precision", list(Precision))
def test_prefill_equals_token_by_token_decoding(precision):
    decoder = tiny.decoder(quantization=read_by(precision))
    add_group_sums(decoder)
    at_once = logits_of(decoder, TOKENS, precision)
    cache, one_by_one = decoder.create_cache(batch=2, capacity=64), []
    step = jax.jit(lambda token, cache: decoder(token, cache, precision=precision))
    for index in range(TOKENS.shape[1]):
        logits, cache = step(TOKENS[:, index : index + 1], cache)
        one_by_one.append(logits)
    assert_agree(np.concatenate(one_by_one, axis=1), at_once, precision)
    np.testing.assert_array_equal(cache.lengths, [TOKENS.shape[1]] * 2)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_attention_reads_nothing_of_idle_sequences(scan_layers):
    """Nor does what they hold change, and the others have their bits."""
    decoder = tiny.decoder(scan_layers=scan_layers)
    _, cache = decoder(TOKENS, decoder.create_cache(batch=2, capacity=64), precision=Precision.W4A16)
    length = TOKENS.shape[1]
    # The first sequence holds something else, but for the first three places.
    other = dataclasses.replace(cache, layers=jax.tree.map(lambda a: a.at[..., 0, 3:length, :].add(1.0), cache.layers))
    run = functools.partial(decoder, TOKENS[:, :3], precision=Precision.W4A16)
    idle = jnp.asarray([True, False])
    (expected, _), (of_other, _) = run(cache), run(other)
    (logits, _), (of_other_idle, after) = run(cache, idle=idle), run(other, idle=idle)
    assert not np.array_equal(expected[0], of_other[0])
    np.testing.assert_array_equal(logits[0], of_other_idle[0])
    for found in (logits, of_other_idle):
        np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(after.lengths, [length + 3] * 2)
    for one, before in zip(jax.tree.leaves(after.layers), jax.tree.leaves(other.layers), strict=True):
        np.testing.assert_array_equal(one[..., 0, :length, :], before[..., 0, :length, :])


@pytest.mark.parametrize(
    ("kv", "num_tokens", "options"),
    [("model", 4, {"weigh": 16}), (KV_INT8, 1, {"logits_at": jnp.zeros(9, jnp.int32)})],
    ids=["masses", "int8"],
)
def test_sequences_that_make_up_whole_tiles_change_nothing(kv, num_tokens, options, monkeypatch):
    """Beside 9 of them: logits, masses, and what is written, as if the reference had the tiles of Hopper's kernels."""
    decoder = tiny.decoder()
    decoder.kv = kv
    cache = decoder.create_cache(batch=9, capacity=64).with_lengths(jnp.arange(9, dtype=jnp.int32))
    tokens = jnp.arange(9 * num_tokens, dtype=jnp.int32).reshape(9, num_tokens)

    def run():
        traced = jax.jit(lambda cache: decoder.run(tokens, cache, precision=Precision.W4A16, **options)).trace(cache)
        return str(traced.jaxpr), traced.lower().compile()(cache)

    program, alone = run()
    monkeypatch.setattr(DecoderLayer, "rows_read", lambda _, num_rows, **__: num_rows + -num_rows % 8)
    padded, among = run()
    stream = f"f32[{-(-9 * num_tokens // 8) * 8 // num_tokens},{num_tokens},64]"
    assert stream in padded
    assert stream not in program
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), among, alone)


def test_sequences_of_different_lengths_do_not_influence_each_other():
    decoder = tiny.decoder()
    lengths = jnp.asarray([40, 7], jnp.int32)
    cache = decoder.create_cache(batch=2, capacity=64)
    last, cache = decoder(TOKENS, cache, precision=Precision.W4A16, logits_at=lengths - 1)
    following, _ = decoder(TOKENS[:, :3], cache.with_lengths(lengths), precision=Precision.W4A16)
    for row, length in enumerate(lengths.tolist()):
        alone = jnp.concatenate([TOKENS[row : row + 1, :length], TOKENS[row : row + 1, :3]], axis=1)
        expected = logits_of(decoder, alone, Precision.W4A16)[0]
        np.testing.assert_allclose(last[row, 0], expected[length - 1], atol=2e-4)
        np.testing.assert_allclose(following[row], expected[length:], atol=2e-4)


@pytest.mark.parametrize("precision", list(Precision))
def test_scanned_and_unrolled_layers_agree(precision):
    scanned, unrolled = (
        tiny.decoder(scan_layers=scanned, quantization=read_by(precision)) for scanned in (True, False)
    )
    add_group_sums(scanned)
    add_group_sums(unrolled)
    assert_agree(logits_of(scanned, TOKENS, precision), logits_of(unrolled, TOKENS, precision), precision)


def test_unrolled_layers_that_are_alike_are_traced_once(monkeypatch):
    """Once as the first layer, which has nothing to add to the residual stream, and once for all others."""
    traced, call = [], DecoderLayer.__call__
    monkeypatch.setattr(DecoderLayer, "__call__", lambda self, *a, **k: traced.append(1) or call(self, *a, **k))
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "num_hidden_layers": 4})
    decoder = tiny.decoder(config, scan_layers=False)
    for precision in (Precision.W4A16, Precision.W4A8):
        trace(decoder, precision)
    assert len(traced) == 4


def test_float_precision_of_4_bit_weights_is_w4a16_in_float32():
    decoder = tiny.decoder()
    a, b = logits_of(decoder, TOKENS, Precision.FLOAT), logits_of(decoder, TOKENS, Precision.W4A16)
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_sums_that_an_asymmetric_draft_needs_are_made_on_the_way_where_there_are_none():
    """As of a model that was loaded, and has run no plan."""
    found = logits_of(tiny.decoder(), TOKENS, Precision.W4A4)
    decoder = tiny.decoder()
    add_group_sums(decoder)
    np.testing.assert_allclose(found, logits_of(decoder, TOKENS, Precision.W4A4), atol=1e-5)


def test_precisions_differ_and_order_by_error():
    decoder = tiny.decoder(quantization=QuantConfig(w4a4=ActivationQuantization(group_size=32)))
    add_group_sums(decoder)
    exact = logits_of(decoder, TOKENS, Precision.W4A16)
    precisions = (Precision.W4A8, Precision.W4A4)
    error = {p: float(jnp.abs(logits_of(decoder, TOKENS, p) - exact).mean()) for p in precisions}
    assert 1e-4 < error[Precision.W4A8] < error[Precision.W4A4] / 4


def test_every_refinement_of_the_activations_lowers_the_error_of_w4a4():
    exact, errors = logits_of(tiny.decoder(), TOKENS, Precision.W4A16), []
    for group_size, symmetric, outlier_groups in ((None, True, 0), (32, True, 0), (32, False, 0), (32, False, 1)):
        recipe = ActivationQuantization(group_size, symmetric, outlier_groups=outlier_groups)
        decoder = tiny.decoder(quantization=QuantConfig(w4a4=recipe))
        add_group_sums(decoder)
        errors.append(float(jnp.square(logits_of(decoder, TOKENS, Precision.W4A4) - exact).mean()))
    assert errors[0] > errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (Precision.W4A4, {"rms_norm_quantize": 4, "swiglu_quantize": 2, "quantize_activations": 2, "rms_norm": 1}),
        (Precision.W4A8, {"rms_norm_quantize": 4, "swiglu_quantize": 2, "quantize_activations": 2, "rms_norm": 1}),
        (Precision.W4A16, {"rms_norm": 5, "swiglu": 2}),
        (Precision.FLOAT, {"rms_norm": 5, "swiglu": 2}),
    ],
)
def test_what_feeds_a_linear_is_computed_in_the_form_its_precision_wants(monkeypatch, precision, expected):
    """Two layers: only the attention's result is quantised alone, only the last norm of a draft is not."""
    calls = collections.Counter()

    def count(name, operation, *arguments, **settings):
        calls[name] += 1
        return operation(*arguments, **settings)

    for name in ("rms_norm_quantize", "swiglu_quantize", "quantize_activations", "rms_norm", "swiglu"):
        monkeypatch.setattr(pallas_kernels, name, functools.partial(count, name, getattr(pallas_kernels, name)))
    decoder = tiny.decoder(scan_layers=False)
    add_group_sums(decoder)
    trace(decoder, precision)
    assert calls == expected


GATED = {"swiglu": 0, "swiglu_quantize": 0, "w4a16_swiglu": 0, "w4a4_swiglu_quantize": 0}


@pytest.mark.parametrize(
    ("precision", "changes", "expected"),
    [
        (Precision.W4A16, {}, "w4a16_swiglu"),
        (Precision.W4A8, {}, "w4a4_swiglu_quantize"),
        (Precision.W4A4, {"group_size": 32}, "swiglu_quantize"),
        (Precision.FLOAT, {}, "swiglu"),
        (Precision.W4A16, {"mlp_bias": True}, "swiglu"),
        (Precision.W4A8, {"mlp_bias": True}, "swiglu_quantize"),
        (Precision.W4A16, {"kernels": "reference"}, "swiglu"),
    ],
    ids=str,
)
def test_gate_and_up_are_multiplied_and_gated_at_once_where_a_kernel_can(monkeypatch, precision, changes, expected):
    """Not where activations have several scales, outputs a bias, or the kernels named have none for both."""
    calls = collections.Counter(GATED)

    def count(name, operation, *arguments, **settings):
        calls[name] += 1
        return operation(*arguments, **{**settings, "implementation": None})

    for name in GATED:
        monkeypatch.setattr(pallas_kernels, name, functools.partial(count, name, getattr(pallas_kernels, name)))
    for name in ("w4a16_swiglu", "w4a4_swiglu_quantize"):
        can = lambda *arguments, implementation, **settings: implementation is None  # noqa: E731
        monkeypatch.setattr(pallas_kernels, f"{name}_is_fused", can)
    quantization = QuantConfig(w4a4=ActivationQuantization(changes.get("group_size")))
    config = ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "mlp_bias": changes.get("mlp_bias", False)})
    decoder = tiny.decoder(config, quantization=quantization, scan_layers=False, kernels=changes.get("kernels"))
    trace(decoder, precision)
    assert calls == {**GATED, expected: 2}


def test_floats_that_a_view_reads_as_integers_are_not_gated_as_floats(monkeypatch):
    """A linear quantises what it is given, and whoever gates its outputs then asks for the two operations."""
    monkeypatch.setattr(pallas_kernels, "w4a16_swiglu_is_fused", lambda *arguments, **settings: True)
    decoder = tiny.decoder(scan_layers=False)
    gate_up, x = decoder.layers[0].mlp.gate_up, jnp.ones((1, 1, decoder.config.hidden_size))
    shapes = {
        precision: jax.eval_shape(lambda x, p=precision: gate_up.gated(x, view=View.of(p), quantization=None), x)
        for precision in (Precision.W4A16, Precision.W4A8)
    }
    assert shapes[Precision.W4A16].shape == (1, 1, decoder.config.intermediate_size)
    assert shapes[Precision.W4A8] is None


@pytest.mark.parametrize(
    ("precision", "operation"), [(Precision.W4A16, "rms_norm"), (Precision.W4A8, "rms_norm_quantize")]
)
def test_a_blocks_result_is_added_by_the_norm_after_it(monkeypatch, precision, operation):
    """Two layers of two blocks; before the first norm there is nothing to add, and the last is always in floats."""
    with_update = []

    def record(operation, *arguments, update=None, **settings):
        with_update.append(update is not None)
        return operation(*arguments, update=update, **settings)

    for name in {operation, "rms_norm"}:
        monkeypatch.setattr(pallas_kernels, name, functools.partial(record, getattr(pallas_kernels, name)))
    decoder = tiny.decoder(scan_layers=False)
    add_group_sums(decoder)
    trace(decoder, precision)
    assert with_update == [False, True, True, True, True]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what a CPU answers")
def test_norms_run_on_the_kernels_of_the_model():
    with pytest.raises(NotImplementedError, match="rms_norm: implementation 'triton' needs an NVIDIA GPU"):
        logits_of(tiny.decoder(kernels="triton"), TOKENS, Precision.FLOAT)


def test_bfloat16_stays_close_to_float32():
    wide, narrow = tiny.decoder(), tiny.decoder(dtype="bfloat16")
    a, b = logits_of(wide, TOKENS, Precision.W4A16), logits_of(narrow, TOKENS, Precision.W4A16)
    assert b.dtype == jnp.float32
    assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 0.03


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 3), "tokens has 2 sequences and the cache 1"), ((1, 17), "tokens has 17 tokens and the cache 16 positions")],
)
def test_tokens_that_a_cache_has_no_place_for_are_refused(shape, message):
    decoder = tiny.decoder()
    cache = decoder.create_cache(batch=1, capacity=16)
    with pytest.raises(UsageError, match=message):
        decoder(jnp.ones(shape, jnp.int32), cache, precision=Precision.W4A16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": None}, "cache is NoneType; use what create_cache"),
        ({"logits_at": [1, 0]}, r"logits_at is list; use an array of whole numbers, \[B\] int32, of B=2 sequences"),
        ({"logits_at": np.array([1])}, r"logits_at is int64\[1\]"),  # which would be that of both
        ({"logits_at": np.array([0.0, 1.0])}, r"logits_at is float64\[2\]"),
        ({"idle": np.array([True])}, r"idle is bool\[1\]; use an array of truth values"),
        ({"idle": np.array([1, 0])}, r"idle is int64\[2\]"),
    ],
    ids=str,
)
def test_what_says_nothing_of_each_sequence_is_refused(given, message):
    decoder = tiny.decoder()
    options = {"cache": decoder.create_cache(batch=2, capacity=4), "precision": Precision.W4A16, **given}
    with pytest.raises(UsageError, match=message):
        decoder(jnp.ones((2, 3), jnp.int32), **options)


@pytest.mark.parametrize("sizes", [{"batch": 1.5}, {"capacity": -1}, {"batch": True}, {"capacity": "8"}], ids=str)
def test_a_cache_of_no_size_is_refused_by_name(sizes):
    (name,) = sizes
    with pytest.raises(UsageError, match=f"^{name}( must be a whole number|=-1 must be at least 0)"):
        tiny.decoder().create_cache(**{"batch": 1, "capacity": 8, **sizes})


def test_a_float_model_refuses_a_4_bit_precision():
    decoder = tiny.decoder(quantization=None)
    with pytest.raises(UsageError, match="needs 4-bit weights"):
        logits_of(decoder, TOKENS, Precision.W4A16)


@pytest.mark.parametrize(("kernels", "expected"), [("triton", "triton"), ("mosaic", None), (None, None)])
def test_decodes_ask_for_the_attention_kernel_and_prefills_for_that_of_prompts(monkeypatch, kernels, expected):
    asked = []

    def without_a_name(operation, *arguments, implementation, **settings):
        asked.append((operation.__name__, arguments[0].shape[1], implementation))
        return operation(*arguments, **settings)

    for name in ("decode_attention", "prefill_attention", "rotate_and_write", "rms_norm", "swiglu"):
        monkeypatch.setattr(pallas_kernels, name, functools.partial(without_a_name, getattr(pallas_kernels, name)))
    decoder = tiny.decoder(quantization=None, kernels=kernels)
    for num_tokens in (MAX_DECODE_TOKENS, MAX_DECODE_TOKENS + 1):
        trace(decoder, Precision.FLOAT, TOKENS[:, :num_tokens])
    assert [call for call in asked if call[0] != "rms_norm"] == [
        ("rotate_and_write", 17, expected),
        ("decode_attention", 17, expected),
        ("swiglu", 17, expected),
        ("rotate_and_write", 18, expected),
        ("prefill_attention", 18, expected),
        ("swiglu", 18, expected),
    ]

"""LM heads in 8 and 4 bits: what passes read of them, and how they are made, saved, split and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import upper_nibbles
from qspec_jax import ModelConfig, Precision, QuantConfig, UsageError
from qspec_jax.decoding.costs import PassBytes
from qspec_jax.decoding.plan import plan_of
from qspec_jax.engine.load import open_model
from qspec_jax.model.sharding import from_shard_order, spec_of, split_axis, to_shard_order
from qspec_jax.model.view import View
from qspec_jax.weights.checkpoint.manifest import FILE_NAME
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from qspec_jax.weights.checkpoint.save import save_checkpoint
from qspec_jax.weights.checkpoint.source import open_saved_source
from tests import tiny
from tests.tiny import dequantize

HEADS = {
    "8": QuantConfig(head_bits=8),
    "8 and 4": QuantConfig(head_bits=8, draft_head=4),
    "4": QuantConfig(head_bits=4),
    "16 and 4": QuantConfig(draft_head=4),
}
heads = pytest.mark.parametrize("name", HEADS)
tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
TOKENS = jnp.asarray([[1, 5, 9, 40]], jnp.int32)
DRAFT = View(activation_bits=8, head_bits=4)


def config(*, tied):
    return ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, "tie_word_embeddings": tied})


def decoder(name, *, tied):
    return tiny.decoder(config(tied=tied), quantization=HEADS[name])


def floats_of(tied):
    return tiny.weights(config(tied=tied))["embedding.weight" if tied else "lm_head.weight"]


@tying
@heads
def test_each_view_reads_the_head_that_is_its_own(name, tied):
    made, quantization, floats = decoder(name, tied=tied), HEADS[name], floats_of(tied)
    assert (made.lm_head is None) == (tied or quantization.head_bits is not None)
    np.testing.assert_array_equal(made.embedding.get_value(), tiny.weights(config(tied=tied))["embedding.weight"])
    codes = made.quantized_head.get_value()
    assert (codes.bits, codes.group_size, codes.symmetric) == (quantization.head_bits or 4, 64, True)
    steps = np.repeat(np.abs(np.asarray(codes.scale, np.float32)).T, 64, axis=1) / 2 ** (codes.bits - 4)
    assert (np.abs(dequantize(codes) - floats) <= 0.5 * steps + 1e-3 * np.abs(floats).max()).all()
    found = made.head_for(View())
    np.testing.assert_array_equal(
        found if quantization.head_bits is None else dequantize(found),
        floats if quantization.head_bits is None else dequantize(codes),
    )
    np.testing.assert_array_equal(dequantize(made.head_for(DRAFT)), dequantize(upper_nibbles(codes)))


@pytest.mark.parametrize("view", [View(), DRAFT], ids=lambda view: view.name)
def test_logits_are_float32_products_with_the_head(view):
    made, plain = decoder("8 and 4", tied=False), tiny.decoder(config(tied=False))
    found = tiny.logits(made, TOKENS, view)
    plain.lm_head.set_value(dequantize(made.head_for(view)))
    expected = tiny.logits(plain, TOKENS, dataclasses.replace(view, head_bits=None))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_head_that_is_not_there_is_refused_with_how_to_have_it():
    with pytest.raises(
        UsageError, match=r"w4a8\+head4 reads an LM head of 4 bits, which .*QuantConfig\(draft_head=4\)"
    ):
        tiny.decoder().head_for(DRAFT)
    for fields, told in (
        ({"head_bits": 6}, "head_bits=6 is not supported; use 8 or 4 or None"),
        ({"draft_head": 8}, "draft_head=8 is not supported; use 4 or None"),
        ({"head_bits": 8, "keep_floats": True}, "keeps a model's own output; use draft_head"),
    ):
        with pytest.raises(UsageError, match=told):
            QuantConfig(**fields)


def test_drafts_of_a_model_with_a_head_for_them_read_it():
    model = tiny.language_model(config(tied=False), quantization=HEADS["8 and 4"])
    plan = model.plan("qspec", draft="w4a8")
    assert (plan.verify, plan.draft) == (View.of(Precision.W4A16), DRAFT)
    assert plan.label == "w4a8+head4 x3"
    assert plan_of("lookup-qspec", draft="w4a8", draft_head=4).draft_view == DRAFT
    options = {"max_new_tokens": 12}
    plain, drafted = (model.generate([[5, 9, 17, 3]], mode=mode, **options)[0] for mode in ("w4a16", "qspec"))
    assert drafted.token_ids == plain.token_ids


@tying
def test_what_a_pass_reads_counts_its_own_head(tied):
    of = PassBytes.of(made := decoder("16 and 4", tied=tied))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made.head_for(DRAFT)))
    assert of.weights_of(View()) - of.weights_of(View(head_bits=4)) == floats_of(tied).nbytes - size
    assert PassBytes.of(tiny.decoder(config(tied=tied))).weights_of(View()) == of.weights_of(View())
    of = PassBytes.of(decoder("8", tied=tied))
    assert of.weights_of(View()) < PassBytes.of(decoder("16 and 4", tied=tied)).weights_of(View())


@tying
@heads
def test_a_checkpoint_has_the_head_of_its_model(tmp_path, name, tied):
    made, quantization = decoder(name, tied=tied), HEADS[name]
    save_checkpoint(tmp_path / "c", made, tokenizer=None, quantization=quantization)
    assert json.loads((tmp_path / "c" / FILE_NAME).read_text())["format_version"] == 2
    back = restored(tmp_path / "c")
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)
    entry = open_saved_source(open_checkpoint(tmp_path / "c")).entries[f"{'embedding' if tied else 'lm_head'}.weight"]
    kept = quantization.head_bits is None or tied
    expected = floats_of(tied) if kept else dequantize(made.quantized_head.get_value())
    np.testing.assert_array_equal(entry.read(), expected)


def restored(path: Path, **options):
    return open_model(path, "auto", **options).read(dtype=jnp.dtype("float32"), kernels="reference", scan_layers=True)


def test_the_head_of_a_checkpoint_is_rounded_as_it_is_read(tmp_path):
    save_checkpoint(tmp_path / "c", tiny.decoder(), tokenizer=None, quantization=QuantConfig())
    back = restored(tmp_path / "c", head_bits=8, draft_head=4)
    expected = decoder("8 and 4", tied=False)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    save_checkpoint(tmp_path / "8", back, tokenizer=None, quantization=HEADS["8 and 4"])
    assert open_model(tmp_path / "8", "auto").quantization == HEADS["8 and 4"]
    for asked in (16, 4):
        with pytest.raises(UsageError, match=f"head_bits={asked}: the LM head of 8 is stored in 8 bits alone"):
            open_model(tmp_path / "8", "auto", head_bits=asked)
    with pytest.raises(UsageError, match="head_bits are of models whose linears are quantised"):
        open_model(tmp_path / "c", None, head_bits=8)
    with pytest.raises(UsageError, match="head_bits=5 is not supported"):
        open_model(tmp_path / "c", "auto", head_bits=5)


def test_devices_share_a_head_by_tokens():
    codes = np.random.default_rng(0).integers(0, 256, (96, 32), np.uint8)
    parts = (("packed", -2, (96, 32)), ("low", -2, (96, 32)), ("scale", -1, (1, 96)), ("offset", -1, (1, 96)))
    for part, axis, shape in parts:
        path = f"quantized_head.{part}"
        assert split_axis(path, shape) == axis
        assert spec_of(path, shape)[axis] == "model"
    shared = to_shard_order("quantized_head.low", codes, config(tied=False), 2)
    np.testing.assert_array_equal(from_shard_order("quantized_head.low", shared, config(tied=False), 2), codes)

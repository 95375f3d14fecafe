"""What each device has of a model: how many of them fit, the order of shared arrays, what all compute together.

Here one device runs the programs of all of them (``jax.vmap``), which tells errors in what they compute from those in
where arrays lie (``tests/decoding/on_eight_devices.py``).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import Layout, PartialSums, QuantizedWeight, dequantize, pack_codes, unpack_codes
from pallas_kernels.arrays.weight import order_bytes
from qspec_jax.device.mesh import MODEL
from qspec_jax.errors import UsageError
from qspec_jax.model.collectives import add_up, all_logits, embed, most_likely
from qspec_jax.model.config import ActivationQuantization, ModelConfig, QuantConfig
from qspec_jax.model.decoder import abstract_decoder
from qspec_jax.model.layouts import add_group_sums
from qspec_jax.model.linear import WeightFormat
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.precision import Precision
from qspec_jax.model.sharding import check_split, from_shard_order, spec_of, split_axis, to_shard_order
from qspec_jax.model.shards import parameters
from tests import tiny

# Eight heads of queries, two of keys and values: what eight devices share, and what they have several times.
WIDE = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 256}
TWELVE = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 384}
TOKENS = jnp.asarray([[5, 9, 17, 3], [80, 81, 2, 95]], jnp.int32)


def config(family="llama2", **changes):
    return ModelConfig.from_hf({**tiny.hf_config(family), **WIDE, **changes})


GROUPS = {path: WeightFormat(32, symmetric=False) for path in ("attention.output", "mlp.down")}


@pytest.mark.parametrize(
    ("changes", "split", "told", "fitting"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "6 query heads", "1 or 2"),
        (TWELVE, 3, "4 key/value", "1, 2, 4 or 12"),
        ({"intermediate_size": 96 * 2}, 4, "192 inputs of mlp.down into whole weight groups of 32", "1 or 2"),
        ({"vocab_size": 97}, 2, "97 tokens of the vocabulary", "1"),
        ({"head_dim": 16}, 8, "128 inputs of attention.output into whole weight groups of 32", "1, 2 or 4"),
    ],
)
def test_what_does_not_split_is_named_with_the_numbers_that_fit(changes, split, told, fitting):
    asked = config(**changes)
    with pytest.raises(UsageError, match=rf"model={split} does not split .*{told}.*; of this model, use") as refused:
        check_split(asked, split, quantization=QuantConfig(), formats=GROUPS)
    assert str(refused.value).endswith(f"use model={fitting}")
    for number in fitting.replace(" or", ",").split(", "):
        check_split(asked, int(number), quantization=QuantConfig(), formats=GROUPS)


def test_groups_of_draft_activations_must_be_whole_too():
    coarse = QuantConfig(w4a8=ActivationQuantization(group_size=128))
    whole_rows = {path: WeightFormat(None, symmetric=True) for path in GROUPS}
    with pytest.raises(UsageError, match=r"256 inputs of mlp.down into whole W4A8 groups of 128.*use model=1 or 2$"):
        check_split(config(), 4, quantization=coarse, formats=whole_rows)
    check_split(config(), 8, quantization=None, formats=dict.fromkeys(GROUPS))


def test_a_transform_of_all_channels_or_across_devices_is_refused():
    rotated = dataclasses.replace(config(), down_hadamard=True)
    with pytest.raises(UsageError, match=r"a Hadamard transform of all 256 channels .*use model=1$"):
        check_split(rotated, 2, quantization=QuantConfig(), formats=GROUPS)
    in_blocks = dataclasses.replace(rotated, hadamard_block=64)
    check_split(in_blocks, 4, quantization=QuantConfig(), formats=GROUPS)
    with pytest.raises(UsageError, match=r"256 channels into whole Hadamard blocks of 64.*use model=1, 2 or 4$"):
        check_split(in_blocks, 8, quantization=QuantConfig(), formats=GROUPS)


def test_codes_of_shared_inputs_are_each_devices_own_two_planes():
    codes = np.random.default_rng(0).integers(0, 16, (2, 3, 64), np.uint8)
    packed = pack_codes(codes)
    shared = to_shard_order("layers.0.mlp.down.weight.packed", packed, config(), 4)
    for device in range(4):
        mine = unpack_codes(jnp.asarray(shared[..., 8 * device : 8 * device + 8]))
        np.testing.assert_array_equal(mine, codes[..., 16 * device : 16 * device + 16])
    np.testing.assert_array_equal(from_shard_order("layers.0.mlp.down.weight.packed", shared, config(), 4), packed)


def test_each_devices_codes_have_the_order_that_its_kernel_reads():
    packed = np.random.default_rng(0).integers(0, 256, (3, 512), np.uint8)
    path, layout = "layers.0.attention.output.weight.packed", Layout.WGMMA
    shared = to_shard_order(path, packed, config(), 2, layout=layout)
    in_planes = to_shard_order(path, packed, config(), 2)
    np.testing.assert_array_equal(shared[:, :256], order_bytes(in_planes[:, :256], layout))
    np.testing.assert_array_equal(from_shard_order(path, shared, config(), 2, layout=layout), packed)


def test_rows_of_projections_go_device_by_device():
    asked = config(num_key_value_heads=2)
    rows = np.arange(sum(asked.qkv_sizes))[:, None]
    shared = to_shard_order("layers.0.attention.qkv.weight", rows, asked, 4)
    heads = shared[:: asked.head_dim, 0] // asked.head_dim  # 8 of queries, then 2 of keys and 2 of values
    assert heads.reshape(4, -1).tolist() == [[0, 1, 8, 10], [2, 3, 8, 10], [4, 5, 9, 11], [6, 7, 9, 11]]
    np.testing.assert_array_equal(from_shard_order("layers.0.attention.qkv.weight", shared, asked, 4), rows)
    gates = to_shard_order("layers.0.mlp.gate_up.bias", np.arange(512), asked, 2)
    assert gates[[0, 127, 128, 255, 256]].tolist() == [0, 127, 256, 383, 128]


def together(of_device, split=None):
    """A function of all devices, as one program that rounds where it says so."""
    mapped = jax.vmap(of_device, axis_name=MODEL, axis_size=split)
    return jax.jit(mapped, compiler_options={"xla_allow_excess_precision": False})


def stacked_shards(decoder, split):
    """The graph of one device's decoder, and the arrays of all, each with an axis of devices in front."""
    whole, quantization = dict(parameters(decoder)), decoder.layers[0].mlp.down.quantization
    options = {"kernels": "reference", "dtype": decoder.dtype}
    local = abstract_decoder(
        decoder.config, quantization=quantization, formats=None, scan_layers=decoder.scan_layers, split=split, **options
    )

    def cut(path, array, like):
        array = to_shard_order(path, np.asarray(array), decoder.config, split)
        axis = split_axis(path, array.shape)
        parts = [array] * split if axis is None else np.split(array, split, axis=axis)
        assert all(part.shape == like.shape for part in parts), path
        return jnp.asarray(np.stack(parts))

    for path, parameter in parameters(local):
        like, value = parameter.get_value(), whole[path].get_value()
        if isinstance(like, QuantizedWeight):
            arrays = {
                part: getattr(value, part)
                for part in ("packed", "scale", "offset")
                if hasattr(getattr(value, part), "shape")
            }
            made = {part: cut(f"{path}.{part}", array, getattr(like, part)) for part, array in arrays.items()}
            parameter.set_value(dataclasses.replace(like, **made))
        else:
            parameter.set_value(cut(path, value, like))
    return nnx.split(local)


def logits_of_one(decoder, precision):
    run = jax.jit(lambda tokens, cache: decoder(tokens, cache, precision=precision)[0])
    return np.asarray(run(TOKENS, decoder.create_cache(batch=2, capacity=32)))


def logits_of_all(graph, state, precision, tokens, split):
    """What the devices compute together; each of them has all logits in the end."""

    def of_device(state):
        decoder = nnx.merge(graph, state)
        if precision is Precision.W4A4:
            add_group_sums(decoder)
        cache = decoder.create_cache(batch=len(tokens), capacity=32)
        return all_logits(decoder(tokens, cache, precision=precision)[0], decoder.axis)

    logits = np.asarray(together(of_device, split)(state))
    np.testing.assert_array_equal(logits, np.broadcast_to(logits[:1], logits.shape))
    return logits[0]


@pytest.mark.parametrize(
    ("family", "split", "quantization"),
    [("qwen3_qk_norm", 2, QuantConfig()), ("llama_with_biases", 4, None), ("smollm2_tied", 8, QuantConfig(None, True))],
)
def test_devices_compute_together_what_one_computes(family, split, quantization):
    whole = tiny.decoder(config(family), scan_layers=split != 4, quantization=quantization)
    precision = Precision.FLOAT if quantization is None else Precision.W4A16
    expected = logits_of_one(whole, precision)
    found = logits_of_all(*stacked_shards(whole, split), precision, TOKENS, split)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_drafts_with_zero_points_have_the_sums_of_each_devices_inputs():
    """Sums of other inputs would make drafts that are never accepted, and no token would tell."""
    whole = tiny.decoder(config())
    add_group_sums(whole)
    expected = logits_of_one(whole, Precision.W4A4)
    found = logits_of_all(*stacked_shards(whole, 2), Precision.W4A4, TOKENS, 2)
    # One group of each device's inputs has 8 bits, where one of all inputs has on one device.
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).max()


def test_whole_numbers_are_added_to_the_bit():
    """Integer codes, scales of 1 and integer inputs: no tolerance hides a wrong row, plane or group."""
    rng, split = np.random.default_rng(0), 4
    codes, x = rng.integers(0, 16, (24, 128), np.uint8), rng.integers(-3, 4, (2, 3, 128)).astype(np.float32)
    scale = np.arange(1, 5, dtype=np.float32)[:, None] * np.ones((4, 24), np.float32)
    weight = QuantizedWeight(pack_codes(codes), scale)
    expected = x @ np.asarray(jax.jit(dequantize)(weight)).T
    packed = to_shard_order("layers.0.mlp.down.weight.packed", weight.packed, config(), split)
    shards = QuantizedWeight(*(np.stack(np.split(a, split, axis)) for a, axis in ((packed, 1), (scale, 0))))
    inputs = np.stack(np.split(x, split, axis=-1))

    def of_device(shard, x):
        return add_up(x @ dequantize(shard).T, MODEL).value()

    found = together(of_device)(shards, inputs)
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize("tokens", [1, 4, 32, 40])
def test_a_token_is_added_up_in_one_order_whatever_is_beside_it(tokens):
    """In one message or two, and where tokens do not divide among the devices: it is ((0 + 1) + (2 + 3)) + 4."""
    sizes = np.float32(10) ** np.arange(5, dtype=np.float32)[:, None, None, None]
    parts = sizes * np.random.default_rng(0).standard_normal((5, 2, tokens, 8), np.float32)
    summed = together(lambda y: _value(add_up(y, MODEL)))(parts)
    expected = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + parts[4]
    np.testing.assert_array_equal(summed, np.broadcast_to(expected, summed.shape))


@pytest.mark.parametrize("tokens", [1, 40])
def test_sums_that_a_kernel_has_left_in_parts_are_added_up_as_those_that_it_has_rounded(tokens):
    """Which of them a kernel leaves depends on the number of rows, and a token has the same bits with any."""
    parts = np.random.default_rng(0).standard_normal((4, 2, 2, tokens, 8), np.float32)  # of each device two
    rounded = (parts[:, 0] + parts[:, 1]).astype(jnp.bfloat16)
    left = together(lambda y: _value(add_up(PartialSums(y, jnp.dtype(jnp.bfloat16)), MODEL)))(parts)
    whole = together(lambda y: _value(add_up(y, MODEL)))(rounded)
    own = rounded.astype(np.float32)
    expected = ((own[0] + own[1]) + (own[2] + own[3])).astype(jnp.bfloat16)
    assert not np.array_equal(expected, parts.sum((0, 1)).astype(jnp.bfloat16))  # it matters where sums are rounded
    for found in (left, whole):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def _value(sums):
    return sums if isinstance(sums, jax.Array) else sums.value()


def test_tokens_are_embedded_and_chosen_as_by_one_device():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((24, 8), np.float32).astype(jnp.bfloat16)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    embedded = together(lambda part: embed(part, jnp.asarray(tokens), MODEL))(table.reshape(4, 6, 8))
    np.testing.assert_array_equal(embedded[3], table[tokens])
    logits = np.round(4 * rng.standard_normal((5, 7, 24), np.float32)) / 4  # with equal ones
    logits[0, 0], logits[0, 1, 7], logits[0, 2, 23] = -np.inf, np.nan, np.inf
    parts = np.moveaxis(logits.reshape(5, 7, 4, 6), 2, 0)
    chosen = together(lambda part: most_likely(part, MODEL))(parts)
    np.testing.assert_array_equal(chosen, np.broadcast_to(np.argmax(logits, -1), chosen.shape))


def test_a_decoder_of_several_devices_is_not_called_by_one():
    graph, state = nnx.split(abstract_decoder(config(), quantization=None, formats=None, split=2))

    def call(state):
        decoder = nnx.merge(graph, state)
        return decoder(TOKENS, decoder.create_cache(batch=2, capacity=32), precision=Precision.FLOAT)

    with pytest.raises(UsageError, match=r"on a mesh .model=2.*load the model without a mesh"):
        jax.eval_shape(call, state)


@pytest.mark.parametrize("path", ["attention.qkv", "attention.output", "mlp.gate_up", "mlp.down"])
def test_floats_beside_codes_are_split_as_floats_alone(path):
    wide = config(num_key_value_heads=4)
    linear = layer_anatomy(wide).linears[path]
    array = np.arange(linear.num_outputs * linear.num_inputs).reshape(linear.num_outputs, -1)
    beside, alone = f"layers.1.{path}.floats", f"layers.1.{path}.weight"
    assert spec_of(beside, array.shape) == spec_of(alone, array.shape)
    assert split_axis(beside, array.shape) is not None
    shared = to_shard_order(beside, array, wide, 4)
    np.testing.assert_array_equal(shared, to_shard_order(alone, array, wide, 4))
    np.testing.assert_array_equal(from_shard_order(beside, shared, wide, 4), array)

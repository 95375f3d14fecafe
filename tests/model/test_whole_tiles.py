"""Contracts of passes on Hopper whose rows are no multiple of 8: they are padded once, and no layer copies rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend import core

from pallas_kernels.backends import early_launch
from qspec_jax.model.cache import KV_INT8
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.decoder import Decoder, abstract_decoder
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny
from tests.decoding.test_early_launch import SIZES, on_hopper  # noqa: F401

CAPACITY, LAYERS = 64, 2
BUDGET = View(activation_bits=8, cache_budget=256)


def decoder_of(
    *, kernels: str = "mosaic", kv: str | None = None, scan_layers: bool = False, **quantization: Any
) -> Decoder:
    decoder = abstract_decoder(
        ModelConfig.from_hf({**tiny.BASE_HF_CONFIG, **SIZES, "num_hidden_layers": LAYERS}),
        quantization=QuantConfig(**{"group_size": 128, "symmetric": True, **quantization}),
        formats=None,
        kernels=kernels,
        dtype=jnp.bfloat16,
        scan_layers=scan_layers,
    )
    decoder.kv = kv or decoder.kv
    return decoder


def traced(decoder: Decoder, batch: int, num_tokens: int, view: View | Precision, **options: Any) -> core.ClosedJaxpr:
    """The pass of so many new tokens of each row."""
    graph, parameters = nnx.split(decoder)
    num_blocks = View.of(view).num_blocks if view is BUDGET else 0
    cache = jax.eval_shape(lambda: decoder.create_cache(batch=batch, capacity=CAPACITY, num_blocks=num_blocks))
    tokens = jax.ShapeDtypeStruct((batch, num_tokens), jnp.int32)

    def run(parameters, tokens, cache):
        return nnx.merge(graph, parameters).run(tokens, cache, precision=view, **options)

    with early_launch.early_launch():
        return jax.make_jaxpr(run)(parameters, tokens, cache)


def operations(jaxpr: core.Jaxpr) -> Iterator[tuple[str, Any]]:
    """What XLA and kernels compute, by name. A kernel is one operation."""
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        if kind == "jit":
            yield from operations(equation.params["jaxpr"].jaxpr)
        else:
            yield str(equation.params.get("name") or "matmul") if kind in early_launch._KERNELS else kind, equation


def shapes(arrays: Any) -> list[tuple[int, ...]]:
    return [array.aval.shape for array in arrays]


def layers_of(program: core.ClosedJaxpr) -> list[core.Jaxpr]:
    return [one.params["jaxpr"].jaxpr for one in program.jaxpr.eqns if one.params.get("name") == "_run_layer"]


def num_sequences(program: core.ClosedJaxpr) -> int:
    """Those whose tokens are embedded."""
    [embedded] = next(shapes(one.outvars) for name, one in operations(program.jaxpr) if name == "gather")
    return embedded[0]


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "sequences"),
    # The rows of 9 x 7 become 64, which are no whole sequences: kernels copy them, as that costs less than 112 rows. So
    # they do with the 16 of 3 x 3, although five sequences would come nearer.
    [(9, 4, 10), (12, 1, 16), (12, 4, 12), (16, 1, 16), (5, 1, 5), (3, 5, 3), (15, 5, 16), (9, 7, 9), (3, 3, 3)],
)
def test_a_pass_has_the_sequences_that_make_up_whole_tiles_of_rows(batch, num_tokens, sequences, scan_layers):
    program = traced(decoder_of(scan_layers=scan_layers), batch, num_tokens, Precision.W4A16)
    assert num_sequences(program) == sequences
    assert program.out_avals[0].shape[:2] == (batch, num_tokens)


@pytest.mark.parametrize(
    ("view", "options"),
    {
        "triton": (Precision.W4A16, {"kernels": "triton"}),
        "reference": (Precision.W4A16, {"kernels": "reference"}),
        "floats": (Precision.FLOAT, {"keep_floats": True}),
    }.values(),
    ids=["triton", "reference", "floats"],
)
def test_a_pass_whose_kernels_read_any_number_of_rows_has_no_others(view, options):
    assert num_sequences(traced(decoder_of(**options), 12, 1, view)) == 12


@pytest.mark.parametrize("kv", [None, KV_INT8], ids=["bf16", "int8"])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "sequences", "view", "options"),
    {
        "plain": (12, 1, 16, Precision.W4A16, {}),
        "draft": (12, 1, 16, Precision.W4A8, {}),
        "draft with a budget": (12, 1, 16, BUDGET, {}),
        "verification": (9, 4, 10, Precision.W4A16, {}),
        "verification that weighs": (9, 4, 10, Precision.W4A16, {"weigh": 16}),
    }.values(),
    ids=["plain", "draft", "draft with a budget", "verification", "verification that weighs"],
)
def test_no_layer_copies_rows_and_the_cache_has_its_own(kv, batch, num_tokens, sequences, view, options):
    program = traced(decoder_of(kv=kv), batch, num_tokens, view, **options)
    assert early_launch.obstacle(program) is None
    layers = layers_of(program)
    assert len(layers) == LAYERS
    for layer in layers:
        of_cache = []
        for name, operation in operations(layer):
            assert name != "padded_rows"
            if name in ("pad", "slice", "dynamic_slice", "gather", "concatenate"):
                masses = (batch, 2, CAPACITY // 16)  # which are of the rows of the cache
                assert options
                assert shapes(operation.outvars) == [masses]
            if name == "matmul":
                assert shapes(operation.invars)[0][0] == sequences * num_tokens
            if name.startswith(("rotate_and_write", "decode_attention", "block_attention")):
                of_cache.append(name)
                assert operation.params["grid_mapping"].grid[-1] == batch  # programs beyond would write anywhere
                assert {shape[0] for shape in shapes(operation.invars) if shape[1:3] == (CAPACITY, 2)} <= {batch}
        assert len(of_cache) == 3 + ("weigh" in options)

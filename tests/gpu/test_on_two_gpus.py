"""On two GPUs, in bfloat16: QSpec yields the tokens of plain decoding on the same mesh.

``data=2`` shares the rows of the demo model out, and yields what one GPU yields; ``model=2`` cuts the weights of four
layers of Llama-3-8B, whose sums are then of two parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qspec_jax
from tests.gpu.test_equal_outputs import DTYPE, few_layers, noise, outputs, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
PLANS = {
    "qspec": {"mode": "qspec", "draft_length": 3},
    "7 drafts": {"mode": "qspec", "draft_length": 7},
    "lookup": {"mode": "lookup"},
}


@pytest.mark.parametrize("turns", ["as many", "of their own"])
def test_loops_of_jax_alone_end(turns):
    """What the others rest on: loops on both devices, with messages inside, and of as many turns as each has rows."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])

    def of_a_device(a):
        def turn(index, a):
            return jax.lax.all_gather(a, "x").sum(0) if turns == "as many" else a + 1

        count = 5 if turns == "as many" else jax.lax.axis_index("x") * 3 + 1
        a = jax.lax.fori_loop(0, count, turn, a)
        return jax.lax.all_gather(a, "x", tiled=True)

    whole = jax.sharding.PartitionSpec()
    program = jax.jit(jax.shard_map(of_a_device, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False))
    for _ in range(3):
        found = program(jnp.zeros((4, 256)) if turns == "of their own" else jnp.ones((4, 256)))
        np.testing.assert_array_equal(
            found, np.repeat([32, 32] if turns == "as many" else [1, 4], 4)[:, None] * np.ones(256)
        )


def differences(model, given, *, rows, expected):
    """Of plans that do not yield what is expected: how many of their outputs differ."""
    found = {}
    for name, plan in PLANS.items():
        others = outputs(model, given, rows=rows, **plan)
        count = sum(one != other for one, other in zip(others, expected, strict=True))
        print(f"{model.name}, {name}, {rows} rows: {count} of {len(expected)} differ", flush=True)
        found |= {name: count} if count else {}
    return found


def test_rows_that_two_gpus_share_yield_what_they_yield_on_one(demo_gguf):
    given = texts(96)
    one = qspec_jax.load(demo_gguf, dtype=DTYPE)
    one.programs.packing = False  # as on a mesh
    expected = outputs(one, given, rows=16, mode="w4a16")
    two = qspec_jax.load(demo_gguf, dtype=DTYPE, mesh="data=2")
    assert outputs(two, given, rows=32, mode="w4a16") == expected
    assert not differences(two, given, rows=32, expected=expected)


def test_weights_that_two_gpus_share_yield_the_same_with_drafts_and_without():
    given = noise(96)
    model = few_layers(mesh="model=2")
    plain = outputs(model, given, rows=32, mode="w4a16")
    assert len({tuple(ids) for ids in plain}) > len(plain) / 2
    assert not differences(model, given, rows=32, expected=plain)

"""On two GPUs, in bfloat16: QSpec yields the tokens of plain decoding on the same mesh.

``data=2`` shares the rows of the demo model out, and yields what one GPU yields; ``model=2`` cuts the weights of four
layers of Llama-3-8B, whose sums are then of two parts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qspec_jax
from qspec_jax.decoding import mailboxes
from tests.gpu.on_two_gpus import PLANS, differences
from tests.gpu.serving import DTYPE, few_layers, noise, outputs, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


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


def test_rows_that_two_gpus_share_yield_what_they_yield_on_one(demo_gguf):
    given = texts(96)
    one = qspec_jax.load(demo_gguf, dtype=DTYPE)
    expected = outputs(one, given, rows=16, mode="w4a16")
    two = qspec_jax.load(demo_gguf, dtype=DTYPE, mesh="data=2")
    assert two.programs.longest_packed == one.programs.longest_packed > 0
    assert outputs(two, given, rows=32, mode="w4a16") == expected
    assert "pieces" in {name[0] for name in two.programs.compiled}
    assert not differences(two, given, rows=32, expected=expected)
    alone = given._replace(prompts=given.prompts[:1])  # of which one of the two has nothing to read
    assert outputs(two, alone, rows=32, mode="w4a16") == expected[:1]


def test_weights_that_two_gpus_share_yield_the_same_with_drafts_and_without():
    given = noise(96)
    model = few_layers(mesh="model=2")
    plain = outputs(model, given, rows=32, mode="w4a16")
    model.programs.packing = True
    assert model.programs.longest_packed
    assert outputs(model, given, rows=32, mode="w4a16") == plain
    assert "pieces" in {name[0] for name in model.programs.compiled}
    assert len({tuple(ids) for ids in plain}) > len(plain) / 2
    assert not differences(model, given, rows=32, expected=plain)


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
def test_sums_in_mailboxes_yield_what_messages_do(sampled, monkeypatch):
    given = noise(64) if sampled else noise(64)._replace(sampling={})
    plans = [{"mode": "w4a16"}, {"mode": "qspec", "draft_length": 3}, {"mode": "lookup"}]
    found = {}
    for sends in ("to mailboxes", "messages"):
        if sends == "messages":
            monkeypatch.setattr(mailboxes, "obstacle", lambda *_, **__: "a test asks for messages")
        model = few_layers(mesh="model=2")
        assert (mailboxes.obstacle(model.mesh, model.plan(mode="w4a16")) is None) == (sends == "to mailboxes")
        found[sends] = [
            outputs(model, given, rows=rows, **plan) for rows in (1, 32) for plan in plans[: 1 + 2 * (rows > 1)]
        ]
    assert found["to mailboxes"] == found["messages"]


@pytest.mark.parametrize(("name", "mesh"), [("demo", "data=2"), ("llama", "model=2")])
def test_a_process_for_each_yields_the_same_with_drafts_and_without(name, mesh, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.gpu.on_two_gpus", name, mesh, "--packing", "--coordinator", where]
    command = [*command, "--process-id"]
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(2):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(index)}
            log = stack.enter_context(open(tmp_path / str(index), "w"))
            options = {"cwd": Path(__file__).parents[2], "env": environment, "stdout": log, "stderr": log}
            started.append(stack.enter_context(subprocess.Popen([*command, str(index)], **options)))
            stack.callback(started[-1].kill)
        codes = [one.wait(timeout=240) for one in started]
    said = (tmp_path / "0").read_text()
    print(said)
    assert codes == [0, 0], said[-4000:] + (tmp_path / "1").read_text()[-2000:]
    assert said.count(" 0 of 96 differ") == len(PLANS)

"""Models go straight to the shards of a mesh, each device its own, and are written from there as they were.

Meshes need devices, of which the process that runs the tests has one: another one has four.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import qspec_jax
from pallas_kernels import Layout
from qspec_jax import ModelConfig, QuantConfig
from qspec_jax.bench.synthetic import synthetic_model
from qspec_jax.device.mesh import make_mesh
from qspec_jax.errors import OutOfMemoryError
from qspec_jax.model.decoder import num_bytes
from qspec_jax.model.placement import decoder_options
from qspec_jax.model.sharding import from_shard_order
from qspec_jax.model.shards import Shards, parameters
from qspec_jax.weights import placing
from qspec_jax.weights.checkpoint.restore import open_checkpoint, restore_decoder
from qspec_jax.weights.checkpoint.save import save_checkpoint
from qspec_jax.weights.fill import load_decoder, weight_formats
from qspec_jax.weights.placing import MeshPlacing
from tests import tiny
from tests.weights import test_checkpoint

ROOT = Path(__file__).parents[2]
NUM_DEVICES = 4  # of a model with 2 heads of keys and values, each of which two devices have
FORMATS = {"groups": QuantConfig(group_size=32), "whole rows": QuantConfig(group_size=None, symmetric=True)}


def test_restored_and_loaded_models_lie_on_the_mesh_as_those_placed_from_memory(tmp_path):
    code = f"from tests.weights import test_placing; test_placing.check_all({str(tmp_path)!r})"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, timeout=300)


def check_all(folder):
    """In a process of its own."""
    mesh, half = make_mesh(f"data=1,model={NUM_DEVICES}"), make_mesh("data=2,model=2")
    for name, quantization in FORMATS.items():
        check_mesh(Path(folder) / name, "llama_with_biases", quantization, half)
    check_mesh(Path(folder) / "tied", "smollm2_tied", FORMATS["groups"], mesh)
    check_mesh(Path(folder) / "norms", "qwen3_qk_norm", FORMATS["groups"], mesh)
    check_a_stack_is_never_whole(mesh)
    check_that_synthetic_weights_are_made_where_they_belong(half)
    check_that_what_does_not_fit_is_refused(Path(folder) / "norms", mesh)
    test_checkpoint.check_placing(test_checkpoint.save(Path(folder) / "plain"), 2)


def check_mesh(folder, family, quantization, mesh):
    config = ModelConfig.from_hf({**tiny.hf_config(family), "head_dim": 32})
    source = tiny.source(config)
    formats, of_layout = weight_formats(source, quantization), {}
    for scan_layers in (False, True):
        options = {"dtype": jnp.dtype("float32"), "kernels": "reference", "scan_layers": scan_layers}
        shards = Shards.of(config, mesh, quantization=quantization, formats=formats, **options)
        whole = load_decoder(source, quantization=quantization, formats=formats, **options)
        expected, onto = tiny.distributed(whole, shards), MeshPlacing(shards)
        loaded = load_decoder(source, quantization=quantization, formats=formats, placing=onto, **options)
        assert_same(loaded, expected)
        of_layout[scan_layers] = loaded
        own = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(nnx.state(loaded)))
        assert own == num_bytes(shards.local) < num_bytes(whole) * 0.8
        if not folder.exists():
            save_checkpoint(folder, whole, tokenizer=None, quantization=quantization)
        checkpoint = open_checkpoint(folder)
        assert_same(restore_decoder(checkpoint, placing=onto, **options), expected)
    model = qspec_jax.load(folder, mesh=mesh, kernels="reference", dtype="float32")
    assert model.mesh == mesh
    assert_same(model.decoder, of_layout[True])
    for name, decoder in (("scanned", model.decoder), ("unrolled", of_layout[False])):
        again = folder.parent / f"{folder.name} {name}"
        saved = save_checkpoint(again, decoder, tokenizer=None, quantization=quantization)
        assert saved.arrays == checkpoint.manifest.arrays  # shapes, dtypes and hashes
        assert saved.formats == checkpoint.manifest.formats


def assert_same(one, other):
    """The same graph, bits and shardings."""
    (graph, state), (other_graph, other_state) = nnx.split(one), nnx.split(other)
    assert graph == other_graph
    leaves, other_leaves = jax.tree.leaves(state), jax.tree.leaves(other_state)
    for a, b in zip(leaves, other_leaves, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check_that_synthetic_weights_are_made_where_they_belong(mesh):
    config = ModelConfig.from_hf(tiny.hf_config("llama_with_biases"))
    quantization = FORMATS["whole rows"]
    decoder = synthetic_model(config, quantization=quantization, mesh=mesh, kernels="reference").decoder
    shards = Shards.of(config, mesh, quantization=quantization, formats=None, **decoder_options("reference", None))
    for leaf, like in zip(*(jax.tree.leaves(nnx.state(one)) for one in (decoder, shards.shapes())), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        parts = {shard.device: np.asarray(shard.data) for shard in leaf.addressable_shards}
        for row in mesh.devices.T:  # the places of the data axis hold the same
            assert np.array_equal(parts[row[0]], parts[row[1]])
        one, other = (parts[device] for device in mesh.devices[0])
        assert leaf.is_fully_replicated == np.array_equal(one, other)


def check_a_stack_is_never_whole(mesh):
    """Of one device of four, as if the others were another process's."""
    config = ModelConfig.from_hf(tiny.hf_config("wide_heads"))
    options = {"quantization": QuantConfig(), "formats": None, "dtype": "float32", "kernels": None, "scan_layers": True}
    onto = MeshPlacing(Shards.of(config, mesh, **options))
    path, layer = "layers.0.mlp.gate_up.weight.packed", np.arange(256 * 32, dtype=np.uint8).reshape(256, 32)
    stack = placing.Stack(onto, path, num_layers=3)
    stack.write(1, layer)
    assert [share.shape for share in stack._shares.values()] == [(3, 64, 32)] * 4
    assert np.array_equal(stack._shares[(64, 128), (None, None)][1], layer[64:128])


def check_that_what_does_not_fit_is_refused(path, mesh):
    checkpoint = open_checkpoint(path)
    options = {"formats": None, "dtype": "float32", "kernels": None, "scan_layers": True}
    with pytest.MonkeyPatch.context() as patch:
        onto = MeshPlacing(Shards.of(checkpoint.manifest.model, mesh, quantization=FORMATS["groups"], **options))
        own = onto.num_bytes(onto.whole(checkpoint.manifest.model))
        patch.setattr("qspec_jax.device.memory.available_bytes", lambda: 4 * own - 1)
        with pytest.raises(OutOfMemoryError, match=r"what 4 of 4 devices have of norms need .* [kM]B and cpu has"):
            restore_decoder(checkpoint, placing=onto)


@pytest.mark.parametrize("family", ["llama_with_biases", "smollm2_tied"])
@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("layout", list(Layout))
def test_what_is_stored_is_what_was_arranged(family, split, layout):
    """In host memory alone, with rows long enough for every order of bytes, and more rows than were stored."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1, "head_dim": 256}
    config = ModelConfig.from_hf({**tiny.hf_config(family), **sizes})
    options = {"quantization": QuantConfig(group_size=128), "formats": None, "dtype": "float32", "scan_layers": False}
    shards = Shards.of(config, Mesh([jax.local_devices() * split], ("data", "model")), kernels="reference", **options)
    onto = MeshPlacing(shards)
    onto._layouts = dict.fromkeys(onto._layouts, layout)
    rng = np.random.default_rng(0)
    rows = {}
    for name, parameter in parameters(shards.whole()):
        for part, leaf in placing.parts_of(parameter.get_value()).items():
            path, array = f"{name}{part}", rng.integers(0, 256, leaf.shape).astype(leaf.dtype)
            arranged = onto.arranged(path, array)
            rows[path] = arranged.shape[0] / array.shape[0]
            back = from_shard_order(path, arranged, config, split, layout=layout)
            assert back.tobytes() == array.tobytes(), path
    assert rows["layers.0.mlp.down.weight.packed"] == 1
    assert rows["layers.0.attention.qkv.weight.packed"] == (1 if split == 2 else 1.5)

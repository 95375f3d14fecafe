"""What XLA is told to record in CUDA graphs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qspec_jax.decoding import device_graphs, on_mesh
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.device_graphs import Graphs, compiler_options
from qspec_jax.decoding.plan import DecodingPlan
from qspec_jax.decoding.programs import Programs
from qspec_jax.device.mesh import AXES
from qspec_jax.model.config import ModelConfig, QuantConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.shards import Shards
from tests import tiny

RECORDED = "xla_gpu_enable_command_buffer"
SHAPE, PLAN = Shape(rows=1, capacity=64), DecodingPlan(Precision.W4A16)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compiler_options.cache_clear()
    yield
    compiler_options.cache_clear()


def test_only_gpus_have_options():
    assert all(compiler_options(graphs, on_mesh=True) == {} for graphs in Graphs)


@pytest.mark.usefixtures("gpu")
def test_nothing_is_recorded_or_messages_as_well_and_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(device_graphs, "_NO_KERNELS", {"xla_no_such_option": "1"})
    assert compiler_options(Graphs.USUAL, on_mesh=True) == {}
    assert compiler_options(Graphs.NONE, on_mesh=False) == {RECORDED: ""}
    assert compiler_options(Graphs.WITH_MESSAGES, on_mesh=True)[RECORDED].endswith(",COLLECTIVES")


def test_loops_are_recorded_and_prefills_are_not(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "qspec_jax.decoding.lowering.compiler_options", lambda graphs, *, on_mesh: asked.append((graphs, on_mesh)) or {}
    )
    programs = Programs(tiny.decoder(kernels=None))
    programs.lower_prefill(PLAN, SHAPE, 32)
    programs.lower_pieces(PLAN, SHAPE, 2)
    programs.lower_loop(PLAN, SHAPE)
    assert asked == [(Graphs.NONE, False)] * 2 + [(Graphs.USUAL, False)]


def test_a_mesh_records_messages_where_nothing_is_sampled(monkeypatch):
    """Loops that sample gathered all logits in a run that failed (lab notebook, 052)."""
    asked = []
    monkeypatch.setattr(on_mesh, "compiler_options", lambda graphs, *, on_mesh: asked.append((graphs, on_mesh)) or {})
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES)
    options = {"quantization": QuantConfig(), "formats": None, "scan_layers": True, "dtype": jnp.dtype("float32")}
    shards = Shards.of(ModelConfig.from_hf(tiny.BASE_HF_CONFIG), mesh, kernels="reference", **options)
    programs = Programs(shards.shapes(), mesh)
    programs.lower_prefill(PLAN, SHAPE, 32)
    programs.lower_loop(PLAN, SHAPE)
    programs.lower_loop(PLAN, SHAPE._replace(features=SHAPE.features._replace(scores=True)))
    assert asked == [(Graphs.NONE, True), (Graphs.WITH_MESSAGES, True), (Graphs.USUAL, True)]

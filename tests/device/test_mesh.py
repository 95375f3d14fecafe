"""Meshes as people ask for them; those of several devices are made in ``tests/decoding/on_eight_devices.py``."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from qspec_jax.device.mesh import MeshShape, make_mesh, parse_mesh
from qspec_jax.errors import UsageError


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=2,model=4", (2, 4)),
        ("model=4,data=2", (2, 4)),
        ("model=8", (1, 8)),
        ("data=3", (3, 1)),
        (" data = 2 ; model = 2 ", (2, 2)),
    ],
)
def test_a_text_names_axes_in_any_order(text, shape):
    assert parse_mesh(text) == shape
    assert parse_mesh(str(MeshShape(*shape))) == shape


NO_TEXTS = ["", "8", "model", "model=", "model=0", "model=-1", "model=1.5", "model=two", "tensor=2", "model=2,model=2"]
NO_TEXTS += ["data=2,", "data=2 model=4", "model=9999999", "model=2x4", "model=" + "9" * 5000]


@pytest.mark.parametrize("text", NO_TEXTS)
def test_another_text_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="use data=N,model=N, such as data=2,model=4") as refused:
        parse_mesh(text)
    assert len(str(refused.value)) < 200


def test_no_mesh_is_made_of_one_device():
    assert make_mesh(None) is None
    assert make_mesh("data=1,model=1") is None
    assert make_mesh(Mesh(np.array(jax.devices()[:1]), ("model",))) is None


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"mesh=data=2,model=4 has 8 devices, and there is 1 cpu device; JAX_NUM_CPU_"):
        make_mesh("data=2,model=4")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (8, "is of type int"),
        ((2, 4), "is of type tuple"),
        (Mesh(np.array(jax.devices()[:1]), ("x",)), "has the axis 'x'; name its axes 'data' and 'model'"),
        (Mesh(np.array(jax.devices()[:0]), ("model",)), "has no devices"),
    ],
)
def test_what_is_no_mesh_is_refused(given, told):
    with pytest.raises(UsageError, match=told):
        make_mesh(given)

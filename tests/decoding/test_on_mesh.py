"""Programs on a mesh. Meshes need devices, of which the process that runs the tests has one: another one has eight."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from qspec_jax.decoding import on_mesh
from qspec_jax.decoding.chunks import Shape
from qspec_jax.decoding.on_mesh import OnMesh
from qspec_jax.decoding.programs import Programs
from qspec_jax.device.mesh import AXES
from tests import tiny

ROOT = Path(__file__).parents[2]
PARTS = ("equal", "features", "int8")


def test_one_thread_at_a_time_hands_work_to_devices():
    """Of whatever meshes: devices that begin two programs in different orders wait for each other for ever."""
    meshes = [OnMesh(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES)) for _ in range(2)]
    running, most = [], []

    def program(index):
        running.append(index)
        time.sleep(0.005)
        most.append(len(running))
        running.remove(index)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: meshes[index % 2].run(program, index), range(8)))
    assert most == [1] * 8


def test_processes_of_cpus_wait_for_a_program_before_the_next_one_begins():
    """Which may need nothing of it: a batch that is done has left a burst that nobody reads."""
    mesh = OnMesh(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES))
    done = []

    class Array:
        def __init__(self, name, nbytes):
            self.name, self.nbytes = name, nbytes

        def block_until_ready(self):
            done.append(self.name)

    def program(name):
        done.append(f"{name} begins")
        return Array(f"cache of {name}", 99), Array(name, 4)

    for mesh._mixes_up in (False, True):
        for name in "ab":
            mesh.run(program, name)
    on_mesh._returned.clear()
    assert done == [f"{name} begins" for name in "aba"] + ["a", "b begins"]


def test_what_makes_the_state_of_a_batch_is_compiled_once_for_each_shape_and_keeps_nothing():
    """Not the decoder either, whose weights would stay until Python looks for circles."""
    mesh = OnMesh(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES))
    programs, traced = Programs(tiny.decoder()), []

    def make(shape, programs=programs):
        traced.append(shape)
        return programs._idle(shape)

    shapes = [Shape(rows=2, capacity=64), Shape(rows=2, capacity=128)]
    for shape in shapes:
        mesh.made(shape, make)
    before = len(traced)
    states = [mesh.made(shape, make) for shape in (*shapes, shapes[0])]
    assert len(traced) == before
    assert [state.cache.capacity for state in states] == [64, 128, 64]
    makes, has = weakref.ref(make), weakref.ref(programs)
    del make, programs
    assert (makes(), has()) == (None, None)


@pytest.mark.slow  # a minute of CPU time: three files in one process, whose start takes ten seconds
def test_on_eight_devices(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    files = [f"tests/decoding/on_eight_devices_{part}.py" for part in PARTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    options = {"env": environment, "timeout": 600, "capture_output": True, "text": True}
    done = subprocess.run([*command, *files], cwd=ROOT, check=False, **options)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

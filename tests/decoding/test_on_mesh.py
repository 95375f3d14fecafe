"""Programs on a mesh. Meshes need devices, of which the process that runs the tests has one: another one has eight."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("equal", "features")  # two processes, so that each of these tests stays below the limit of CPU time


@pytest.mark.parametrize("part", PARTS)
def test_on_eight_devices(part, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    file = f"tests/decoding/on_eight_devices_{part}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    options = {"env": environment, "timeout": 600, "capture_output": True, "text": True}
    done = subprocess.run([*command, file], cwd=ROOT, check=False, **options)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

"""Imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_kernels_know_nothing_of_models():
    for path in modules_of("pallas_kernels"):
        assert not any(
            name.split(".")[0] in ("qspec_jax", "flax", "transformers") for name in imported_modules(path)
        ), path


def test_gpu_backends_are_imported_by_their_own_files_only():
    for path in [*modules_of("pallas_kernels"), *modules_of("qspec_jax")]:
        if "backends" not in path.parts and path.name not in ("gpu_triton.py", "gpu_mosaic.py"):
            names = imported_modules(path)
            assert not any("pallas" in name and name.startswith("jax") for name in names), path


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("config", ("model.", "linear", "engine", "loading", "speculative")),
        ("linear", ("model.", "engine", "loading", "speculative")),
        ("model/decoder", ("engine", "loading", "speculative")),
        ("speculative", ("engine", "loading", "tokenizer")),
        ("sampling_params", ("state", "programs", "engine")),
        ("state", ("speculative", "programs", "engine")),
        ("lookup", ("state", "speculative", "programs", "engine")),
        ("programs", ("requests", "scheduler", "pipeline", "engine")),
        ("prefixes", ("programs", "requests", "scheduler", "engine")),
        ("scheduler", ("pipeline", "engine", "tokenizer", "generate")),
        ("prompt_files", ("engine", "generate")),
        ("tokenizer", ("engine", "model.", "speculative")),
        ("tokenizer_backend", ("tokenizer", "loading", "engine", "model.")),
        ("checkpoint/manifest", ("engine", "loading", "recipes", "checkpoint.save", "checkpoint.restore")),
        ("checkpoint/save", ("engine", "loading", "recipes", "checkpoint.restore")),
        ("checkpoint/restore", ("engine", "loading", "recipes", "checkpoint.save")),
        ("loading/load", ("recipes", "quantize", "generate")),
    ],
)
def test_a_module_does_not_import_what_builds_on_it(module, later):
    names = imported_modules(ROOT / "qspec_jax" / f"{module}.py")
    assert not {name for name in names for other in later if name.startswith(f"qspec_jax.{other}")}


def test_importing_does_no_work():
    """No backend is initialised, no tokenizer library loaded."""
    code = (
        "import sys, qspec_jax, pallas_kernels, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was initialised'\n"
        "assert not {'transformers', 'torch', 'orbax', 'tensorstore'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""What kernels may know, and that importing does no work; which room may import which is in ``test_rooms.py``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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


def test_importing_does_no_work():
    """No backend is initialised, no tokenizer library loaded."""
    code = (
        "import sys, qspec_jax, pallas_kernels, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was initialised'\n"
        "assert not {'transformers', 'torch', 'orbax', 'tensorstore'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

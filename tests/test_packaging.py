"""What a wheel holds: every module, and the files that code reads at run time."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


@pytest.mark.parametrize("package", ["qspec_jax", "pallas_kernels"])
def test_every_data_file_of_a_package_goes_into_the_wheel(package):
    """CI builds a wheel and looks into it; this says at once which file the patterns of ``pyproject.toml`` miss."""
    files = [path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*") if path.is_file()]
    data = {path.as_posix() for path in files if path.suffix not in (".py", ".pyc")}
    assert "py.typed" in data
    patterns = SETTINGS["package-data"][package]
    assert {name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)} == set()
    for pattern in patterns:
        assert fnmatch.filter(data, pattern), f"{pattern} matches no file"


def test_every_folder_with_modules_is_a_package():
    """``packages.find`` passes over a folder without ``__init__.py``, in silence."""
    for package in ("qspec_jax", "pallas_kernels"):
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder

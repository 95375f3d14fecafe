"""What kernels may know, and where public names are; which room may import which is in ``test_rooms.py``."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import qspec_jax

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


def is_of_a_backend(path: Path) -> bool:
    """``gpu_*.py`` and ``tpu.py`` of an operation, and what those of one compiler share, in ``backends/``."""
    return "backends" in path.parts or path.name == "tpu.py" or path.name.startswith("gpu_")


def test_backends_are_imported_by_their_own_files_only():
    for path in [*modules_of("pallas_kernels"), *modules_of("qspec_jax")]:
        if not is_of_a_backend(path):
            names = imported_modules(path)
            assert not any("pallas" in name and name.startswith("jax") for name in names), path


def test_each_file_of_a_backend_is_an_implementation_of_its_operation():
    """It has an entry in the operation's dictionary, ``obstacle``, and the functions of the reference by name.

    A file named after one that has, and more, is a part of it.
    """
    operations = [path.parent for path in modules_of("pallas_kernels") if path.name == "reference.py"]
    assert operations
    for folder in operations:
        package = importlib.import_module(f"pallas_kernels.{folder.name}")
        files = {path.stem for path in folder.glob("*.py") if is_of_a_backend(path)}
        assert package._IMPLEMENTATIONS.op == folder.name
        entries = {name.rpartition(".")[2] for name in package._IMPLEMENTATIONS.modules.values()}
        files -= {file for file in files if any(file.startswith(f"{entry}_") for entry in entries)}
        assert entries == {*files, "reference"}
        functions = {folder.name, f"add_{folder.name}"} & names_defined(folder / "reference.py")
        for file in files:
            assert {*functions, "obstacle"} <= names_defined(folder / f"{file}.py"), (folder, file)


def names_defined(path: Path) -> set[str]:
    """Functions of a module, and other names that it assigns; read, not imported, as a JAX may lack the backend."""
    body = ast.parse(path.read_text()).body
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    assigned = {target.id for target in targets if isinstance(target, ast.Name)}
    return assigned | {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_public_names_are_the_ones_that_type_checkers_see():
    tree = ast.parse((ROOT / "qspec_jax" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == qspec_jax._MODULES
    assert sorted(seen) == sorted(qspec_jax.__all__)
    assert set(qspec_jax.__all__) <= set(dir(qspec_jax))
    for name in qspec_jax.__all__:
        assert getattr(qspec_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'qspec_jax' has no attribute 'Qspec'"):
        qspec_jax.Qspec  # noqa: B018 - looked up, that is all


def test_only_devices_of_this_process_are_asked():
    """``jax.devices()`` lists those of other processes first, of which this one can ask nothing."""
    # The platform as a whole, and meshes of all devices.
    everywhere = {ROOT / "qspec_jax/decoding/program_store.py", ROOT / "qspec_jax/device/mesh.py"}
    for path in [*modules_of("pallas_kernels"), *modules_of("qspec_jax")]:
        assert path in everywhere or "jax.devices(" not in path.read_text(), path

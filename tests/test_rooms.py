"""Imports point one way: a room may import the rooms of the lines above it, and itself; files of a room, no circle."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From what knows nothing of the others to what knows all. Rooms of one line do not know each other.
ROOMS = """
pallas_kernels            qspec_jax.errors
qspec_jax.device          qspec_jax.tokenizer       qspec_jax.files
qspec_jax.model
qspec_jax.quantization    qspec_jax.decoding
qspec_jax.weights
qspec_jax.recipes         qspec_jax.engine
qspec_jax.__init__        qspec_jax.commands
qspec_jax.evaluation      qspec_jax.dialogue        qspec_jax.inspection    qspec_jax.serving
qspec_jax.generate        qspec_jax.quantize        qspec_jax.evaluate    qspec_jax.harness    qspec_jax.info    qspec_jax.chat    qspec_jax.serve    qspec_jax.texts    qspec_jax.bench
"""  # noqa: E501 - a room a column
LEVELS = [line.split() for line in ROOMS.strip().splitlines()]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


@functools.cache
def modules() -> dict[str, Path]:
    paths = [path for package in ("pallas_kernels", "qspec_jax") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def room(module: str) -> str:
    """The longest name in ROOMS that a module is in."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in LEVEL:
            return name
    raise AssertionError(f"{module} is in no room: add its folder to ROOMS")


def imports(module: str, source: str) -> Iterator[str]:
    """The modules of the house that a source imports, within functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports name the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parent = name.rpartition(".")[0]
            for found in (name, f"{name}.__init__", parent, f"{parent}.__init__"):
                if found in modules() and found != module:
                    yield found
                    break


def wrong_imports(module: str, source: str) -> list[str]:
    here = room(module)
    return [
        f"{module} imports {other}: {here} may not know {room(other)}"
        for other in imports(module, source)
        if room(other) != here and LEVEL[room(other)] >= LEVEL[here]
    ]


@pytest.mark.parametrize("module", modules())
def test_a_room_imports_only_rooms_above_it_in_the_list(module):
    assert wrong_imports(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qspec_jax.model.linear", "from qspec_jax.engine.load import load"),
        ("qspec_jax.model.linear", "def f():\n    import qspec_jax.decoding.plan"),
        ("pallas_kernels.arrays.weight", "if TYPE_CHECKING:\n    from qspec_jax import errors"),
        ("qspec_jax.decoding.plan", "from qspec_jax.quantization import rtn"),
        ("qspec_jax.engine.pipeline", "import qspec_jax"),
        ("qspec_jax.generate", "from qspec_jax.evaluate import main"),
    ],
)
def test_a_wrong_import_is_found_wherever_it_stands(module, source):
    assert len(wrong_imports(module, source)) == 1


def test_no_file_imports_itself_through_others():
    graph = {module: set(imports(module, path.read_text(encoding="utf-8"))) for module, path in modules().items()}
    graphlib.TopologicalSorter(graph).prepare()  # names the circle if there is one


def test_a_file_at_the_root_is_a_command_and_a_folder_says_what_it_is():
    root = {path.stem for path in (ROOT / "qspec_jax").glob("*.py")}
    commands = {"chat", "evaluate", "generate", "harness", "info", "quantize", "serve", "texts"}
    assert root == {"__init__", "errors", *commands}
    for path in (ROOT / "qspec_jax").rglob("*/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, f"{path} holds more than its docstring"
        assert isinstance(body[0], ast.Expr), path

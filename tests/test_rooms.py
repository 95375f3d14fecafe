"""Imports point one way: a room may import the rooms of the lines above it, and itself; files of a room, no circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From what knows nothing of the others to what knows all. Rooms of one line do not know each other.
ROOMS = """
pallas_kernels            qspec_jax.errors
qspec_jax.device          qspec_jax.tokenizer
qspec_jax.model
qspec_jax.quantization    qspec_jax.decoding
qspec_jax.weights
qspec_jax.engine
"""
LEVELS = [line.split() for line in ROOMS.strip().splitlines()]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> dict[str, Path]:
    paths = [path for package in ("pallas_kernels", "qspec_jax") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def room(module: str) -> str | None:
    """The longest line of ROOMS that a module is in."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in LEVEL:
            return name
    return None  # not moved into a room yet


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the house that a module imports, within functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            for found in (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__"):
                if found in known and found != module:
                    yield found
                    break


@pytest.mark.parametrize("module", modules())
def test_a_room_imports_only_rooms_above_it_in_the_list(module):
    known, here = modules(), room(module)
    for other in imports(module, known[module], known):
        there = room(other)
        if here is None or there is None:
            continue
        assert there == here or LEVEL[there] < LEVEL[here], f"{module} imports {other}: {here} may not know {there}"


def test_no_file_imports_itself_through_others():
    known = modules()
    graph = {
        module: {other for other in imports(module, path, known) if room(other)}
        for module, path in known.items()
        if room(module)
    }
    graphlib.TopologicalSorter(graph).prepare()  # names the circle if there is one

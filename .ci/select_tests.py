"""Which test files concern what changed: by mirrored paths first, then by imports, nearest first.

Nothing is imported: sources are only parsed. A rule of thumb that leaves much out, and says what.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qspec_jax", "pallas_kernels", "tests")
ALWAYS = "tests/test_rooms.py"
CONCERNS_EVERY_TEST = ("pyproject.toml", "tests/conftest.py")
MAX_IMPORTERS = 4  # for each changed file, besides the tests that mirror it


def select(changed: list[str]) -> tuple[dict[str, str], list[str]]:
    """The test files to run, in this order, each with the reason; and those that depend on the change besides.

    Args:
        changed: files relative to the root, deleted ones too.
    """
    graph = ImportGraph(changed)
    found = [(0, ALWAYS, "always")] if ALWAYS in graph.tests else []
    concerned = set(graph.tests) if set(changed) & set(CONCERNS_EVERY_TEST) else set()
    for file in changed:
        distances = graph.distances(file)
        mirrors = {test for test in graph.tests if mirrors_of(file, test)}
        others = sorted(distances.keys() - mirrors, key=lambda test: (distances[test], *graph.preference(file, test)))
        found += [(0, file, "changed")] if file in graph.tests else []
        found += [(1, test, f"mirrors {file}") for test in sorted(mirrors)]
        for test in others[:MAX_IMPORTERS]:
            found.append((1 + distances[test], test, f"uses {'what uses ' * (distances[test] > 1)}{file}"))
        concerned |= distances.keys()
    selected: dict[str, str] = {}
    for _, test, reason in sorted(found, key=lambda entry: entry[0]):
        selected.setdefault(test, reason)
    return selected, sorted(concerned - selected.keys())


def mirrors_of(file: str, test: str) -> bool:
    """Whether a test file mirrors a source file: ``model/rope.py`` has ``tests/model/test_rope.py``.

    ``test_rope_scaling.py`` beside it counts too, and what mirrors the file's folder as a whole.
    """
    package, *parts = Path(file).with_suffix("").parts
    if package not in PACKAGES[:2] or not file.endswith(".py"):
        return False
    parts = [part for part in parts if part != "__init__"]
    if package != "qspec_jax":
        parts = [package, *parts]
    folder, name = Path(test).parent.parts[1:], Path(test).stem
    places = [(parts[:depth], parts[depth]) for depth in (len(parts) - 1, len(parts) - 2) if depth >= 0]
    return any(
        list(folder) == above and (name == f"test_{stem}" or name.startswith(f"test_{stem}_")) for above, stem in places
    )


class ImportGraph:
    """Who imports whom, by paths relative to the root; imports within functions and by name in a string count.

    A file that is no module is imported by the modules that name it, or its folder, in a string.
    """

    def __init__(self, changed: Iterable[str]) -> None:
        paths = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
        self.tests = {path for path in paths if path.startswith("tests/") and Path(path).name.startswith("test_")}
        modules = [path for path in {*paths, *changed} if path.endswith(".py")]  # a deleted one is still imported
        known = {".".join(Path(path).with_suffix("").parts).removesuffix(".__init__"): path for path in modules}
        files: dict[str, set[str]] = {}
        for path in set(changed) - set(modules):
            for name in {Path(path).name, Path(path).parent.name} - {"", *PACKAGES}:
                files.setdefault(name, set()).add(path)
        self._uses = {path: set(_uses(ROOT / path, known, files)) - {path} for path in paths}
        self._users: dict[str, set[str]] = {}
        for path, used in self._uses.items():
            for other in used:
                self._users.setdefault(other, set()).add(path)

    def distances(self, file: str) -> dict[str, int]:
        """The test files that use a file, directly (1) or through others."""
        distances, edge = {file: 0}, {file}
        for distance in itertools.count(1):
            edge = {user for path in edge for user in self._users.get(path, ())} - distances.keys()
            if not edge:
                break
            distances |= dict.fromkeys(edge, distance)
        return {path: distance for path, distance in distances.items() if path in self.tests and path != file}

    def preference(self, file: str, test: str) -> tuple[object, ...]:
        """Of test files as near as each other: of the same room, of a direct user, run anywhere, about little else."""
        room = Path(file).parts[1:2] if file.startswith("qspec_jax/") else Path(file).parts[:1]
        mirrors_user = any(mirrors_of(user, test) for user in self._users.get(file, ()))
        on_gpu = test.endswith("_on_gpu.py")
        return Path(test).parts[1:2] != room, not mirrors_user, on_gpu, len(self._uses[test]), test


def _uses(path: Path, known: dict[str, str], files: dict[str, set[str]]) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:  # which the linter shows
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from files.get(node.value, ())
            names = [node.value] if node.value.startswith(PACKAGES) else []
        for name in names:
            module = name
            while module and module not in known:  # what is imported from a module, or patched in it
                module = module.rpartition(".")[0]
            if module:
                yield known[module]

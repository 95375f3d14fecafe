"""The notebooks run from top to bottom, and are stored without outputs.

The demo model's tokens are tests/test_demo.py's. Here a tiny model takes its place, unless all is tested thoroughly.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from tests.conftest import THOROUGH
from tests.test_documents import write_model

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# What the cell tagged "parameters" of each sets for a reader, and a test for itself: fewer programs of fewer tokens.
SMALLER = {
    "01_quickstart": {"NUM_TOKENS": 16, "NUM_PROMPTS": 2, "DRAFT_LENGTHS": (3,), "TARGETS": ("float",)},
    "02_where_speculation_pays": {
        **{"NUM_TOKENS": 8, "NUM_PROMPTS": 2, "NUM_RUNS": 1},
        **{"DRAFT_LENGTHS": (1, 3), "COPIED_BYTES": 2**22},
    },
    "03_kernels": {"NUM_OUTPUTS": 256, "NUM_INPUTS": 256, "ROWS": (1, 4), "SIDE": 128, "COPIED_BYTES": 2**22},
    "04_your_pipeline": {"NUM_TOKENS": 8, "NUM_QUESTIONS": 2},
}
# What each prints at least so often, and the pictures that it draws.
PRINTS = {
    "01_quickstart": (
        {"2 of 2 outputs equal plain decoding": 2, "rejected draft": 2, "float: equal to plain decoding": 1},
        1,
    ),
    "02_where_speculation_pays": ({"speed-up": 2, "c_d = ": 1, "tokens per cycle": 3, "a plain step could take": 1}, 3),
    "03_kernels": ({"reference": 2, "W4A8": 2, "TFLOP/s": 1}, 1),
    "04_your_pipeline": ({"right, and equal to the program above": 1}, 0),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_notebook_is_run():
    assert list(SMALLER) == list(PRINTS) == [path.stem for path in NOTEBOOKS]


def with_smaller_parameters(path, nbformat):
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    smaller = SMALLER[path.stem]
    assert [line.split(" = ")[0] for line in parameters.source.splitlines()] == list(smaller)
    parameters.source = "\n".join(f"{name} = {value}" for name, value in smaller.items())
    return notebook


@pytest.mark.filterwarnings("default")  # of the notebook machinery
@pytest.mark.slow  # with the demo model, where all is tested thoroughly
def test_the_notebooks_run_and_draw(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebook'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebook'")
    notebooks = [with_smaller_parameters(path, nbformat) for path in NOTEBOOKS]
    # One model for all, and nothing else: each begins with no name that another has set.
    begin = "import functools, pathlib, qspec_jax\nqspec_jax.load = functools.cache(qspec_jax.load)\n"
    if not THOROUGH:
        model = write_model(tmp_path / "demo.gguf", gguf.GGMLQuantizationType.Q4_0)
        begin += f"qspec_jax.weights.resolve.demo_gguf_path = functools.partial(pathlib.Path, {str(model)!r})\n"
    cells = [nbformat.v4.new_code_cell(begin)]
    for notebook in notebooks:
        cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    folder = {"metadata": {"path": str(NOTEBOOKS[0].parent)}}
    together = nbformat.v4.new_notebook(cells=cells, metadata=notebooks[0].metadata)
    nbclient.NotebookClient(together, timeout=900, resources=folder).execute()
    for path, notebook in zip(NOTEBOOKS, notebooks, strict=True):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        text = "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)
        prints, pictures = PRINTS[path.stem]
        assert {part: text.count(part) for part, least in prints.items() if text.count(part) < least} == {}
        assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures

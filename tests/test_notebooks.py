"""The notebooks run from top to bottom, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# What the cell tagged "parameters" sets for a reader, and a test for itself: fewer programs of fewer tokens.
SMALLER = {"NUM_TOKENS": 8, "DRAFT_LENGTHS": (3,)}
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.contract
@pytest.mark.demo
@pytest.mark.usefixtures("demo_gguf")
@pytest.mark.filterwarnings("default")  # of the notebook machinery
@pytest.mark.slow  # 45 s: a kernel of its own, and the demo model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebook'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebook'")
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert [line.split(" = ")[0] for line in parameters.source.splitlines()] == list(SMALLER)
    parameters.source = "\n".join(f"{name} = {value}" for name, value in SMALLER.items())
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert text.count("4 of 4 outputs equal plain decoding") == 2
    assert any("image/png" in output.get("data", {}) for output in outputs)

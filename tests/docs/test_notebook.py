"""The tutorial notebook runs from beginning to end."""

import os
from pathlib import Path

import pytest

import flaxnets

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("pandas")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "degradation.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not outputs(notebook)
    assert all(cell.get("execution_count") is None for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(flaxnets, "Study"), reason="there is no flaxnets.Study")
def test_it_runs(tmp_path, monkeypatch, data_dir):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = outputs(notebook)
    text = "".join(output.get("text", "") for output in shown)
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert "training error" in text
    assert len(pictures) == 3
    assert (tmp_path / "runs" / "tutorial" / "summary.csv").exists()

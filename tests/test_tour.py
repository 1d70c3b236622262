"""`examples/tour.ipynb` runs as it stands. Needs the extra `test-map`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("plotly")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_tour_is_ten_cells_without_stored_outputs():
    cells = [cell for cell in nbformat.read(EXAMPLES / "tour.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) == 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_the_tour_leads_from_a_model_to_a_map(tmp_path, monkeypatch):
    for name in ("speech.flac", "music.ogg", "till.wav", "bell.mp3"):
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for !hear-map
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    # The last output of a cell: without ipywidgets, tqdm warns before.
    assert outputs[1][-1].data["text/plain"] == "((960,), dtype('float32'))"
    assert outputs[2][-1].data["text/plain"].startswith("((133, 960), ")
    assert "application/vnd.plotly.v1+json" in outputs[3][-1].data
    assert outputs[5][-1].data["text/plain"] == "(37, 960)"
    nearest = outputs[6][-1].text.splitlines()
    assert nearest[0] == f"1.00  {Path('tour/speech/03.flac')}" and len(nearest) == 6
    assert sum("speech" in line for line in nearest) >= 5
    accuracy, _, rest = outputs[7][-1].text.partition(" ")
    assert float(accuracy) >= 0.9 and rest == "of 18 cuttings recognized\n"
    page = (tmp_path / "tour/map.html").read_text(encoding="utf-8")
    assert "data:audio/mpeg" in page and '"speech/03.flac"' in page

"""The notebook runs from its first cell to its last: here with a tiny model, in the long tests with the shipped one."""

import json
import os
from pathlib import Path

import pytest
from conftest import tiny_config

from pointalign import assets

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def run(monkeypatch, model: str | None) -> list[dict]:
    """Outputs of all cells, executed in the notebook's folder by a kernel of this Python."""
    for package in ("plotly", "ipykernel"):
        pytest.importorskip(package)
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.delenv("POINTALIGN_MODEL", raising=False)
    if model:
        monkeypatch.setenv("POINTALIGN_MODEL", model)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def plots(outputs: list[dict]) -> list[dict]:
    kind = "application/vnd.plotly.v1+json"
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def test_no_outputs_are_stored():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_every_cell_runs_with_a_tiny_model(tmp_path, processor, monkeypatch):
    import torch

    from pointalign.models import PointAlignForConditionalGeneration

    torch.manual_seed(0)
    PointAlignForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    cloud, attention, layers = plots(run(monkeypatch, str(tmp_path)))
    assert cloud["data"][0]["type"] == "scatter3d"
    assert attention["data"][0]["marker"]["colorbar"]["title"]["text"] == "share of attention"
    assert len(layers["data"][0]["y"]) == tiny_config().text_config.num_hidden_layers + 1


@pytest.mark.skipif(not os.environ.get("POINTALIGN_LONG_TESTS"), reason="run it by `make test-long`")
def test_every_cell_runs_with_the_shipped_model(monkeypatch):
    if not (assets.home() / "llm" / "smollm2-135m-instruct").is_dir():
        pytest.skip(f"no embedded model in {assets.home()}: run `pointalign assets`")
    monkeypatch.setenv("POINTALIGN_HOME", str(assets.home()))
    outputs = run(monkeypatch, "furniture")
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert "What is this? This is" in printed, printed
    assert len(plots(outputs)) == 3

"""The notebooks run from beginning to end, and lie in git without outputs."""

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SHORT = "tokenizer_steps, pretrain_steps, grpo_steps = 60, 30, 4"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert not any(word in path.read_text() for word in ("/home/", "/tmp/", "/root/", "/Users/"))


def test_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few steps: it draws, trains, draws, saves and loads."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "first_steps.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    first, _ = parameters.source.split("\n")
    parameters.source = f"{first}\n{SHORT}"
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 3
    (rewards,) = [output.text for output in outputs if output.get("text", "").startswith("reward at each step:")]
    assert len(rewards.split()) == 4 + 4
    assert {path.name for path in (tmp_path / "runs/first_steps/shared").iterdir()} >= {"README.md", "config.json"}

"""docs/notebook.ipynb runs: in this process, line by line, and in a kernel, with its bars and its picture."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from commands import exit_code, forked

from config.files import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "notebook.ipynb"


def cells() -> list[str]:
    """The notebook's cells of code."""
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_its_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        names: dict[str, object] = {}
        for cell in cells():
            exec(compile(cell, str(NOTEBOOK), "exec"), names)

    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    said = tmp_path / "said"
    assert exit_code(forked(work, said)) == 0, said.read_text()


def test_it_is_stored_without_outputs() -> None:
    assert not [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell.get("outputs")]


@pytest.mark.slow
def test_it_runs_in_a_kernel_with_bars_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}
    ).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    told = "".join(output.get("text", "") for output in outputs[1])
    assert "best checkpoint, step" in told and "100%|" in told, "the kernel's cell has the bar"
    assert any("image/png" in output.get("data", {}) for output in outputs[2]), (
        "its pictures are drawn inline"
    )
    assert "next line: 20 lines" in "".join(output.get("text", "") for output in outputs[4])

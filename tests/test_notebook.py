"""docs/notebook.ipynb runs: in this process, line by line, and in a kernel, with its bars and its picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from config.files import REPOSITORY
from training.checkpoint import checkpoints

NOTEBOOK = REPOSITORY / "docs" / "notebook.ipynb"


def cells() -> list[str]:
    """The notebook's cells of code."""
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.slow  # Their calls are those of docs/python.md, which tests/test_docs.py runs.
def test_its_lines_run(tmp_path: Path) -> None:
    (tmp_path / "cells.py").write_text("\n".join(cells()), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    run = [sys.executable, str(tmp_path / "cells.py")]
    done = subprocess.run(run, cwd=NOTEBOOK.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


LONG = """
from training.api import train
train(run="run", data={"source": "code", "validation_one_in": 4, "test_one_in": 4},
      tokenizer={"vocab_size": 300, "min_count": 2}, device="cpu", max_steps=10**6, log_every=1,
      model={"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 64})
"""


@pytest.mark.slow
def test_the_interrupt_of_a_kernel_saves_and_leaves_the_kernel(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = pytest.importorskip("jupyter_client.manager", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    corpus.rename(tmp_path / "code")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path))
    try:
        asked = client.execute(LONG)
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        kernel.interrupt_kernel()
        content = next_reply(client, asked)
        assert (content["status"], content.get("ename")) == ("error", "KeyboardInterrupt")
        (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
        assert saved.step >= 1 and saved.loss is None
        assert next_reply(client, client.execute("1 + 1"))["status"] == "ok"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def next_reply(client: Any, asked: str) -> dict[str, Any]:
    """The content of a kernel's reply to one request."""
    while True:
        reply = client.get_shell_msg(timeout=240)
        if reply["parent_header"].get("msg_id") == asked:
            return reply["content"]

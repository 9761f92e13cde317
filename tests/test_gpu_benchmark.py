"""The script that checks a GPU, on the CPU: records, time limits, and the checks themselves in small."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu, gpu_checks
from benchmarks.gpu_checks import CheckRequest
from guards import preflight
from guards.faults import Fault


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let every check be this program, whose arguments are the check's number and the file of its result."""
    monkeypatch.setattr(
        gpu,
        "child_command",
        lambda number, device, folder, result, small: [sys.executable, "-c", text, str(number), str(result)],
    )


PASSES = """
import json, pathlib, sys
number, result = sys.argv[1:]
found = {"passed": number != "2", "line": f"line of {number}", "values": {"n": 7}}
pathlib.Path(result).write_text(json.dumps(found))
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "commit", lambda: "c0ffee")
    program(monkeypatch, PASSES)
    return tmp_path / "new" / "records.jsonl"


def run(out: Path, *words: str) -> int:
    return gpu.main(["--device", "cpu", "--out", str(out), *words])


def test_without_a_gpu_it_says_so(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(out)]) == 0 and not out.exists()
    assert capsys.readouterr().out == (
        "no CUDA device here: nothing was checked (--device cpu tries the checks on the CPU)\n"
    )


def test_a_check_has_a_line_and_a_record_and_is_not_run_twice(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(out, "--checks", "2,1") == 1  # 2 does not pass.
    found = records(out)
    assert [(r["check"], r["outcome"], r["line"]) for r in found] == [
        (2, "failed", "line of 2"),
        (1, "passed", "line of 1"),
    ]
    fields = {"commit": "c0ffee", "device": "cpu", "small": False, "torch": str(torch.__version__)}
    assert all(record.items() >= {**fields, "values": {"n": 7}}.items() for record in found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "2 tests: failed; line of 2",
        "1 environment: passed; line of 1",
    ]
    out.write_text(out.read_text("utf-8") + '{"check": 1, "comm', "utf-8")  # A record that was cut off.
    program(monkeypatch, "raise SystemExit(3)")
    assert run(out, "--checks", "1") == 0 and "recorded at " in capsys.readouterr().out
    assert run(out, "--checks", "2,1") == 1


@pytest.mark.parametrize("words", [["--again"], ["--small"], []])
def test_a_record_of_something_else_does_not_count(
    words: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(out, "--checks", "1") == 0
    if not words:
        monkeypatch.setattr(gpu, "commit", lambda: "c0ffee-dirty")
    for n in (2, 3):
        assert run(out, "--checks", "1", *words) == 0
        repeats = n if words != ["--small"] else 2  # The second in small has a record of its kind.
        assert len(records(out)) == repeats


def test_a_check_that_takes_too_long_is_stopped_with_its_children(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grandchild writes a line in ever shorter intervals: after the check no more come."""
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.01)"
    program(
        monkeypatch,
        f"import subprocess, sys, time\nprint('so far', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)",
    )
    short = gpu_checks.CHECKS[1]._replace(seconds=3.0)
    monkeypatch.setitem(gpu_checks.CHECKS, 1, short)
    assert run(out, "--checks", "1") == 1
    (record,) = records(out)
    assert record["outcome"] == "stopped" and record["line"].startswith("not done after 3 s: ")
    written = beats.read_text() if beats.exists() else ""  # On a busy machine it had no time to begin.
    assert run(out, "--checks", "1") == 1 and len(records(out)) == 1
    assert written == (beats.read_text() if beats.exists() else "")


def test_a_crash_is_recorded_and_the_next_check_runs(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "import os, sys\nprint('before'); print('the reason')\nsys.exit(9)")
    assert run(out) == 1
    assert [record["outcome"] for record in records(out)] == ["crashed"] * len(gpu_checks.CHECKS)
    assert all(record["line"] == "exit code 9: the reason" for record in records(out))
    assert out.with_name("records-1.log").read_text("utf-8") == "before\nthe reason\n"


def test_a_check_that_there_is_not_is_refused() -> None:
    assert gpu.chosen_checks("") == [*gpu_checks.CHECKS] and gpu.chosen_checks("3, 1") == [3, 1]
    with pytest.raises(ValueError, match="--checks has 99, and the checks are 1, 2, 3"):
        gpu.chosen_checks("1,99")


# --- the checks in small -----------------------------------------------------------------------------


def test_the_environment_and_the_tests_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "records.jsonl", "--small", "--checks", "1,2") == 0
    first, second = records(tmp_path / "records.jsonl")
    attention = first["values"]["attention"]
    assert attention["math"] == {"causal": [64, 128], "mask": [64, 128], "grouped": [64, 128]}
    assert attention["cudnn"] == {"causal": [], "mask": [], "grouped": []}
    assert second["values"]["passed"] > 5 and second["values"]["failures"] == second["values"]["errors"] == 0
    assert f"{second['values']['passed']} passed, 0 failed, 0 left out" in capsys.readouterr().out


def test_the_environment_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes no mask there, and has heads of up to 64 here."""

    def flash_is_choosy(backend: SDPBackend, case: str, head_dim: int, device: torch.device) -> bool:
        return backend is not SDPBackend.FLASH_ATTENTION or (case != "mask" and head_dim <= 64)

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    smi.chmod(0o755)
    properties = SimpleNamespace(major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_checks, "attends", flash_is_choosy)
    monkeypatch.setattr(gpu_checks, "has_native_bf16", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = gpu_checks.environment(CheckRequest(torch.device("cuda"), tmp_path, small=False))
    assert found.passed and found.line == (
        f"NVIDIA H100 (1 of 2), capability 9.0, 80 GiB, driver 550.54.15, torch {torch.__version__}, bf16; "
        "attention by flash: causal of 64, grouped of 64; efficient: causal, mask, grouped; "
        "cudnn: causal, mask, grouped; math: causal, mask, grouped"
    )


def test_healthy_runs_raise_no_alarm_and_every_guard_that_is_too_strict_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CheckRequest(torch.device("cpu"), tmp_path, small=True)
    healthy = gpu_checks.guards(request)
    assert healthy.passed and healthy.line == "default passed; LoRA passed; nf4 passed"
    monkeypatch.setattr(gpu_checks, "GUARD_CASES", {"default": None})
    for guard, name in (("order", "batch-repeated"), ("generation", "clip-ignored")):
        fault = Fault(name, f"evidence of {guard}", "")
        monkeypatch.setitem(preflight.GUARDS, guard, lambda subject, fault=fault: iter([fault]))
    strict = gpu_checks.guards(request)
    assert not strict.passed and strict.line == (
        "default false alarm batch-repeated: evidence of order; "
        "false alarm clip-ignored: evidence of generation"
    )

"""Problems whose completions are run, in the published forms of HumanEval and MBPP, made up here."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sandbox
from config.files import REPOSITORY
from metrics.intervals import share_interval
from sandbox import problems
from sandbox.passing import FunctionalConfig, evaluate, score
from sandbox.problems import Sample, read_problems, read_samples


def human_eval(number: int, name: str, body: str, checks: str, **more: str) -> dict[str, str]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'from typing import List\n\n\ndef {name}(values: List[int]):\n    """ Of a list. """\n',
        "entry_point": name,
        "canonical_solution": f"    {body}\n",
        "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n    {checks}\n",
        **more,
    }


PROBLEMS = [
    human_eval(0, "total", "return sum(values)", "assert candidate([1, 2]) == 3 and candidate([]) == 0"),
    human_eval(1, "largest", "return max(values)", "assert largest([1, 2]) == candidate([2, 0]) == 2"),
]
MBPP = [
    {
        "task_id": 2,
        "text": "Write a function to find the shared elements.",
        "code": "def shared(a, b):\r\n  return tuple(set(a) & set(b))",
        "test_list": ["assert set(shared((3, 4), (4, 7))) == set((4,))", "assert shared((1,), (2,)) == ()"],
        "test_setup_code": "",
        "challenge_test_list": ["assert False"],
    },
    {  # The form of the sanitized file.
        "task_id": 3,
        "prompt": "Write a function to find the circumference.",
        "code": "import math\ndef around(r):\n  return 2 * math.pi * r",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(around(1), 6.28318, rel_tol=0.001)"],
    },
    {
        "task_id": 4,
        "text": "Write a function to find the longest chain.",
        "code": "class Pair:\n  def __init__(self, a): self.a = a\ndef chain(pairs): return len(pairs)",
        "test_list": ["assert chain([Pair(5), Pair(15)]) == 2"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
]


def write(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_solutions_pass_and_stubs_do_not(isolated: None, tmp_path: Path) -> None:
    problems = read_problems(write(tmp_path / "HumanEval.jsonl.gz", PROBLEMS))
    whole = [Sample(p.task_id, p.solution.removeprefix(p.before), {}) for p in problems.values()]
    stubs = [Sample(name, "    pass\n", {}) for name in problems]
    for workers in (1, 3):
        found = score(problems, whole + stubs, workers=workers)
        assert [v.kind for v in found.verdicts] == ["passed"] * 2 + ["failed"] * 2
        assert found.solved == {"HumanEval/0": (2, 1), "HumanEval/1": (2, 1)} and found.left_out == {}
    # Nobody solved them, so the published solutions were tried.
    assert score(problems, stubs).solved == {"HumanEval/0": (1, 0), "HumanEval/1": (1, 0)}


def test_infilling_puts_the_completion_before_its_suffix(isolated: None, tmp_path: Path) -> None:
    row = human_eval(0, "f", "x = 1", "assert candidate([4]) == 5", suffix="    return values[0] + x\n")
    problems = read_problems(write(tmp_path / "infilling.jsonl", [row]))
    samples = [Sample("HumanEval/0", text, {}) for text in ("    x = 1\n", "    x = 2\n")]
    assert [v.kind for v in score(problems, samples).verdicts] == ["passed", "failed"]


def test_mbpp_in_both_published_forms(isolated: None, tmp_path: Path) -> None:
    lines = read_problems(write(tmp_path / "mbpp.jsonl", MBPP))
    array = tmp_path / "sanitized-mbpp.json"
    array.write_text(json.dumps(MBPP))
    assert read_problems(array) == lines and list(lines) == ["2", "3", "4"]
    samples = [Sample(name, problem.solution, {}) for name, problem in lines.items()]
    samples += [
        Sample("2", "def set(x): return 0\ndef shared(a, b): return ()", {})
    ]  # a `set` that any answer fits
    samples += [Sample("3", "def around(r): return 2 * math.pi * r", {})]  # The tests import math.
    samples += [Sample("3", "def around(r): return 6.2", {})]
    found = score(lines, samples)
    assert [v.kind for v in found.verdicts] == ["passed", "passed", "no data", "failed", "passed", "failed"]
    assert found.solved == {"2": (2, 1), "3": (3, 2)}
    assert found.left_out == {
        "4": "its own solution: no data, the program returned a Pair, which is no plain data"
    }


def test_a_problem_that_its_own_solution_fails_is_left_out_by_name(isolated: None, tmp_path: Path) -> None:
    broken = human_eval(7, "f", "return 1", "assert candidate([]) == 2")
    problems = read_problems(write(tmp_path / "p.jsonl", [*PROBLEMS, broken]))
    samples = [Sample(name, "    return 0\n", {}) for name in problems]
    assert score(problems, samples).left_out == {"HumanEval/7": "its own solution: failed, AssertionError"}


def command(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(REPOSITORY / "functional.py"), "--problems", str(folder / "problems.jsonl")]
    words += ["--samples", str(folder / "samples.jsonl"), *flags]
    values = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=values, check=False)


def test_the_command_writes_what_human_eval_reads(isolated: None, tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", PROBLEMS)
    samples = [
        {"task_id": "HumanEval/0", "completion": "    return sum(values)\n", "seed": 1},
        {"task_id": "HumanEval/1", "completion": "    return 0\n"},
        {"task_id": "HumanEval/0", "completion": "    while True: pass\n"},
        {"task_id": "HumanEval/1", "completion": "    return max(values)\n"},
    ]
    write(tmp_path / "samples.jsonl", samples)
    done = command(tmp_path, "--k", "1,2,10", "--cpu", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("pass@1  50.00% [") and lines[1].startswith("pass@2  100.00% [")
    assert lines[2] == "pass@10  left out: of some problem there are only 2 samples"
    assert lines[3] == "4 samples: 2 passed, 1 failed, 1 timed out"
    assert lines[4].startswith("sandbox: bubblewrap")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl_results.jsonl").read_text().splitlines()]
    assert rows == [
        {**samples[0], "result": "passed", "passed": True},
        {**samples[1], "result": "failed: AssertionError", "passed": False},
        {**samples[2], "result": "timed out", "passed": False},
        {**samples[3], "result": "passed", "passed": True},
    ]
    scores = json.loads((tmp_path / "samples.jsonl_scores.json").read_text())
    assert (scores["pass@1"], scores["pass@2"], scores["problems"], scores["samples"]) == (50.0, 100.0, 2, 4)
    # Two problems that are alike say little of the others.
    assert scores["intervals"]["pass@1"] == pytest.approx(share_interval(1, 2)[1:3])
    assert scores["sandbox"].startswith("bubblewrap") and scores["left_out"] == {}


def test_without_a_sandbox_the_command_refuses_and_a_flag_is_recorded(tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", PROBLEMS[:1])
    write(tmp_path / "samples.jsonl", [{"task_id": "HumanEval/0", "completion": "    return sum(values)\n"}])
    refused = command(tmp_path, PATH="/nonexistent")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == (
        "error: generated code runs in a sandbox only, and bubblewrap is not installed: install it "
        "(apt install bubblewrap)\n"
    )
    assert not (tmp_path / "samples.jsonl_results.jsonl").exists()
    done = command(tmp_path, "--allow", "unsandboxed", PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert f"sandbox: {sandbox.UNSAFE}" in done.stdout
    assert json.loads((tmp_path / "samples.jsonl_scores.json").read_text())["sandbox"] == sandbox.UNSAFE


def test_an_interrupt_ends_the_command_and_its_sandboxes(isolated: None, tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", PROBLEMS[:1])
    asleep = {"task_id": "HumanEval/0", "completion": "    import time\n    time.sleep(600)\n"}
    write(tmp_path / "samples.jsonl", [asleep] * 4)
    code = (
        "import os, signal, threading, time\n"
        "from config import one_sentence\nfrom sandbox import passing, process\n"
        "def soon():\n"
        "    while len(process._live) < 4: time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=soon, daemon=True).start()\n"
        "settings = passing.FunctionalConfig('problems.jsonl', 'samples.jsonl', workers=2, wall=500.0)\n"
        "with one_sentence(): passing.evaluate(settings)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 130 and done.stderr.endswith("interrupted\n"), done.stderr
    assert not (tmp_path / "samples.jsonl_results.jsonl").exists()


GOOD = {"task_id": "HumanEval/0", "completion": "    pass\n"}
BAD_FILES = [
    ([], [GOOD], r"problems\.jsonl has no problems"),
    ([PROBLEMS[0], PROBLEMS[0]], [GOOD], r"problems\.jsonl line 2 has task_id HumanEval/0 again"),
    ([{"task_id": "x", "prompt": ""}], [GOOD], r"line 1 has no field canonical_solution but task_id, prompt"),
    ([{**PROBLEMS[0], "test": 3}], [GOOD], r"line 1 has test of type int; it must be text"),
    ([{**PROBLEMS[0], "entry_point": "f()"}], [GOOD], r"line 1 has entry_point 'f\(\)'"),
    ([{**PROBLEMS[0], "task_id": "\x1b[2J"}], [GOOD], r"line 1 has task_id '\\x1b\[2J'; it must be"),
    ([{**MBPP[0], "test_list": []}], [GOOD], r"line 1 has an empty test_list"),
    (
        [{**MBPP[0], "test_list": [3]}],
        [GOOD],
        r"line 1 has test_list of type list; it must be text or a list",
    ),
    ([PROBLEMS[0]], [], r"samples\.jsonl has samples for 0 of 1 problems and none for HumanEval/0"),
    (PROBLEMS, [GOOD], r"has samples for 1 of 2 problems and none for HumanEval/1"),
    (
        [PROBLEMS[0]],
        [{"task_id": "HumanEval/9", "completion": ""}],
        r"line 1 has task_id HumanEval/9, which is",
    ),
    (
        [PROBLEMS[0]],
        [{"task_id": "HumanEval/0"}],
        r"samples\.jsonl line 1 has no field completion but task_id",
    ),
    ([PROBLEMS[0]], [GOOD, [1]], r"samples\.jsonl line 2 is a JSON list, not an object"),
]


@pytest.mark.parametrize("problems, samples, sentence", BAD_FILES)
def test_a_file_that_is_not_as_it_should_be(
    tmp_path: Path, problems: list, samples: list, sentence: str
) -> None:
    write(tmp_path / "problems.jsonl", problems)
    write(tmp_path / "samples.jsonl", samples)
    with pytest.raises(ValueError, match=sentence):
        read_samples(tmp_path / "samples.jsonl", read_problems(tmp_path / "problems.jsonl"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(PROBLEMS[0]).encode() * 50)[:-20])
    (tmp_path / "text.jsonl").write_text("{} \n{'a': 1}\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    (tmp_path / "one.json").write_text("{}")
    (tmp_path / "list.json").write_text(f" \n[{json.dumps(PROBLEMS[0])}, 3]")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "twice.jsonl").write_text('{"task_id": "a", "task_id": "b"}')
    (tmp_path / "twice.json").write_text('[{"task_id": "a"}, {"task_id": "a", "task_id": "b"}]')
    for name, sentence in {
        "none.jsonl": "none.jsonl cannot be read: No such file",
        "cut.jsonl.gz": "not a whole gzip file",
        "text.jsonl": r"line 1 has no field canonical|line 1 has no field",
        "bytes.jsonl": "cannot be read as text",
        "one.json": "one.json line 1 has no field task_id",
        "list.json": r"list.json row 2 is a JSON int, not an object",
        "deep.jsonl": "deep.jsonl line 1 is not JSON",
        "twice.jsonl": "twice.jsonl line 1 has two readings: the key 'task_id' stands twice in it",
        "twice.json": "twice.json cannot be read as text and JSON: the key 'task_id' stands twice in it",
        "": "cannot be read: Is a directory",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            read_problems(tmp_path / name)


def test_samples_come_from_a_pipe_too(tmp_path: Path) -> None:
    problems = read_problems(write(tmp_path / "problems.jsonl", PROBLEMS))
    rows = [{"task_id": name, "completion": "pass"} for name in problems]
    ears, mouth = os.pipe()
    os.write(mouth, "".join(json.dumps(row) + "\n" for row in rows).encode())
    os.close(mouth)
    assert [one.task_id for one in read_samples(f"/dev/fd/{ears}", problems)] == list(problems)
    os.close(ears)


def test_a_k_above_the_number_of_samples_is_named(isolated: None, tmp_path: Path) -> None:
    problems = write(tmp_path / "problems.jsonl", PROBLEMS[:1])
    row = {"task_id": PROBLEMS[0]["task_id"], "completion": PROBLEMS[0]["canonical_solution"]}
    samples = write(tmp_path / "samples.jsonl", [row, row])
    asked = FunctionalConfig(str(problems), str(samples), k=(5, 10))
    with pytest.raises(
        ValueError, match="--k is 5, and of some problem there are only 2 samples; give --k 2"
    ):
        evaluate(asked)
    said = evaluate(replace(asked, k=(1, 5)))
    assert "pass@1  100.00%" in said
    assert "pass@5  left out: of some problem there are only 2 samples" in said
    assert "left out" not in evaluate(replace(asked, k=FunctionalConfig.k))


def test_a_mistake_in_the_command_line_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", PROBLEMS)
    for flags, sentence in {
        ("--cpu", "0"): "error: --cpu is 0; it must be above 0\n",
        ("--workers", "-1"): "error: --workers is -1; it must be 0, for one a core, or more\n",
    }.items():
        done = command(tmp_path, *flags)
        assert (done.returncode, done.stderr, done.stdout) == (2, sentence, "")
    done = command(tmp_path)
    assert done.returncode == 2 and "samples.jsonl cannot be read: No such file" in done.stderr


@pytest.mark.slow
def test_every_solution_of_human_eval_passes_and_no_stub(isolated: None, tmp_path: Path) -> None:
    """`PLUMB_HUMANEVAL` names the published file; in parallel as in series."""
    path = os.environ.get("PLUMB_HUMANEVAL")
    if not path:
        pytest.skip("PLUMB_HUMANEVAL does not name HumanEval's file")
    problems = read_problems(path)
    whole = [Sample(p.task_id, p.solution.removeprefix(p.before), {}) for p in problems.values()]
    stubs = [Sample(name, "    pass\n", {}) for name in problems]
    for workers in (1, 4):
        kinds = [v.kind for v in score(problems, whole + stubs, workers=workers).verdicts]
        assert kinds == ["passed"] * 164 + ["failed"] * 164
    write(tmp_path / "samples.jsonl", [{"task_id": s.task_id, "completion": s.completion} for s in whole])
    said = evaluate(FunctionalConfig(problems=path, samples=str(tmp_path / "samples.jsonl")))
    assert said.startswith("pass@1  100.00%") and "over 164 problems" in said


def test_a_file_that_no_memory_holds_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(problems, "MOST_CHARACTERS", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 2**24))
    with pytest.raises(ValueError, match=r"bomb\.jsonl\.gz holds more than 1,048,576 characters, the most"):
        list(problems.read_rows(path))

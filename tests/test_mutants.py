"""Mutants: what the operators change, how a run of one is judged, and that a ledger is gone on with."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import mutant_children, mutants
from benchmarks.mutant_bench import Bench, Candidate
from benchmarks.mutant_children import MutatedModule, _Finder, _is_said
from benchmarks.mutant_ledger import Outcome, cut_to_whole_lines, read_ledger, survivors, table
from benchmarks.mutant_operators import OPERATORS, Mutant
from benchmarks.mutant_operators import mutants as mutants_of
from benchmarks.mutant_traces import difference, trace
from config import REPOSITORY
from guards.faults import Fault


def changes(source: str) -> dict[str, set[str]]:
    """Return by operator the lines that its mutants have in the place of others."""
    tree = ast.parse(source)
    found: dict[str, set[str]] = {}
    for mutant in mutants_of(tree):
        found.setdefault(mutant.operator, set()).add(mutant.shown()[1])
    return found


# --- operators --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "source", "expected"),
    [
        ("sign", "def f(a, b):\n    return a - b", {"return a + b"}),
        ("sign", "def f(a):\n    a += 1", {"a -= 1"}),
        ("constant", "x = 0.5", {"x = 1.0"}),
        ("constant", "x = [1, True]", {"x = [2, True]", "x = [1, False]"}),
        ("comparison", "x = a < b <= c", {"x = a <= b <= c", "x = a < b < c"}),
        ("index", "x = a[1:n]", {"x = a[2:n]", "x = a[1:n - 1]"}),
        ("index", "x = a[:, -1]", {"x = a[:, -2]"}),
        ("arguments", "f(a, b, c=2)", {"f(b, a, c=2)"}),
        ("keyword", "f(a, b=1, c=2)", {"f(a, c=2)", "f(a, b=1)"}),
        ("statement", "def f(a):\n    a.zero_()\n    a.x = 1\n    a = 2\n    b = 3", {"pass"}),
        ("axis", "x = a.sum(-1)", {"x = a.sum(-2)"}),
        ("axis", "x = torch.cat(a, dim=0)", {"x = torch.cat(a, dim=1)"}),
        ("default", "def f(a, b=2, c=True):\n    return a", {"a, b=3, c=True", "a, b=2, c=False"}),
        ("logic", "if a and not b:\n    f()", {"a or not b", "a and b"}),
        ("logic", "x = 1 if a else 2", {"x = 1 if not a else 2"}),
        ("returned", "def f(a) -> tuple[int, int]:\n    return a, 1", {"return (1, a)"}),
        ("returned", "def f(a) -> bool:\n    return a.b", {"return not a.b"}),
    ],
)
def test_an_operator_makes_these_changes(operator: str, source: str, expected: set[str]):
    assert changes(source)[operator] == expected


def test_every_operator_has_an_example_above():
    marks = test_an_operator_makes_these_changes.pytestmark  # pyright: ignore[reportFunctionMemberAccess]
    assert {row[0] for row in marks[0].args[1]} == OPERATORS.keys()


def test_what_decides_no_number_is_left_alone():
    source = '''
"""A docstring of 1 line."""
from a import b
def f(a: tuple[int, 3], b: Literal[1]) -> Literal[2]:
    """Another, of 2."""
    assert a == 1
    print(f"{a + 1}", 2)
    say(1 + 1)
    raise ValueError(f"{a - 1} of {3}")
def refuse_long(a):
    if a > 3:
        raise ValueError(a)
'''
    assert changes(source) == {}


@pytest.mark.parametrize("file", ["architecture.py", "training/optim.py", "tokenization/merges.py"])
def test_mutants_of_the_product_compile_to_other_code_and_the_tree_is_as_it_was(file: str):
    tree = ast.parse((REPOSITORY / file).read_text("utf-8"))
    before = ast.dump(tree)
    own = compile(tree, file, "exec")
    found = list(mutants_of(tree))[::7]
    assert len(found) > 10
    assert all(mutant.compiled(tree, file) != own for mutant in found)
    assert all(old != new for old, new in (mutant.shown() for mutant in found))
    assert ast.dump(tree) == before


def test_a_default_is_reached_by_the_body_of_its_function():
    ((_, mutant),) = mutants_named("def f(\n    a=1,\n):\n    b = a\n    g(b)\n", "default")
    assert mutant.line == 2 and mutant.lines == range(4, 6) and not mutant.is_of_module


def mutants_named(source: str, operator: str) -> Iterator[tuple[ast.Module, Mutant]]:
    tree = ast.parse(source)
    return ((tree, mutant) for mutant in mutants_of(tree) if mutant.operator == operator)


def test_a_mutated_module_is_imported_in_the_place_of_its_file(tmp_path: Path, monkeypatch: Any):
    file = tmp_path / "mutated_for_a_test.py"
    file.write_text("def f(a):\n    return a - 1\n", "utf-8")
    ((tree, mutant),) = mutants_named(file.read_text("utf-8"), "sign")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = MutatedModule(file.stem, mutant.compiled(tree, str(file)))
    monkeypatch.setattr(sys, "meta_path", [_Finder(module), *sys.meta_path])
    import mutated_for_a_test  # pyright: ignore[reportMissingImports]

    assert mutated_for_a_test.f(1) == 2 and mutated_for_a_test.__file__ == str(file)
    monkeypatch.delitem(sys.modules, file.stem)


# --- what a run leaves ------------------------------------------------------------------------------


def left(folder: Path, weight: float = 1.0, loss: float = 2.0, said: str = "step 3: loss 2.0") -> Any:
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    weights = torch.linspace(0, 1, 9) * weight
    save_file({"w": weights}, folder / "run" / "checkpoints" / "model.safetensors")
    np.save(folder / "offsets.npy", np.arange(5, dtype=np.uint64))
    line = json.dumps({"step": 3, "eval/loss": loss, "train/tokens_per_second": id(folder)})
    (folder / "run" / "metrics.jsonl").write_text(line + "\n", "utf-8")
    return trace(folder, f"preflight, start: passed ({weight} s)\n{said}\n")


def test_runs_that_leave_the_same_do_not_differ_and_times_do_not_count(tmp_path: Path):
    one, other = left(tmp_path / "a"), left(tmp_path / "b", said="step 3: loss 2.0")
    assert {name for name in one if "loss" in name} == {"run/metrics.jsonl/0/eval/loss"}
    assert difference(one, other) is None


@pytest.mark.parametrize(
    ("changed", "what", "is_rounding"),
    [
        ({"weight": 1 + 1e-5}, "run/checkpoints/model.safetensors/w", True),
        ({"weight": 1.1}, "run/checkpoints/model.safetensors/w", False),
        ({"loss": 2 + 1e-6}, "run/metrics.jsonl/0/eval/loss", True),
        ({"loss": 2.1}, "run/metrics.jsonl/0/eval/loss", False),
        ({"loss": float("nan")}, "run/metrics.jsonl/0/eval/loss", False),
        ({"said": "step 4: loss 2.0"}, "printed/0", False),
        ({"said": "step 3: loss 2.00001"}, "printed/0", True),
        ({"weight": 1 + 1e-5, "loss": 2.1}, "run/metrics.jsonl/0/eval/loss", False),
        ({"said": "step 3: loss 2.0\nwarning"}, "printed/1", False),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, changed: dict, what: str, is_rounding: bool):
    found = difference(left(tmp_path / "b", **changed), left(tmp_path / "a"))
    assert found is not None and found.what.startswith(what) and found.is_rounding == is_rounding


def test_a_whole_number_is_never_off_by_rounding(tmp_path: Path):
    expected = left(tmp_path)
    found = expected | {"offsets.npy": expected["offsets.npy"] + (torch.arange(5) == 4)}
    assert difference(found, expected) == ("offsets.npy: 20% of it, by up to 2.5e-01 of the largest", False)


# --- how a mutant is judged -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "outcome", "by"),
    [
        ([["same"], ["same"], ["same"]], "equal", ""),
        ([["same"], ["rounding"], ["same"]], "rounding", ""),
        ([["same"], ["differs", "differs"]], "silent", ""),
        (
            [["same"], ["differs", "same"]],
            "silent",
            "",
        ),  # It differs from time to time, and nothing was said.
        ([["differs", "named"]], "named", "clip-ignored"),
        ([["differs", "crash"]], "crash", "a guard: clip-ignored"),
        ([["crash"]], "crash", "clip-ignored"),  # It is loud whatever guards do.
        ([["refused"]], "crash", "clip-ignored"),
    ],
)
def test_the_run_that_is_not_as_it_was_decides(monkeypatch: Any, ends: list, outcome: str, by: str):
    """Each run is without guards first, and where it differs with them."""
    flat = [{"ended": end, "by": "clip-ignored", "seconds": 1.0} for run in ends for end in run]
    results, guarded = iter(flat), []
    monkeypatch.setattr(mutant_children, "result_of", lambda child: next(results))
    monkeypatch.setattr(
        Bench, "start", lambda self, one, run, with_guards, number: guarded.append(with_guards)
    )
    bench = Bench.__new__(Bench)
    bench.code = "code"
    ((tree, mutant),) = mutants_named("def f(a):\n    return a - 1\n", "sign")
    candidate = Candidate("model", "f.py", tree, mutant, ["plain", "packed", "lora"])
    found = [one for one in bench.judged(candidate, 0, 0) if one is not None]
    assert [(one.outcome, one.by, len(one.tried)) for one in found] == [(outcome, by, len(ends))]
    assert found[0].seconds == len(flat) and next(results, None) is None
    assert guarded == [bool(number) for run in ends for number in range(len(run))]


def test_a_refusal_in_a_sentence_is_told_from_a_crash():
    with pytest.raises(Fault) as refused:
        from guards.faults import refuse_unknown_faults

        refuse_unknown_faults([])
        raise Fault("clip-ignored", "a", "b")
    assert _is_said(refused.value)
    with pytest.raises(ValueError) as crash:
        json.loads("{")
    assert not _is_said(crash.value)


OUTCOME = Outcome(
    seed=0,
    room="model",
    file="architecture.py",
    line=3,
    operator="sign",
    before="a - b",
    after="a + b",
    run="plain",
    tried=["plain"],
    outcome="silent",
    by="",
    difference="run/metrics.jsonl/0/loss: 1 -> 2",
    seconds=1.0,
    code="code",
)


def test_a_ledger_is_gone_on_with_where_it_stopped(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(mutants, "ROOMS", {"model": ("architecture.py",)})
    files = {"architecture.py": list(range(1, 1000))}

    def drawn(seed: int) -> dict[str, list[Candidate]]:
        return {"model": mutants.candidates("model", seed, {"plain": files, "packed": files})}

    first, known = drawn(0)["model"], []
    for candidate in first[:5]:
        file, line, operator, before, after = candidate.key
        own = {"file": file, "line": int(line), "operator": operator, "before": before, "after": after}
        known.append(replace(OUTCOME, **own))
    again = mutants.Pass(drawn(0), 40, known)
    assert [one.key for one in again.waiting["model"]] == [one.key for one in first[5:]]
    assert again.changed["model"] == 5 and mutants.Pass(drawn(0), 5, known).next() is None
    assert [one.key for one in drawn(1)["model"]] != [one.key for one in first]

    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in known) + '{"seed"', "utf-8")
    assert read_ledger(path) == known
    cut_to_whole_lines(path)
    assert path.read_text("utf-8").endswith("}\n") and read_ledger(path) == known


def test_the_table_has_each_rooms_score_and_survivors_their_change():
    named = replace(OUTCOME, outcome="named", by="clip-ignored", difference="")
    equal = replace(OUTCOME, outcome="equal", room="data")
    said = table([OUTCOME, named, named, named, equal]).splitlines()
    assert "| model | 4 | 3 | 1 | 0 | 0 | 0 | 75% [30, 95] |" in said
    assert "| data | 1 | 0 | 0 | 0 | 0 | 1 | - |" in said and "named by: clip-ignored 3" in said
    assert survivors([OUTCOME, named, equal]).splitlines() == [
        "architecture.py:3 (sign, run plain)",
        "  - a - b",
        "  + a + b",
        "  run/metrics.jsonl/0/loss: 1 -> 2",
    ]


END_TO_END = """
import ast, dataclasses, json, pathlib, sys

sys.path.insert(0, {root!r})
from benchmarks import mutants
from benchmarks.mutant_bench import Bench, Candidate

bench = Bench(pathlib.Path({folder!r}))
for file, operator, before in {chosen!r}:
    tree = ast.parse((mutants.REPOSITORY / file).read_text("utf-8"))
    found = (one for one in mutants.mutants(tree) if before in one.shown()[0] and one.operator == operator)
    candidate = Candidate("model", file, tree, next(found), ["packed"])
    *_, outcome = bench.judged(candidate, 0, 0)
    print(json.dumps(dataclasses.asdict(outcome)))
"""


@pytest.mark.slow
def test_mutants_of_the_product_are_named_crash_are_silent_or_change_nothing(tmp_path: Path):
    """The bench runs in a process of its own: threads of this one would stop its children."""
    chosen = [
        ("training/loop.py", "statement", "optimizer.zero_grad"),
        ("architecture.py", "sign", "x = x + self.dropout"),  # The same in training, scores and generation.
        ("training/loop.py", "statement", "release_freed_memory()"),
    ]
    code = END_TO_END.format(root=str(REPOSITORY), folder=str(tmp_path / "bench"), chosen=chosen)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["outcome"], one["by"]) for one in found] == [
        ("named", "gradient-not-cleared"),
        ("silent", ""),
        ("equal", ""),
    ]
    assert all(0 < one["seconds"] < 60 for one in found)

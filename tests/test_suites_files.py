"""Suites with a file of their own, and published models: from file and folder to eval.json."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import command
from test_eval import BYTES, prepared, run_of, source
from test_functional import MBPP, PROBLEMS, human_eval, write
from test_generate_command import STARCODER

from architecture import Decoder
from config import LoraConfig, ModelConfig, one_sentence
from data.fim import fim_prompt_ids
from dataset import PreparedData
from generation.settings import GenerationConfig
from generation.text import generate
from lora import add_adapter
from pretrained import load_pretrained, save_pretrained
from pretrained.save_adapter import save_adapter
from sandbox.passing import FunctionalConfig, evaluate
from sandbox.problems import read_problems, read_samples
from suites import evaluate as evaluation
from suites.baselines import nearest_place, places_of
from suites.codexglue import through_line, through_method
from suites.functions import body_spans
from suites.gaps import line_spans, piece_spans
from suites.hidden import Judge
from suites.programs import MBPP_TEST
from suites.rescoring import differences, rescore
from suites.scoring import SUITES, Example, suites_of
from suites.settings import EvalConfig, mistake, parse_settings
from suites.task import Given, Task
from suites.tasks import OF_FILES, TASKS, suite_names

LINES = [{"input": f"<s> import os <EOL> x{i} = os . <EOL>", "gt": f"y{i} = <NUM_LIT:{i}>"} for i in range(6)]
METHODS = [
    {
        "signature": f"def f{i}(self, v=<NUM_LIT:{i}>):",
        "docstring": f"Gives {i}.",
        "body": f"if v:<EOL><INDENT>return <STR_LIT:a{i}><EOL><DEDENT>return v + {i}",
        "id": f"f{i}:m0",
    }
    for i in range(6)
]
SOLVED = [*PROBLEMS, human_eval(2, "least", "return min(values)", "assert candidate([4, 2]) == 2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A published model with fill-in-the-middle tokens, drawn here."""
    shape = ModelConfig(
        STARCODER.vocab_size,
        block_size=192,
        position="rotary",
        n_layer=1,
        n_head=2,
        n_kv_head=2,
        n_embd=32,
        mlp="swiglu",
        qk_norm=False,
        norm="rms",
        norm_weight=True,
        norm_bias=False,
    )
    model = Decoder(shape)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=draw)
    path = tmp_path_factory.mktemp("published") / "tiny"
    save_pretrained(model.eval(), STARCODER, path)
    return path


def given(file: Path, **more: Any) -> Given:
    return replace(Given(STARCODER, 192, None, 0, 0, None, str(file)), **more)


def task(name: str, file: Path, **more: Any) -> Task:
    return TASKS[name](given(file, **more))


def settings(folder: Path, tmp_path: Path, suite: str, **more: Any) -> EvalConfig:
    own: dict[str, Any] = {"cache": str(tmp_path / "cache"), "out": str(tmp_path / "out")}
    return EvalConfig(model=str(folder), suite=suite, max_new_tokens=6, precision="fp32", **own | more)


# --- names ---------------------------------------------------------------------------------------------


def test_suites_are_named_between_commas_and_fim_is_three():
    assert suite_names("") == ()
    assert suite_names(" next_token, fim ,mbpp") == (
        "next_token",
        "fim_line",
        "fim_lines",
        "fim_span",
        "mbpp",
    )
    with pytest.raises(ValueError, match="did you mean humaneval"):
        suite_names("humanevall")
    with pytest.raises(ValueError, match="fim_line is named twice"):
        suite_names("fim_line,fim")
    assert set(SUITES) > OF_FILES


# --- examples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["test.jsonl", "test.json"])  # the published one ends in .json
def test_a_line_of_codexglue_is_asked_as_it_stands_and_ends_at_its_marker(tmp_path: Path, file: str):
    asked = task("codexglue_line", write(tmp_path / file, LINES))
    assert [e.prompt for e in asked.examples] == [row["input"] for row in LINES]
    assert [e.reference for e in asked.examples] == [row["gt"] for row in LINES]
    assert asked.baselines(asked.examples) == {
        "copy": [f" x{i} = os . " for i in range(6)],
        "empty": [""] * 6,
    }
    assert asked.cut is through_line
    for text, kept in (
        (" x = 1 <EOL> y", " x = 1 "),
        ("<EOL> \n a\nb", "<EOL> \n a"),
        ("\n", "\n"),
        ("a", "a"),
    ):
        assert through_line(asked.examples[0], text) == kept


def test_a_method_of_codexglue_is_asked_in_python_and_scored_on_one_line(tmp_path: Path):
    asked = task("codexglue_method", write(tmp_path / "test.jsonl", METHODS))
    assert asked.examples[3].prompt == 'def f3(self, v=3):\n    """Gives 3."""\n'
    assert asked.examples[3].name == "f3:m0"
    body = "    if v:\n        return a3\n    return v + 3\n"
    assert through_method(asked.examples[3], f"{body}\ndef g():\n    pass") == body
    assert through_method(asked.examples[3], "x = 1\ny = 2") == "x = 1\ny = 2"
    clean = asked.suite.clean
    assert clean(body) == clean(METHODS[3]["body"]) == "if v: return a3 return v + 3"


def test_programs_are_asked_as_their_files_publish_them(tmp_path: Path):
    whole = task("humaneval", write(tmp_path / "h.jsonl", SOLVED))
    assert [e.prompt for e in whole.examples] == [row["prompt"] for row in SOLVED]
    assert whole.baselines(whole.examples) == {"stub": ["    pass\n"] * 3}
    assert "\ndef" in whole.stop
    gap = {**SOLVED[0], "task_id": "SingleLineInfilling/0/L0", "suffix": "    # end\n"}
    filled = task("humaneval_infilling", write(tmp_path / "i.jsonl", [gap]))
    assert (filled.examples[0].suffix, filled.stop) == ("    # end\n", ())
    assert whole.examples[0].suffix is None
    tasks = task("mbpp", write(tmp_path / "m.jsonl", MBPP))
    assert tasks.examples[1].prompt == (
        '"""\nWrite a function to find the circumference.\n'
        'assert math.isclose(around(1), 6.28318, rel_tol=0.001)\n"""\n'
    )
    assert tasks.baselines(tasks.examples)["stub"][2] == "def chain(*_, **__):\n    pass\n"


def test_of_all_of_mbpp_the_test_side_is_taken_and_samples_are_drawn_in_order(tmp_path: Path):
    rows = [{**MBPP[0], "task_id": i} for i in range(1, 975)]
    file = write(tmp_path / "mbpp.jsonl", rows)
    assert [e.name for e in task("mbpp", file).examples] == [str(i) for i in MBPP_TEST]
    some = [e.name for e in task("mbpp", file, n=20).examples]
    assert len(some) == 20 and some == sorted(some, key=int)
    assert set(map(int, some)) <= set(MBPP_TEST)
    assert some != [e.name for e in task("mbpp", file, n=20, seed=1).examples]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("codexglue_line", [{"input": "x"}], "line 1 has no field gt but input"),
        ("codexglue_line", [*LINES, {"input": "x", "gt": 3}], "line 7 has gt of type int"),
        ("codexglue_method", [{"signature": "def f():", "body": ""}], "line 1 has no field docstring"),
        ("humaneval", [], "has no rows"),
        (
            "humaneval",
            [{**SOLVED[0], "suffix": ""}],
            "is a problem of humaneval_infilling",
        ),
        ("humaneval", [SOLVED[0], SOLVED[0]], "line 2 has task_id HumanEval/0 again"),
        ("mbpp", [{"task_id": 1, "code": "", "test_list": ["assert 1"]}], "line 1 has no field prompt"),
        ("mbpp", SOLVED[:1], "is a problem of humaneval, and the suite is mbpp"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_one_sentence(tmp_path: Path, name, rows, said):
    with pytest.raises(ValueError, match=said) as error:
        task(name, write(tmp_path / "rows.jsonl", rows))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "humaneval"], "give one of --run"),
        (["--model", "x", "--checkpoint", "y"], "give one of --run"),
        (["--checkpoint", "x", "--adapter", "y"], "--adapter belongs to a published model"),
        (["--model", "x", "--samples_per_example", "3"], "without sampling all of them would be equal"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_settings(words)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_stop_strings_are_taken_as_they_are():
    found = parse_settings(["--model", "x", "--stop", "\n\n", "--stop=```", "--stop", "- a: b"])
    assert found.stop == ("\n\n", "```", "- a: b")
    assert parse_settings(["--model", "x"]).stop is None
    assert mistake(found) is None


# --- a published model ---------------------------------------------------------------------------------


def test_the_command_scores_a_published_model_by_a_file(folder: Path, tmp_path: Path):
    file = write(tmp_path / "lines.jsonl", LINES)
    words = ["--model", str(folder), "--suite", "codexglue_line", "--suite_file", file, "--max_new_tokens", 5]
    done = command("eval.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "evals" / "tiny" / "eval-codexglue_line.json").read_text("utf-8"))
    assert "CodeXGLUE line completion: 6 lines, with 95% intervals" in done.stdout
    assert list(result["suite"]["scores"]) == ["model", "copy", "empty"]
    assert "\nbeside these: no n-gram model and no nearest training example: no training text" in done.stdout
    assert list(result["suite"]["signatures"]) == ["exact_match_words", "edit_similarity_rounded"]
    assert result["fingerprints"]["weights"] == load_pretrained(str(folder)).fingerprint
    assert (result["settings"]["seed"], result["suite"]["sampling"]) == (0, None)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))  # nothing was interrupted
    assert rescore(tmp_path / "evals" / "tiny" / "eval-codexglue_line.json") == 0


@pytest.mark.parametrize("held", ["int8", "int4", "nf4"])
def test_a_published_model_is_scored_with_its_matrices_in_fewer_bits(held: Any, folder: Path, tmp_path: Path):
    file = str(write(tmp_path / "lines.jsonl", LINES))
    asked = replace(settings(folder, tmp_path, "codexglue_line", suite_file=file), out=None, held=held)
    result = evaluation.evaluate(asked)
    assert result["precision"] == f"fp32, as asked; matrices in {held}"
    assert result["run"] == f"evals/{folder.name}-{held}"
    assert result["fingerprints"]["weights"] != load_pretrained(str(folder)).fingerprint
    assert mistake(replace(asked, adapter="a")) is not None
    assert mistake(EvalConfig(rescore="x", held=held)) is not None


def test_an_adapter_is_scored_beside_its_base(folder: Path, tmp_path: Path):
    base = load_pretrained(str(folder))
    add_adapter(base.model, LoraConfig(r=2, targets=("attention",)), base.family.key)
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=1.0, generator=torch.Generator().manual_seed(1))
    save_adapter(base.model, base.family, tmp_path / "adapter", str(folder), None)
    file = write(tmp_path / "methods.jsonl", METHODS)
    asked = settings(
        folder, tmp_path, "codexglue_method", suite_file=str(file), adapter=str(tmp_path / "adapter")
    )
    plain = evaluation.evaluate(replace(asked, adapter=None))["suite"]
    found = evaluation.evaluate(replace(asked, metrics="bleu_codexglue,semantic"))["suite"]
    assert list(found["scores"]) == ["model", "base", "copy", "empty"]

    def texts(record: dict[str, Any], system: str) -> list[str]:
        return [sample["predictions"][system] for sample in record["samples"]]

    assert texts(found, "base") == texts(plain, "model") != texts(found, "model")
    assert found["verdicts"]["bleu_codexglue"]["differences"]["base"]["n"] == 6
    # The judge of both is the base: with its adapters a model would judge itself.
    judge = Judge(load_pretrained(str(folder)).model, STARCODER, "")
    clean = SUITES["codexglue_method"].clean
    for system in ("model", "base", "copy"):
        for (measured,), sample in zip(found["measured"]["semantic"][system], found["samples"], strict=True):
            pair = clean(sample["predictions"][system]), clean(sample["reference"])
            assert measured == pytest.approx(judge.similarity(*pair), abs=1e-3)
    assert "hidden states of its base, weights" in found["signatures"]["semantic"]
    assert list(differences(json.loads(json.dumps(found)))) == []


def test_mistakes_about_a_published_model_are_one_sentence(folder: Path, tmp_path: Path, capsys):
    file = str(write(tmp_path / "lines.jsonl", LINES))
    for changed, said in (
        ({"suite": "next_line", "suite_file": None}, "has no held-out files for next_line"),
        ({"suite": "", "suite_file": None}, "name a suite with a file of its own"),
        ({"suite": "humaneval,mbpp"}, "have a file each"),
        ({"suite": "codexglue_line", "suite_file": None}, "name it with --suite_file"),
        ({"suite": "codexglue_line", "metrics": "chfr"}, "did you mean chrf"),
        ({"suite": "codexglue_line", "top_p": 0.9}, "temperature 0 samples nothing"),
        ({"suite": "codexglue_line", "model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"suite": "next_token", "suite_file": file}, "--suite_file is of a suite with a file of its own"),
        (
            {"suite": "codexglue_line", "suite_file": str(tmp_path / "no.jsonl")},
            "cannot be read: No such file",
        ),
    ):
        asked = replace(settings(folder, tmp_path, "codexglue_line", suite_file=file), **changed)
        with pytest.raises(SystemExit) as exit, one_sentence():
            evaluation.write_evaluation(asked)
        assert exit.value.code == 2
        captured = capsys.readouterr()
        assert said in captured.err and len(captured.err.splitlines()) == 1, captured.err
        assert captured.out == ""


ROWS = [
    {
        "prompt": f"class C{i}:\n    x = {i}\n",
        "completion": f"Holds {i} and nothing else.",
        "prompts": {"simple": f"class C{i}:\n    x = {i}\n", "verbose": f"Summarise:\nclass C{i}: x = {i}\n"},
    }
    for i in range(8)
]


def test_a_published_model_is_asked_rows_of_ones_own_in_each_wording(folder: Path, tmp_path: Path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    asked = settings(folder, tmp_path, "examples", suite_file=str(file), samples=5, prompts="verbose,simple")
    result = evaluation.evaluate(replace(asked, metrics="chrf,rougeL"))
    record = result["suite"]
    numbers = [sample["where"] for sample in record["samples"]]
    assert len(numbers) == 5
    assert [s["prompt"] for s in record["samples"]] == [ROWS[i]["prompt"] for i in numbers]
    assert [s["reference"] for s in record["samples"]] == [ROWS[i]["completion"] for i in numbers]
    assert list(record["scores"]) == ["model", "copy", "empty"]
    assert record["samples"][0]["predictions"]["copy"].startswith("class C")
    model = load_pretrained(str(folder)).model
    said = generate(
        model, STARCODER, [s["prompt"] for s in record["samples"]], GenerationConfig(max_new_tokens=6)
    )
    assert [s["predictions"]["model"] for s in record["samples"]] == [one.text for one in said]
    verbose, simple = result["prompts"]["verbose"], result["prompts"]["simple"]
    assert [s["prompt"] for s in verbose["samples"]] == [ROWS[i]["prompts"]["verbose"] for i in numbers]
    assert simple["samples"] == record["samples"]
    assert "completions: 5 examples of a file, with 95% intervals" in evaluation.table(result)
    # A gap is asked with its markers, and has no input to copy.
    gaps = [
        {"prefix": f"def f{i}(x):\n", "middle": f"    x += {i}\n", "suffix": "    return x\n"} for i in (1, 2)
    ]
    made = task("examples", write(tmp_path / "gaps.jsonl", gaps))
    assert [(e.prompt, e.reference, e.suffix) for e in made.examples] == [
        (row["prefix"], row["middle"], row["suffix"]) for row in gaps
    ]
    assert list(made.baselines(made.examples)) == ["empty"]


def test_rows_of_ones_own_that_cannot_be_asked_are_one_sentence(folder: Path, tmp_path: Path):
    rows = str(write(tmp_path / "rows.jsonl", ROWS))
    text = str(write(tmp_path / "text.jsonl", [{"text": "x = 1\n"}]))
    lacking = str(write(tmp_path / "lacking.jsonl", [{"prompt": "x", "path": "y"}]))
    for changed, said in (
        ({"suite_file": None}, "name it with --suite_file"),
        ({"suite_file": text}, "holds plain text, and the suite examples is of prompts and completions"),
        ({"suite_file": lacking}, r"has no field completion but path, prompt: [^-]*$"),  # no flag of training
        ({"suite_file": str(tmp_path)}, "is no .jsonl, .jsonl.gz or .parquet file"),
        ({"samples": 0}, "--samples is 0, which leaves the scores of texts out, and examples has no others"),
        ({"prompts": "terse"}, "has no prompt called 'terse'"),
        ({"suite": "examples,humaneval"}, "have a file each"),
    ):
        asked = replace(settings(folder, tmp_path, "examples", suite_file=rows), **changed)
        with pytest.raises(ValueError, match=said):
            evaluation.evaluate(asked)
    other = settings(folder, tmp_path, "codexglue_line", suite_file=str(write(tmp_path / "l.jsonl", LINES)))
    with pytest.raises(ValueError, match="here is no run whose examples they were"):
        evaluation.evaluate(replace(other, prompts="simple"))
    assert "--prompts ask a model again" in (
        mistake(replace(other, prompts="simple", predictions=rows)) or ""
    )


def test_one_example_is_left_out_and_said(folder: Path, tmp_path: Path):
    file = write(tmp_path / "lines.jsonl", LINES[:1])
    result = evaluation.evaluate(settings(folder, tmp_path, "codexglue_line", suite_file=str(file)))
    assert "suite" not in result
    assert "its file has 1 lines, and an interval needs at least 2" in evaluation.table(result)


# --- programs ------------------------------------------------------------------------------------------


def test_published_solutions_all_pass_and_a_stub_does_not(isolated: None, tmp_path: Path):
    """Predictions made elsewhere need no model."""
    file = write(tmp_path / "HumanEval.jsonl.gz", SOLVED)
    made = [{"task_id": p["task_id"], "completion": p["canonical_solution"]} for p in SOLVED]
    theirs = write(tmp_path / "theirs.jsonl", made)
    asked = EvalConfig(suite="humaneval", suite_file=str(file), predictions=str(theirs), precision="fp32")
    result = evaluation.evaluate(asked)
    record = result["suite"]
    assert record["scores"]["given"]["pass@1"]["mean"] == 100
    assert record["scores"]["stub"]["pass@1"]["mean"] == 0
    assert record["left_out"] == {} and "bubblewrap" in record["signatures"]["pass@1"]
    path = evaluation.write_results(result, asked)
    assert path == Path(f"{theirs}.eval.json")
    assert rescore(path) == 0
    # A result that was edited does not have the score beside it.
    saved = json.loads(path.read_text("utf-8"))
    saved["suite"]["samples"][0]["results"]["given"] = ["failed: planted"]
    path.write_text(json.dumps(saved), "utf-8")
    assert rescore(path) == 1
    # Another order would score each program by another's tests.
    write(theirs, made[::-1])
    with pytest.raises(ValueError, match="is for task_id 'HumanEval/2', and that example is 'HumanEval/0'"):
        evaluation.evaluate(asked)


def test_a_sandbox_is_asked_for_once_run_and_problems_are_there_and_before_a_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("load_run", "open_published"):
        monkeypatch.setattr(evaluation, name, lambda *_: pytest.fail("a model was opened"))
    file = str(write(tmp_path / "HumanEval.jsonl", SOLVED))
    broken = str(write(tmp_path / "broken.jsonl", [{"task_id": "HumanEval/0"}]))
    cases: dict[str, dict[str, Any]] = {
        "takes its examples from a file; name it with --suite_file": {"model": "m"},
        "none.jsonl cannot be read": {"model": "m", "suite_file": "none.jsonl"},
        "has no field prompt": {"model": "m", "suite_file": broken},
        "holds no run": {"checkpoint": str(tmp_path), "suite_file": file},
        "bubblewrap is not installed": {"model": "m", "suite_file": file},
    }
    for sentence, fields in cases.items():
        with pytest.raises(ValueError, match=sentence):
            evaluation.evaluate(EvalConfig(suite="humaneval", precision="fp32", **fields))


def test_prompts_that_a_row_has_no_room_for_are_told(isolated: None, folder, tmp_path: Path):
    long = PROBLEMS[0] | {
        "task_id": "HumanEval/9",
        "prompt": "# " + "x " * 400 + "\n" + PROBLEMS[0]["prompt"],
    }
    file = write(
        tmp_path / "HumanEval.jsonl", [PROBLEMS[0], PROBLEMS[1], long, long | {"task_id": "HumanEval/8"}]
    )
    result = evaluation.evaluate(settings(folder, tmp_path, "humaneval", suite_file=str(file)))
    assert result["suite"]["trimmed"] == {"model": 0.5}
    assert re.search(r"\nprompts cut to fit +50.0%\nwarning: 50.0% of the prompts", evaluation.table(result))
    result["suite"]["trimmed"] = {"model": 0.24}
    assert "warning: " not in evaluation.table(result)
    few = write(tmp_path / "few.jsonl", PROBLEMS[:2])
    result = evaluation.evaluate(settings(folder, tmp_path, "humaneval", suite_file=str(few)))
    assert result["suite"]["trimmed"] == {"model": 0}
    assert "prompts cut to fit" not in evaluation.table(result)


def test_samples_are_written_as_human_eval_and_the_harness_read_them(isolated: None, folder, tmp_path: Path):
    file = write(tmp_path / "HumanEval.jsonl", SOLVED)
    asked = settings(
        folder, tmp_path, "humaneval", suite_file=str(file), temperature=1.0, samples_per_example=2
    )
    result = evaluation.evaluate(asked)
    # Half of the draws of two problems are what solves them.
    for sample, problem in zip(result["suite"]["samples"], SOLVED[:2], strict=False):
        sample["more"]["model"] = [problem["canonical_solution"]]
        sample["results"]["model"] = [sample["results"]["model"][0], "passed"]
    assert all("passed" not in sample["results"]["model"][0] for sample in result["suite"]["samples"])
    path = evaluation.write_results(result, asked)
    samples = path.parent / "samples-humaneval-model.jsonl"
    problems = read_problems(file)
    read = read_samples(samples, problems)
    assert [s.task_id for s in read] == [f"HumanEval/{i}" for i in (0, 0, 1, 1, 2, 2)]
    rows = [json.loads(line) for line in Path(f"{samples}_results.jsonl").read_text("utf-8").splitlines()]
    assert [row["passed"] for row in rows] == [False, True, False, True, False, False]
    assert set(rows[0]) == {"task_id", "completion", "result", "passed"}
    # Judged again by the command of its own, from that file alone.
    said = evaluate(FunctionalConfig(str(file), str(samples)))
    assert "pass@1  33.33%" in said
    programs = json.loads((path.parent / "generations-humaneval-model.json").read_text("utf-8"))
    assert [len(one) for one in programs] == [2, 2, 2]
    for program, problem, passes in zip(programs, SOLVED, (True, True, False), strict=True):
        assert all(text.startswith(problem["prompt"]) for text in program)
        if passes:  # The harness runs the program, then its test.
            exec(f"{program[1]}\n{problem['test']}\ncheck({problem['entry_point']})", {})


def test_samples_of_a_part_are_judged_again_by_the_problems_beside_them(
    isolated: None, folder, tmp_path: Path
):
    file = write(tmp_path / "HumanEval.jsonl", SOLVED)
    asked = settings(folder, tmp_path, "humaneval", suite_file=str(file), samples=2)
    result = evaluation.evaluate(asked)
    assert "\nsandbox: bubblewrap" in evaluation.table(result)
    path = evaluation.write_results(result, asked)
    samples, problems = (
        path.parent / "samples-humaneval-model.jsonl",
        path.parent / "problems-humaneval.jsonl",
    )
    with pytest.raises(ValueError, match="has samples for 2 of 3 problems"):
        evaluate(FunctionalConfig(str(file), str(samples)))
    whole = {row["task_id"]: row for row in SOLVED}
    held = [json.loads(line) for line in problems.read_text("utf-8").splitlines()]
    assert held == [whole[sample["name"]] for sample in result["suite"]["samples"]]
    said = evaluate(FunctionalConfig(str(problems), str(samples)))
    # Of the whole, later, there is no part beside it.
    whole_of = replace(asked, samples=None)
    evaluation.write_results(evaluation.evaluate(whole_of), whole_of)
    assert not problems.exists()
    evaluation.write_results(result, asked)
    assert f"pass@1  {result['suite']['scores']['model']['pass@1']['mean']:.2f}%" in said
    assert "over 2 problems" in said


def test_mbpp_samples_keep_their_numbers_and_judge_whole_programs(isolated: None, folder, tmp_path: Path):
    file = write(tmp_path / "mbpp.jsonl", MBPP)
    asked = settings(folder, tmp_path, "mbpp", suite_file=str(file))
    result = evaluation.evaluate(asked)
    assert result["suite"]["scores"]["model"]["pass@1"]["mean"] == 0
    evaluation.write_results(result, asked)
    lines = (tmp_path / "out" / "samples-mbpp-model.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["task_id"] for line in lines] == [2, 3, 4]


def test_a_cut_of_the_reference_is_all_of_it():
    for name, text in (("codexglue_line", "x = 1"), ("codexglue_method", "    a\n\n    b")):
        cut = through_line if name.endswith("line") else through_method
        assert cut(Example("", 0, "", text), text) == text


# --- gaps in held-out files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> PreparedData:
    """Forty plain files, by a tokenizer that has the markers."""
    return prepared(tmp_path_factory.mktemp("files"), STARCODER)


def of_run(files: PreparedData, **more: Any) -> Given:
    return replace(Given(STARCODER, 192, 20, 0, 0, files), **more)


@pytest.mark.parametrize("name", ["fim_line", "fim_lines", "fim_span"])
def test_gaps_stand_in_their_files(files, name):
    asked = TASKS[name](of_run(files))
    texts = {name: source(int(name[1:-3])) for name in files.test.names}
    assert len(asked.examples) == len({e.id for e in asked.examples}) == 20
    assert {e.name for e in asked.examples} == set(texts)
    for e in asked.examples:
        assert e.suffix is not None
        assert e.reference.strip()
        around = texts[e.name][: e.where - 1], texts[e.name][e.where - 1 + len(e.reference) :]
        assert texts[e.name][e.where - 1 :].startswith(e.reference)
        assert around[0].endswith(e.prompt) and around[1].startswith(e.suffix)
        lines = e.reference.split("\n")
        if name != "fim_span":
            assert around[0][-1:] in ("", "\n") and around[1][:1] in ("", "\n")
            assert lines[0].strip() and lines[-1].strip()
        assert len(lines) == 1 if name == "fim_line" else len(lines) in range(2, 9) or name == "fim_span"
        assert len(e.reference) <= 300 or name == "fim_lines"
    assert TASKS[name](of_run(files)).examples == asked.examples
    assert TASKS[name](of_run(files, seed=1)).examples != asked.examples
    copy = asked.baselines(asked.examples)["copy"]
    assert copy[0] == asked.examples[0].prompt.rstrip("\n").rsplit("\n", 1)[-1]


def test_the_nearest_place_is_that_with_the_most_alike_around_it():
    def place(i: int, call: str, after: str | None, answer: str) -> Example:
        before = "".join(f"{word} = {i}\n" for word in ("alpha", "beta")) + f"call_{i}_{call}(x{i}, y{i})"
        return Example("f.py", i, before, answer, after)

    known = [place(i, "a", f"\nend_{i}()", f"line {i}") for i in range(200)]
    other = [place(i, "a", f"\nother_{i % 7}({i})", f"other {i}") for i in range(200)]
    asked = [place(i, "b", None, "") for i in (7, 150, 3)]
    assert nearest_place(asked, known + other) == ["line 7", "line 150", "line 3"]
    # Of a gap, what follows it counts as well.
    gaps = [replace(e, suffix=f"\nother_{e.where % 7}({e.where})") for e in asked]
    assert nearest_place(gaps, known + other) == ["other 7", "other 150", "other 3"]
    # What is far from the place does not count, and neither do blank lines next to it.
    far = [replace(e, prompt="z\n" * 400 + e.prompt + "\n\n") for e in asked]
    assert nearest_place(far, known) == ["line 7", "line 150", "line 3"]
    assert nearest_place(asked, []) == [""] * 3
    assert nearest_place([Example("", 0, "", "")], known[:1]) == ["line 0"]


def test_places_are_of_training_files_and_evenly_spread(files, monkeypatch):
    texts = {name: source(int(name[1:-3])) for name in files.train.names}
    places = places_of(files.train, STARCODER, line_spans)
    assert {place.name for place in places} == set(texts)
    assert len({(place.name, place.where) for place in places}) == len(places)
    assert len(places) == sum(bool(line.strip()) for text in texts.values() for line in text.split("\n"))
    for place in places:
        start = place.where - 1
        assert texts[place.name][:start].endswith(place.prompt)
        assert texts[place.name][start:].startswith(place.reference + (place.suffix or ""))
    monkeypatch.setattr("suites.baselines.NEIGHBOURS", 12)
    monkeypatch.setattr("suites.baselines.FILES", 6)
    fewer = places_of(files.train, STARCODER, line_spans)
    assert len(fewer) <= 12 and len({place.name for place in fewer}) in (5, 6)
    assert fewer[0].name == files.train.names[0] and fewer[-1].name != files.train.names[len(fewer) // 2]


def test_places_in_files_that_training_gave_gaps_are_those_of_the_files(tmp_path):
    sides = [tmp_path / "whole", tmp_path / "gapped"]
    for side in sides:
        side.mkdir()
    whole, gapped = (
        prepared(side, STARCODER, rate).train for side, rate in zip(sides, (0.0, 1.0), strict=True)
    )
    assert gapped.document(0).tolist() != whole.document(0).tolist()
    assert places_of(gapped, STARCODER, line_spans) == places_of(whole, STARCODER, line_spans)


@pytest.mark.parametrize("name", ["next_line", "fim_line", "fim_lines", "fim_span"])
def test_the_nearest_of_plain_files_is_a_piece_of_training_files_of_its_kind(files, name):
    asked = TASKS[name](of_run(files))
    found = asked.baselines(asked.examples)
    assert list(found) == ["copy", "nearest", "empty"]
    train = [source(int(one[1:-3])) for one in files.train.names]
    for text in found["nearest"]:
        assert text.strip() and any(text in one for one in train)
        lines = text.count("\n") + 1
        assert lines == 1 if name in ("next_line", "fim_line") else lines in range(2, 9) or name == "fim_span"
    assert found["nearest"] != found["copy"] and found["empty"] == [""] * 20
    if name in ("next_line", "fim_line"):  # files and lines are alike, so that the nearest is often right
        right = [text == e.reference for text, e in zip(found["nearest"], asked.examples, strict=True)]
        assert sum(right) >= 5


def test_the_nearest_of_codexglue_is_of_the_runs_own_training_text(files, tmp_path: Path):
    methods = task("codexglue_method", write(tmp_path / "methods.jsonl", METHODS), data=files)
    found = methods.baselines(methods.examples)
    assert list(found) == ["copy", "nearest", "empty"]
    train = [source(int(one[1:-3])) for one in files.train.names]
    bodies = [
        text[a:b] for text in train for a, b in body_spans(text, np.random.Generator(np.random.PCG64(0)))
    ]
    assert all(body.startswith("    y = ") and "return" in body for body in bodies)
    assert set(found["nearest"]) <= set(bodies)
    lines = task("codexglue_line", write(tmp_path / "lines.jsonl", LINES), data=files)
    found = lines.baselines(lines.examples)
    assert list(found) == ["copy", "nearest", "empty"]
    assert set(found["nearest"]) <= {line for text in train for line in text.split("\n") if line.strip()}


def test_gaps_do_not_cut_characters_in_two():
    text = "a\r\nb\ud83d\ude00c" * 30
    draw = np.random.Generator(np.random.PCG64(0))
    spans = list(piece_spans(text, draw))
    assert len(spans) > 20
    for start, end in spans:
        for place in (start, end):
            assert text[max(0, place - 1) : place + 1] not in ("\r\n", "\ud83d\ude00")


def test_gaps_need_markers_plain_files_and_a_run(files, tmp_path: Path):
    without = prepared(tmp_path, BYTES)
    with pytest.raises(ValueError, match="so the suite fim_span cannot be evaluated"):
        TASKS["fim_span"](of_run(without, tokenizer=BYTES))
    with pytest.raises(ValueError, match="give --run RUN"):
        TASKS["fim_line"](of_run(files, data=None))
    with pytest.raises(ValueError, match="ask for next_line"):
        TASKS["pairs"](of_run(files))


def test_a_run_fills_gaps_and_is_asked_several_suites_at_once(files, folder, tmp_path: Path):
    model = load_pretrained(str(folder)).model
    path = run_of(tmp_path, files, model, STARCODER)
    own = {"cache": str(tmp_path / "cache"), "precision": "fp32", "samples": 5, "max_new_tokens": 5}
    asked = EvalConfig(str(path), suite="next_token,fim,next_line", **own)
    result = evaluation.evaluate(asked)
    assert [record["suite"] for record in suites_of(result)] == [
        "fim_line",
        "fim_lines",
        "fim_span",
        "next_line",
    ]
    for record in suites_of(result):
        assert list(record["scores"]) == ["model", "n-gram", "copy", "nearest", "empty"]
    shown = evaluation.table(result)
    for said in (
        "loss, nats a token",
        "gaps of a line: 5 gaps",
        "gaps of several lines",
        "next line: 5 lines",
    ):
        assert said in shown
    # The prompt is that of training; the n-gram model reads on from what stands before the gap.
    sample = result["suite"]["samples"][0]
    ids = fim_prompt_ids(STARCODER, sample["prompt"], sample["suffix"])
    settings = GenerationConfig(max_new_tokens=5)
    (expected,) = generate(model, STARCODER, [sample["prompt"]], settings, suffix=sample["suffix"])
    if len(ids) + 5 <= 192:
        assert sample["predictions"]["model"] == expected.text
    written = evaluation.write_results(result, asked)
    assert rescore(written) == 0
    saved = json.loads(written.read_text("utf-8"))
    saved["more_suites"][2]["scores"]["copy"]["exact_match"]["mean"] += 1
    written.write_text(json.dumps(saved), "utf-8")
    assert rescore(written) == 1

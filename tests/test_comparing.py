"""Evaluations side by side: differences are those of the metrics' own comparison; unlike ones are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_eval import command

from metrics.intervals import compare, mean_of_sums, mean_rows
from metrics.registry import score
from suites.comparing import compare_files
from suites.programs import record_of_results
from suites.records import evaluation_files, examples_of, scored_again
from suites.rescoring import differences
from suites.results import results_path
from suites.scoring import SUITES, Example, Predictions, scored, suites_of
from suites.settings import EvalConfig
from suites.tables import suite_table
from suites.task import Task

PAIRS = SUITES["pairs"]
METRICS = ["exact_match", "chrf"]


def evaluation(seed: int, good: float, base: float | None = None, prompt: str = "say") -> dict[str, Any]:
    """Make an evaluation of 40 samples, whose predictions are right with probability `good`."""
    draw = np.random.default_rng(seed)
    examples = [Example(f"f{i}", i, f"{prompt} {i}", f"def f_{i}(x):\n    return x + {i}") for i in range(40)]

    def made(share: float) -> Predictions:
        right = draw.random(40) < share
        return Predictions(
            [e.reference if ok else f"# {e.name}" for e, ok in zip(examples, right, strict=True)]
        )

    systems = {"model": made(good), **({"base": made(base)} if base is not None else {})}
    systems |= {"copy": Predictions([e.prompt for e in examples])}
    return {
        "run": f"runs/{seed}",
        "step": seed,
        "suite": {"max_new_tokens": 9, **scored(PAIRS, examples, systems, METRICS, seed=3)},
    }


def programs(passed: np.ndarray) -> dict[str, Any]:
    """Make an evaluation of HumanEval, with (problems, draws) of results."""
    examples = [
        Example(f"HumanEval/{i}", 0, f"def f_{i}():\n", f"    return {i}\n") for i in range(len(passed))
    ]
    words = [["passed" if one else f"failed: <{i}>" for one in row] for i, row in enumerate(passed)]
    texts = [[f"    return {n}\n"] * len(examples) for n in range(passed.shape[1])]
    made = {"model": Predictions(texts[0], 0, texts[1:]), "stub": Predictions(["    pass\n"] * len(examples))}
    results = {"model": words, "stub": [["failed"]] * len(examples)}
    task = Task(SUITES["humaneval"], examples, 9, "problems", lambda _: {})
    judged_by = {"left_out": {}, "sandbox": "a box", "draws": len(texts)}
    record = record_of_results(task, made, results, judged_by, "python", 0)
    return {"run": "runs/p", "step": 1, "suite": record}


def write(folder: Path, *evaluations: dict[str, Any]) -> list[str]:
    paths = []
    for number, found in enumerate(evaluations):
        run = folder / f"run{number}"
        run.mkdir(parents=True)
        (run / "eval.json").write_text(json.dumps(found), "utf-8")
        paths.append(str(run))
    return paths


def with_tokens(found: dict[str, Any], factor: float, tokenizer: str) -> dict[str, Any]:
    """The evaluation with token scores of 30 documents beside, by a tokenizer of this fingerprint."""
    nats = [factor * (10.0 + i) for i in range(30)]
    values = {
        "tokens": 500,
        "loss": 2.0,
        "perplexity": 7.4,
        "bits_per_byte": factor,
        "top1": 0.5,
        "top5": 0.6,
    }
    documents = {"names": list(map(str, range(30))), "bytes": [20] * 30, "tokens": [9] * 30}
    documents["nats"] = {"model": nats}
    return found | {
        "side": "test",
        "files": 30,
        "bytes": 600,
        "model": values,
        "documents": documents,
        "fingerprints": {"tokenizer": tokenizer},
    }


def test_differences_are_the_paired_bootstraps_of_the_metrics(tmp_path):
    a, b = evaluation(1, 0.2), evaluation(2, 0.9)
    said = compare_files(write(tmp_path, a, b))
    for name in METRICS:
        pairs = [
            [
                (PAIRS.clean(s["predictions"]["model"]), PAIRS.clean(s["reference"]))
                for s in e["suite"]["samples"]
            ]
            for e in (a, b)
        ]
        ours, theirs = (score([name], one)[name] for one in pairs)
        found = theirs.compare(ours, 3)
        gap = found.difference
        assert (
            f"{name}: B model less A model is {gap.mean:+.1f} [{gap.low:.1f}, {gap.high:.1f}], "
            f"{found.verdict('A model')}" in said
        )
        for one in (ours, theirs):
            at = one.interval(3)
            assert f"{at.mean:.1f} [{at.low:.1f}, {at.high:.1f}]" in said
    assert "better than A model by" in said
    assert "A: runs/1, step 1, from" in said
    assert " copy\n" in said


def test_an_evaluation_against_itself_and_a_small_difference(tmp_path):
    a = evaluation(1, 0.5)
    paths = write(tmp_path, a, a)
    assert "exact_match: B model less A model is +0.0 [0.0, 0.0], not distinguishable from A model: " in (
        compare_files(paths)
    )
    near = copy.deepcopy(a)
    sample = next(s for s in near["suite"]["samples"] if s["predictions"]["model"] != s["reference"])
    sample["predictions"]["model"] = sample["reference"]
    Path(paths[1], "eval.json").write_text(json.dumps(near), "utf-8")
    assert "on 40 samples; about " in compare_files(paths)


def test_bases_are_compared_with_bases_and_each_model_with_its_own(tmp_path):
    said = compare_files(write(tmp_path, evaluation(1, 0.9, 0.1), evaluation(2, 0.9, 0.2)))
    lines = [line.split(" is ")[0] for line in said.splitlines() if " less " in line]
    assert lines == [
        f"{name}: {pair}"
        for name in METRICS
        for pair in (
            "A model less A base",
            "B model less A model",
            "B base less A base",
            "B model less B base",
        )
    ]


def test_programs_are_compared_by_the_results_of_their_runs(tmp_path):
    right = np.random.default_rng(0).random((2, 40, 5)) < np.array([0.2, 0.7])[:, None, None]
    found = [programs(one) for one in right]
    said = compare_files(write(tmp_path, *found))
    assert said.splitlines()[3].startswith("HumanEval: 40 problems")
    one, other = (passed.mean(1) * 100 for passed in right)
    wanted = compare(mean_rows(other), mean_rows(one), mean_of_sums, 0)
    gap = wanted.difference
    assert (
        f"pass@1: B model less A model is {gap.mean:+.1f} [{gap.low:.1f}, {gap.high:.1f}], "
        f"{wanted.verdict('A model')}" in said
    )
    assert "pass@10" not in said
    found[1]["suite"]["left_out"] = {"HumanEval/3": "its own solution fails"}
    with pytest.raises(
        ValueError, match="what could not be judged is 'none' in one and 'HumanEval/3' in the"
    ):
        compare_files(write(tmp_path / "again", *found))


def test_only_the_suites_that_are_asked_for_are_compared(tmp_path):
    a, b = evaluation(1, 0.2), evaluation(2, 0.9)
    gap = {**a["suite"], "suite": "fim_line"}
    paths = write(tmp_path, a | {"more_suites": [gap]}, b)
    said = compare_files(paths)
    assert "left out: fim_line, which is only in A\n" in said
    assert said.splitlines()[4:] == compare_files(paths, "pairs").splitlines()[3:]
    assert (
        compare_files(paths, "pairs").splitlines()[3:]
        == compare_files(write(tmp_path / "a", a, b)).splitlines()[3:]
    )
    with pytest.raises(ValueError, match=r"run1.eval.json: it holds no suite .fim. but pairs"):
        compare_files(paths, "fim")
    both = write(tmp_path / "b", *(found | {"more_suites": [gap]} for found in (a, b)))
    assert compare_files(both, "fim") == compare_files(both, "fim_line") != compare_files(both, "pairs")
    a["suite"]["suite"] = b["suite"]["suite"] = "humaneval_infilling"
    with pytest.raises(ValueError, match="it holds no suite 'humaneval' but humaneval_infilling"):
        compare_files(write(tmp_path / "c", a, b), "humaneval")


def test_a_run_stands_for_the_evaluations_of_its_suites_with_files_of_their_own(tmp_path):
    def files(run: Path, suite: str, found: dict[str, Any], weights: str) -> None:
        run.mkdir(exist_ok=True)
        found = copy.deepcopy(found) | {"fingerprints": {"weights": weights, "tokenizer": "t"}}
        found["suite"]["suite"] = suite
        name = "eval.json" if suite == "pairs" else f"eval-{suite}.json"
        (run / name).write_text(json.dumps(found), "utf-8")

    a, b = evaluation(1, 0.2), evaluation(2, 0.9)
    for run, found in (("a", a), ("b", b)):
        for suite in ("pairs", "examples"):
            files(tmp_path / run, suite, found, run)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    both = [f"{path}/eval-examples.json" for path in paths]
    said = compare_files(paths)
    assert f"A: runs/1, step 1, from {tmp_path}/a/eval.json\n" in said
    for suite in ("pairs", "examples"):
        assert "\n".join(compare_files(paths, suite).splitlines()[3:]) in said
    assert compare_files(paths, "examples") == compare_files(both)
    files(tmp_path / "b", "examples", b, "of an earlier checkpoint")
    said = compare_files(paths)
    assert f"{both[1]}: left out, for {tmp_path}/b/eval.json is of another checkpoint\n" in said
    assert "left out: examples, which is only in A\n" in said
    assert compare_files(paths, "examples") == compare_files(both)


def test_of_other_tokenizers_the_bytes_can_be_compared_and_are_named(tmp_path):
    a, b = (with_tokens(evaluation(1, 0.5), 0.5, tokenizer) for tokenizer in "tu")
    b["suite"]["samples"][7]["prompt"] = "x"
    paths = write(tmp_path, a, b)
    with pytest.raises(ValueError, match=r"prompt of sample 8.*--suite next_token compares their bits"):
        compare_files(paths)
    assert "bits per byte" in compare_files(paths, "next_token")
    (tmp_path / "run1" / "eval.json").write_text(json.dumps(evaluation(1, 0.5)), "utf-8")
    with pytest.raises(ValueError, match=r"run1/eval.json: it holds no suite .next_token. but pairs"):
        compare_files(paths, "next_token")


def test_wordings_are_compared_by_name_and_only_so(tmp_path):
    """The two by two table: base and tuned, verbose and simple."""
    a, b = evaluation(1, 0.9, 0.1), evaluation(2, 0.5, 0.4, prompt="in a few words, say")
    paths = write(tmp_path, a, b)
    with pytest.raises(ValueError, match=r"prompt of sample 1 is 'say 0' in one and 'in a few words"):
        compare_files(paths)
    for path, found, name in zip(paths, (a, b), ("verbose", "simple"), strict=True):
        found["prompts"] = {name: found["suite"]}
        Path(path, "eval.json").write_text(json.dumps(found), "utf-8")
    said = compare_files([f"{paths[0]}:verbose", f"{paths[1]}/eval.json:simple"])
    head = next(line for line in said.splitlines() if line.startswith("metric"))
    assert head.split("  ")[-1].strip() == "best baseline"
    for label in ("A verbose model", "A verbose base", "B simple model", "B simple base"):
        assert label in head
    assert "chrf: B simple base less A verbose base is +" in said
    with pytest.raises(ValueError, match=r"not evaluated with prompts called 'simple' \(there are verbose"):
        compare_files([f"{paths[0]}:simple", paths[1]])


def changed(found: dict[str, Any], *keys: Any, to: Any) -> dict[str, Any]:
    other = copy.deepcopy(found)
    place = other
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return other


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (
            ("suite", "max_new_tokens"),
            64,
            "max_new_tokens is 9 in one and 64 in the other; evaluate both alike, as by --max_new_tokens 64",
        ),
        (("suite", "language"), "kotlin", "language is 'python' in one and 'kotlin'"),
        (("suite", "sampling"), {"temperature": 0.8}, "sampling is None in one and {'temperature': 0.8}"),
        (("suite", "signatures", "chrf"), "chrf|2.6", "signature of chrf is 'chrf|"),
        (
            ("suite", "signatures"),
            {"chrf": "x"},
            r"metrics is \['chrf', 'exact_match'\] in one and \['chrf'\]",
        ),
        (("suite", "healed"), True, "a prompt's end was healed is False in one and True in the other"),
        (("suite", "samples", 7, "reference"), "x", r"reference of sample 8 is 'def f_7"),
        (("suite", "samples", 7, "id"), "x", "id of sample 8 is 'f7:7' in one and 'x'"),
        (("suite", "samples", 7, "prompt"), "x", "prompt of sample 8 is 'say 7' in one and 'x'"),
        (("suite", "samples", 7, "suffix"), "x", "suffix of sample 8 is None in one and 'x'"),
        (("suite", "samples"), [], "number of samples is 40 in one and 0"),
        (
            ("suite", "suite"),
            "next_line",
            "they share no suite: A holds pairs; B holds next_line; eval",
        ),
        (
            ("suite", "samples", 3, "predictions"),
            {},
            "is no whole evaluation: it has no 'model'; evaluate again",
        ),
        (("suite",), 3, "no whole evaluation: a value in it is of another kind; evaluate again"),
    ],
)
def test_what_was_not_measured_alike_is_refused_with_both_values(tmp_path, keys, value, says):
    a = evaluation(1, 0.5)
    with pytest.raises(ValueError, match=says):
        compare_files(write(tmp_path, a, changed(a, *keys, to=value)))


def test_limits_that_no_text_ran_into_may_differ(tmp_path):
    """Those that are not given are of each tokenizer's own tokens."""
    a, b = evaluation(1, 0.5), changed(evaluation(2, 0.5), "suite", "max_new_tokens", to=64)
    for found in (a, b):
        found["suite"]["ran_long"] = {"model": 0.0}
    assert "chrf: B model less A model" in compare_files(write(tmp_path / "a", a, b))
    b["suite"]["ran_long"]["model"] = 0.025
    with pytest.raises(ValueError, match="max_new_tokens is 9 in one and 64"):
        compare_files(write(tmp_path / "b", a, b))


def test_evaluations_that_share_neither_a_suite_nor_a_text_are_refused(tmp_path):
    a, b = with_tokens(evaluation(1, 0.5), 1.0, "t"), with_tokens(evaluation(2, 0.5), 0.5, "t")
    b["suite"]["suite"], b["files"] = "next_line", 31
    sentence = "share no suite: A holds .*; token scores are left out: .* of 30 test files.* of 31 test files"
    with pytest.raises(ValueError, match=sentence):
        compare_files(write(tmp_path, a, b))


def test_token_scores_are_compared_over_the_same_documents(tmp_path):
    a, b = with_tokens(evaluation(1, 0.5), 1.0, "t"), with_tokens(evaluation(2, 0.5), 0.5, "t")
    paths = write(tmp_path, a, b)
    said = compare_files(paths)
    gap = -0.5 * sum(10 + i for i in range(30)) / np.log(2) / 600
    assert f"bits per byte: B model less A model is {gap:+.4f} [" in said
    assert "better on 30 documents" in said
    assert "perplexity" in said
    Path(paths[1], "eval.json").write_text(json.dumps(with_tokens(b, 0.5, "u")), "utf-8")
    said = compare_files(paths)
    assert "perplexity" not in said
    assert "the tokenizers differ" in said
    Path(paths[1], "eval.json").write_text(json.dumps(b | {"bytes": 601}), "utf-8")
    assert "token scores are left out: they are over 600 bytes of 30 test files" in compare_files(paths)


def test_several_draws_count_with_their_mean():
    found = evaluation(1, 0.5)
    record = found["suite"]
    for sample in record["samples"]:
        sample["more"] = {"model": [sample["reference"], "x"]}
    rows = scored_again(record, ["model"])["model"]["exact_match"]
    once = record["scores"]["model"]["exact_match"]["mean"]
    assert rows.value == pytest.approx((once + 100 + 0) / 3)
    assert suites_of(found | {"more_suites": [record]}) == [record, record]
    assert suites_of({}) == []


def test_the_command_compares_and_a_mistake_is_one_sentence(tmp_path):
    paths = write(tmp_path, evaluation(1, 0.2), evaluation(2, 0.9))
    done = command("--compare", *paths)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == compare_files(paths).strip()
    for words in ((paths[0],), (), (*paths, "--rescore", "x"), (paths[0], tmp_path / "nowhere")):
        done = command("--compare", *words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


def test_a_strangers_file_does_not_write_to_the_terminal(tmp_path):
    a = evaluation(1, 0.5) | {"run": "\x1b[2Jx\u202e"}
    said = compare_files(write(tmp_path, a, evaluation(2, 0.9)))
    assert all(c.isprintable() or c == "\n" for c in said)


def test_a_suite_with_a_file_of_its_own_leaves_the_scores_of_the_run_where_they_are(tmp_path):
    run = {"run": str(tmp_path)}
    assert results_path(run, EvalConfig("run")) == tmp_path / "eval.json"
    assert results_path(run, EvalConfig("run", suite="fim,next_token")) == tmp_path / "eval.json"
    assert results_path(run, EvalConfig("run", suite="mbpp")) == tmp_path / "eval-mbpp.json"
    assert results_path(run, EvalConfig("run", suite="pairs,mbpp")) == tmp_path / "eval.json"
    assert set(evaluation_files(tmp_path)) == {tmp_path / "eval.json"}
    for name in ("eval-mbpp.json", "eval-mbpp-1.json", "eval-1.json"):
        (tmp_path / name).touch()
    for name in ("eval-x.json", "eval-0.json", "eval-mbpp-.json", "eval-2.json"):
        (tmp_path / name).touch()
    found = [path.name for path in evaluation_files(tmp_path)]
    assert found == ["eval-mbpp.json", "eval-2.json", "eval-1.json", "eval-mbpp-1.json"]


def test_evaluations_set_aside_are_found(tmp_path):
    """A suite that was evaluated later by itself does not hide what a run's first evaluation stores."""
    a, b = (with_tokens(evaluation(seed, 0.5), float(seed), "t") for seed in (1, 2))
    pairs, weights = {**a["suite"]}, {"tokenizer": "t", "weights": "w"}
    a |= {"fingerprints": weights}
    gaps = {**pairs, "suite": "fim_line"}
    later = {"run": a["run"], "step": 1, "suite": gaps, "fingerprints": weights}
    of_texts = {"side": "test", "files": 30, "bytes": 600}
    one, other = write(tmp_path, later | of_texts, b)
    for name in ("eval-1.json", "eval-2.json"):
        (Path(one) / name).write_text(json.dumps(a), "utf-8")
    whole = compare_files(write(tmp_path / "whole", a, b))
    for suite in ("", "pairs", "next_token", "pairs,next_token"):
        said = compare_files([one, other], suite)
        assert "eval-2.json" in said
        assert "eval-1.json" not in said, "eval-2.json has all that it has"
        for line in compare_files(write(tmp_path / f"whole-{suite}", a, b), suite).splitlines()[2:]:
            assert line in said
    assert "left out: fim_line, which is only in A" in compare_files([one, other])
    assert "bits per byte: B model less A model" in whole
    # What the newest holds counts; of another checkpoint, or over other texts, the older does not.
    fewer = {**pairs, "samples": pairs["samples"][:9]}
    (Path(one) / "eval.json").write_text(json.dumps(later | of_texts | {"more_suites": [fewer]}), "utf-8")
    with pytest.raises(ValueError, match="number of samples"):
        compare_files([one, other], "pairs")
    (Path(one) / "eval.json").write_text(json.dumps(later | of_texts | {"bytes": 9}), "utf-8")
    assert "bits per byte" not in compare_files([one, other])
    assert PAIRS.title in compare_files([one, other])
    newer = later | of_texts | {"fingerprints": {"tokenizer": "t", "weights": "x"}}
    (Path(one) / "eval.json").write_text(json.dumps(newer), "utf-8")
    with pytest.raises(ValueError, match="they share no suite"):
        compare_files([one, other])


def test_answers_that_are_mostly_empty_have_no_verdict(tmp_path):
    """Planted: 21 of 40 answers of nothing but white space, and 20, which is not above half."""
    record, fewer = (evaluation(seed, 0.9)["suite"] for seed in (1, 2))
    examples = examples_of(record)
    for silent, said in ((21, True), (20, False)):
        texts = [" \n" if i < silent else e.reference for i, e in enumerate(examples)]
        made = {"model": Predictions(texts, 0), "copy": Predictions([e.prompt for e in examples])}
        found = scored(PAIRS, examples, made, METRICS, seed=3)
        assert found["empty"] == {"model": silent / 40}
        table = suite_table(found)
        verdict = f"no verdict: {silent / 40:.1%} of the answers of model are empty"
        assert (
            (verdict in table)
            == said
            == found["verdicts"]["chrf"]["against"]["copy"].startswith("no verdict")
        )
        assert list(differences(json.loads(json.dumps(found)))) == []
        paths = []
        for name, one in (("a", found), ("b", fewer)):
            whole = {"run": name, "step": 1, "suite": {"max_new_tokens": 9, **one}}
            (tmp_path / f"{name}.json").write_text(json.dumps(whole), "utf-8")
            paths.append(str(tmp_path / f"{name}.json"))
        assert ("no verdict: 52.5% of the answers of A model are empty" in compare_files(paths)) == said

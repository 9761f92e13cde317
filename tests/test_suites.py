"""Suites: a reference has the maximum, a copier is called one, and an edited number is named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_eval import BYTES, FP32, REPOSITORY
from test_generate_command import STARCODER

from architecture import Decoder
from config import Config, DataConfig, ModelConfig, one_sentence
from config.files import code_fingerprint
from data.corpus import split_documents
from data.fim import fim_end_ids, fim_prompt_ids
from data.rows import alpaca_prompt
from dataset import PreparedData, prepare_data
from metrics.registry import METRICS
from suites import evaluate as evaluation
from suites.baselines import copied, last_lines, nearest
from suites.completing import CompletionSettings, complete, completion_request, ngram_complete, uncut
from suites.pairs import longest_completion, pair_examples
from suites.rescoring import differences, rescore
from suites.scoring import (
    SUITES,
    Example,
    Predictions,
    metric_names,
    origin_of,
    read_predictions,
    scored,
)
from suites.settings import EvalConfig
from suites.tables import suite_table
from suites.tokens import model_scores, ngram_scores, tokens_of, train_ngram
from tokenization.healing import Prompt
from tokenizer import Tokenizer
from training.checkpoint import save_checkpoint

NAMES = ("alpha", "beta", "gamma", "delta", "ßeta", "total", "count")
PAIRS = SUITES["pairs"]


def row(number: int) -> dict[str, str]:
    """A function, and the same with a better name for its variable."""
    draw = np.random.default_rng(number)
    a, b, c = draw.choice(NAMES, 3, replace=False)
    before = f"def {a}_{number}({b}):\n    x = {b} + {number % 7}\n    return x * {c}\n"
    return {"input": before, "output": before.replace("x ", f"{c}_{a} ")}


def prepared(folder: Path, rows: list[dict[str, str]], tokenizer: Tokenizer = BYTES) -> PreparedData:
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    config = DataConfig(
        str(folder / "rows.jsonl"), validation_one_in=4, test_one_in=3, cache=str(folder / "cache"), workers=1
    )
    return prepare_data(config, tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return prepared(tmp_path_factory.mktemp("pairs"), [row(number) for number in range(60)])


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    shape = ModelConfig(BYTES.vocab_size, block_size=160, n_layer=1, n_head=2, n_embd=16, init="normal")
    decoder = Decoder(shape)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.4)
    return decoder.eval()


def systems(examples: list[Example], texts: list[str]) -> dict[str, Predictions]:
    return {
        "model": Predictions(texts, 0),
        "copy": Predictions(copied(examples)),
        "empty": Predictions([""] * len(examples)),
    }


def halves(examples: list[Example]) -> list[str]:
    """Predictions that are neither right nor a copy."""
    return [e.reference[: len(e.reference) // 2] + "?" for e in examples]


# --- what is said of a model -------------------------------------------------------------------------


def test_a_copy_model_on_a_copy_task_is_not_distinguishable_from_copying(data):
    examples = [replace(e, reference=e.prompt) for e in pair_examples(data.test, BYTES, 25)]
    record = scored(PAIRS, examples, systems(examples, [e.prompt for e in examples]))
    assert record["scores"]["model"]["chrf"]["mean"] == 100
    copies = Predictions([e.prompt for e in examples])  # the base may copy too
    tied = scored(PAIRS, examples, {"model": copies, "base": copies, "copy": copies}, ["chrf"])
    assert tied["verdicts"]["chrf"]["best"] == "copy"
    table = suite_table(record)
    for name in PAIRS.metrics:
        assert (
            f"\n{name}: not distinguishable from copying: the same on each of {len(examples)} samples"
            in table
        )


def test_nearly_a_copy_says_how_many_samples_would_be_needed(data):
    """High scores of which the input alone has nearly all: the ones that were once read as success."""
    examples = pair_examples(data.test, BYTES, 25)
    texts = [e.prompt.replace("x *", "y *", i % 3 == 0) for i, e in enumerate(examples)]
    record = scored(PAIRS, examples, systems(examples, texts))
    verdict = record["verdicts"]["edit_similarity"]
    assert verdict["best"] == "copy"
    assert record["scores"]["model"]["edit_similarity"]["mean"] > 80
    assert verdict["against"]["copy"].startswith(("not distinguishable", "worse"))
    noisy = [e.prompt[:-1] if i % 2 else e.reference[:-1] for i, e in enumerate(examples[:8])]
    said = scored(PAIRS, examples[:8], systems(examples[:8], noisy))["verdicts"]["edit_similarity"]
    assert said["against"]["copy"].startswith("not distinguishable from copying on 8 samples; about ")
    assert said["against"]["copy"].endswith(" would be needed")


def test_a_model_that_does_the_task_is_better_than_copying(data):
    examples = pair_examples(data.test, BYTES, 25)
    record = scored(PAIRS, examples, systems(examples, [e.reference for e in examples]))
    assert record["verdicts"]["exact_match"]["against"]["copy"].startswith("better than copying by 100.0")


@pytest.mark.parametrize("name", sorted(name for name in SUITES if not SUITES[name].runs))
def test_a_reference_against_itself_has_each_maximum_in_the_table(name: str):
    texts = ["x = 1\r\n\n", "  return a + b  \n", "ß = '\U0001f600'", "f(\n    1,\n)", "0", "\ttab\r"]
    examples = [Example("f.py", i, f"# {i}\n", text) for i, text in enumerate(texts)]
    # `parses` is of the text alone, whatever the reference.
    metrics = tuple(name for name in METRICS if name != "parses")
    predictions = systems(examples, texts)
    for chosen in (SUITES[name].metrics, metrics):
        record = scored(SUITES[name], examples, predictions, chosen)
        for one in chosen:
            assert record["scores"]["model"][one]["mean"] == pytest.approx(METRICS[one].maximum), one
        lines = suite_table(record).split("\n")
        for one in chosen:
            (line,) = [line for line in lines if line.startswith(f"{one} ")]
            assert line.split()[1] == "100.0"


def test_both_sides_are_cleaned_alike():
    """The fault was a cleaned prediction against a raw reference."""
    examples = [Example("f.py", i, "", f"x = {i}  \r\n") for i in range(3)]
    record = scored(PAIRS, examples, systems(examples, [f"x = {i}\n\n" for i in range(3)]))
    assert record["scores"]["model"]["exact_match"]["mean"] == 100


def test_without_a_baseline_there_is_no_score_and_no_table(data):
    examples = pair_examples(data.test, BYTES, 5)
    predictions = systems(examples, halves(examples))
    with pytest.raises(ValueError, match="no baseline"):
        scored(PAIRS, examples, {"model": predictions["model"]})
    record = scored(PAIRS, examples, predictions)
    for system in ("copy", "empty"):
        del record["scores"][system]
    with pytest.raises(ValueError, match="no baseline"):
        suite_table(record)


def test_the_best_baseline_is_the_one_that_is_compared_with(data):
    examples = pair_examples(data.test, BYTES, 12)
    knows = {"model": Predictions(halves(examples)), "empty": Predictions([""] * len(examples))}
    knows["base"] = Predictions([e.reference for e in examples])
    record = scored(PAIRS, examples, knows | {"copy": Predictions(copied(examples))})
    for verdict in record["verdicts"].values():
        assert verdict["best"] == "base"
        assert "the base model" in verdict["against"]["base"]
    assert "chrf: worse than the base model by" in suite_table(record)


def test_other_numbers_of_predictions_and_unknown_metrics_are_refused(data):
    examples = pair_examples(data.test, BYTES, 5)
    with pytest.raises(ValueError, match="model has 4 predictions for 5 examples"):
        scored(PAIRS, examples, systems(examples, [""] * 4))
    assert metric_names(" chrf, codebleu ,") == ("chrf", "codebleu")
    with pytest.raises(ValueError, match="did you mean chrf"):
        metric_names("chfr")


# --- examples and baselines --------------------------------------------------------------------------


def test_examples_come_back_as_they_were(data):
    folder = data.folder.parent.parent
    config = DataConfig(str(folder / "rows.jsonl"), validation_one_in=4, test_one_in=3)
    held_out = {d.name: (d.prompt, d.text) for split, d in split_documents(config) if split == "test"}
    examples = pair_examples(data.test, BYTES, 1000)
    assert {e.name: (e.prompt, e.reference) for e in examples} == held_out
    assert len({e.id for e in examples}) == len(examples) == len(held_out) > 10
    assert pair_examples(data.test, BYTES, 5, seed=1) == pair_examples(data.test, BYTES, 5, seed=1)
    assert pair_examples(data.test, BYTES, 5, seed=1) != pair_examples(data.test, BYTES, 5, seed=2)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_nats_of_examples_are_those_of_each_completion_alone(data, model, batch_size):
    """Several share a row, in an order of their lengths."""
    store = data.test
    scores, sums = model_scores(model, store, batch_size, 160, FP32)
    nats = sums["nats"]
    with torch.no_grad():
        for number, found in enumerate(nats):
            tokens = torch.from_numpy(store.document(number))[None]
            log_p = model(tokens[:, :-1])[0].double().log_softmax(-1).gather(1, tokens[0, 1:, None])
            bears = log_p[int(store.prompt_lengths[number]) - 1 :]
            assert found == pytest.approx(-bears.sum().item(), rel=1e-5)
            assert tokens_of(store, 160)[number] == len(bears)
    assert nats.sum() == pytest.approx(scores.nats, rel=1e-6)
    of_ngram, sums = ngram_scores(train_ngram(data.train), store, 160)
    by_document = sums["nats"]
    assert by_document.sum() == pytest.approx(of_ngram.nats) and len(by_document) == store.n_documents


def test_a_part_of_a_file_is_from_it():
    for name, file in (
        ("a/b.py:17", "a/b.py"),
        ("a/b.py:Class", "a/b.py"),
        ("a/b.py", "a/b.py"),
        ("HumanEval/3", "HumanEval/3"),
        ("https://x.org:80/page", "https://x.org:80/page"),
        ("C:\\code\\b.py", "C:\\code\\b.py"),
        (":17", ":17"),
        ("SingleLineInfilling/HumanEval/3/L0", "SingleLineInfilling/HumanEval/3"),
    ):
        assert origin_of(name) == Example(name, 0, "", "").origin == file


def test_what_is_copied_is_the_input_and_not_the_words_around_it():
    inputs = [f"x = {i}\n" + "y = x\n" * i for i in range(4)]

    def copies(prompts: list[str], references: list[str] = inputs) -> list[str]:
        pairs = zip(prompts, references, strict=True)
        return copied([Example("", i, p, r) for i, (p, r) in enumerate(pairs)])

    assert copies(inputs) == inputs
    assert copies([alpaca_prompt("Improve this code.", text) for text in inputs]) == inputs
    assert copies([alpaca_prompt(f"Improve {i}.", text) for i, text in enumerate(inputs)]) == inputs
    wrapped = [f"Improve this:\n```\n{text}\n```\nAnswer:\n" for text in inputs]
    assert [text.strip() for text in copies(wrapped)] == [text.strip() for text in inputs]
    # Words on the input's own line, and instructions that are not all alike.
    inputs = ["value of one", "the second", "33", "fourth, too"]
    assert copies([f"Repeat exactly: {text} ->" for text in inputs], inputs) == inputs
    two = [f"{'Say this:' if i % 2 else 'Once more, please:'}\n{text}\n" for i, text in enumerate(inputs)]
    assert copies(two, inputs) == inputs
    inputs = [f"def f{i}():\n    return {i}" for i in range(4)]
    three = [f"{'Refactor the code below. ' * (1 + i % 3)}\n\n{text}" for i, text in enumerate(inputs)]
    assert copies(three, inputs) == inputs
    inputs = [f"x = {i}\n" + "y = x\n" * i for i in range(4)]
    # Lines that all inputs share are theirs where the references keep them.
    headed = [f"import os\n{text}" for text in inputs]
    assert copies(headed, headed) == headed
    assert last_lines([Example("", 0, "a\n  b", "c"), Example("", 0, "d", "e")]) == ["  b", "d"]


def test_the_nearest_training_example_answers_for_its_like(tmp_path: Path):
    """Each test row has one training row that differs in a digit, under another name."""
    rows = [row(number) for number in range(40)]
    twins = [{k: v.replace("+ ", "+ 9", 1) for k, v in one.items()} for one in rows]
    for split, part in (("train", twins), ("validation", [row(90), row(91)]), ("test", rows)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in part), "utf-8")
    config = DataConfig(str(tmp_path), cache=str(tmp_path / "cache"), workers=1)
    data = prepare_data(config, BYTES)
    examples = pair_examples(data.test, BYTES, 25, seed=3)
    answers = dict(zip((one["input"] for one in rows), (one["output"] for one in twins), strict=True))
    found = nearest(examples, data.test, data.train, BYTES)
    assert found == [answers[example.prompt] for example in examples]


def test_a_gap_is_asked_for_as_training_shows_it_and_has_no_copy(tmp_path: Path):
    rows = [
        {"prefix": f"def f{i}(x):\n    ", "suffix": f"    return y + {i}\n", "middle": f"y = {i} * x\n"}
        for i in range(40)
    ]
    data = prepared(tmp_path, rows, STARCODER)
    examples = pair_examples(data.test, STARCODER, 100)
    assert len(examples) > 4
    for e in examples:
        i = e.prompt[5 : e.prompt.index("(")]
        assert {"prefix": e.prompt, "suffix": e.suffix, "middle": e.reference} == rows[int(i)]
        stored = data.test.document(e.where)[: int(data.test.prompt_lengths[e.where])].tolist()
        found = completion_request(STARCODER, e, 20, 200)
        assert found.prompt == Prompt(fim_prompt_ids(STARCODER, e.prompt, e.suffix or "")) == Prompt(stored)
        assert found.ends == fim_end_ids(STARCODER) and STARCODER.eos_id in found.ends
    assert copied(examples) == [""] * len(examples)
    assert all("y = " in text for text in nearest(examples, data.test, data.train, STARCODER))
    record = scored(PAIRS, examples, systems(examples, [e.reference for e in examples]), ["exact_match"])
    assert record["samples"][0]["suffix"] == examples[0].suffix
    assert list(differences(json.loads(json.dumps(record)))) == []


# --- completions -------------------------------------------------------------------------------------


def test_a_prompt_keeps_its_place_and_leaves_room(data):
    example = Example("", 0, "a" * 40, "b")
    whole = BYTES.prompt_ids(example.prompt)
    assert completion_request(BYTES, example, 20, 100)[:2] == (Prompt(whole), 20)
    assert completion_request(BYTES, example, 90, 100)[:2] == (Prompt(whole), 100 - len(whole))
    # Never less than half of the row for either, if both want it.
    (ids, *_), limit, _, trimmed = completion_request(BYTES, example, 90, 60)
    assert trimmed and not completion_request(BYTES, example, 20, 100).trimmed
    assert (len(ids), limit) == (30, 30)
    assert ids == [whole[0], *whole[-29:]]
    assert all(
        len(completion_request(BYTES, e, 500, 64).prompt.ids) + completion_request(BYTES, e, 500, 64).limit
        == 64
        for e in pair_examples(data.test, BYTES, 9)
    )


def test_completions_do_not_depend_on_what_shares_a_batch(data, model):
    """Prompts of unequal length have unequal limits here, since both fill the row."""
    examples = pair_examples(data.test, BYTES, 6)
    four, one = (CompletionSettings(70, 120, FP32, batch_size) for batch_size in (4, 1))
    made = complete(model, BYTES, examples, uncut, four)
    assert made == complete(model, BYTES, examples, uncut, one)
    assert len({completion_request(BYTES, e, 70, 120).limit for e in examples}) > 1
    assert not any(e.prompt[:20] in text for e, text in zip(examples, made.texts, strict=True))


def test_the_ngram_model_goes_on_with_its_likeliest_token_until_eos(data):
    baseline = train_ngram(data.train)
    examples, limit = pair_examples(data.test, BYTES, 4), 30
    expected, long = [], 0
    for example in examples:
        before, new = BYTES.prompt_ids(example.prompt), []
        while len(new) < limit and BYTES.eos_id not in new:
            new.append(int(baseline.predict(np.array(before + new), 1)[0]))
        expected.append(BYTES.decode(before + new)[len(example.prompt) :])
        long += BYTES.eos_id not in new
    assert ngram_complete(baseline, BYTES, examples, uncut, limit, 1000) == Predictions(expected, long)
    assert longest_completion(data.test) == max(
        len(BYTES.encode(e.reference)) + 1 for e in pair_examples(data.test, BYTES, 1000)
    )


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, data, model) -> Path:
    folder = tmp_path / "run"
    settings = DataConfig(
        str(data.folder.parent.parent / "rows.jsonl"),
        validation_one_in=4,
        test_one_in=3,
        cache=str(tmp_path / "cache"),
        workers=1,
    )
    config = replace(Config(), data=settings, model=model.config)
    BYTES.save(folder / "tokenizer")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), "utf-8")
    fingerprints = {"data": data.fingerprint, "tokenizer": BYTES.fingerprint, "code": code_fingerprint()}
    (folder / "fingerprints.json").write_text(json.dumps(fingerprints), "utf-8")
    save_checkpoint(folder / "checkpoints", 7, model, {}, 2.5, keep=False)
    return folder


def evaluated(run: Path, **settings: Any) -> Path:
    """The eval.json of the run."""
    asked = EvalConfig(str(run), cache=str(run.parent / "cache"), precision="fp32", **settings)
    return evaluation.write_results(evaluation.evaluate(asked), asked)


def test_a_run_of_examples_is_scored_on_its_test_side_beside_all_baselines(run, data, capsys):
    path = evaluated(run, samples=6, max_new_tokens=8)
    result = json.loads(path.read_text("utf-8"))
    suite = result["suite"]
    assert list(suite["scores"]) == ["model", "n-gram", "copy", "nearest", "empty"]
    examples = pair_examples(data.test, BYTES, 6)
    for sample, example in zip(suite["samples"], examples, strict=True):
        assert (sample["prompt"], sample["reference"]) == (example.prompt, example.reference)
        assert sample["predictions"]["copy"] == example.prompt
    assert set(suite["ran_long"]) == {"model", "n-gram"}
    shown = evaluation.table(result)
    assert "completions: 6 held-out examples" in shown
    assert "ran into the limit" in shown
    assert rescore(path) == 0
    told = capsys.readouterr().out
    assert told.startswith("equal: token scores of model, n-gram\n")
    assert "\nequal: 20 scores of model, n-gram, copy, nearest, empty from 6" in told


def test_saved_predictions_score_what_the_file_says_and_an_edited_number_is_named(tmp_path, data, capsys):
    """A published 22.88 whose own predictions scored 20.88."""
    examples, path = pair_examples(data.test, BYTES, 6), tmp_path / "eval.json"
    metrics = ("exact_match", "edit_similarity", "chrf")
    whole = {"suite": scored(PAIRS, examples, systems(examples, halves(examples)), metrics)}
    path.write_text(json.dumps(whole), "utf-8")
    assert rescore(path) == 0
    assert capsys.readouterr().out == "equal: 9 scores of model, copy, empty from 6 samples each\n"

    def said_of(change) -> str:
        changed = copy.deepcopy(whole)
        change(changed["suite"])
        path.write_text(json.dumps(changed), "utf-8")
        assert rescore(path) == 1
        out = capsys.readouterr().out
        assert out.endswith("by another method, its scores may not\n")  # it names no version of the code
        return out.rpartition("this file is of another version")[0]

    true = whole["suite"]["scores"]["model"]["chrf"]["mean"]
    said = said_of(lambda suite: suite["scores"]["model"]["chrf"].update(mean=true + 2))
    assert said == f"pairs, model, chrf: the file says {true + 2:.2f}, and its predictions score {true:.2f}\n"
    said = said_of(lambda suite: suite["scores"]["model"]["chrf"].update(mean=true + 1e-5))
    assert f"{true + 1e-5:.5f}"[:-1] in said
    said = said_of(lambda suite: suite["scores"]["copy"]["chrf"].update(low=0.5))
    assert said.startswith("pairs, copy, chrf: the file has the interval [0.5000, ")
    said = said_of(
        lambda suite: suite["samples"][2]["predictions"].update(model=suite["samples"][2]["reference"])
    )
    assert "pairs, model, exact_match: the file says 0.00, and its predictions score 16.67" in said
    said = said_of(
        lambda suite: suite["verdicts"]["chrf"]["against"].update(copy="better than copying by 9.9")
    )
    assert "the file says 'better than copying by 9.9', and its predictions are" in said
    said = said_of(lambda suite: suite["verdicts"]["chrf"].update(best="empty"))
    assert "names empty as the best baseline" in said
    said = said_of(
        lambda suite: (
            suite["signatures"].update(chrf="chrF of\x1b[2J old"),
            suite["scores"]["model"]["chrf"].update(mean=1.0),
        )
    )
    assert "pairs, chrf: by chrF of?[2J old in the file, and by chrf|" in said
    said = said_of(lambda suite: suite["verdicts"]["chrf"]["differences"]["copy"].update(needed=7, high=9.0))
    assert "pairs, chrf: of the difference from copy the file says high 9.0, and its predictions " in said
    assert "of the difference from copy the file says needed 7, and its predictions " in said
    said = said_of(lambda suite: suite["verdicts"]["chrf"]["differences"]["copy"].update(needed=None))
    assert "the file says needed None, and its predictions " in said or "equal" in said
    # What was asked in other words is held to its predictions too.
    worded = copy.deepcopy(whole["suite"])
    worded["scores"]["model"]["chrf"]["mean"] += 1
    path.write_text(json.dumps(whole | {"prompts": {"simple": worded}}), "utf-8")
    assert rescore(path) == 1
    assert capsys.readouterr().out.startswith("pairs, simple prompts, model, chrf: the file says ")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda suite: suite["samples"][1]["predictions"].pop("copy"), "the record of a suite"),
        (lambda suite: suite["samples"][1].update(reference=None), "a prediction or a reference is not text"),
        (lambda suite: suite.update(suite="unheard of"), "the record of a suite"),
        (lambda suite: suite["signatures"].pop("chrf"), "chrf has a score and no signature"),
        (lambda suite: suite["scores"]["model"]["chrf"].update(mean="much"), "the record of a suite"),
        (lambda suite: suite["samples"].clear(), "0 pairs to score"),
        (lambda suite: suite.update(language=["python"]), "no grammar of"),
        (lambda suite: suite.pop("verdicts"), "the record of a suite"),
        (lambda suite: suite.update(seed=None), "the record of a suite"),
    ],
)
def test_a_record_that_is_not_whole_is_one_sentence(data, change, sentence):
    examples = pair_examples(data.test, BYTES, 4)
    record = json.loads(json.dumps(scored(PAIRS, examples, systems(examples, halves(examples)))))
    assert list(differences(record)) == []
    change(record)
    with pytest.raises(ValueError, match=sentence):
        list(differences(record))


def test_the_command_rescores_without_torch_and_exits_with_1_for_an_edited_number(tmp_path: Path, data):
    examples = pair_examples(data.test, BYTES, 4)
    record = scored(PAIRS, examples, systems(examples, halves(examples)))
    path = tmp_path / "eval.json"

    def command() -> subprocess.CompletedProcess:
        words = [sys.executable, "-X", "importtime", "eval.py", "--rescore", str(path)]
        return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)

    path.write_text(json.dumps({"suite": record}), "utf-8")
    done = command()
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "equal"), done.stderr
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    record["scores"]["model"]["edit_similarity"]["mean"] += 2
    path.write_text(json.dumps({"suite": record}), "utf-8")
    done = command()
    assert done.returncode == 1
    assert done.stdout.startswith("pairs, model, edit_similarity: the file says ")
    path.write_text("[]", "utf-8")
    done = command()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {path} holds no predictions")


def test_predictions_made_elsewhere_are_scored_in_the_place_of_the_models(run, data):
    examples = pair_examples(data.test, BYTES, 6)
    file = run.parent / "theirs.jsonl"
    lines = [{"id": e.id, "prediction": e.reference} for e in examples]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", "utf-8")
    path = evaluated(run, samples=6, predictions=str(file))
    assert path == Path(f"{file}.eval.json")
    result = json.loads(path.read_text("utf-8"))
    assert list(result["suite"]["scores"]) == ["given", "n-gram", "copy", "nearest", "empty"]
    assert result["suite"]["scores"]["given"]["exact_match"]["mean"] == 100
    assert result["suite"]["verdicts"]["exact_match"]["against"]["copy"].startswith("better than copying")
    assert "given" in evaluation.table(result)
    assert not (run / "eval.json").exists()
    assert rescore(path) == 0


def test_predictions_of_another_length_or_order_are_one_sentence_and_exit_2(run, data, capsys):
    examples = pair_examples(data.test, BYTES, 6)
    file = run.parent / "theirs.jsonl"
    file.write_text('{"completion": "x"}\n' * 5, "utf-8")
    settings = EvalConfig(str(run), cache=str(run.parent / "cache"), samples=6, predictions=str(file))
    with pytest.raises(SystemExit) as exit, one_sentence():
        evaluation.write_evaluation(settings)
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert "holds 5 predictions, and the suite has 6 examples" in said.err
    file.write_text('{"completion": "x"}\n' * 6, "utf-8")
    assert read_predictions(file, examples) == ["x"] * 6
    for last, message in (
        ({"prediction": "x", "id": examples[0].id}, "line 6 is for"),
        ({"prediction": 3}, "line 6 has no text"),
        (["x"], "line 6 has no text"),
    ):
        file.write_text('{"completion": "x"}\n' * 5 + json.dumps(last), "utf-8")
        with pytest.raises(ValueError, match=message):
            read_predictions(file, examples)
    file.write_text('{"completion": "x"}\n' * 5 + "{", "utf-8")
    with pytest.raises(ValueError, match="line 6 is not JSON"):
        read_predictions(file, examples)
    file.write_text('{"completion": "x"}\n' * 5 + '{"completion": "x", "completion": "y"}', "utf-8")
    with pytest.raises(ValueError, match="line 6 has two readings: the key 'completion' stands twice"):
        read_predictions(file, examples)
    file.write_bytes(b'{"completion": "x"}\n' * 5 + b'{"completion": "\xff"}')
    with pytest.raises(ValueError, match=r"line 6 is no UTF-8 \(byte 0xff\): write the file in UTF-8"):
        read_predictions(file, examples)
    with pytest.raises(ValueError, match="cannot be read"):
        read_predictions(run.parent / "nowhere.jsonl", examples)

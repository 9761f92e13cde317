"""Evaluation on a small corpus, with a byte tokenizer and a model made here."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import commands
import numpy as np
import pytest
import torch
import yaml

import suites.documents
import suites.tokens
from architecture import Decoder
from config import Config, DataConfig, ModelConfig, one_sentence
from config.files import REPOSITORY, code_fingerprint
from dataset import PreparedData, prepare_data, validation_batches
from metrics.intervals import interval
from modules.precision import choose_precision
from suites import evaluate as evaluation
from suites.documents import add_intervals
from suites.settings import EvalConfig
from suites.tokens import model_scores, ngram_scores, tokens_of, train_ngram
from tokenizer import CodeTokenizer, Tokenizer
from training.checkpoint import save_checkpoint
from training.loss import score

FP32 = choose_precision(torch.device("cpu"), "fp32")
BYTES = CodeTokenizer([], [], [])  # without pieces every byte is a token
NAMES = ("alpha", "beta", "gamma", "delta", "ßeta")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source(number: int) -> str:
    """A Python file of some 10 to 25 lines, blank lines and classes included."""
    draw = np.random.default_rng(number)
    parts = [f'"""Module {number}."""\n\nimport os\n']
    for i in range(draw.integers(1, 4)):
        a, b = draw.choice(NAMES, 2)
        parts.append(
            f"\n\ndef {a}_{i}({b}, x={number}):\n    '''Add {a}.'''\n    y = {b} + x\n\n    return y * {i}\n"
        )
    return "".join(parts)


def prepared(folder: Path, tokenizer: Tokenizer = BYTES, fim_rate: float = 0.0) -> PreparedData:
    """Forty such files, split and tokenised."""
    (folder / "corpus").mkdir()
    for number in range(40):
        (folder / "corpus" / f"m{number}.py").write_text(source(number), "utf-8")
    config = DataConfig(
        str(folder / "corpus"), validation_one_in=4, test_one_in=4, cache=str(folder / "cache"), workers=1
    )
    return prepare_data(replace(config, fim_rate=fim_rate), tokenizer)


def run_of(folder: Path, data: PreparedData, model: Decoder, tokenizer: Tokenizer = BYTES) -> Path:
    """A finished run of `model` in `folder`, with a corpus of its own, which a test may change."""
    (folder / "corpus").mkdir()
    for number in range(40):
        (folder / "corpus" / f"m{number}.py").write_text(source(number), "utf-8")
    settings = DataConfig(
        str(folder / "corpus"), validation_one_in=4, test_one_in=4, cache=str(folder / "cache"), workers=1
    )
    config = replace(Config(), data=settings, model=model.config)
    path = folder / "run"
    tokenizer.save(path / "tokenizer")
    (path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), "utf-8")
    code = code_fingerprint()
    fingerprints = {"data": data.fingerprint, "tokenizer": tokenizer.fingerprint, "code": code}
    (path / "fingerprints.json").write_text(json.dumps(fingerprints), "utf-8")
    save_checkpoint(path / "checkpoints", 7, model, {}, 2.5, keep=False)
    return path


def random_model() -> Decoder:
    torch.manual_seed(0)
    shape = ModelConfig(BYTES.vocab_size, block_size=128, n_layer=2, n_head=2, n_embd=16, init="normal")
    decoder = Decoder(shape)
    with torch.no_grad():  # As initialised, it would predict nearly the same everywhere.
        for parameter in decoder.parameters():
            parameter.normal_(std=0.4)
    return decoder.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_model()


def documents_of(store) -> list[np.ndarray]:
    return [store.document(number) for number in range(store.n_documents)]


# --- token scores ------------------------------------------------------------------------------------


def test_model_scores_equal_those_of_each_file_alone(data, model):
    store = data.test
    log_p, rank = [], []
    with torch.no_grad():
        for document in documents_of(store):
            tokens = torch.from_numpy(document)[None]
            whole = model(tokens[:, :-1])[0].double().log_softmax(-1)
            target = whole.gather(1, tokens[0, 1:, None])
            log_p += target[:, 0].tolist()
            rank += (whole > target).sum(1).tolist()
    n_bytes = sum(len(source(int(name[1:-3])).encode()) for name in store.names)
    # One row as long as everything: packed side by side, no file sees another.
    found = score(model, validation_batches(store, 1, store.n_tokens), FP32)
    assert found.tokens == len(log_p)
    assert found.bits_per_byte(store.n_bytes) == pytest.approx(-sum(log_p) / np.log(2) / n_bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(-np.mean(log_p)), rel=1e-5)
    assert (found.top1, found.top5) == (np.mean(np.array(rank) < 1), np.mean(np.array(rank) < 5))


def test_model_scores_do_not_depend_on_the_batch_size(data, model):
    scores = [score(model, validation_batches(data.test, n, 64), FP32) for n in (1, 5, 1000)]
    for found in scores[1:]:
        assert found.nats == pytest.approx(scores[0].nats, rel=1e-6)
        assert (found.tokens, found.top1, found.top5) == (scores[0].tokens, scores[0].top1, scores[0].top5)


def test_ngram_scores_are_over_the_same_tokens_and_equal_its_predictions(data, model, monkeypatch):
    store, baseline = data.test, train_ngram(data.train)
    found, sums = ngram_scores(baseline, store, 64)
    by_document = sums["nats"]
    assert (sums["top1"].sum(), sums["top5"].sum()) == (found.top1 * found.tokens, found.top5 * found.tokens)
    assert found.tokens == score(model, validation_batches(store, 4, 64), FP32).tokens
    alone = [-baseline.log_probs([document]).sum() for document in documents_of(store)]
    assert by_document == pytest.approx(alone, rel=1e-12)
    nats, hits = 0.0, []
    for document in documents_of(store):
        nats -= baseline.log_probs([document]).sum()
        top = baseline.top([document], 5)
        hits += [top[i].tolist().index(x) if x in top[i] else 9 for i, x in enumerate(document[1:])]
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert (found.top1, found.top5) == (np.mean(np.array(hits) < 1), np.mean(np.array(hits) < 5))
    monkeypatch.setattr(suites.tokens, "SCORED_TOKENS", 300)
    assert ngram_scores(baseline, store, 64)[0].nats == pytest.approx(nats, rel=1e-12)


def test_the_baseline_is_far_from_chance_and_better_on_its_own_training_files(data):
    baseline = train_ngram(data.train)
    held_out, seen = (ngram_scores(baseline, split, 64)[0] for split in (data.test, data.train))
    assert seen.loss < held_out.loss < 0.5 * np.log(BYTES.vocab_size)


def test_a_very_large_corpus_trains_the_baseline_on_spread_documents(data, monkeypatch):
    monkeypatch.setattr(suites.tokens, "BASELINE_TOKENS", data.train.n_tokens // 3)
    part = ngram_scores(train_ngram(data.train), data.test, 64)[0]
    monkeypatch.undo()
    whole = ngram_scores(train_ngram(data.train), data.test, 64)[0]
    assert whole.loss < part.loss


# --- documents and intervals -------------------------------------------------------------------------


@pytest.mark.parametrize("row_length", [31, 700, 5000])
def test_nats_of_documents_are_those_of_each_file_alone_where_rows_do_not_cut_them(data, model, row_length):
    store = data.test
    scores, sums = model_scores(model, store, 2, row_length, FP32)
    nats = sums["nats"]
    assert nats.sum() == pytest.approx(scores.nats, rel=1e-6)
    assert tokens_of(store, row_length).tolist() == [len(document) - 1 for document in documents_of(store)]
    assert tokens_of(store, row_length).sum() == scores.tokens
    first_row, last_row = store.offsets[:-1] // row_length, (store.offsets[1:] - 2) // row_length
    whole = np.flatnonzero(first_row == last_row)
    assert len(whole) >= {31: 0, 700: 4, 5000: store.n_documents}[row_length]
    assert row_length != 700 or first_row[whole].max() >= 2  # beyond the first batch
    with torch.no_grad():
        for number in whole.tolist():
            tokens = torch.from_numpy(store.document(number))[None]
            log_p = model(tokens[:, :-1])[0].double().log_softmax(-1)
            alone = -log_p.gather(1, tokens[0, 1:, None]).sum().item()
            assert nats[number] == pytest.approx(alone, rel=1e-5)
            place = (log_p > log_p.gather(1, tokens[0, 1:, None])).sum(1)
            for key, k in (("top1", 1), ("top5", 5)):
                assert sums[key][number] == pytest.approx((place < k).sum().item(), abs=1)  # a near tie
    assert sums["top1"].sum() == pytest.approx(scores.top1 * scores.tokens)
    assert sums["top5"].sum() == pytest.approx(scores.top5 * scores.tokens)


def test_intervals_of_the_loss_resample_documents_and_name_what_they_tell_apart():
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 400, 60)
    level = draw.normal(2.0, 0.3, 60)
    nats = {
        "model": level * tokens,
        "base": (level + 0.02 + draw.normal(0, 0.01, 60)) * tokens,
        "n-gram": (level + draw.normal(0, 0.3, 60)) * tokens,
    }
    result: dict[str, Any] = {name: {} for name in nats}
    documents = {
        "names": [f"f{i}" for i in range(60)],
        "tokens": tokens.tolist(),
        "bytes": (3 * tokens).tolist(),
        "nats": {name: values.tolist() for name, values in nats.items()},
    }
    add_intervals(result, documents, seed=0)
    own = result["model"]["intervals"]
    loss = nats["model"].sum() / tokens.sum()
    assert own["loss"]["mean"] == pytest.approx(loss, rel=1e-12)
    assert own["bits_per_byte"]["mean"] == pytest.approx(loss / np.log(2) / 3, rel=1e-12)
    assert own["loss"]["low"] < loss - 0.03 < loss + 0.03 < own["loss"]["high"]
    # A small difference on each document is seen through what they differ by among themselves.
    found = result["token_verdicts"]["loss"]
    assert found["base"]["distinguishable"] and found["base"]["high"] < 0
    size = -found["base"]["mean"]
    assert found["base"]["verdict"].startswith(f"better than the base model by {size:.4f} [0.0")
    assert found["base"]["verdict"].endswith("on 60 documents")
    assert not found["n-gram"]["distinguishable"]
    assert found["n-gram"]["verdict"].startswith(
        "not distinguishable from the n-gram model on 60 documents; "
    )
    assert result["documents"] is documents
    again: dict[str, Any] = {name: {} for name in nats}
    add_intervals(again, documents, seed=0)
    assert again == result


def test_documents_of_one_file_are_resampled_together():
    def found(names: list[str]) -> dict[str, Any]:
        nats = np.repeat(np.arange(1.0, 21.0), 4)  # alike within a file
        documents = {"names": names, "tokens": [2] * 80, "bytes": [5] * 80}
        result: dict[str, Any] = {"model": {}, "n-gram": {}}
        add_intervals(result, documents | {"nats": {"model": nats, "n-gram": nats + 1}}, 0)
        return result

    files, lines = (found([name(i) for i in range(80)]) for name in (lambda i: f"f{i // 4}:{i}", str))
    (wide, one), (narrow, other) = (
        (r["model"]["intervals"]["loss"], r["token_verdicts"]["loss"]["n-gram"]["verdict"])
        for r in (files, lines)
    )
    assert wide["mean"] == pytest.approx(narrow["mean"])
    assert (wide["n"], narrow["n"]) == (20, 80)
    assert (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"]) == pytest.approx(2, rel=0.2)
    assert one.endswith("on 20 files") and other.endswith("on 80 documents")
    # Of one file alone nothing is said of others.
    assert found([f"f.py:{i}" for i in range(80)]) == lines | {"documents": ANY}


def test_very_many_documents_are_resampled_in_groups_of_neighbours(monkeypatch):
    monkeypatch.setattr(suites.documents, "MOST_UNITS", 7)
    result: dict[str, Any] = {"model": {}, "n-gram": {}}
    nats = np.arange(1.0, 41.0)
    documents = {"names": [f"f{i}" for i in range(40)], "tokens": [2] * 40, "bytes": [5] * 40}
    add_intervals(result, documents | {"nats": {"model": nats, "n-gram": nats + 1}}, 0)
    assert result["model"]["intervals"]["loss"]["n"] == 7
    assert result["model"]["intervals"]["loss"]["mean"] == pytest.approx(nats.sum() / 80)
    one: dict[str, Any] = {"model": {}, "n-gram": {}}
    documents = {"names": ["f"], "tokens": [2], "bytes": [5], "nats": {"model": [1.0], "n-gram": [2.0]}}
    add_intervals(one, documents, 0)
    assert "intervals" not in one["model"] and "token_verdicts" not in one


@pytest.mark.slow
def test_intervals_of_the_loss_cover_it_93_to_97_percent_of_the_time():
    draw = np.random.default_rng(0)
    covered, trials = 0, 2000
    for _ in range(trials):
        tokens = draw.integers(20, 400, 60).astype(float)
        nats = tokens * draw.gamma(16, 2.0 / 16, 60)  # 2 nats a token, whatever the document's length
        rows = np.column_stack([nats, tokens, tokens])
        found = interval(rows, suites.documents.OF_SUMS["loss"], int(draw.integers(2**31)), resamples=1000)
        covered += found.low <= 2.0 <= found.high
    assert 0.93 <= covered / trials <= 0.97


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, data, model) -> Path:
    """A finished run in a corpus of its own, which a test may change."""
    return run_of(tmp_path, data, model)


def here(run: Path, **settings: Any) -> EvalConfig:
    """Settings that keep the cache out of the repository."""
    return EvalConfig(str(run), cache=str(run.parent / "cache"), **settings)


def command(*words: str | Path | int) -> subprocess.CompletedProcess[str]:
    return commands.command("eval.py", *words, cwd=REPOSITORY)


def test_the_command_prints_the_table_and_writes_what_it_printed(run, data, model):
    cache = run.parent / "cache"
    words = ("--samples", 8, "--max_new_tokens", 16, "--precision", "fp32", "--cache", cache)
    whole = [sys.executable, "eval.py", "--checkpoint", str(run), *map(str, words)]
    done = subprocess.run(whole, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "eval.json").read_text("utf-8"))
    expected = score(model, validation_batches(data.test, 16, 128), FP32)
    assert result["model"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert result["step"] == 7
    assert len(result["suite"]["samples"]) == 8
    assert "--samples 8" in result["command"]
    rows = {line[: line.find("  ")]: line for line in done.stdout.splitlines()}
    for key, name in (("loss", "loss, nats a token"), ("bits_per_byte", "bits per byte")):
        for side in ("model", "n-gram"):
            assert f" {result[side][key]:.4f} " in rows[name]
            ends = result[side]["intervals"][key]
            assert ends["low"] < result[side][key] < ends["high"]
            assert ends["mean"] == pytest.approx(result[side][key], rel=1e-6)
            assert f"[{ends['low']:.4f}, {ends['high']:.4f}]" in done.stdout
    # Accuracies and perplexity have their intervals too, each below its row.
    lines = done.stdout.splitlines()
    for name, key, scale in (
        ("perplexity", None, 1),
        ("top-1 accuracy", "top1", 100),
        ("top-5", "top5", 100),
    ):
        (at,) = (i for i, line in enumerate(lines) if line.startswith(name))
        low, high = (float(end.strip("[],%")) for end in lines[at + 1].split()[2:4])
        ends = result["model"]["intervals"][key or "loss"]
        wanted = [scale * ends[end] if key else np.exp(ends[end]) for end in ("low", "high")]
        assert [low, high] == pytest.approx(wanted, abs=0.01)
    assert f"\nloss: {result['token_verdicts']['loss']['n-gram']['verdict']}\n" in done.stdout
    systems = ["model", "n-gram", "copy", "nearest", "empty"]
    assert list(result["suite"]["scores"]) == systems
    for by_name in result["suite"]["scores"].values():
        for found in by_name.values():
            assert f"{found['mean']:.1f} [{found['low']:.1f}, {found['high']:.1f}]" in done.stdout
    verdict = result["suite"]["verdicts"]["edit_similarity"]
    best = max(systems[1:], key=lambda name: result["suite"]["scores"][name]["edit_similarity"]["mean"])
    assert verdict["best"] == best
    assert f"edit_similarity: {verdict['against'][best]}" in done.stdout
    for sample in result["suite"]["samples"]:
        assert sample["predictions"]["copy"] == sample["prompt"].split("\n")[-1]


def test_an_evaluation_can_be_repeated_and_names_a_single_checkpoint(run):
    settings = here(run, samples=6, max_new_tokens=8, precision="fp32", batch_size=3)
    first = evaluation.evaluate(settings)
    assert len(first.pop("kept")) == 1

    def again(settings: EvalConfig) -> dict[str, Any]:
        found = evaluation.evaluate(replace(settings, cache=f"{settings.cache}-again"))
        assert len(found.pop("kept", [""])) == 1
        shutil.rmtree(f"{settings.cache}-again")
        return found

    assert first == again(settings)
    one = replace(settings, checkpoint=str(run / "checkpoints" / "step-00000007"))
    assert first == again(one)
    without = evaluation.evaluate(replace(settings, samples=0))
    assert "suite" not in without
    assert without["model"] == first["model"]
    assert "next line" in evaluation.table(first)
    assert "next line" not in evaluation.table(without)


def refusal(settings: EvalConfig, capsys) -> str:
    """Return the one line that the command prints on its error output before it exits with 2."""
    capsys.readouterr()  # What an evaluation before it said.
    with pytest.raises(SystemExit) as exit, one_sentence():
        evaluation.write_evaluation(settings)
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert all(line.startswith("source: ") for line in said.out.splitlines())  # what is read
    lines = [line for line in said.err.splitlines() if not line.startswith("preflight, first use")]
    assert len(lines) == 1
    return said.err


def test_a_suite_that_cannot_be_asked_is_told_before_others_take_time(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "add_token_scores", lambda *_: pytest.fail("scored before"))
    said = refusal(here(run, suite="next_token,next_line,fim", samples=4), capsys)
    assert "has no fill-in-the-middle tokens" in said


def test_changed_data_are_refused(run, capsys):
    train = run.parent / "corpus" / "m0.py"
    train.write_text(train.read_text("utf-8") + "x = 1\n", "utf-8")
    said = refusal(here(run), capsys)
    assert "fingerprint" in said
    assert "restore the files" in said
    assert not (run / "eval.json").exists()


def test_a_checkpoint_of_another_tokenizer_is_refused(run, capsys):
    other = CodeTokenizer(["def"], [], [])
    other.save(run / "tokenizer")
    was = json.loads((run / "fingerprints.json").read_text("utf-8"))["tokenizer"]
    said = refusal(here(run), capsys)
    assert (
        f"its fingerprint is {other.fingerprint[:12]}, and that of training was {was[:12]}; restore it"
        in said
    )


def test_a_run_without_a_checkpoint_is_named(run, capsys):
    (run / "checkpoints" / "step-00000007" / "manifest.json").unlink()
    assert "no finished checkpoint" in refusal(here(run), capsys)
    assert "holds no run" in refusal(EvalConfig(str(run / "nowhere")), capsys)
    assert "holds no run" in refusal(EvalConfig(str(run.parent)), capsys)


def change_config(run: Path, group: str, **values: Any) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    saved[group] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(saved), "utf-8")


@pytest.mark.parametrize("block_size", [2, 3, 16])
def test_files_without_a_line_that_fits_leave_the_line_scores_out_and_say_so(run, block_size):
    change_config(run, "model", block_size=block_size)
    result = evaluation.evaluate(here(run, precision="fp32"))
    assert "suite" not in result
    assert "an interval needs at least 2" in evaluation.table(result)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_loss_that_is_not_finite_is_one_sentence_and_no_table(run, model, capsys, value):
    broken = Decoder(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.head.weight[1:].fill_(value)
        broken.head.weight[1::2] *= -1
    save_checkpoint(run / "checkpoints", 8, broken, {}, 1.0, keep=False)
    said = refusal(here(run, precision="fp32"), capsys)
    assert str(run) in said
    assert "train again" in said
    assert not (run / "eval.json").exists()


def test_moved_files_are_found_and_other_ones_refused(run, capsys):
    settings = here(run, samples=0, precision="fp32")
    before = evaluation.evaluate(settings)
    moved = (run.parent / "corpus").rename(run.parent / "moved")
    assert "corpus" in refusal(settings, capsys)
    assert evaluation.evaluate(replace(settings, source=str(moved))) == before
    (moved / "m0.py").write_text("x = 1\n", "utf-8")
    assert "fingerprint" in refusal(replace(settings, source=str(moved)), capsys)
    gone = refusal(replace(settings, source=str(moved / "gone")), capsys)
    assert "set --source to a folder" in gone and "--data.source" not in gone


def test_a_strangers_config_does_not_say_where_the_cache_is_nor_how_many_work(run, monkeypatch):
    change_config(run, "data", cache=str(run.parent / "theirs"), workers=10**6)
    seen = []

    def noted(config, tokenizer):
        seen.append(config)
        return prepare_data(config, tokenizer)

    monkeypatch.setattr("suites.evaluated.prepare_data", noted)
    evaluation.evaluate(here(run, samples=0, precision="fp32"))
    assert [(c.cache, c.workers) for c in seen] == [(str(run.parent / "cache"), 0)]
    assert not (run.parent / "theirs").exists()
    assert EvalConfig("x").cache == "cache"


def test_results_are_written_with_what_repeats_them_and_never_as_invalid_json(run):
    settings = here(run, samples=0)
    result = {"run": str(run), "step": 3, "side": "test", "allowed faults": {}}
    path = evaluation.write_results(result, settings)
    written = json.loads(path.read_text("utf-8"))
    assert path == run / "eval.json"
    assert written["settings"]["cache"] == settings.cache
    assert {"command", "versions", "evaluation_code", "step"} <= set(written)
    with pytest.raises(ValueError, match="JSON"):
        evaluation.write_results({"run": str(run), "loss": float("nan")}, settings)
    assert json.loads(path.read_text("utf-8")) == written


def test_token_scores_that_the_documents_do_not_have_are_named(run):
    evaluation.write_evaluation(here(run, samples=4, max_new_tokens=4, precision="fp32"))
    whole = json.loads((run / "eval.json").read_text("utf-8"))
    assert "equal: token scores of model, n-gram\n" in command("--rescore", run / "eval.json").stdout
    table = command("--compare", run, run).stdout
    for keys, value, said in (
        (("model", "loss"), 0.5, "model, loss: the file says 0.5, and its documents "),
        (("n-gram", "bits_per_byte"), 0.3, "n-gram, bits_per_byte: the file says 0.3, and"),
        (("model", "perplexity"), 2.0, "model, perplexity: the file says 2, and its documents "),
        (("model", "intervals", "loss", "low"), 0.1, "model, loss: the file has the interval "),
        (
            ("token_verdicts", "loss", "n-gram", "verdict"),
            "better",
            "loss: the file says 'better', and its documents",
        ),
        (("model", "intervals"), {}, "the token scores is no whole evaluation: it has no 'loss'"),
        (("documents", "tokens"), 3, "the token scores is no whole evaluation"),
    ):
        edited = json.loads(json.dumps(whole))
        place = edited
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (run / "eval.json").write_text(json.dumps(edited), "utf-8")
        done = command("--rescore", run / "eval.json")
        assert said in done.stdout + done.stderr and done.returncode in (1, 2), (keys, done)
        if keys[0] in ("model", "n-gram") and isinstance(value, float):
            assert command("--compare", run, run).stdout == table  # has the documents' own numbers


def test_a_look_at_a_few_samples_does_not_cost_the_evaluation_that_stood_there(run, capsys):
    def evaluate(**settings: Any) -> str:
        evaluation.write_evaluation(here(run, max_new_tokens=4, precision="fp32", **settings))
        return capsys.readouterr().out

    evaluate(samples=6)
    assert "other settings" not in evaluate(samples=6, batch_size=3)
    assert not (run / "eval-1.json").exists()
    whole, page = (run / "eval.json").read_bytes(), (run / "eval.html").read_bytes()
    few = evaluate(samples=4)
    assert f"the evaluation that stood there, of other settings, is {run / 'eval-1.json'} now" in few
    assert (run / "eval-1.json").read_bytes() == whole
    assert (run / "eval-1.html").read_bytes() == page
    assert len(json.loads((run / "eval.json").read_text("utf-8"))["suite"]["samples"]) == 4
    evaluate(samples=5, temperature=1.0)
    assert len(json.loads((run / "eval-2.json").read_text("utf-8"))["suite"]["samples"]) == 4
    # Nor that of another checkpoint in the same folder; the run by another name is no other.
    (run.parent / "link").symlink_to(run)
    out = run.parent / "out"
    evaluate(samples=5, out=str(out))
    evaluation.write_evaluation(
        replace(
            here(run.parent / "link", max_new_tokens=4, precision="fp32", samples=5, out=str(out)),
            cache=str(run.parent / "cache"),
        )
    )
    assert not (out / "eval-1.json").exists()
    step = str(run / "checkpoints" / "step-00000007")
    evaluation.write_evaluation(
        replace(here(run, max_new_tokens=4, precision="fp32", samples=5, out=str(out)), checkpoint=step)
    )
    assert (out / "eval-1.json").exists()
    # What is no evaluation is in nobody's way.
    (run / "eval.json").write_text('{"settings": 3}', "utf-8")
    evaluate(samples=6)
    assert not (run / "eval-3.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--run"),
        (("--checkpoint", "x", "--sampels", "3"), "did you mean --samples"),
        (("--checkpoint", "x", "--samples", "1"), "at least 2"),
        (("--checkpoint", "x", "--batch_size", "0"), "at least 1"),
        (("--checkpoint", "x", "--out", "/proc/x"), "/proc/x cannot be used"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(words, named):
    done = command(*words)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_help_answers_without_torch():
    words = [sys.executable, "-X", "importtime", "eval.py", "--help"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0
    assert "--checkpoint" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "config" in imported
    assert not imported & {"torch", "numpy", "dataset"}

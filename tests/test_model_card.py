"""The card of an exported model, its metadata, and models that are sent to the hub."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
import yaml
from conftest import FILES
from hub_server import TOKEN, Hub, hub_server
from huggingface_hub import ModelCard
from safetensors import safe_open
from test_finetune import base_in, config_in, other

import export as command
from data.sourcefiles import CORPUS
from serving.scores import known_scores
from training.begin import train
from training.export import export
from training.export_config import ExportConfig
from training.model_card import LIST, Exported, card_of
from training.report import report
from training.run import TrainedRun, load_run

pytestmark = pytest.mark.usefixtures("unguarded")

HOSTILE = "</td><script>x</script>|`[a](http://b)\n# c\x1b[2J\u202e\ud800"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with adapters, trained and reported once."""
    folder = tmp_path_factory.mktemp("card")
    for name, text in FILES.items():
        (folder / "corpus").mkdir(exist_ok=True)
        (folder / "corpus" / name).write_text(text, "utf-8")
    base = base_in(folder, folder / "corpus")
    manager = train(other(config_in(folder, base, folder / "corpus"), max_steps=3))
    report(manager)
    return manager.folder


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> TrainedRun:
    """A copy of that run without its report."""
    shutil.copytree(reported, tmp_path / "run")
    for name in ("eval.json", "overrides.json"):
        (tmp_path / "run" / name).unlink()
    return load_run(tmp_path / "run")


def evaluation(run: TrainedRun, **more: Any) -> dict[str, Any]:
    """Return an eval.json of a run's weights, as evaluation writes it, with one suite."""
    interval = {"mean": 1.25, "low": 1.0, "high": 1.5, "n": 9}
    scores = {"intervals": dict.fromkeys(("loss", "bits_per_byte", "top1", "top5"), interval)}
    suite = {
        "suite": "next_line",
        "signatures": {"exact_match": "x"},
        "scores": {"model": {"exact_match": interval}, "copy": {"exact_match": interval | {"mean": 2.0}}},
        "verdicts": {"exact_match": {"best": "copy", "against": {"copy": "worse than copying by 0.8"}}},
        "samples": [{"id": str(n)} for n in range(9)],
    }
    return {
        "fingerprints": {"weights": run.weights}, "step": 3, "side": "test", "files": 9, "bytes": 1234,
        "n-gram order": 6, "model": scores, "n-gram": scores, "base": scores, "suite": suite,
        "token_verdicts": {"loss": {"n-gram": {"verdict": "worse than the n-gram model by 0.1"}}},
    } | more  # fmt: skip


def card(run: TrainedRun, **more: Any) -> str:
    """Return the card of a run's model, whose body is Markdown that says nothing but text and tables."""
    base = run.config.train.base
    return card_of(Exported(run.model, run.tokenizer, "gpt_bigcode", run, base, **more))


def written(run: TrainedRun, name: str, values: Any) -> None:
    (run.folder / name).write_text(json.dumps(values), "utf-8")


# --- what the card says ---------------------------------------------------------------------------


def test_the_card_of_a_run_has_the_scores_that_its_report_made(reported: Path, tmp_path: Path) -> None:
    run, out = load_run(reported), tmp_path / "out"
    export(ExportConfig(str(out), str(run.folder), merge=True))
    found = ModelCard.load(out / "README.md")
    record = json.loads((run.folder / "eval.json").read_text())
    for system in ("model", "n-gram", "base"):
        one = record[system]["intervals"]["loss"]
        assert f"{one['mean']:.4f} [{one['low']:.4f}, {one['high']:.4f}]" in found.text
    assert "Then they were merged: " in found.text and "largest logit gap" in found.text
    assert found.data.to_dict()["library_name"] == "transformers"
    assert "| train |" in found.text and "licences of its documents were not counted" in found.text
    assert str(reported.parent) not in (out / "README.md").read_text()
    with safe_open(out / "model.safetensors", framework="pt") as file:
        said = file.metadata()
    assert said["format"] == "pt" and said["plumb_step"] == str(run.step)
    assert said["plumb_weights"] == run.weights and said["plumb_data"] == run.fingerprints["data"]
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == run.tokenizer.eos_id


def test_an_adapter_names_the_base_that_it_belongs_to(run: TrainedRun, tmp_path: Path) -> None:
    export(ExportConfig(str(tmp_path / "out"), str(run.folder)))
    text = (tmp_path / "out" / "README.md").read_text()
    folder = Path(str(run.config.train.base))
    assert f"An adapter for PEFT on the base `{folder.name}`" in text and "LoRA" in text
    assert str(folder) not in text and "base_model" not in text
    published = replace(run.config, train=replace(run.config.train, base="bigcode/starcoder2-3b"))
    front = yaml.safe_load(card(replace(run, config=published)).split("---")[1])
    assert front["base_model"] == "bigcode/starcoder2-3b"


def test_scores_are_those_of_the_exported_weights_or_none(run: TrainedRun) -> None:
    assert "The run was not evaluated." in card(run)
    written(run, "eval.json", evaluation(run))
    text = card(run)
    assert "| loss, nats a token | 1.2500 [1.0000, 1.5000] |" in text and "| 6-gram |" in text
    assert "- loss: worse than the n-gram model by 0.1" in text
    assert "| exact_match | 1.2 [1.0, 1.5] | 2.0 [1.0, 1.5] |" in text
    assert "- exact_match: worse than copying by 0.8" in text
    written(run, "eval.json", evaluation(run, fingerprints={"weights": "0" * 64}))
    assert "is of step 3, and of other weights." in card(run) and "1.2500" not in card(run)


def test_a_server_tells_of_scores_what_the_card_does(run: TrainedRun, tmp_path: Path) -> None:
    """Of the run itself, of the folder that it was exported to, and of one that nobody wrote a card for."""
    written(run, "eval.json", evaluation(run))
    written(run, "overrides.json", {"future-visible": "a prediction depends on a later token"})
    told = known_scores(str(run.folder), run)
    assert "| 1.2500 [1.0000, 1.5000] |" in told and "- future-visible: " in told
    assert all(line in card(run) for line in told.splitlines()) and "Data" not in told
    export(ExportConfig(str(tmp_path / "out"), str(run.folder)))
    assert known_scores(str(tmp_path / "out")).strip() == told.strip()
    (tmp_path / "out" / "README.md").rename(tmp_path / "README.md")
    assert known_scores(str(tmp_path / "out")).startswith("No scores of this model are known here")
    held = known_scores(str(tmp_path), None, "int8")
    assert held.startswith("The scores are of weights in their own format; here they are held in int8.")
    (tmp_path / "README.md").write_bytes(b"\xff## Scores\n")
    assert known_scores(str(tmp_path)).startswith("No scores")


def test_faults_that_were_allowed_are_told(run: TrainedRun) -> None:
    written(run, "overrides.json", {"future-visible": "a prediction depends on a later token"})
    assert "## Faults that were allowed\n\n- future-visible: a prediction depends on a later token" in card(
        run
    )


def test_licences_are_counted_where_the_corpus_is_still_that_of_the_run(
    run: TrainedRun, tmp_path: Path
) -> None:
    corpus = tmp_path / "scraped"
    corpus.mkdir()
    licences = {f"licence-{n}": n + 1 for n in range(LIST + 5)} | {"MIT": 7_000}
    record = {"fingerprint": "f" * 64, "parts": [], "licences": licences}
    (corpus / CORPUS).write_text(json.dumps(record))
    config = replace(run.config, data=replace(run.config.data, source=str(corpus)))
    of_corpus = replace(run, config=config, fingerprints=run.fingerprints | {"corpus": "f" * 64})
    text = card(of_corpus)
    assert "Source: `scraped`" in text and "| MIT | 7,000 |" in text and "| 6 others | 21 |" in text
    assert text.index("| MIT |") < text.index("| licence-44 | 45 |")
    for change in ({"fingerprint": "0" * 64}, {"licences": {"MIT": "many"}}, {"licences": None}):
        (corpus / CORPUS).write_text(json.dumps(record | change))
        assert "licences of its documents were not counted" in card(of_corpus)


# --- bad input ------------------------------------------------------------------------------------


DAMAGED: list[dict[str, Any]] = [
    {"model": None}, {"files": "many"}, {"suite": {"suite": "no such"}}, {"suite": []},
    {"step": None, "fingerprints": {"weights": 1}}, {"fingerprints": None}, {"token_verdicts": [1]},
    {"n-gram order": "x"}, {"model": {"intervals": {"loss": {"mean": "1"}}}},
]  # fmt: skip


def test_an_evaluation_that_is_damaged_is_left_out(run: TrainedRun) -> None:
    for change in DAMAGED:
        written(run, "eval.json", evaluation(run) | change)
        assert "The evaluation beside the run cannot be read." in card(run), change
    (run.folder / "eval.json").write_bytes(b"\xff")
    assert "The evaluation beside the run cannot be read." in card(run)


def test_names_of_strangers_are_text_and_no_markup(run: TrainedRun, tmp_path: Path) -> None:
    many = {f"{HOSTILE}{n}": {"exact_match": {"mean": 1, "low": 1, "high": float("inf")}} for n in range(90)}
    record = evaluation(run, side=HOSTILE * 99)
    record["suite"] |= {"scores": record["suite"]["scores"] | many}
    record["token_verdicts"]["loss"]["n-gram"]["verdict"] = HOSTILE * 999
    written(run, "eval.json", record)
    written(run, "overrides.json", {f"{HOSTILE}{n}": HOSTILE * 999 for n in range(900)})
    folder = tmp_path / "a\x1b[31m`b`<u>"
    run.folder.rename(folder)
    data = replace(run.config.data, source=f"/home/me/{HOSTILE}")
    moved = replace(run, folder=folder, config=replace(run.config, data=data))
    text = card(moved, merge=HOSTILE)
    assert len(text.encode()) < 400_000
    assert not re.search(r"<|\x1b|\u202e|\]\(|^# c", text.split("---", 2)[2], re.MULTILINE)
    assert "/home/me" not in text and "&#60;script&#62;" in text
    assert yaml.safe_load(text.split("---")[1]).keys() == {"library_name", "pipeline_tag", "tags"}


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub on loopback, whose token the environment has; large files go by git-lfs."""
    with hub_server() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield found


def test_a_model_and_a_file_are_sent_as_they_are(
    run: TrainedRun, hub: Hub, tmp_path: Path, capsys: Any
) -> None:
    out, file = tmp_path / "out", tmp_path / "model.gguf"
    said = export(ExportConfig(str(out), str(run.folder), merge=True, push="me/my-model"))
    assert said.endswith(f"it is at {hub.address}/me/my-model")
    assert hub.models["me/my-model"] == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.private == {"me/my-model": True}
    export(ExportConfig(run=str(run.folder), merge=True, gguf=str(file), push="me/my-model"))
    assert hub.models["me/my-model"]["model.gguf"] == file.read_bytes()
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_hub_that_fails_leaves_what_was_written_and_shows_no_token(
    run: TrainedRun, hub: Hub, tmp_path: Path, capsys: Any
) -> None:
    hub.fails = "/commit/"
    with pytest.raises(SystemExit) as ended:
        command.main(["--run", str(run.folder), "--out", str(tmp_path / "out"), "--push", "me/my-model"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and TOKEN not in said.out + said.err
    sentence = said.err.splitlines()[-1]
    assert "out is written, and cannot be sent to me/my-model (403" in sentence and "***" in sentence
    assert "hf upload me/my-model" in sentence and (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "name", ["model", "me/my/model", "me/../model", "https://x/y", "me/a b", "-me/x", ""]
)
def test_a_name_that_the_hub_does_not_take_is_refused_at_once(name: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no name of a model on the hub; give OWNER/NAME"):
        export(ExportConfig(str(tmp_path / "out"), "no-such-run", push=name))
    assert not hub.requests


def test_without_a_token_nothing_is_written(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="takes a token of the hub; set HF_TOKEN"):
        export(ExportConfig(str(tmp_path / "out"), str(run.folder), push="me/my-model"))
    assert not (tmp_path / "out").exists()

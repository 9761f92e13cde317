"""The card of an exported model: README.md with the front matter of the Hugging Face hub.

It says what the run's own files say, and nothing else: the scores of eval.json with their intervals and
baselines, the base, the counts of the data and of their licences, and the faults that were allowed. An
eval.json of other weights, and a corpus that is no longer the run's, are left out with a sentence. No path of
this machine is written. All of it may be a stranger's: names are escaped and cut, and lists have an end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from architecture import Decoder
from config import write_atomically
from config.markdown import plain, table
from data.sourcefiles import CORPUS, corpus_parts
from guards.preflight import overrides
from pretrained.load import HUB_ID
from suites.records import DAMAGED, read_evaluation
from suites.scoring import SUITES, records_of
from tokenizer import Tokenizer
from training.run import TrainedRun

CARD = "README.md"
NAME, SENTENCE = 100, 400  # The most characters of a name, and of a sentence.
LIST = 40  # The most entries of a list.
STORES = 200  # Token stores of a cache that are looked at.
SCORES_HEAD, FAULTS_HEAD = "Scores", "Faults that were allowed"
SCORES = {
    "loss": ("loss, nats a token", "{:.4f}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "top1": ("the likeliest token is right", "{:.2%}"),
    "top5": ("one of the five likeliest is right", "{:.2%}"),
}


@dataclass(frozen=True)
class Exported:
    """What is exported, for its card.

    Args:
        model: The model, as it is written.
        tokenizer: The model's tokenizer.
        kind: The `model_type`, or `peft` for an adapter.
        run: The run that it is of; None for a base with a stranger's adapter.
        base: The base that it was trained from, or that its adapter belongs to.
        merge: How the merge of its adapter went, if there was one.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    kind: str
    run: TrainedRun | None
    base: str | None
    merge: str = ""


def write_card(folder: Path, exported: Exported) -> None:
    """Write README.md into the folder of an exported model."""
    write_atomically(folder / CARD, card_of(exported))


def metadata_of(run: TrainedRun) -> dict[str, str]:
    """Return what the files of weights say of the run that they are of."""
    known = {"step": str(run.step), "weights": run.weights} | run.fingerprints
    return {f"plumb_{key}": str(value)[:NAME] for key, value in known.items()}


def card_of(exported: Exported) -> str:
    """Return the card as Markdown."""
    run, base = exported.run, _named(exported.base)
    title = "Exported model" if run is None else plain(run.folder.resolve().name, NAME)
    front: dict[str, Any] = {
        "library_name": "peft" if exported.kind == "peft" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["code", "plumb"],
    }
    if base is not None and HUB_ID.fullmatch(base):
        front["base_model"] = base
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", f"# {title}", ""]
    lines += [*_model(exported, base), ""]
    if run is None:
        return "\n".join(lines)
    return "\n".join(
        [
            *lines,
            *_section(SCORES_HEAD, [*_scores(run), *_merge(exported)]),
            *_section("Data", _data(run)),
            *_section("Training", _training(run)),
            *_section(FAULTS_HEAD, _faults(run)),
        ]
    )


def scores_of_run(run: TrainedRun) -> str:
    """Return the parts of a run's card on its scores and on the faults that it was allowed to have."""
    return "\n".join([*_section(SCORES_HEAD, _scores(run)), *_section(FAULTS_HEAD, _faults(run))])


def scores_of_card(text: str) -> str:
    """Return the same parts of a card that was written."""
    parts = [part for part in f"\n{text}".split("\n## ") if part.startswith((SCORES_HEAD, FAULTS_HEAD))]
    return "\n".join(f"## {part}" for part in parts)


def _section(head: str, part: list[str]) -> list[str]:
    return [f"## {head}", "", *part, ""] if part else []


def _named(base: str | None) -> str | None:
    """Return the id of a base on the hub, or the name of its folder without the folders around it."""
    if base is None:
        return None
    is_id = HUB_ID.fullmatch(base) and not Path(base).exists()
    return (base if is_id else Path(base).resolve().name)[:NAME]


def _model(exported: Exported, base: str | None) -> list[str]:
    """Return what the model is, and how it is opened."""
    config, tokenizer = exported.model.config, exported.tokenizer
    n = sum(parameter.numel() for parameter in exported.model.parameters())
    size = "" if exported.kind == "peft" else f"{n:,} parameters, "  # Those of an adapter and its base.
    what = "An adapter for PEFT" if exported.kind == "peft" else f"A `{plain(exported.kind, NAME)}` model"
    if base is not None:
        what += (
            f" on the base `{plain(base)}`" if exported.kind == "peft" else f", trained from `{plain(base)}`"
        )
    code = tokenizer is not None and tokenizer.kind == "code"
    opened = (
        "Its tokenizer is opened by modules in this folder: "
        "`AutoTokenizer.from_pretrained(..., trust_remote_code=True)`."
        if code
        else "Its tokenizer opens in `AutoTokenizer`."
    )
    return [
        f"{what}: {size}{config.n_layer} layers of width {config.n_embd}, a vocabulary of "
        f"{config.vocab_size:,} and a context of {config.block_size:,} tokens. {opened} It was written by "
        "Plumb."
    ]


# --- scores ---------------------------------------------------------------------------------------


def _scores(run: TrainedRun) -> list[str]:
    """Return the tables of eval.json, if it is of these weights."""
    path = run.folder / "eval.json"
    if not path.is_file():
        return ["The run was not evaluated."]
    try:
        record = read_evaluation(path)
        if record["fingerprints"]["weights"] != run.weights:
            return [f"The evaluation beside the run is of step {int(record['step'])}, and of other weights."]
        return [
            *_token_scores(record),
            *(line for suite in records_of(record)[:LIST] for line in _suite(*suite)),
        ]
    except (*DAMAGED, ValueError):
        return ["The evaluation beside the run cannot be read."]


def _merge(exported: Exported) -> list[str]:
    """Return what the merge of an adapter changed since the scores were made."""
    if not exported.merge:
        return []
    said = plain(exported.merge.rstrip("; "), SENTENCE)
    return [f"Scores are of the adapter beside its base. Then they were merged: {said}.", ""]


def _token_scores(record: Mapping[str, Any]) -> list[str]:
    """Return the table of the scores of tokens, and the verdicts below it."""
    systems = [name for name in ("model", "n-gram", "base") if name in record]
    rows = []
    for key, (name, form) in SCORES.items():
        if all(key in record[system]["intervals"] for system in systems):
            intervals = (record[system]["intervals"][key] for system in systems)
            rows.append([name, *(_interval(interval, form) for interval in intervals)])
    head = [*systems]
    if "n-gram" in head:
        head[head.index("n-gram")] = f"{int(record['n-gram order'])}-gram"
    told = _sentences(
        f"{key}: {found['verdict']}"
        for key, against in record.get("token_verdicts", {}).items()
        for found in against.values()
    )
    return [
        f"On the {int(record['files']):,} files of the {plain(str(record['side']), NAME)} split, "
        f"{int(record['bytes']):,} bytes, which were kept out of training; in brackets 95% intervals.",
        "",
        *table(["", *head], rows),
        "",
        *told,
        "",
    ]


def _suite(worded: str, record: Mapping[str, Any]) -> list[str]:
    """Return the table of a suite's scores beside its baselines, and the verdicts below it."""
    systems = list(record["scores"])[:LIST]
    rows = []
    for metric in list(record["signatures"])[:LIST]:
        cells = (_interval(record["scores"][system][metric], "{:.1f}") for system in systems)
        rows.append([plain(str(metric), NAME), *cells])
    told = _sentences(
        f"{metric}: {found['against'][found['best']]}" for metric, found in record["verdicts"].items()
    )
    title = SUITES[record["suite"]].title + worded
    samples = f"{len(record['samples']):,} samples."
    head = ["", *(plain(str(system), NAME) for system in systems)]
    return [f"### {plain(title, NAME)}", "", samples, "", *table(head, rows), "", *told, ""]


def _interval(found: Mapping[str, Any], form: str) -> str:
    values = [float(found[key]) for key in ("mean", "low", "high")]
    if not all(math.isfinite(value) for value in values):
        return "none"
    mean, low, high = (form.format(value) for value in values)
    return f"{mean} [{low}, {high}]"


def _sentences(found: Iterable[Any]) -> list[str]:
    return [f"- {plain(str(sentence), SENTENCE)}" for sentence in list(dict.fromkeys(found))[:LIST]]


# --- data and training ----------------------------------------------------------------------------


def _data(run: TrainedRun) -> list[str]:
    """Return the counts of the data: of the splits, by the token store, and of licences, by corpus.json."""
    source = run.config.data.source
    name = (
        "the interpreter's standard library" if source == "stdlib" else f"`{plain(Path(source).name, NAME)}`"
    )
    lines = [f"Source: {name}, fingerprint `{plain(run.fingerprints['data'][:12])}`."]
    if splits := _splits(run):
        rows = [[split, *(f"{count:,}" for count in counts)] for split, counts in splits.items()]
        lines += ["", *table(["split", "documents", "tokens", "bytes"], rows)]
    licences = _licences(run)
    if licences is None:
        return [*lines, "", "The licences of its documents were not counted."]
    largest = sorted(licences.items(), key=lambda item: (-item[1], item[0]))
    rows = [[plain(licence, NAME), f"{count:,}"] for licence, count in largest[:LIST]]
    rest = sum(count for _, count in largest[LIST:])
    rows += [[f"{len(largest) - LIST:,} others", f"{rest:,}"]] if rest else []
    return [
        *lines,
        "",
        "Licences of the corpus, counted when it was built:",
        "",
        *table(["licence", "documents"], rows),
    ]


def _licences(run: TrainedRun) -> dict[str, int] | None:
    """Return the documents of the corpus by licence; None where the run's corpus is not there any more."""
    folder = Path(run.config.data.source)
    if "corpus" not in run.fingerprints or not (folder / CORPUS).is_file():
        return None
    try:
        if corpus_parts(folder)[0] != run.fingerprints["corpus"]:
            return None
        counts = json.loads((folder / CORPUS).read_text("utf-8"))["licences"]
        return {str(licence): int(count) for licence, count in counts.items()}
    except (*DAMAGED, ValueError):
        return None


def _splits(run: TrainedRun) -> dict[str, list[int]]:
    """Return documents, tokens and bytes of each split, if the cache still has the run's tokens."""
    for path in sorted(Path(run.config.data.cache).glob("tokens-*/index.json"))[:STORES]:
        try:
            index = json.loads(path.read_text("utf-8"))
            if [index[key] for key in ("data", "tokenizer")] == [
                run.fingerprints[key] for key in ("data", "tokenizer")
            ]:
                counted = ("documents", "tokens", "bytes")
                splits = ("train", "validation", "test")
                return {split: [int(index["splits"][split][key]) for key in counted] for split in splits}
        except (*DAMAGED, OSError, ValueError):
            continue
    return {}


def _training(run: TrainedRun) -> list[str]:
    """Return the settings that bear on what was learned; none of them is a path."""
    config, train = run.config, run.config.train
    row = train.row_length or config.model.block_size
    settings: dict[str, Any] = {
        "steps": f"{run.step:,}",
        "tokens a step": f"{train.batch_size * train.accumulation * row:,}",
        "optimizer": f"{config.optimizer.name}, schedule {config.optimizer.schedule}",
        "seed": train.seed,
        "share of documents with a gap to fill": config.data.fim_rate,
    }
    if config.lora.r:
        settings["LoRA"] = (
            f"r {config.lora.r}, alpha {config.lora.alpha:g}, base stored as {train.base_format}"
        )
    rows = [[key, plain(str(value), NAME)] for key, value in settings.items()]
    return [
        *table(["", ""], rows),
        "",
        f"SHA-256 of the weights as they were trained: `{plain(run.weights)}`.",
    ]


def _faults(run: TrainedRun) -> list[str]:
    """Return the faults that the run was allowed to have, in the words of its guards."""
    found = sorted(overrides(run.folder).items())[:LIST]
    return _sentences(f"{name}: {evidence}" for name, evidence in found)

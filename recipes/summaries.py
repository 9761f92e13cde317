"""Write a Python class's docstring: `python -m recipes summaries --source apache_airflow_core-3.0.0.whl`.

The classes have a docstring of at least 20 words, and come from a repository, archive or folder. The model
gets the class without its own or any inner docstring, truncated where it is long, and writes the docstring.
Two prompts are trained and compared, each in its own run: a verbose instruction, and next to none. Texts are
generated greedily and by nucleus sampling with a seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from config import write_atomically
from data.nearby import nearest_of
from recipes.building import Counts, RecipeSettings, split_items, write_dataset
from recipes.classes import Class, classes_of
from recipes.files import check_source, read_files
from scraping.documents import Drop, ScrapedDocument
from tokenizer import Tokenizer

FAMILY = "llama"
METRICS = ("chrf", "rougeL")
EVALUATION: dict[str, Any] = {"metrics": ",".join(METRICS)}
SMALL: dict[str, Any] = {"optimizer.lr": 1e-3}
PROMPTS = ("verbose", "simple")
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1  # shares of all classes, and of those that are not test
RECORD = "summaries.json"  # the texts behind the table, in the run's folder


@dataclass(frozen=True)
class SummariesSettings(RecipeSettings):
    """Settings of the recipe summaries: its classes, their prompts, and how texts are sampled.

    Args:
        source: A folder, an archive (.whl, .zip, .tar.gz), the address of a git repository, or a .jsonl file
            with `path` and `text`.
        revision: Tag, branch or commit of a repository.
        under: Read only files whose path begins with this.
        min_words: Fewest words of a docstring, as str.split counts them.
        prompt: `verbose`, `simple`, or both, one after the other.
        code_tokens: Most tokens of a class's code; longer classes lose their end.
        input_tokens: Most tokens of a prompt with its code.
        docstring_tokens: Most tokens of a docstring, with its end; longer ones lose their last lines.
        quality: Leave out docstrings that are no summary: lists of parameters, notes of deprecation, names.
        related: Show this many of the most similar classes of the training split, with their docstrings.
        related_tokens: Most tokens of each of these; they share `input_tokens` with the code.
        temperature: Temperature of the sampled texts.
        top_p: Probability of the tokens that are sampled from.
        split_seed: Seed of the split.
        sampling_seed: Seed of the sampled texts, and of the choice of `eval_samples` examples.
    """

    source: str = ""
    revision: str = ""
    under: str = ""
    min_words: int = 20
    prompt: Literal["both", "verbose", "simple"] = "both"
    code_tokens: int = 400
    input_tokens: int = 512
    docstring_tokens: int = 256
    quality: bool = False
    related: int = 0
    related_tokens: int = 120
    temperature: float = 0.7
    top_p: float = 0.9
    split_seed: int = 42
    sampling_seed: int = 0


SETTINGS = SummariesSettings


def check(settings: SummariesSettings) -> None:
    for name in ("min_words", "code_tokens", "docstring_tokens"):
        if getattr(settings, name) < 2:
            raise ValueError(f"--{name} is {getattr(settings, name)}; it must be at least 2")
    if settings.temperature == 0:
        raise ValueError(
            "--temperature is 0, by which sampled texts would be the greedy ones again; raise it"
        )
    if not 0 < settings.top_p <= 1:
        raise ValueError(f"--top_p is {settings.top_p}; it must be above 0 and at most 1")
    check_source(settings.source, ".py", settings.revision)


def files_of(settings: SummariesSettings, work: Path) -> list[ScrapedDocument | tuple[str, Drop]]:
    return read_files(settings.source, ".py", settings.revision, settings.under, work)


def longest(settings: SummariesSettings) -> int:
    return settings.input_tokens + settings.docstring_tokens


def variants(settings: SummariesSettings) -> dict[str, SummariesSettings]:
    if settings.prompt != "both":
        return {}
    return {prompt: replace(settings, prompt=prompt) for prompt in PROMPTS}


# --- prompts -----------------------------------------------------------------------------------------


def prompt_of(name: str, code: str, prompt: str, related: Sequence[str] = ()) -> str:
    """Return the prompt for the docstring of a class, in training, evaluation and serving.

    Args:
        name: The class's name.
        code: The class's code, without docstrings.
        prompt: `verbose` or `simple`.
        related: Other classes, as `example_of` shows them.
    """
    before = "".join(f"{one}\n\n" for one in related)
    if prompt == "verbose":
        instruction = "Your task is to write a docstring that summarizes the following Python class.\n"
        return f"{instruction}{before}Class {name}:\n{code.rstrip()}\n\nDocstring:\n"
    return f"{before}Class {code.rstrip()}\n\nDocstring:\n"


def example_of(code: str, docstring: str) -> str:
    """Return a class with its docstring, as context for another."""
    return f"Class {code.rstrip()}\n\nDocstring:\n{docstring.rstrip()}"


def fitted_prompt(
    one: Class, related: Sequence[str], settings: SummariesSettings, tokenizer: Tokenizer
) -> str:
    """Return the prompt with as many of the code's first lines as fit between instruction and ending.

    Raises:
        ValueError: The prompt does not fit even without code.
    """
    name = one.name.rpartition(".")[2]
    code = first_lines(one.code, settings.code_tokens, tokenizer)
    room = settings.input_tokens - 1  # One token is for a start token.
    while len(tokenizer.encode(prompt := prompt_of(name, code, settings.prompt, related))) > room:
        excess = len(tokenizer.encode(prompt)) - room
        shorter = first_lines(code, len(tokenizer.encode(code)) - excess, tokenizer)
        if not shorter.strip():
            raise ValueError(
                f"{one.id}: the prompt has no room for code in {settings.input_tokens} tokens; raise "
                "--input_tokens, or lower --related or --related_tokens"
            )
        code = shorter
    return prompt


def first_lines(text: str, tokens: int, tokenizer: Tokenizer) -> str:
    """Return as many whole first lines as fit into `tokens` tokens; of a longer first line its beginning."""
    ids = tokenizer.encode(text)
    if len(ids) <= tokens:
        return text
    kept = tokenizer.decode(ids[: max(0, tokens)]).rstrip("\ufffd")
    whole = kept[: kept.rfind("\n") + 1]
    return whole if whole.strip() else kept


# --- the dataset -------------------------------------------------------------------------------------


def build(settings: SummariesSettings, tokenizer: Tokenizer, folder: Path) -> Counts:
    """Write the dataset of classes; raise a ValueError where the source has too few of them."""
    counts = Counts("classes")
    found, unparsed, unread = [], 0, 0
    for file in files_of(settings, folder.parent / "source"):
        if not isinstance(file, ScrapedDocument):
            unread += 1
            continue
        try:
            found += classes_of(file.text, file.path)
        except (SyntaxError, RecursionError):
            unparsed += 1
    counts.found = len(found)
    if not found:
        raise ValueError(
            f"{settings.source} holds no Python class"
            + (f", and {unparsed} files that do not parse" if unparsed else "")
            + "; name another --source"
        )
    chosen = [one for one in found if not (reason := unfit(one, settings)) or counts.drop(reason)]
    splits = split_items(chosen, settings.split_seed, TEST_SHARE, VALIDATION_SHARE)
    shortened = sum(_docstring(one, settings, tokenizer) != one.docstring for one in chosen)
    rows = {
        split: [
            _row(one, related, settings, tokenizer)
            for one, related in _with_related(own, splits["train"], settings, tokenizer)
        ]
        for split, own in splits.items()
    }
    cut = sum(row["cut"] for own in rows.values() for row in own)
    return write_dataset(
        folder,
        rows,
        counts,
        "Classes and their docstrings",
        about(settings, unparsed, unread, cut, shortened, len(chosen)),
    )


def about(settings: SummariesSettings, unparsed: int, unread: int, cut: int, shortened: int, n: int) -> str:
    """Return the text of the dataset card."""
    revision = f" at {settings.revision}" if settings.revision else ""
    related = (
        f"Before it stand the {settings.related} training classes most like it, with their docstrings.\n"
        if settings.related
        else ""
    )
    return f"""
A class is every `class` statement of a `.py` file of `{settings.source}`{revision}, nested ones too.
It is an example if its own docstring, as `ast` finds it, has at least {settings.min_words} words between
spaces and line breaks. A prompt holds the {settings.prompt} instruction and the code from the first decorator
on, without the docstrings of the class and of whatever is inside: at most {settings.code_tokens} tokens,
in whole lines ({cut} of {n} classes lose their end).
{related}A completion is the docstring without its indentation; {shortened} are cut to their first
{settings.docstring_tokens} tokens in whole lines. {unparsed} files do not parse, and {unread} are no text.

The split is drawn by seed {settings.split_seed}: a fifth of all is test, and a tenth of the rest
validation, by which the best checkpoint is chosen. Classes of one file may stand in two splits.
"""


def unfit(one: Class, settings: SummariesSettings) -> str:
    """Return why a class is no example; "" if it is."""
    if not one.docstring:
        return "no docstring"
    if len(one.docstring.split()) < settings.min_words:
        return f"docstring of fewer than {settings.min_words} words"
    return poor(one) if settings.quality else ""


FIELD = re.compile(r"\s*(?::\w[\w\s.*]*:|\w+\s*\([^)]*\)\s*:|@\w+|>>>|\.\. )")
SECTION = re.compile(
    r"\s*(?:Args|Arguments|Attributes|Parameters|Returns?|Raises|Examples?|Usage|Notes?)\s*:?\s*$"
)
NO_SUMMARY = re.compile(
    r"\W*(?:deprecated|todo|fixme|internal use only|do not use|see\b|alias\b)", re.IGNORECASE
)
LEAST_PROSE = 0.5  # least share of a docstring's words that are prose


def poor(one: Class) -> str:
    """Return the rule by which a docstring does not summarise its class; "" if none applies."""
    lines = one.docstring.split("\n")
    if NO_SUMMARY.match(lines[0]):
        return "docstring begins with a note or a reference"
    words, prose, inside, margin = 0, 0, False, 0
    for line in lines:
        n, indent = len(line.split()), len(line) - len(line.lstrip())
        if inside and line.strip() and indent <= margin:
            inside = False
        if not inside and (FIELD.match(line) or SECTION.match(line)):
            inside, margin = True, indent
        words, prose = words + n, prose + (0 if inside else n)
    if prose < LEAST_PROSE * words:
        return "docstring is mostly lists of parameters or examples"
    name = set(_words(one.name))
    if all(word in name | {"the", "a", "an", "class", "for"} for word in _words(lines[0])):
        return "docstring begins with the class's name alone"
    return ""


def _words(text: str) -> list[str]:
    return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text)]


def _docstring(one: Class, settings: SummariesSettings, tokenizer: Tokenizer) -> str:
    return first_lines(one.docstring, settings.docstring_tokens - 1, tokenizer).rstrip()


def _with_related(
    own: Sequence[Class], train: Sequence[Class], settings: SummariesSettings, tokenizer: Tokenizer
) -> list[tuple[Class, list[str]]]:
    """Return each class with the texts that retrieval finds among the other training classes."""
    if not settings.related:
        return [(one, []) for one in own]
    found = nearest_of([one.code for one in own], [one.code for one in train], settings.related + 1)
    shown = []
    for one, numbers in zip(own, found, strict=True):
        others = [train[i] for i in numbers if train[i] != one][: settings.related]
        half = settings.related_tokens // 2
        shown.append(
            (
                one,
                [
                    example_of(
                        first_lines(o.code, half, tokenizer), first_lines(o.docstring, half, tokenizer)
                    )
                    for o in others
                ],
            )
        )
    return shown


def _row(
    one: Class, related: Sequence[str], settings: SummariesSettings, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return a row. Its `prompts` are for eval.py: `verbose`, `simple`, and `related` if it is requested."""
    prompts = {name: fitted_prompt(one, (), replace(settings, prompt=name), tokenizer) for name in PROMPTS}
    if settings.related:
        prompts["related"] = fitted_prompt(one, related, settings, tokenizer)
    prompt = prompts["related" if settings.related else settings.prompt]
    return {
        "name": f"{one.path}:{one.name}",
        "prompt": prompt,
        "prompts": prompts,
        "completion": _docstring(one, settings, tokenizer),
        "cut": one.code.rstrip() not in prompt,
    }


# --- scores ------------------------------------------------------------------------------------------


def evaluation(settings: SummariesSettings) -> dict[str, Any]:
    """Return the seed of all scores, which also chooses the examples of greedy and sampled texts."""
    return {"seed": settings.sampling_seed}


def evaluate(settings: SummariesSettings, scoring: Any, result: dict[str, Any]) -> str:
    """Return a table of greedy and sampled texts of the base and the tuned model.

    Args:
        settings: The recipe's settings.
        scoring: The EvalConfig of the scores. The annotation does not name it, since its import needs torch.
        result: The result of `evaluate` with it.
    """
    from suites.evaluate import evaluate as evaluated
    from suites.scoring import origin_of

    how = {"temperature": settings.temperature, "top_p": settings.top_p}
    drawn = evaluated(replace(scoring, suite="pairs", **how))["suite"]["samples"]
    found = {"greedy": result["suite"]["samples"], "sampled": sorted(drawn, key=lambda sample: sample["id"])}
    found["greedy"] = sorted(found["greedy"], key=lambda sample: sample["id"])
    assert [one["id"] for one in found["greedy"]] == [one["id"] for one in found["sampled"]]
    record: dict[str, Any] = {
        "step": result["step"],
        "references": [sample["reference"] for sample in found["greedy"]],
        "files": [origin_of(sample["name"]) for sample in found["greedy"]],
    }
    for way, samples in found.items():
        record[way] = {s: [sample["predictions"][s] for sample in samples] for s in ("base", "model")}
    write_atomically(Path(scoring.checkpoint) / RECORD, json.dumps(record, indent=1))
    return table({settings.prompt: record}, settings)


def together(made: dict[str, tuple[SummariesSettings, Path]]) -> str:
    """Return the table of both prompts, from the records that each run's `evaluate` wrote."""
    records = {name: json.loads((out / "run" / RECORD).read_text("utf-8")) for name, (_, out) in made.items()}
    (settings, _), *_ = made.values()
    return table(records, settings)


def table(records: dict[str, Any], settings: SummariesSettings) -> str:
    """Return base and tuned scores by prompt, metric and decoding, with 95% intervals and a verdict."""
    from metrics import cleaned
    from metrics.registry import score
    from suites.tables import aligned

    ways = {"greedy": "greedy", "sampled": f"p {settings.top_p:g}, t {settings.temperature:g}"}
    rows = [["scenario", *(f"{metric}, {said}" for said in ways.values() for metric in METRICS)]]
    verdicts = []
    for prompt, record in records.items():
        scored = {
            (system, way): score(
                METRICS,
                cleaned(record[way][system], record["references"], "plain"),
                origins=record["files"],
            )
            for way in ways
            for system in ("base", "model")
        }
        for system, said in (("base", "baseline"), ("model", "finetuned")):
            cells = [scored[system, way][metric].interval() for way in ways for metric in METRICS]
            rows.append(
                [f"{said} with {prompt} prompt", *("{:.1f} [{:.1f}, {:.1f}]".format(*c[:3]) for c in cells)]
            )
        for way in ways:
            for metric in METRICS:
                verdict = (
                    scored["model", way][metric].compare(scored["base", way][metric]).verdict("the base")
                )
                verdicts.append(f"{prompt} prompt, {metric}, {way}: {verdict}")
    steps = {prompt: record["step"] for prompt, record in records.items()}
    if len(set(steps.values())) > 1:
        had = ", ".join(f"{prompt} {step}" for prompt, step in steps.items())
        verdicts.append(
            f"NOTE: the checkpoints are of different steps ({had}), so the prompts are not compared on equal "
            "training; set --max_steps or --max_epochs, not --max_seconds"
        )
    n = len(next(iter(records.values()))["references"])
    seed = settings.sampling_seed
    head = f"docstrings of {n} test classes, with 95% intervals; sampling is by seed {seed}"
    return "\n".join([head, *aligned(rows), *verdicts])

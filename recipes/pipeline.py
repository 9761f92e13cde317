"""A recipe's steps in order: base, dataset, training, export, scores. What is done stays as it is.

OUT/dataset/        train.jsonl, validation.jsonl, test.jsonl, counts.json, and the card
OUT/run/            the training run: checkpoints, curves, eval.json
OUT/adapter/        for PEFT
OUT/merged/         for transformers
OUT/report.txt      the tables, and five samples
OUT/steps.json      what each step was made from
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from config import Config, make_parser, parse_config, refuse_unwritable, write_atomically
from config.console import printable
from recipes.building import RecipeSettings, read_counts
from recipes.files import content_of

HERE = Path(__file__).parent
SAMPLES = 5
SHOWN = 600  # characters of a sample's prompt, from its end
BUDGETS = ("max_seconds", "max_steps", "max_epochs")
TO_BE_MADE = "(none yet)"  # the base, where the command line names none
PLACES = {"--run": "--out", "--data.source": "--source"}  # flags of training -> what a recipe has instead
SMALL_BASE = "small base trained here, figures are not those of the published weights"


@dataclass(frozen=True)
class RecipeRun:
    """A recipe with its settings, and the words of the command line that are training's."""

    name: str
    module: ModuleType
    settings: Any  # an instance of the module's SETTINGS
    words: list[str]
    less: Sequence[str] = ()  # of all words those that the module's SMALL adds

    @property
    def out(self) -> Path:
        return Path(self.settings.out or f"runs/{self.name}")

    @property
    def run(self) -> Path:
        return self.out / "run"

    def config(self, *more: str) -> Config:
        """The training settings: recipes/NAME.yaml, then the command line's, then where the data lie."""
        places = ["--data.source", str(self.out / "dataset"), "--run", str(self.run)]
        base = [] if self.module.FAMILY is None else ["--base", TO_BE_MADE]
        return parse_config([*base, "--config", str(HERE / f"{self.name}.yaml"), *self.words, *more, *places])


# --- the command line --------------------------------------------------------------------------------


def parse_words(name: str, words: list[str]) -> RecipeRun:
    """Recipe flags and training flags apart; a mistake prints one sentence and exits with 2."""
    module = importlib.import_module(f"recipes.{name}")
    mine, rest = apart(words, module)
    parser = make_parser({"": module.SETTINGS}, str(module.__doc__).splitlines()[0])
    if "--help" in rest or "-h" in rest:
        parser.print_help()
        print("\nEvery flag of training can be given too: python trainingmanager.py --help")
        less = " ".join(f"--{key} {value}" for key, value in module.SMALL.items())
        print(f"Without --base, small models have other defaults: {less}")
        sys.exit(0)
    given = {word.split("=")[0] for word in rest}
    for place, instead in {**PLACES, "--resume": "the same command again, which goes on"}.items():
        if place in given:
            parser.error(f"{place} is the recipe's own; give {instead}")
    for other in ("--plan", "--prove_resume", "--overfit"):
        if other in given:
            parser.error(
                f"{other} is no part of a recipe; ask for it by python trainingmanager.py {other} --config "
                f"recipes/{name}.yaml, with --base and --data.source"
            )
    if module.FAMILY is None and "--base" in given:
        parser.error(f"--base is given, and the recipe {name} trains from scratch; leave it out")
    values = parser.parse_args(mine).clone(with_meta=False).as_dict()
    asked = RecipeRun(name, module, _settings(module, values), rest)
    if asked.config().train.base in (None, TO_BE_MADE):  # a typo is told before anything takes time
        less = in_small(asked, words)
        small, more = apart(less, module)
        values = parser.parse_args([*small, *mine]).clone(with_meta=False).as_dict()
        asked = RecipeRun(name, module, _settings(module, values), [*more, *rest], less)
        asked.config()
    for field in dataclasses.fields(asked.settings):
        value = getattr(asked.settings, field.name)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            parser.error(f"--{field.name} is {value}; it must be at least 0, and finite")
    if asked.settings.eval_samples < 2:
        parser.error(f"--eval_samples is {asked.settings.eval_samples}, and an interval needs at least 2")
    if not asked.settings.base_seconds > 0:
        parser.error(f"--base_seconds is {asked.settings.base_seconds}; it must be above 0")
    return asked


@contextlib.contextmanager
def in_own_words() -> Iterator[None]:
    """What the rest of the house says of its flags, with those that a recipe takes."""
    try:
        yield
    except ValueError as error:
        said = re.sub(r"--[a-z_.]+", lambda flag: PLACES.get(flag[0], flag[0]), str(error))
        raise ValueError(said) from error


def _settings(module: ModuleType, values: dict[str, Any]) -> Any:
    return module.SETTINGS(**{key: value for key, value in values.items() if key != "config"})


def apart(words: list[str], module: ModuleType) -> tuple[list[str], list[str]]:
    """The words that are the recipe's own flags with their values, and the rest, which is training's."""
    own = {field.name: field.type for field in dataclasses.fields(module.SETTINGS)}
    mine, rest, place = [], [], 0
    while place < len(words):
        word = words[place]
        flag, equals, value = word.removeprefix("--").partition("=")
        place += 1
        if not word.startswith("--") or flag not in own:
            rest.append(word)
            continue
        mine.append(f"--{flag}")
        following = words[place] if place < len(words) else "--"
        if equals:
            following = value
        elif own[flag] == "bool" and following.startswith("--"):
            following = "true"
        elif place < len(words):
            place += 1
        else:
            continue  # the parser says that it wants a value
        several = own[flag].startswith("tuple") and not following.startswith("[")
        mine.append(json.dumps(following.split(",")) if several else following)
    return mine, rest


def in_small(asked: RecipeRun, words: list[str]) -> list[str]:
    """The module's settings for small models as words, but for those that the command line gives.

    A budget that is given, in whatever unit, stands for itself.
    """
    given = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    asks, own = asked.config().train, replace(asked, words=[]).config().train
    if any(name in given or getattr(asks, name) != getattr(own, name) for name in BUDGETS):
        given.update(BUDGETS)
    small = {key: value for key, value in asked.module.SMALL.items() if key not in given}
    return [part for key, value in small.items() for part in (f"--{key}", str(value))]


# --- what was done -----------------------------------------------------------------------------------


def done(out: Path) -> dict[str, Any]:
    """What each finished step was made from, by its name."""
    path = out / "steps.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it must be a mapping")
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{path} is damaged; remove {out}, or name another --out") from None
    return found


def mark(out: Path, step: str, made_from: Any) -> None:
    write_atomically(out / "steps.json", json.dumps(done(out) | {step: made_from}, indent=1))


def sources(settings: RecipeSettings) -> dict[str, str]:
    """The `content_of` each file or folder that a setting names."""
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        path = Path(value) if isinstance(value, str) and value and field.name != "out" else None
        if path is not None and path.exists():
            found[field.name] = content_of(path)
    return found


# --- the steps ---------------------------------------------------------------------------------------


def run(asked: RecipeRun) -> int:
    """All steps; the exit code.

    Raises:
        ValueError: The base, the source, the settings or the folder do not fit; one sentence.
        SystemExit: With 75, when a signal asked training to stop.
    """
    if hasattr(asked.module, "variants") and (several := asked.module.variants(asked.settings)):
        made, lap = {}, laps()
        for name, settings in several.items():
            print(f"\n=== {asked.name}, {name}", flush=True)
            one = replace(asked, settings=replace(settings, out=str(asked.out / name)))
            run(one)
            made[name] = one.settings, one.out
            lap(name)
        text = asked.module.together(made)
        write_atomically(asked.out / "report.txt", text + "\n")
        print(f"\n{text}\n\nreport    {asked.out / 'report.txt'}\ntime      {lap('')}")
        return 0
    if check := getattr(asked.module, "check", None):
        check(asked.settings)
    lap, config = laps(), asked.config()
    longest = asked.module.longest(asked.settings)
    if config.train.row_length and config.train.row_length < longest:
        raise ValueError(
            f"--row_length is {config.train.row_length}, and the recipe's settings let an example have "
            f"{longest} tokens: raise it, or ask for shorter examples"
        )
    refuse_early(asked, config)
    asked.out.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    if asked.less:
        print(f"settings for a small model: {' '.join(asked.less)}; flags override them", flush=True)
    if config.train.base == TO_BE_MADE:
        if files_of := getattr(asked.module, "files_of", None):
            files_of(asked.settings, asked.out / "source")
        config = with_small_base(asked, config)
        notes.append(SMALL_BASE)
        lap("base")
    tokenizer = None if config.train.base is None else checked_base(config)
    build(asked, tokenizer)
    lap("dataset")
    from recipes.training import finish

    if not finish(config):
        print(f"training: {config.train.run} is finished already")
    lap("training")
    notes += export_run(asked.out, config)
    lap("export")
    print(evaluated(asked, config, notes))
    lap("scores")
    print(f"time      {lap('')}", flush=True)
    return 0


def refuse_early(asked: RecipeRun, config: Config) -> None:
    """ValueError for what can be known not to do before the source is opened, and before a base is made."""
    from pretrained.load import described
    from recipes.training import FINISHED
    from training.beforehand import refuse_mistakes, refuse_other_base

    refuse_unwritable(asked.out, "--out")
    if (asked.run / FINISHED).is_file():  # what is left is to score it, which may be done by other settings
        return
    refuse_mistakes(config, made_here=True)
    if config.train.base in (None, TO_BE_MADE):
        return
    try:
        refuse_other_base(config)
    except ValueError as error:
        if not str(error).startswith("lora."):
            raise
        family, _ = described(config.train.base, config.train.base_revision)
        raise ValueError(
            f"{config.train.base} is of the family {family.model_type}, which this recipe's settings do not "
            f"fit: {error}; set --lora.targets, or take another --base"
        ) from None


def laps() -> Callable[[str], str]:
    """A clock that is told what has just ended, and says how long each and all of it took."""
    begun = time.monotonic()
    took: dict[str, float] = {}

    def clock(seconds: float) -> str:
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"

    def lap(name: str) -> str:
        whole = time.monotonic() - begun
        if name:
            took[name] = whole - sum(took.values())
        return f"{clock(whole)}: " + ", ".join(f"{one} {clock(seconds)}" for one, seconds in took.items())

    return lap


def with_small_base(asked: RecipeRun, config: Config) -> Config:
    """The settings with the base that this machine trains where none is named; its context holds a row."""
    from recipes.base import BaseConfig, make_base

    print(f"no --base is given: {SMALL_BASE}", flush=True)
    settings = BaseConfig(
        asked.module.FAMILY,
        asked.settings.base_seconds,
        cache=config.data.cache,
        block_size=max(config.train.row_length, asked.module.longest(asked.settings)),
    )
    return asked.config("--base", str(make_base(settings)))


def checked_base(config: Config) -> Any:
    """The tokenizer that training will use; ValueError if the base cannot be opened."""
    from pretrained import load_pretrained
    from training.run import starting_tokenizer

    found = load_pretrained(str(config.train.base), revision=config.train.base_revision)
    return starting_tokenizer(config, found)


def build(asked: RecipeRun, tokenizer: Any) -> None:
    """The dataset, unless it is there, made from the same."""
    shared = {field.name for field in dataclasses.fields(RecipeSettings)}
    made_from = {
        **{k: v for k, v in dataclasses.asdict(asked.settings).items() if k not in shared},
        **{f"content of {name}": value for name, value in sources(asked.settings).items()},
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
    }
    made_from = json.loads(json.dumps(made_from))
    folder, before = asked.out / "dataset", done(asked.out).get("dataset")
    if before == made_from:
        if check_isolation := getattr(asked.module, "check_isolation", None):
            check_isolation(asked.settings)
        print(f"dataset: {folder} is there already")
    else:
        if before is not None and (asked.run / "config.yaml").exists():
            name = next(key for key in {**made_from, **before} if made_from.get(key) != before.get(key))
            raise ValueError(
                f"{asked.out} was begun with {name} {before.get(name)!r}, and now it is "
                f"{made_from.get(name)!r}; set it back, or name another --out"
            )
        asked.module.build(asked.settings, tokenizer, folder)
        mark(asked.out, "dataset", made_from)
    print("\n".join(read_counts(folder).lines()), flush=True)


def export_run(out: Path, config: Config) -> list[str]:
    """Adapter and merged model of the best checkpoint; what could not be written, and why."""
    from training.checkpoint import checkpoints
    from training.export import export
    from training.export_config import ExportConfig

    made_from = [[m.step, m.files] for m in checkpoints(Path(config.train.run) / "checkpoints")]
    made_from = json.loads(json.dumps(made_from))
    names = ("adapter", "merged") if config.train.base and config.lora.r else ("model",)
    before = done(out).get("export", {})
    if before.get("from") == made_from:
        missing = [name for name in names if not (out / name).is_dir()]
        if all(any(note.startswith(f"not written: {name}:") for note in before["notes"]) for name in missing):
            return before["notes"]
    import shutil

    notes = []
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)  # of an earlier checkpoint
        try:
            print(export(ExportConfig(str(out / name), config.train.run, merge=name == "merged")), flush=True)
        except ValueError as error:
            notes.append(f"not written: {name}: {error}")
    mark(out, "export", {"from": made_from, "notes": notes})
    return notes


def evaluated(asked: RecipeRun, config: Config, notes: list[str]) -> str:
    """The tables, verdicts and samples, also in OUT/report.txt; made anew where what they are of changed."""
    from suites.evaluate import evaluate, table, write_results
    from suites.settings import EvalConfig
    from training.checkpoint import checkpoints
    from training.curves import draw_curves

    out, train = asked.out, config.train
    precision = train.precision if train.eval_precision == "auto" else train.eval_precision
    fields = {"samples": asked.settings.eval_samples, "source": config.data.source} | asked.module.EVALUATION
    if decided := getattr(asked.module, "evaluation", None):
        fields |= decided(asked.settings)
    scoring = EvalConfig(
        train.run, device=train.device, precision=precision, cache=config.data.cache, **fields
    )
    manifests = checkpoints(Path(train.run) / "checkpoints")
    made_from = [[m.step, m.files] for m in manifests], vars(scoring), vars(asked.settings), notes
    made_from = json.loads(json.dumps(made_from))
    report = out / "report.txt"
    if done(out).get("scores") != made_from or not report.is_file():
        result = evaluate(scoring)
        step, side = result["step"], result["side"]
        parts = [f"{asked.name}: best checkpoint, step {step}, on all {side} examples"]
        parts += [f"NOTE: {note}" for note in notes]
        parts.append(table(result))
        if own := getattr(asked.module, "evaluate", None):
            parts.append(own(asked.settings, scoring, result))
        parts.append(samples(result.get("suite", {"samples": []})["samples"]))
        write_results(result, scoring)
        write_atomically(report, printable("\n\n".join(part for part in parts if part)) + "\n")
        mark(out, "scores", made_from)
    places = [f"dataset   {out / 'dataset'}"]
    places += [f"{name:<10}{out / name}" for name in ("adapter", "merged", "model") if (out / name).is_dir()]
    places += [f"curves    {', '.join(map(str, draw_curves(Path(train.run))))}", f"report    {report}"]
    return "\n\n" + report.read_text("utf-8") + "\n" + "\n".join(places)


def samples(found: list[dict[str, Any]]) -> str:
    """Five examples in words: the end of the prompt, what each model wrote, and what stands there."""
    parts = []
    for sample in found[:SAMPLES]:
        prompt = sample["prompt"]
        prompt = prompt if len(prompt) <= SHOWN else "..." + prompt[-SHOWN:]
        if "suffix" in sample:
            prompt += f"[gap]{sample['suffix'][:SHOWN]}"
        texts = {
            name: sample["predictions"][name] for name in ("base", "model") if name in sample["predictions"]
        }
        lines = [f"--- {sample['id']}", prompt]
        for name, text in texts.items():
            shown = text.strip("\n") if text.strip() else f"({len(text)} blanks)" if text else "(nothing)"
            lines += [f"--- {'tuned' if name == 'model' and 'base' in texts else name}", shown]
        parts.append("\n".join([*lines, "--- the reference", sample["reference"].strip("\n")]))
    return "\n\n".join(parts)

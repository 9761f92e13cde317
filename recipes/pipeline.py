"""Run a recipe's steps in order: base, dataset, training, export, scores. A finished step is not repeated.

OUT/dataset/        train.jsonl, validation.jsonl, test.jsonl, counts.json, and the card
OUT/run/            the training run: checkpoints, curves, eval.json
OUT/adapter/        the adapter, for PEFT
OUT/merged/         the merged model, for transformers
OUT/report.txt      the tables, and five samples
OUT/steps.json      the inputs of each finished step
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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from config import CONFIG_GROUPS, Config, parse_config, refuse_unwritable, write_atomically
from config.console import printable, refuse, say
from config.describe import config_as_yaml
from config.files import REPOSITORY
from config.flags import Given, asks_for_help, flags_of, read_words, without_print
from config.help import show_help
from config.parser import values_of
from recipes.building import RecipeSettings, read_counts
from recipes.files import content_of

SAMPLES = 5
SHOWN = 600  # a sample shows this many characters of its prompt, from the end
BUDGETS = ("max_seconds", "max_steps", "max_epochs")
TO_BE_MADE = "(none yet)"  # This stands for the base where the command line names none.
PLACES = {"--run": "--out", "--data.source": "--source"}  # flags of training -> what a recipe has instead
SMALL_BASE = "small base trained here, figures are not those of the published weights"


@dataclass(frozen=True)
class RequestedRecipe:
    """A recipe as a command line requests it: its settings, and the words that are flags of training."""

    name: str
    module: ModuleType
    settings: Any  # an instance of the module's SETTINGS
    words: list[str]
    less: Sequence[str] = ()  # the words that the module's SMALL adds, for a report

    @property
    def out(self) -> Path:
        return Path(self.settings.out or f"runs/{self.name}")

    @property
    def run(self) -> Path:
        return self.out / "run"

    def config(self, *more: str) -> Config:
        """Return the training settings: recipes/NAME.yaml, the command line's, then the recipe's paths."""
        places = ["--data.source", str(self.out / "dataset"), "--run", str(self.run)]
        base = [] if self.module.FAMILY is None else ["--base", TO_BE_MADE]
        return parse_config(
            [
                *base,
                "--config",
                str(REPOSITORY / "recipes" / f"{self.name}.yaml"),
                *self.words,
                *more,
                *places,
            ]
        )


# --- the command line --------------------------------------------------------------------------------


def parse_words(name: str, words: list[str]) -> RequestedRecipe:
    """Tell the recipe's flags from those of training; a mistake prints one sentence and exits with 2."""
    module = importlib.import_module(f"recipes.{name}")
    flags = flags_of(CONFIG_GROUPS) | flags_of({"": module.SETTINGS})
    if asks_for_help(words, flags):
        less = " ".join(f"--{key} {value}" for key, value in module.SMALL.items())
        show_help(
            {"": module.SETTINGS},
            str(module.__doc__).splitlines()[0],
            f"python -m recipes {name}",
            "Every flag of training can be given too: python trainingmanager.py --help\n"
            f"Without --base, small models have other defaults: {less}",
        )
    given, prints = without_print(read_words(words, flags, subject=""))
    mine, rest = apart(given, module)
    _refuse_flags(name, module, {one.flag for one in rest})
    groups = {"": module.SETTINGS}
    recipe = RequestedRecipe(name, module, module.SETTINGS(**values_of(groups, mine)), _words(rest))
    if recipe.config().train.base in (None, TO_BE_MADE):  # A typo is reported before anything takes time.
        less = in_small(recipe, given)
        small, more = apart(read_words(less, flags), module)
        settings = module.SETTINGS(**values_of(groups, [*small, *mine]))
        recipe = RequestedRecipe(name, module, settings, _words([*more, *rest]), less)
        recipe.config()
    for field in dataclasses.fields(recipe.settings):
        value = getattr(recipe.settings, field.name)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            refuse(f"--{field.name} is {value}; it must be at least 0, and finite")
    if recipe.settings.eval_samples < 2:
        refuse(f"--eval_samples is {recipe.settings.eval_samples}, and an interval needs at least 2")
    if not recipe.settings.base_seconds > 0:
        refuse(f"--base_seconds is {recipe.settings.base_seconds}; it must be above 0")
    if prints:  # Of its training, for which --config is; its own settings are flags alone.
        say(config_as_yaml(recipe.config()))
        sys.exit(0)
    return recipe


def _words(given: list[Given]) -> list[str]:
    return [str(one) for one in given]


def _refuse_flags(name: str, module: ModuleType, given: Collection[str]) -> None:
    """End the command for a flag of training that a recipe decides itself."""
    for place, instead in {**PLACES, "--resume": "the same command again, which goes on"}.items():
        if place in given:
            refuse(f"{place} is the recipe's own; give {instead}")
    for other in ("--plan", "--prepare", "--prove_resume", "--overfit"):
        if other in given:
            refuse(
                f"{other} is no part of a recipe; ask for it by python trainingmanager.py {other} --config "
                f"recipes/{name}.yaml, with --base and --data.source"
            )
    if module.FAMILY is None and "--base" in given:
        refuse(f"--base is given, and the recipe {name} trains from scratch; leave it out")


@contextlib.contextmanager
def in_own_words() -> Iterator[None]:
    """Rewrite errors of the block: a flag of training becomes the recipe's own."""
    try:
        yield
    except ValueError as error:
        said = re.sub(r"--[a-z_.]+", lambda flag: PLACES.get(flag[0], flag[0]), str(error))
        raise ValueError(said) from error


def apart(given: list[Given], module: ModuleType) -> tuple[list[Given], list[Given]]:
    """Return the flags that are the recipe's own, and those that are training's."""
    own = {f"--{field.name}" for field in dataclasses.fields(module.SETTINGS)}
    return [one for one in given if one.flag in own], [one for one in given if one.flag not in own]


def in_small(recipe: RequestedRecipe, given: list[Given]) -> list[str]:
    """Return the module's settings for small models as words, without those that the command line gives.

    A budget on the command line, in whatever unit, replaces the module's budget.
    """
    names = {one.flag.removeprefix("--") for one in given}
    asks, own = recipe.config().train, replace(recipe, words=[]).config().train
    if any(name in names or getattr(asks, name) != getattr(own, name) for name in BUDGETS):
        names.update(BUDGETS)
    small = {key: value for key, value in recipe.module.SMALL.items() if key not in names}
    return [part for key, value in small.items() for part in (f"--{key}", str(value))]


# --- what was done -----------------------------------------------------------------------------------


def done(out: Path) -> dict[str, Any]:
    """Return the inputs of each finished step, by its name."""
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


def sources(recipe: RequestedRecipe) -> dict[str, str]:
    """Return the `content_of` each file or folder that a setting names, but of a source that lives none."""
    found, settings = {}, recipe.settings
    if getattr(recipe.module, "LIVING", False):
        return {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        path = Path(value) if isinstance(value, str) and value and field.name != "out" else None
        if path is not None and path.exists():
            found[field.name] = content_of(path)
    return found


# --- the steps ---------------------------------------------------------------------------------------


def run(recipe: RequestedRecipe) -> int:
    """Run all steps; return the exit code.

    Raises:
        ValueError: The base, the source, the settings or the folder do not fit.
        SystemExit: With 75, when a signal stopped training.
    """
    if hasattr(recipe.module, "variants") and (several := recipe.module.variants(recipe.settings)):
        made, lap = {}, laps()
        for name, settings in several.items():
            print(f"\n=== {recipe.name}, {name}", flush=True)
            one = replace(recipe, settings=replace(settings, out=str(recipe.out / name)))
            run(one)
            made[name] = one.settings, one.out
            lap(name)
        text = recipe.module.together(made)
        write_atomically(recipe.out / "report.txt", text + "\n")
        print(f"\n{text}\n\nreport    {recipe.out / 'report.txt'}\ntime      {lap('')}")
        return 0
    if check := getattr(recipe.module, "check", None):
        check(recipe.settings)
    lap, config = laps(), recipe.config()
    longest = recipe.module.longest(recipe.settings)
    if config.train.row_length and config.train.row_length < longest:
        raise ValueError(
            f"--row_length is {config.train.row_length}, and the recipe's settings let an example have "
            f"{longest} tokens: raise it, or ask for shorter examples"
        )
    refuse_early(recipe, config)
    recipe.out.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    if recipe.less:
        print(f"settings for a small model: {' '.join(recipe.less)}; flags override them", flush=True)
    if config.train.base == TO_BE_MADE:
        if files_of := getattr(recipe.module, "files_of", None):
            files_of(recipe.settings, recipe.out / "source")
        config = with_small_base(recipe, config)
        notes.append(SMALL_BASE)
        lap("base")
    tokenizer = None if config.train.base is None else checked_base(config)
    build(recipe, tokenizer)
    lap("dataset")
    from recipes.training import finish

    if not finish(config):
        print(f"training: {config.train.run} is finished already")
    lap("training")
    notes += export_run(recipe.out, config)
    lap("export")
    print(evaluated(recipe, config, notes))
    lap("scores")
    print(f"time      {lap('')}", flush=True)
    return 0


def refuse_early(recipe: RequestedRecipe, config: Config) -> None:
    """Raise a ValueError for mistakes that show before the source is opened and a base is trained."""
    from pretrained.load import described
    from recipes.training import FINISHED
    from training.beforehand import refuse_mistakes, refuse_other_base

    refuse_unwritable(recipe.out, "--out")
    if (recipe.run / FINISHED).is_file():  # Only scores are left, for which other settings are allowed.
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
    """Return a function that takes the name of the step that just ended, and returns all steps' times."""
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


def with_small_base(recipe: RequestedRecipe, config: Config) -> Config:
    """Train a small base whose context has room for a row; return the training settings with it."""
    from recipes.base_config import BaseConfig
    from recipes.small_base import make_base

    print(f"no --base is given: {SMALL_BASE}", flush=True)
    settings = BaseConfig(
        recipe.module.FAMILY,
        recipe.settings.base_seconds,
        cache=config.data.cache,
        block_size=max(config.train.row_length, recipe.module.longest(recipe.settings)),
    )
    return recipe.config("--base", str(make_base(settings)))


def checked_base(config: Config) -> Any:
    """Return the tokenizer that training will use; raise a ValueError if the base cannot be opened."""
    from pretrained import load_pretrained
    from training.run import starting_tokenizer

    found = load_pretrained(str(config.train.base), revision=config.train.base_revision)
    return starting_tokenizer(config, found)


def build(recipe: RequestedRecipe, tokenizer: Any) -> None:
    """Build the dataset, unless it is there and was made from the same inputs."""
    shared = {field.name for field in dataclasses.fields(RecipeSettings)}
    made_from = {
        **{k: v for k, v in dataclasses.asdict(recipe.settings).items() if k not in shared},
        **{f"content of {name}": value for name, value in sources(recipe).items()},
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
    }
    made_from = json.loads(json.dumps(made_from))
    folder, before = recipe.out / "dataset", done(recipe.out).get("dataset")
    if before == made_from:
        if check_isolation := getattr(recipe.module, "check_isolation", None):
            check_isolation(recipe.settings)
        print(f"dataset: {folder} is there already")
    else:
        if before is not None and (recipe.run / "config.yaml").exists():
            name = next(key for key in {**made_from, **before} if made_from.get(key) != before.get(key))
            raise ValueError(
                f"{recipe.out} was begun with {name} {before.get(name)!r}, and now it is "
                f"{made_from.get(name)!r}; set it back, or name another --out"
            )
        recipe.module.build(recipe.settings, tokenizer, folder)
        mark(recipe.out, "dataset", made_from)
    print("\n".join(read_counts(folder).lines()), flush=True)


def export_run(out: Path, config: Config) -> list[str]:
    """Write adapter and merged model of the best checkpoint; return notes on what could not be written."""
    from guards.faults import Fault
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
        shutil.rmtree(out / name, ignore_errors=True)  # an export of an earlier checkpoint
        settings = ExportConfig(
            str(out / name), config.train.run, merge=name == "merged", allow=config.train.allow
        )
        try:
            print(export(settings), flush=True)
        except Fault:
            raise
        except ValueError as error:
            notes.append(f"not written: {name}: {error}")
    mark(out, "export", {"from": made_from, "notes": notes})
    return notes


def evaluated(recipe: RequestedRecipe, config: Config, notes: list[str]) -> str:
    """Return tables, verdicts and samples, also in OUT/report.txt; score again if their inputs changed."""
    from suites.evaluate import evaluate, table, write_results
    from suites.settings import EvalConfig
    from training.checkpoint import checkpoints
    from training.curves import draw_curves

    out, train = recipe.out, config.train
    precision = train.precision if train.eval_precision == "auto" else train.eval_precision
    fields = {
        "samples": recipe.settings.eval_samples,
        "source": config.data.source,
    } | recipe.module.EVALUATION
    if decided := getattr(recipe.module, "evaluation", None):
        fields |= decided(recipe.settings)
    scoring = EvalConfig(
        train.run, device=train.device, precision=precision, cache=config.data.cache, **fields
    )
    manifests = checkpoints(Path(train.run) / "checkpoints")
    made_from = [[m.step, m.files] for m in manifests], vars(scoring), vars(recipe.settings), notes
    made_from = json.loads(json.dumps(made_from))
    report = out / "report.txt"
    if done(out).get("scores") != made_from or not report.is_file():
        result = evaluate(scoring)
        step, split = result["step"], result["side"]
        parts = [f"{recipe.name}: best checkpoint, step {step}, on all {split} examples"]
        parts += [f"NOTE: {note}" for note in notes]
        parts.append(table(result))
        if own := getattr(recipe.module, "evaluate", None):
            parts.append(own(recipe.settings, scoring, result))
        parts.append(samples(result.get("suite", {"samples": []})["samples"]))
        write_results(result, scoring)
        write_atomically(report, printable("\n\n".join(part for part in parts if part)) + "\n")
        mark(out, "scores", made_from)
    places = [f"dataset   {out / 'dataset'}"]
    places += [f"{name:<10}{out / name}" for name in ("adapter", "merged", "model") if (out / name).is_dir()]
    places += [f"curves    {', '.join(map(str, draw_curves(Path(train.run))))}", f"report    {report}"]
    return "\n\n" + report.read_text("utf-8") + "\n" + "\n".join(places)


def samples(found: list[dict[str, Any]]) -> str:
    """Return five examples as text: the end of the prompt, each model's text, and the reference."""
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

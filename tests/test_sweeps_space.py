"""The space: what it draws, and each mistake in it told in one sentence."""

from __future__ import annotations

import math
import random
import re
import sys
from typing import Any

import pytest
import yaml
from optuna.trial import create_trial

from config import Config, ModelConfig, OptimizerConfig, TrainConfig
from config.schema import flat
from sweeps import space as spaces
from sweeps.budget import more_trials
from sweeps.settings import DEFAULT, parse_settings
from sweeps.space import Parameter, Space, parse_space
from sweeps.study import open_studies

WHOLE = """
head_lr: {log: [1e-3, 1e-1]}
optimizer:
  name: [adamw, muon]
  muon_lr: {log: [5e-3, 5e-2], when: {optimizer.name: muon}}
model.n_layer: {int: [2, 6], step: 2}
model.dropout: {float: [0, 0.3]}
batch_size: {log: [4, 16]}
data.loss_on: [completion, all]
"""


def space_of(text: str, base: Config | None = None) -> Space:
    return parse_space(yaml.safe_load(text), base or Config())


def drawn(space: Space, seed: int, base: Config) -> dict[str, Any]:
    draw = random.Random(seed)

    def choose(p: Parameter) -> Any:
        if p.kind == "choice":
            return draw.choice(p.choices)
        if p.kind == "int":
            return draw.randrange(int(p.low), int(p.high) + 1, p.step)
        return draw.uniform(p.low, p.high)

    return space.draw(flat(base), choose)


def test_whatever_is_drawn_is_a_config_with_these_values_and_no_others() -> None:
    base, space = Config(), space_of(WHOLE)
    names = set()
    for seed in range(12):
        chosen = drawn(space, seed, base)
        config = space.config(base, chosen)
        found = flat(config)
        assert {key: found[key] for key in chosen} == chosen
        others = {key for key, value in flat(base).items() if value != found[key]}
        assert others <= set(chosen)
        assert ("optimizer.muon_lr" in chosen) == (chosen["optimizer.name"] == "muon")
        names.add(chosen["optimizer.name"])
        assert chosen["model.n_layer"] in (2, 4, 6)
    assert names == {"adamw", "muon"}


def test_a_parameter_that_does_not_vary_has_its_default_which_nothing_reads() -> None:
    base = Config(optimizer=OptimizerConfig(muon_lr=0.03))
    space = space_of(
        "optimizer.name: [adamw, muon]\nmuon_lr: {log: [1e-3, 1e-1], when: {optimizer.name: muon}}", base
    )
    assert space.config(base, {"optimizer.name": "adamw"}).optimizer.muon_lr == OptimizerConfig().muon_lr
    assert space.config(base, {"optimizer.name": "muon", "optimizer.muon_lr": 0.5}).optimizer.muon_lr == 0.5


def test_what_is_read_where_it_does_not_vary_stays_as_in_the_config() -> None:
    base = Config(optimizer=OptimizerConfig(name="adamw", weight_decay=0.07))
    space = space_of(
        "optimizer.name: [adamw, muon]\nweight_decay: {float: [0, 0.1], when: {optimizer.name: muon}}", base
    )
    itself = space.default(base)
    assert itself is not None and itself == {"optimizer.name": "adamw"}
    assert space.config(base, itself) == base


def test_each_optimizer_of_a_space_has_its_own_rates_beside_what_is_shared() -> None:
    text = "optimizer.name: [adamw, muon]\nlr: {log: [1e-4, 1e-2], when: {optimizer.name: adamw}}\n"
    space = space_of(text + "weight_decay: [0.0, 0.1]")
    shared = {"optimizer.weight_decay": 0.1}
    muon = space.config(Config(), {"optimizer.name": "muon", **shared}).optimizer
    assert muon == OptimizerConfig(weight_decay=0.1) and muon.resolved().embedding_lr == 0.3
    adamw = space.config(Config(), {"optimizer.name": "adamw", "optimizer.lr": 3e-4, **shared}).optimizer
    assert adamw == OptimizerConfig(name="adamw", lr=3e-4, weight_decay=0.1)
    assert adamw.resolved().embedding_lr == 0.0  # It is lr's.
    with pytest.raises(
        ValueError, match=r"optimizer.name muon contradicts the config: optimizer.lr is set, but"
    ):
        space_of("optimizer.name: [adamw, muon]\nlr: {log: [1e-4, 1e-3]}")


def test_the_config_itself_as_a_point_of_the_space_or_not() -> None:
    assert space_of("head_lr: {log: [1e-3, 1e-1]}").default(Config()) == {"optimizer.head_lr": 0.01}
    assert space_of("head_lr: {log: [1e-3, 5e-3]}").default(Config()) is None
    assert space_of("model.dropout: {float: [0, 0.3]}").default(Config()) == {"model.dropout": 0.0}
    assert space_of("model.dropout: [0.0, 0.3]").default(Config()) == {"model.dropout": 0.0}
    # embed_dropout follows dropout as long as it is not given.
    dropped = Config(model=ModelConfig(dropout=0.1))
    text = "model.embed_dropout: {float: [0, 0.3]}"
    assert space_of(text, dropped).default(dropped) == {"model.embed_dropout": 0.1}
    on_a_base = TrainConfig(base="x")  # The base's own dropout holds as long as none is given.
    assert space_of("model.dropout: [0.0, 0.3]").default(Config(train=on_a_base)) is None
    given = Config(model=ModelConfig(dropout=0.1), train=on_a_base)
    assert space_of(text, given).default(given) == {"model.embed_dropout": 0.1}
    arms = "arms: {small: {model.n_layer: 2}, own: {model.n_layer: 4, model.dropout: null}}"
    assert space_of(arms).default(Config()) == {"arms": "own"}


def test_arms_set_all_that_any_of_them_sets() -> None:
    base = Config(model=ModelConfig(dropout=0.1))
    space = space_of("arms: {a: {model.n_layer: 2}, b: {n_embd: 96, model.dropout: 0.3}}", base)
    a, b = (space.config(base, {"arms": name}).model for name in "ab")
    assert (a.n_layer, a.n_embd, a.dropout) == (2, 192, 0.1)
    assert (b.n_layer, b.n_embd, b.dropout) == (4, 96, 0.3)


def test_the_grid_has_each_combination_once_and_conditions_hold() -> None:
    text = """
optimizer.name: [adamw, muon]
muon_lr: {log: [1e-3, 1e-1], points: 3, when: {optimizer.name: muon}}
model.n_layer: {int: [1, 3]}
"""
    grid = space_of(text).grid(Config())
    assert len(grid) == 3 * (1 + 3) == len({tuple(sorted(c.items())) for c in grid})
    rates = sorted({c["optimizer.muon_lr"] for c in grid if "optimizer.muon_lr" in c})
    assert rates[0] == 1e-3 and rates[-1] == 1e-1 and math.isclose(rates[1], 1e-2)
    steps = space_of("model.n_layer: {int: [2, 8], step: 2, points: 3}").parameters[0]
    assert steps.grid() == (2, 6, 8) and all(map(steps.holds, steps.grid()))
    with pytest.raises(ValueError, match="add `points: 5`"):
        space_of("head_lr: {log: [1e-3, 1e-1]}").grid(Config())


def test_a_grid_of_too_many_combinations_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "GRID", 12)
    text = "model.n_layer: {int: [1, 3]}\nbatch_size: [2, 4]\nseed: {int: [1, %d]}"
    assert len(space_of(text % 2).grid(Config())) == 12
    with pytest.raises(ValueError, match="grid of 3 x 2 x 3 values has more than 12 combinations"):
        space_of(text % 3).grid(Config())
    with pytest.raises(ValueError, match="seed is a range, of which a grid cannot try every value"):
        space_of(text % 10**15).grid(Config())


MISTAKES = {
    "lrr: [0.1, 0.2]": "lrr is no setting; did you mean optimizer.lr?",
    "optimizer.leaning: [0.1, 0.2]": "optimizer.leaning is no setting; did you mean",
    "dropout: [0.1, 0.2]": "dropout may be model.dropout or lora.dropout",
    "head_lr: {log: [1e-1, 1e-3]}": "goes from 0.1 down to 0.001",
    "head_lr: {log: [1e-3, 1e-3]}": "which is one value",
    "head_lr: {log: []}": r"has the range \[\]; write two numbers",
    "head_lr: {log: [0, 1]}": "must begin above 0",
    "head_lr: {float: [0, .inf]}": "both must be finite",
    "head_lr: {log: [a, b]}": "write two numbers",
    "head_lr: {lug: [1, 2]}": "write optimizer.head_lr: a list of choices",
    "head_lr: 5": "write optimizer.head_lr: a list of choices",
    "head_lr: []": "has no choices",
    "head_lr: [0.1]": "has one choice",
    "head_lr: [0.1, 1e-1]": "twice, two arms that are one",
    "model.n_layer: {float: [1, 2]}": "is a whole number",
    "model.n_layer: {int: [1.5, 2]}": "both must be whole numbers",
    "model.n_layer: {int: [1, 4], step: 2}": "1 to 4, which steps of 2 do not meet; let it end at 3 or 5$",
    "model.n_layer: {int: [1, 2], step: 4}": "1 to 2, which steps of 4 do not meet; let it end at 5$",
    "model.n_layer: {int: [1, 4], step: 0}": "model.n_layer has the step 0; it must be a whole number from 1",
    "model.dropout: {float: [0, 1], step: 0.1}": "has `step` beside `float`; it goes with int alone",
    "model.dropout: {choice: [0, 0.1], points: 2}": "beside `choice`; it goes with int and float and log",
    "seed: {int: [1234567, 1234568.5]}": "from 1234567 to 1234568.5, and both must be whole",
    "optimizer.name: {float: [1, 2]}": "is no number",
    "optimizer.name: [adamw, sgd]": "'sgd' is none of muon, adamw",
    "model.tie_embeddings: [1, 2]": "1 is not of the type bool",
    "lora.rank_pattern: [{}, {}]": "is a mapping, which cannot vary",
    "log_every: [1, 2]": "log_every changes nothing that a run computes",
    "data.source: [a, b]": "changes what validation reads",
    "run: [a, b]": "run is no setting of a model",
    "plan: [false, true]": "plan is no setting of a model",
    "head_lr: {log: [1e-3, 1], points: 1}": "has 1 points; write a whole number from 2 to 10000",
    "head_lr: {log: [1e-3, 1], points: 10_001}": "has 10001 points; write a whole number from 2",
    "head_lr: [0.1, 0.2]\nmodel: {}": "model is empty; write in it what varies",
    "model.rope_factor: {float: [2, 4]}": "contradicts the config .*model.rope_scaling has no factor",
    "beta1: {float: [0.5, 1.5]}": "optimizer.beta1 1.5 contradicts the config: .* must be below 1",
    "seed: [1, 2]\nmodel.n_head: [5, 7]": "contradicts the config .*n_embd 192 is not a multiple",
    "muon_lr: {log: [1e-3, 1e-2], when: {optimizer.name: adamw}}": "never varies",
    "muon_lr: {log: [1e-3, 1e-2], when: {optimizer.nam: muon}}": "optimizer.nam is no setting",
    "lr: {log: [1e-4, 1e-3]}": "learns at it; what acts is optimizer.muon_lr, optimizer.embedding_lr and",
    "optimizer.name: [muon, adamw]\nmuon_lr: {log: [1e-3, 1e-2]}": "optimizer.name adamw contradicts",
    "seed: {int: [0, 3], when: {keep: 0}}": "keep changes nothing",
    "seed: {int: [0, 3], when: {batch_size: 4}}\nbatch_size: {int: [2, 4], when: {seed: 1}}": "comes back",
    "batch_size: [2, 4]\nseed: {int: [0, 3], when: {batch_size: 5}}": "which the space never has",
    "arms: {a: {model.n_layer: 2}}": "at least two names",
    "arms: {a: {model.n_layer: 4}, b: {model.n_layer: 4}}": "arms a and b are the same settings",
    "arms: {a: {model.n_layer: 4}, b: {model.n_embd: 192}}": "arms a and b are the same settings",
    "arms: {a: {model.n_layer: 2}, b: {model.n_layer: 3}}\nmodel.n_layer: [1, 2]": "is set by arms and by",
    "head_lr: [1, 2]\noptimizer.head_lr: [1, 2]": "is there twice",
    "arms: {a: {model.n_layer: 2}, $b: {model.n_layer: 3}}": "printable characters other than",
    'arms: {a: {model.n_layer: 2}, "b\\e[31m": {model.n_layer: 3}}': "printable characters other than",
    "[]": "must be a mapping",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_space_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[text]) as told:
        space_of(text)
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


def test_a_condition_on_a_value_inside_a_range_may_hold() -> None:
    text = "seed: {choice: [1, 2], when: {batch_size: [4, 6]}}\nbatch_size: {int: [2, 8], step: 2}"
    grid = space_of(text).grid(Config())
    assert sorted(c["batch_size"] for c in grid if "seed" in c) == [4, 4, 6, 6]
    assert sorted(c["batch_size"] for c in grid if "seed" not in c) == [2, 8]


def test_choices_that_sometimes_do_not_go_together_are_no_contradiction() -> None:
    space = space_of("model.n_head: [3, 4]\nmodel.n_embd: [192, 256]")
    assert space.check(Config()) == 1  # 256 is no multiple of 3
    with pytest.raises(ValueError, match="not a multiple"):
        space.config(Config(), {"model.n_head": 3, "model.n_embd": 256})


COMMANDS = {
    ("--worker", "2"): "--worker is no flag; did you mean --workers?",
    ("--head_lr", "0.1"): "--head_lr is no flag; did you mean --optimizer.head_lr?",
    ("--dropout", "0.1"): "--dropout is no flag; did you mean --lora.dropout or --model.dropout?",
    ("--workers", "2", "--trials"): "--trials has no value; write --trials VALUE",
    ("--trials", "--workers", "2"): "--trials has no value",
    ("--plan",): "plan is set, and every trial has a run of its own",
    ("--optimizer.head_lr", "0.1"): "--optimizer.head_lr is set, and the space varies it",
    ("--workers", "0"): "workers is 0; it must be at least 1",
    ("--sampler", "grid"): "a grid cannot try every value",
    ("--objectives", "bits"): "objectives: bits is none of",
    (
        "--objectives",
        "bits_per_byte,parameters",
        "--pruner",
        "median",
    ): "pruner median goes by bits_per_byte alone",
    (
        "--config",
        "recipes/sweep_seed.yaml",
        "--sampler",
        "cmaes",
    ): "ranges that always vary, and the space has none",
    ("--objectives", "bits_per_byte,parameters", "--sampler", "cmaes"): "sampler cmaes knows one objective",
    ("--pruner", "hyperband", "--validate_every", "0"): "hyperband goes by validations on the way",
    (
        "--steps",
        "10",
    ): "--steps is 10, and one trial may take 100 of them, its max_steps; set --steps to 100 at "
    "least, or max_steps to 10 at most",
    ("--pruner", "median", "--validate_every", "100"): "is at step 100 of 100; set validate_every lower",
    ("--run", "here"): "run is set, and every trial has a run of its own",
    ("--config", "nothing.yaml"): "nothing.yaml",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_mistake_on_the_command_line_ends_with_2(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_settings([*words])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert COMMANDS[words] in told


@pytest.mark.parametrize("section", ["space: {}", "space:", "space: []", "sweep: {}"])
def test_a_space_that_is_empty_is_said_to_be(
    section: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"max_steps: 9\n{section}\n", "utf-8")
    with pytest.raises(SystemExit):
        parse_settings(["--config", str(path)])
    told = capsys.readouterr().err
    assert told.startswith(
        f"error: {path}: there is no section `space:`, or it is empty; say there what varies"
    )


FILES = {
    "spcae: {seed: [1, 2]}": "error: spcae in {path} is no section; did you mean space?",
    "sweeps: {trials: 2}": "error: sweeps in {path} is no section; did you mean sweep?",
    "max_stps: 3": "error: Option 'max_stps' is not accepted; did you mean max_steps?",
    "modle: {n_layer: 3}": "error: Option 'modle.n_layer' is not accepted; did you mean model.n_layer?",
    "space: {seed: [1, 2]": "error: {path} is no YAML at line 1 column 21: expected ',' or '}', but got",
    "space:\n seed: [1, 2]\n seed: [3]": "error: seed is twice in {path}, again in line 3; leave one out",
    "seed: \udcff": "error: {path} is no YAML: 'utf-8' codec can't decode byte 0xff in position 6",
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_file_is_told_with_its_name_or_the_nearest_key(
    text: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(SystemExit) as ended:
        parse_settings(["--config", str(DEFAULT), "--config", str(path)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert told.startswith(FILES[text].replace("{path}", str(path)))


def test_a_section_of_comments_alone_is_as_none(tmp_path: Any) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("sweep:\n#  trials: 5\nspace: {seed: [1, 2]}\n", "utf-8")
    assert parse_settings(["--config", str(path)]).sweep.trials == 30
    path.write_text("sweep: {objectives:, trials: }\nspace: {seed: [1, 2]}\n", "utf-8")
    sweep = parse_settings(["--config", str(path)]).sweep
    assert (sweep.objectives, sweep.trials) == (("bits_per_byte",), 30)


def test_without_a_budget_a_grid_is_tried_whole(tmp_path: Any) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("space: {model.n_layer: {int: [1, 40]}}\n", "utf-8")
    grid = parse_settings(["--config", str(path), "--sampler", "grid"])
    slots = {n: create_trial(value=1.0, user_attrs={"slot": n, "steps": 1}) for n in range(40)}
    assert not more_trials(grid, slots, 0.0, 40)
    del slots[39]
    assert more_trials(grid, slots, 0.0, 40)


OTHERS = {  # The sentence on the study of `own` below, by what another space has instead.
    "seed: [1, 3]": "space: seed was [1, 2] and is [1, 3] now",
    "seed: {choice: [1, 2], when: {batch_size: 4}}": "is {choice: [1, 2], when: {batch_size: 4}} now",
    "head_lr: {float: [0, 0.1]}": "head_lr was {log: [0.001, 0.1]} and is {float: [0, 0.1]} now",
    "batch_size: {int: [2, 8], step: 2}": "batch_size was {log: [2, 8]} and is {int: [2, 8], step: 2} now",
    "beta1: [0.5, 0.9]": "optimizer.beta1 was left out and is [0.5, 0.9] now",
    "arms: {b: {model.n_layer: 1}, a: {model.n_layer: 2}}": "arms was [a, b] and is [b, a] now",
    "arms: {a: {model.n_layer: 1}, b: {model.n_layer: 3}}": "in the arm b model.n_layer was 2 and is 3 now",
    "max_steps: 8": "another config: max_steps was 9 and is 8 now",
    "patience: 2": "another config: patience was 0 and is 2 now",
    "data: {regroup: false}": "another config: data.regroup was true and is false now",
    "sweep.objectives: [bits_per_byte, parameters]": "was bits_per_byte and is bits_per_byte,parameters now",
}


@pytest.mark.parametrize("change", OTHERS)
def test_what_a_study_differs_in_is_told_as_yaml_has_it(change: str, tmp_path: Any) -> None:
    space = {
        "seed": [1, 2],
        "head_lr": {"log": [1e-3, 0.1]},
        "batch_size": {"log": [2, 8]},
        "arms": {"a": {"model.n_layer": 1}, "b": {"model.n_layer": 2}},
    }
    own = {"max_steps": 9, "space": space, "sweep": {"study": str(tmp_path), "repeat_seeds": 0}}

    def studies() -> None:
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(own, sort_keys=False), "utf-8")
        open_studies(parse_settings(["--config", str(path)]))

    studies()
    ((key, value),) = yaml.safe_load(change).items()
    where = own if key in ("max_steps", "patience", "data") else own["sweep"] if "." in key else space
    where[key.removeprefix("sweep.")] = value
    with pytest.raises(ValueError, match=re.escape(OTHERS[change])) as told:
        studies()
    assert "'" not in str(told.value)


def test_a_study_of_ones_own_files_goes_on_from_when_they_were_split_by_name_in_words(tmp_path: Any) -> None:
    own = {"space": {"seed": [1, 2]}, "sweep": {"study": str(tmp_path)}, "data": {"source": str(tmp_path)}}
    path = tmp_path / "own.yaml"
    for data in (own["data"] | {"regroup": False}, own["data"]):
        path.write_text(yaml.safe_dump(own | {"data": data}), "utf-8")
        open_studies(parse_settings(["--config", str(path)]))


def test_sections_of_files_are_layered_and_flags_come_last(tmp_path: Any) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(
        "batch_size: 4\nspace: {seed: [1, 2], head_lr: {log: [1e-3, 1e-1]}}\nsweep: {trials: 5, workers: 2}"
    )
    two.write_text("optimizer: {head_lr: 1e-2}\nspace: {seed: [3, 4]}\nsweep: {trials: 6}")
    found = parse_settings(["--config", str(one), "--config", str(two), "--workers=3", "--max_steps", "7"])
    assert found.config.train == TrainConfig(batch_size=4, max_steps=7)
    assert found.config.optimizer.head_lr == 0.01
    assert {p.key: p.choices for p in found.space.parameters} == {"seed": (3, 4), "optimizer.head_lr": ()}
    assert (found.sweep.trials, found.sweep.workers, found.sweep.study) == (6, 3, "runs/sweep-two")


def test_a_pruner_goes_by_validations_that_the_space_may_have(tmp_path: Any) -> None:
    def pruner(space: str, *words: str) -> str:
        path = tmp_path / "own.yaml"
        path.write_text(f"max_steps: 9\nvalidate_every: 0\nspace: {{seed: [1, 2]{space}}}")
        return parse_settings(["--config", str(path), *words]).sweep.pruner

    assert pruner("") == "none"
    assert pruner("", "--save_every", "3") == "median"
    assert pruner(", validate_every: [0, 3]") == "median"
    assert pruner(", validate_every: {int: [2, 3], when: {seed: 1}}", "--pruner", "patient") == "patient"
    with pytest.raises(SystemExit):
        pruner("", "--pruner", "patient")


@pytest.mark.parametrize("name", ["sweep", "sweep_seed"])
def test_the_spaces_that_come_along_can_be_built(name: str) -> None:
    found = parse_settings(["--config", f"recipes/{name}.yaml"])
    assert found.space.check(found.config) == 0
    if name == "sweep_seed":
        configs = [found.space.config(found.config, c) for c in found.space.grid(found.config)]
        assert len(configs) == 10 == len({repr(c) for c in configs})


@pytest.mark.parametrize("folder", [".", "a/..", "../{name}/", "{path}"])
def test_a_study_has_the_name_of_its_folder_however_that_is_written(
    folder: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder.format(name=tmp_path.name, path=tmp_path)
    trials, repeats = open_studies(parse_settings(["--study", folder]))
    assert (trials.study_name, repeats.study_name) == (tmp_path.name, f"{tmp_path.name}-repeats")


@pytest.mark.parametrize(("sampler", "package"), [("cmaes", "cmaes"), ("gp", "scipy")])
def test_a_sampler_whose_package_is_not_installed_is_refused_at_once(
    sampler: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # It is as if it were not installed.
    with pytest.raises(SystemExit):
        parse_settings(["--sampler", sampler])
    assert f"needs the package {package}, which is not installed: pip install" in capsys.readouterr().err


def test_a_study_of_before_a_setting_goes_on_by_what_was_done_without_it(tmp_path: Any) -> None:
    own = {"space": {"seed": [1, 2]}, "sweep": {"study": str(tmp_path)}, "data": {"source": str(tmp_path)}}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(own), "utf-8")
    as_then = parse_settings(["--config", str(path), "--data.heal", "false"])
    study, _ = open_studies(as_then)
    known = study.user_attrs["identity"]
    del known["config"]["data.heal"]
    study.set_user_attr("identity", known)
    open_studies(as_then)
    with pytest.raises(ValueError, match=r"data\.heal was false and is true now"):
        open_studies(parse_settings(["--config", str(path)]))

"""The findings at the end of a study: intervals, winner, tables, pictures."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from scipy import stats
from sweeping import tiny

from config import RECIPES, Config, parse_config
from sweeps import study as studies
from sweeps.command import finish
from sweeps.settings import parse_settings
from sweeps.space import Space, parse_space
from sweeps.study import open_studies
from sweeps.verdict import (
    BUDGETS,
    Repeated,
    best_yaml,
    differences,
    front,
    number,
    short,
    verdict,
    winner,
)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    a, b = [1.0, 1.2, 1.1, 1.4], [1.3, 1.4, 1.6, 1.5]
    found = {0: Repeated(0, dict(enumerate(a))), None: Repeated(None, dict(enumerate(b)))}
    (one,) = differences(found)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    assert one.mean == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    found[7] = Repeated(7, {0: 1.0, 1: 1.1, 5: 9.0})  # The config itself has none of seed 5.
    wide, other = differences(found)
    expected = stats.ttest_rel(a, b).confidence_interval(0.975)  # two comparisons
    assert (wide.low, wide.high) == pytest.approx((expected.low, expected.high))
    assert other.seeds == 2


def test_the_winner_is_best_by_the_seeds_that_all_have_and_failed_with_none(
    tmp_path: Path, corpus: Path
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])

    def again(of: int | None, seed: int, value: float | None) -> optuna.trial.FrozenTrial:
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        return optuna.trial.create_trial(state=state, value=value, user_attrs={"of": of, "seed": seed})

    repeats = [again(4, 1, 2.0), again(None, 1, 1.5), again(4, 2, 2.0), again(None, 2, 1.5), again(4, 3, 0.0)]
    assert winner(settings, {}, dict(enumerate(repeats))) is None  # Its third turn did not come.
    repeats += [again(7, 1, 1.0), again(7, 2, None)]
    assert winner(settings, {}, dict(enumerate(repeats))) is None
    repeats += [again(8, 1, 1.0), again(8, 2, 1.0)]
    assert winner(settings, {}, dict(enumerate(repeats))) == 8


def test_one_with_few_seeds_does_not_decide_for_all_and_one_that_failed_again_never_wins(
    tmp_path: Path, corpus: Path
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])

    def again(found: dict[int | None, list[float | None]]) -> dict[int, optuna.trial.FrozenTrial]:
        whole = [(of, seed, v) for of, values in found.items() for seed, v in enumerate(values, 1)]
        return {
            place: optuna.trial.create_trial(
                state=TrialState.FAIL if value is None else TrialState.COMPLETE,
                value=value,
                user_attrs={"of": of, "seed": seed},
            )
            for place, (of, seed, value) in enumerate(whole)
        }

    own: list[float | None] = [1.0, 1.5, 1.5]
    assert verdict(settings, {0: optuna.trial.create_trial(value=1.0)}, again({4: [1.05], None: own}))[
        :2
    ] == [
        "trial 4: 1.0500 over one other seed (1.0500)",
        "the config itself: 1.3333 +- 0.2887 over 3 other seeds (1.0000, 1.5000, 1.5000)",
    ]
    assert winner(settings, {}, again({None: own, 4: [1.05, 1.0, 1.0], 9: [2.0]})) == 4
    assert winner(settings, {}, again({None: own, 4: [1.05, 1.0, 1.0], 9: [0.5]})) == 4
    assert winner(settings, {}, again({4: [1.0, 1.0], 9: [0.9, 1.2], 2: [0.5]})) == 4  # without the config

    def trial(rate: float, value: float) -> optuna.trial.FrozenTrial:
        chosen = {"optimizer.head_lr": rate, "model.dropout": 0.0}
        kinds = {p.key: studies.distribution(p) for p in settings.space.parameters}
        return optuna.trial.create_trial(params=chosen, distributions=kinds, value=value)

    slots = {0: trial(0.01, 1.0), 2: trial(0.02, 3.0), 4: trial(0.03, 0.5), 5: trial(0.03, 0.5)}
    assert winner(settings, slots, {}) == 4
    assert winner(settings, slots, again({4: [None]})) == 0  # Trial 5 has the settings of trial 4.
    assert winner(settings, slots, again({4: [None], None: [None]})) == 2
    (sentence,) = verdict(settings, slots, again({4: [None], None: [None]}))
    assert sentence.startswith("trial 2 has the best bits_per_byte of those that did not fail again; ")
    assert winner(settings, slots, again({None: own})) == 4  # The first turn of trial 4 has not ended.
    assert winner(settings, slots, again({None: own, 4: [None]})) is None
    del slots[2]
    assert winner(settings, slots, again({4: [None], None: [None]})) == 4  # nothing else is left


def test_a_repeat_that_was_stopped_did_not_fail(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    kinds = {p.key: studies.distribution(p) for p in settings.space.parameters}
    slots = {
        slot: optuna.trial.create_trial(
            params={"optimizer.head_lr": rate, "model.dropout": 0.0}, distributions=kinds, value=rate
        )
        for slot, rate in enumerate((0.03, 0.02, 0.05))
    }
    repeat = {"of": 1, "seed": 1}
    for reason, best in (({"requeue": "it was stopped"}, 1), ({"reason": "memory is full"}, 0)):
        ended = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=repeat | reason)
        finish(settings, open_studies(settings), slots, {0: ended})
        assert f"\ntrial {best} has the best bits_per_byte" in capsys.readouterr().out
        found = yaml.safe_load((settings.sweep.folder / "best.yaml").read_text("utf-8"))
        assert found["optimizer"]["head_lr"] == slots[best].params["optimizer.head_lr"]


@pytest.mark.parametrize(
    ("objective", "first"), [("bits_per_byte", "trial 1"), ("tokens_per_second", "trial 0")]
)
def test_the_best_of_the_repeated_stands_first(
    tmp_path: Path, corpus: Path, objective: str, first: str
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), "--objectives", objective])
    values = {0: (3.0, 3.1, 3.2), None: (2.0, 2.1, 2.3), 1: (1.0, 1.1, 1.3)}
    repeats = [
        optuna.trial.create_trial(value=value, user_attrs={"of": of, "seed": seed})
        for of, own in values.items()
        for seed, value in enumerate(own, 1)
    ]
    slots = {n: optuna.trial.create_trial(value=values[n][0]) for n in (0, 1)}
    lines = verdict(settings, slots, dict(enumerate(repeats)))
    assert [line.split(":")[0] for line in lines[:2]] == [first, "the config itself"]
    assert [line.rpartition(": ")[2] for line in lines[3:]].count("better") == 1
    assert winner(settings, slots, dict(enumerate(repeats))) == int(first[-1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.81614, "1.8161"),
        (0.0, "0.0000"),
        (-0.000053, "-5.3e-05"),
        (0.00051, "0.00051"),
        (960_512.0, "960,512"),
        (7_241_732_096.0, "7,241,732,096"),
        (1e30, "1e+30"),
    ],
)
def test_a_value_is_written_with_digits_that_say_something(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    "words",
    [
        ["--batch_size", "60", "--model.n_layer", "2"],
        ["--base", "folder", "--config", str(RECIPES / "kotlin.yaml")],  # The batch_size there is 8.
        ["--base", "folder", "--lora.r", "0", "--optimizer.name", "muon", "--optimizer.schedule", "wsd"],
    ],
)
def test_the_best_config_is_read_again_as_it_was(words: list[str], tmp_path: Path) -> None:
    config, path = parse_config(words), tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(best_yaml(config, Space((), {}), config)), "utf-8")
    own = {key: getattr(Config().train, key) for key in BUDGETS}  # those of the trials stay out of it
    assert parse_config(["--config", str(path)]) == replace(config, train=replace(config.train, **own))


def test_the_budget_of_the_trials_stays_out_of_the_best_config_unless_it_was_varied() -> None:
    base = parse_config(["--max_steps", "60", "--max_seconds", "9", "--batch_size", "60"])
    assert best_yaml(base, Space((), {}), base) == {"batch_size": 60}
    varied = parse_space({"max_steps": [30, 60]}, base)
    assert best_yaml(base, varied, base) == {"batch_size": 60, "max_steps": 60}


def test_settings_in_the_table_are_as_yaml_has_them() -> None:
    values = (None, True, (0.9, 0.95), "adamw", 0.0200001, 1e-5)
    assert [short(v) for v in values] == ["null", "true", "[0.9, 0.95]", "adamw", "0.02", "1e-05"]


def test_the_front_in_words_is_optunas(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--objectives", "bits_per_byte,parameters,tokens_per_second"]
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus)), *words])
    settings.sweep.folder.mkdir()
    opened = open_studies(settings)
    draw, kinds = random.Random(0), {p.key: studies.distribution(p) for p in settings.space.parameters}
    slots = {
        slot: optuna.trial.create_trial(
            values=[1 + draw.randrange(9) / 8, float(draw.randrange(2000, 2009)), float(draw.randrange(7))],
            params={"optimizer.head_lr": (slot + 1) / 1000, "model.dropout": 0.0},
            distributions=kinds,
            user_attrs={"slot": slot, "attempt": 0},
        )
        for slot in range(40)
    }
    told = optuna.create_study(directions=opened[0].directions)
    told.add_trials(list(slots.values()))
    expected = {trial.number for trial in told.best_trials}
    assert 2 < len(expected) < 40
    twin = {"values": slots[min(expected)].values, "user_attrs": {"slot": 41, "attempt": 0, "same_as": 0}}
    slots[41] = optuna.trial.create_trial(**twin)  # was not trained
    slots[42] = optuna.trial.create_trial(state=TrialState.FAIL)
    head, names, _, *lines = front(settings, slots)
    assert head.startswith(f"the front, {len(expected)} of 40 trials: ")
    assert names.split()[:8] == ["trial", "bits", "per", "byte", "parameters", "tokens", "per", "second"]
    assert {int(line.split()[0]) for line in lines} == expected
    assert [line.split()[1] for line in lines] == sorted(line.split()[1] for line in lines)
    finish(settings, opened, slots, {})
    assert "\n".join([head, names]) in capsys.readouterr().out
    assert head in (settings.sweep.folder / "report.html").read_text("utf-8")
    one = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    assert front(one, {0: optuna.trial.create_trial(value=1.0)}) == []


def test_a_sweep_that_trained_nothing_names_no_best(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus))])
    settings.sweep.folder.mkdir()
    failed = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"reason": "memory is full"})
    finish(settings, open_studies(settings), {0: failed}, {})
    output = capsys.readouterr().out
    assert "no trial was trained to its end" in output and "best config" not in output
    assert not (settings.sweep.folder / "best.yaml").exists()
    assert (settings.sweep.folder / "report.html").exists()


def test_names_in_what_is_written_are_text_and_every_picture_is_drawn(tmp_path: Path, corpus: Path) -> None:
    name = "<script>alert('&')</script>"
    space = {
        "arms": {name: {"model.n_layer": 1}, "b": {"model.n_layer": 2}},
        "head_lr": {"log": [1e-3, 1e-1]},
    }
    study = str(tmp_path / "<img src=x>\nseed: 7 #")
    settings = parse_settings(["--config", str(tiny(tmp_path, corpus, space=space, sweep={"study": study}))])
    settings.sweep.folder.mkdir()
    distributions = {p.key: studies.distribution(p) for p in settings.space.parameters}
    slots = {
        slot: optuna.trial.create_trial(
            value=3 - slot / 20,
            params={"arms": (name, "b")[slot % 2], "optimizer.head_lr": (slot + 1) / 490},
            distributions=distributions,
            user_attrs={"slot": slot, "attempt": 0},
            intermediate_values={3: 2.5, 6: 2.2},
        )
        for slot in range(48)
    }
    finish(settings, open_studies(settings), slots, {})
    drawn = {path.stem for path in (settings.sweep.folder / "pictures").iterdir()}
    assert drawn == {"history", "parallel", "slices", "importances", "intermediate"}
    heights = [int.from_bytes(p.read_bytes()[20:24]) for p in (settings.sweep.folder / "pictures").iterdir()]
    assert max(heights) < 800  # Not all 48 stand in a legend.
    assert "seed" not in yaml.safe_load((settings.sweep.folder / "best.yaml").read_text("utf-8"))
    page = (settings.sweep.folder / "report.html").read_text("utf-8")
    assert "<script" not in page and "<img src" not in page
    assert page.count("&lt;script&gt;") == 5 and "<title>&lt;img src=x&gt;\n" in page

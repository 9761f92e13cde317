"""Settings as YAML: whatever road they come by, what the parser would mistake is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from config import parse_config
from config.yamlfile import MAX_BYTES, MAX_VALUES, parse_yaml, read_yaml
from sweeps.settings import parse_settings
from training.run import load_run
from training.runfolder import refuse_changes

LAUGHS = "a0: &a0 [lol, lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
QUOTED = "seed: " + json.dumps("[" + LAUGHS.replace("\n", ", ").replace(": &", ", &") + "]") + "\n"
TWICE = "max_steps: 3\nmax_steps: 4\n"


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command line ends with."""
    with pytest.raises(SystemExit) as stop:
        parse_config(words)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    return printed.removeprefix("error: ").strip()


def test_every_road_into_the_settings_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    twice, group = tmp_path / "twice.yaml", tmp_path / "group.yaml"
    twice.write_text(TWICE)
    group.write_text("n_layer: 3\nn_layer: 4\n")
    for name, text in {
        "inside": "seed: 1\nconfig: twice.yaml\n",
        "deep": "config: inside.yaml\n",
        "model": "model: group.yaml\n",
        "list": "config: [twice.yaml]\n",
        "mapping": "config: {twice.yaml: 1}\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert "max_steps is twice in twice.yaml, again in line 2" in error_of(
        ["--config", "inside.yaml"], capsys
    )
    assert "max_steps is twice in twice.yaml" in error_of(["--config=deep.yaml"], capsys)
    assert "max_steps is twice in twice.yaml" in error_of(["--config", "{config: twice.yaml}"], capsys)
    for words in (["--model", "group.yaml"], ["--model=group.yaml"], ["--optimizer", "group.yaml"]):
        assert error_of(words, capsys).startswith("n_layer is twice in group.yaml, again in line 2")
    for words in (
        ["--config", "model.yaml"],
        ["--model", "{n_layer: 3, n_layer: 4}"],
        ["--config", "{model: {n_layer: 3, n_layer: 4}}"],
    ):
        assert error_of(words, capsys).startswith("n_layer is twice in the settings given, again in line ")
    assert "config in list.yaml is ['twice.yaml']; it must be" in error_of(["--config", "list.yaml"], capsys)
    assert "config in mapping.yaml is {'twice" in error_of(["--config", "mapping.yaml"], capsys)
    with pytest.raises(SystemExit):
        parse_settings(["--config", "twice.yaml"])
    assert "max_steps is twice in twice.yaml" in capsys.readouterr().err


def test_a_file_that_names_another_is_read_after_what_stands_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outer.yaml").write_text("seed: 7\nconfig: inner.yaml\nmax_steps: 1\n")
    (tmp_path / "inner.yaml").write_text("seed: 8\nmax_steps: 2\nmodel: model.yaml\n")
    (tmp_path / "model.yaml").write_text("n_layer: 5\n")
    config = parse_config(["--config", "outer.yaml"])
    assert (config.train.seed, config.train.max_steps, config.model.n_layer) == (8, 1, 5)


@pytest.mark.parametrize("text", [LAUGHS, MERGES, QUOTED, "a: &a [*a]\n", "a: &a {b: {c: *a}}\n"])
def test_aliases_do_not_expand_without_bound(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each hangs or ends the process where it is built: nine lines stand for a billion values."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    sentence = f"{file} cannot be read: its aliases stand for more than {MAX_VALUES:,} values; write them out"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_yaml(file)
    for words in (["--config", str(file)], ["--model", str(file)]):
        assert error_of(words, capsys) == sentence
    with pytest.raises(SystemExit):
        parse_settings(["--config", str(file)])
    assert sentence in capsys.readouterr().err


def test_a_strangers_run_cannot_hang_what_opens_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(LAUGHS)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged .* aliases stand for more than"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="aliases stand for more than"):
        refuse_changes(tmp_path, parse_config([]))


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: &m {n_layer: 5}\nlora: {rank_pattern: &p {a: 3}}\n")
    assert parse_config(["--config", str(file), "--base", "x"]).lora.rank_pattern == {"a": 3}
    many = "[" + ", ".join(map(str, range(MAX_VALUES + 5))) + "]"
    assert len(parse_yaml(many, "it")) == MAX_VALUES + 5  # none of them by an alias
    text = f"lora: {{new_tokens: ['{LAUGHS[:20]}']}}\n"
    assert parse_yaml(text, "it")["lora"]["new_tokens"] == [LAUGHS[:20]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 010", "010 in line 1 of it is 8 to YAML, .* base 8, and 10 elsewhere; write 8 or 10"),
        ("\n\nmodel: {n_layer: -017}", "-017 in line 3 of it is -15 to YAML.* and -17 elsewhere"),
        ("a: [1, 0_10]", "0_10 in line 1 of it is 8 to YAML"),
        ("max_seconds: 1:30", '1:30 in line 1 of it is 90 to YAML.*base 60; write 90, or "1:30" for text'),
        ("max_seconds: -1:30.5", "-1:30.5 in line 1 of it is -90.5 to YAML"),
        ("arms: {on: {seed: 1}, Off: {seed: 2}}", 'the key on in line 1 of it is true to YAML.*"on"'),
        ("lora:\n  rank_pattern: {NO: 2}", 'the key NO in line 2 of it is false to YAML.*"NO"'),
        ("x: " + "1" * MAX_BYTES, f"it is larger than {MAX_BYTES:,} bytes"),
    ],
)
def test_what_has_two_readings_is_refused_with_both(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_yaml(text, "it")


def test_what_has_one_reading_is_read() -> None:
    text = "[0, 07, 1_000, 0x10, '010', \"1:30\", 1.5e-3, 08:00, yes, Off, 'on', 00]"
    values = [0, 7, 1000, 16, "010", "1:30", 0.0015, "08:00", True, False, "on", 0]
    assert parse_yaml(text, "it") == values
    assert parse_yaml("{'no': 1, true: 2}", "it") == {"no": 1, True: 2}


def test_a_number_with_two_readings_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  n_layer: 010\n")
    assert error_of(["--config", str(file)], capsys).startswith(f"010 in line 2 of {file} is 8 to YAML")
    assert "010 in line 1 of the settings given is 8" in error_of(["--config", "{seed: 010}"], capsys)
    assert parse_config(["--run", "1:30"]).train.run == "1:30"  # text stays text
    assert "--seed 010 is 8 to YAML, which takes a leading 0 for base 8" in error_of(
        ["--seed", "010"], capsys
    )
    for words in (["--max_seconds", "1:30"], ["--max_seconds=1:30"]):
        assert "--max_seconds 1:30 is 90 to YAML, which takes a colon for base 60" in error_of(words, capsys)


def test_a_file_larger_than_settings_are_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for content in (b"#" * (MAX_BYTES + 1), b"\xff" * (MAX_BYTES + 1)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"mine.yaml is larger than {MAX_BYTES:,} bytes"):
            read_yaml(file)

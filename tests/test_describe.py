"""The settings in words, and `--print_config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from config import CONFIG_GROUPS, SETTINGS, Config, parse_config
from config.describe import config_as_yaml, range_in_words
from config.help import documented
from config.schema import flat


def printed(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_config([*words, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--optimizer.name", "adamw", "--model.n_embd", "96", "--max_seconds", "60"],
        ["--overfit", "--data.suffixes", ".kt,.kts", "--run", "a name: 'b'\n # no comment"],
        ["--base", "some/model", "--lora.rank_pattern", "{c_attn: 8}", "--lora.targets", "*.attn.c_*"],
    ],
)
def test_what_is_printed_gives_the_same_settings(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all.yaml").write_text(printed(words, capsys), "utf-8")
    assert parse_config(["--config", str(tmp_path / "all.yaml")]) == parse_config(words)


def test_every_key_is_printed_below_one_line_of_what_is_known_of_it() -> None:
    lines = config_as_yaml(Config()).splitlines()
    for key, known in SETTINGS.items():
        group, _, name = key.rpartition(".")
        start = lines.index(f"{group}:") if group else 0
        indent = "  " if group else ""
        at = next(n for n in range(start, len(lines)) if lines[n].startswith(f"{indent}{name}:"))
        comment = lines[at - 1]
        assert comment.startswith(f"{indent}# {documented(CONFIG_GROUPS[group])[1][name]}")
        assert range_in_words(known) in comment and comment.endswith(f"on resume: {known.on_resume})")


def test_what_follows_other_settings_is_told_and_still_follows_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(["--optimizer.name", "adamw", "--model.n_embd", "96"], capsys)
    assert yaml.safe_load(text)["optimizer"]["lr"] is None and yaml.safe_load(text)["model"]["head_dim"] == 0
    above = dict(zip(text.splitlines()[1:], text.splitlines(), strict=False))
    assert "(here 0.001; at least 0; " in above["  lr: null"] and "(here 32; " in above["  head_dim: 0"]


def test_a_mistake_is_told_before_anything_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--print_config", "--model.n_layer", "0"])
    told = capsys.readouterr()
    assert stop.value.code == 2 and not told.out and "model.n_layer is 0" in told.err


def test_the_meaning_of_every_setting_is_in_the_docstring_of_its_class() -> None:
    for name, group in CONFIG_GROUPS.items():
        keys = {key.rpartition(".")[2] for key in flat(Config()) if key.rpartition(".")[0] == name}
        assert documented(group)[1].keys() == keys

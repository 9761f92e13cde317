"""The settings in words and as a YAML file, from their fields: for `--print_config` and docs/settings.md."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Any

import yaml

from config.help import documented
from config.schema import CONFIG_GROUPS, SETTINGS, Config, flat
from config.setting import Setting

HEAD = """\
# Every setting, as a file for --config. "here" names what stands for a value that follows other settings,
# and "on resume" says what becomes of another value when a run goes on: refused, warned of, or free."""


def range_in_words(known: Setting) -> str:
    """Return the range of a number, such as `at least 0, below 1`; nothing where there is no bound."""
    bounds = {
        "at least": 0 if known.or_zero else known.at_least,
        "above": known.above,
        "at most": known.at_most,
        "below": known.below,
    }
    return ", ".join(f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None)


def use_in_words(known: Setting) -> str:
    """Return when a run reads a setting; nothing where every run does."""
    return f"read where {' and '.join(use.when for use in known.used)}" if known.used else ""


def config_as_yaml(config: Config) -> str:
    """Return every setting with its value as a YAML file for `--config`, each below a comment of one line.

    What stands for a value that follows other settings is in the comment, so that it still follows them where
    the file is changed.
    """
    effective, lines = flat(_effective(config)), [HEAD]
    for name, group in CONFIG_GROUPS.items():
        first, meanings = documented(group)
        indent = "  " if name else ""
        lines += ["", f"# {first}", *([f"{name}:"] if name else [])]
        for key, value in flat(config).items():
            prefix, _, short = key.rpartition(".")
            if prefix != name:
                continue
            known = SETTINGS[key]
            here = f"here {_plain(effective[key])}" if effective[key] != value else ""
            facts = [here, range_in_words(known), use_in_words(known), f"on resume: {known.on_resume}"]
            lines.append(f"{indent}# {meanings[short]} ({'; '.join(filter(None, facts))})")
            lines.append(textwrap.indent(_plain({short: value}), indent))
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Return a value as YAML."""
    text = yaml.safe_dump(value, sort_keys=False, width=2**20)
    return text.removesuffix("...\n").rstrip("\n")


def _effective(config: Config) -> Config:
    """Return the config with the defaults that follow other settings, as far as they are known now."""
    config = replace(config.with_optimizer_defaults(), data=config.data.resolved())
    if config.train.base is not None:  # It brings its own shape.
        return config
    model = replace(config.model, vocab_size=config.model.vocab_size or 1).resolved()
    return replace(config, model=replace(model, vocab_size=config.model.vocab_size))

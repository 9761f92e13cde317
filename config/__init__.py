"""Settings: their fields (schema, model), what is known of each (setting, uses, rules), their sources (cli,
yamlfile).

This is the lowest floor, so every command's handling of the terminal (console) and of untrusted files (files)
is here too. Nothing here imports torch: `--help` and a typo are answered at once.
"""

from config.cli import RECIPES, parse_config
from config.console import memory_is_full, one_sentence, say
from config.files import (
    MOST_BYTES,
    REPOSITORY,
    RepeatedKey,
    bounded_lines,
    parse_line,
    refuse_unwritable,
    unrepeated,
    write_atomically,
)
from config.flags import option
from config.model import DROPOUTS, ModelConfig
from config.parser import parse_settings
from config.rules import possible_kinds, unread_rates, unused_keys
from config.schema import (
    BASE_ROW,
    BEFORE,
    CONFIG_GROUPS,
    OPTIMIZER_DEFAULTS,
    SETTINGS,
    Config,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    check_ranges,
)

__all__ = [
    "BASE_ROW",
    "BEFORE",
    "CONFIG_GROUPS",
    "DROPOUTS",
    "MOST_BYTES",
    "OPTIMIZER_DEFAULTS",
    "RECIPES",
    "REPOSITORY",
    "SETTINGS",
    "Config",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RepeatedKey",
    "TokenizerConfig",
    "TrainConfig",
    "bounded_lines",
    "check_ranges",
    "memory_is_full",
    "one_sentence",
    "option",
    "parse_config",
    "parse_line",
    "parse_settings",
    "possible_kinds",
    "refuse_unwritable",
    "say",
    "unread_rates",
    "unrepeated",
    "unused_keys",
    "write_atomically",
]

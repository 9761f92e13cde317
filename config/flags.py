"""The flags of a command, from the dataclasses of its settings, and a command line's words by these flags.

Every command reads its words here, so that a flag has the same forms everywhere:

    --merge   --merge true   --merge 0     a switch stands alone, or has a value
    --allow a,b   --allow a --allow b      a list grows; `[a, b]` begins it anew
    --prompt "a: [b"                       free text is taken as it is; other values are read as YAML
    --max-steps 5                          `-` stands for `_`
    runs/NAME                              a first word without a flag is --run, where a command has it

A word that fits nothing ends the command with one sentence: it names the nearest flag, or ours for a flag of
another program (config/foreign.py). Nothing of this imports more than the settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from config.console import refuse
from config.foreign import RATES, ours_of
from config.typed import field_types
from config.yamlfile import parse_yaml, two_readings

HELP = ("--help", "-h")
PRINT = "--print_config"
_ON, _OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def option(
    default: Any = dataclasses.MISSING,
    *,
    also: Sequence[str] = (),
    is_text: bool = False,
    takes_words: bool = False,
    alone: str = "",
) -> Any:
    """Return a field of a dataclass of settings whose flag has more than a name.

    Args:
        default: The default; none for a setting that has to be given.
        also: Other names of the flag, without `--`; `--help` shows the first of them first.
        is_text: The flag's value is free text, and no YAML; a tuple has one text for each flag.
        takes_words: All words that follow the flag are values of its list.
        alone: The value of the flag where it stands alone; a switch has one by itself.
    """
    more = {"also": tuple(also), "is_text": is_text, "takes_words": takes_words, "alone": alone}
    return dataclasses.field(default=default, metadata={"flag": more})


class Flag(NamedTuple):
    """A flag of a command; its name is `--` and the full key of its setting, such as --model.n_layer."""

    name: str
    kind: Any  # the type of its setting
    also: tuple[str, ...] = ()
    is_text: bool = False
    takes_words: bool = False
    alone: str = ""

    def holds(self, kind: type) -> bool:
        """Whether the setting's value may be of this type."""
        return kind in (self.kind, *get_args(self.kind)) or kind is get_origin(self.kind)

    @property
    def shown(self) -> str:
        """The name that `--help` shows first."""
        return f"--{self.also[0]}" if self.also else self.name

    @property
    def item(self) -> Any:
        """The type of the items of a list; None for what is no list."""
        kinds = [self.kind, *get_args(self.kind)]
        return next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), None)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that its value may be, where they can be listed."""
        if self.holds(bool):
            return ("true", "false")
        kinds = [self.kind, *get_args(self.kind)]
        return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


class Given(NamedTuple):
    """A flag that a command line gives, by its name, and the value as the parser reads it."""

    flag: str
    value: str

    def __str__(self) -> str:
        return f"{self.flag}={self.value}"


def flags_of(groups: dict[str, type]) -> dict[str, Flag]:
    """Return the flags of a command by each of their names.

    Args:
        groups: The dataclasses of its settings by their prefix, which is empty for those without one.
    """
    flags = {"--config": Flag("--config", str)}
    for prefix, group in groups.items():
        if prefix:  # A YAML file with the settings of one group.
            flags[f"--{prefix}"] = Flag(f"--{prefix}", group)
        for field in dataclasses.fields(group):
            name = f"--{prefix}.{field.name}".replace("--.", "--")
            flag = Flag(name, field_types(group)[field.name], **field.metadata.get("flag", {}))
            if flag.holds(bool):
                flag = flag._replace(alone="true")
            flags |= dict.fromkeys((name, *(f"--{other}" for other in flag.also)), flag)
    return flags


def asks_for_help(words: Sequence[str], flags: dict[str, Flag]) -> bool:
    """Whether a command line has `--help`, other than as a free text."""
    return has_flag(words, flags, HELP)


def has_flag(words: Sequence[str], flags: dict[str, Flag], names: Collection[str]) -> bool:
    """Whether a command line has a flag of these names, other than as a free text: `--prompt --help`."""
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word.partition("=")[0] in names:
            return True
        flag = flags.get(_spelled(word))
        if flag is not None and flag.is_text and rest:
            rest.popleft()
    return False


def read_words(words: Sequence[str], flags: dict[str, Flag], subject: str = "--run") -> list[Given]:
    """Return what a command line gives, in its order; the parts of a list are one value.

    A learning rate without its group (RATES) is handed on as it is, where the flags have rates.

    Args:
        words: The words behind the command's name.
        flags: The flags of the command, by `flags_of`.
        subject: The flag whose value may be the first word, without it, if the command has such a flag.
    """
    given: list[Given] = []
    names: dict[str, str] = {}  # The name by which a setting was given.
    rest = deque(words)
    while rest:
        word = rest.popleft()
        written, equals, value = word.partition("=")
        if _spelled(written) == PRINT:
            if equals:
                refuse(f"{PRINT} has no value; write {PRINT} alone")
            given.append(Given(PRINT, ""))
            continue
        if _is_flag(word):
            name, flag = _flag_of(written, flags)
            values = [value] if equals else _values(flag, rest)
        else:
            is_first = len(rest) == len(words) - 1
            name, flag, values = word, _flag_without_name(word, flags, subject, is_first), [word]
        if flag.item is None and names.setdefault(flag.name, name) != name:
            refuse(f"{names[flag.name]} and {name} are one setting; give one of them")
        for value in values:
            _add(given, flag, value)
    return given


def without_print(given: list[Given]) -> tuple[list[Given], bool]:
    """Return what a command line gives but for `--print_config`, and whether that was there."""
    rest = [one for one in given if one.flag != PRINT]
    return rest, len(rest) < len(given)


def _is_flag(word: str) -> bool:
    """Whether a word is a flag; a negative number and a lone `-` are values."""
    return word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha())


def _spelled(written: str) -> str:
    """Return a flag as the settings spell it, with `_` for `-`."""
    return f"--{written.lstrip('-').replace('-', '_')}"


def _flag_of(written: str, flags: dict[str, Flag]) -> tuple[str, Flag]:
    """Return a flag with its name as the command knows it; refuse one that it does not know."""
    if written.startswith("---"):
        return _refuse_unknown(written, _spelled(written), flags)  # exits
    name = written if written in flags else _spelled(written)
    if name in flags:
        return name, flags[name]
    for mapping in (known for known, flag in flags.items() if flag.holds(dict)):
        if not name.startswith(f"{mapping}."):
            continue
        key = written[len(mapping) + 1 :]  # A key of a mapping: --lora.rank_pattern.c_attn
        if "." in key:  # To the parser a mapping of mappings.
            refuse(f"{key} has a dot; write {mapping} '{{{key}: VALUE}}'")
        return f"{mapping}.{key}", Flag(f"{mapping}.{key}", str)
    if name in RATES and "--optimizer.lr" in flags:
        return name, Flag(name, str, alone="null")
    return _refuse_unknown(written, name, flags)  # exits


def _refuse_unknown(written: str, name: str, flags: dict[str, Flag]) -> NoReturn:
    """End the command with a sentence on a flag that it does not know."""
    single = [name for name, flag in flags.items() if not dataclasses.is_dataclass(flag.kind)]
    ours, near = ours_of(name, single), nearest(name, single)
    if ours:
        refuse(f"{written} is another program's name; here it is {ours}")
    refuse(f"{written} is no flag{f'; did you mean {near}?' if near else '; --help lists them'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return those of the known names that differ by their group alone, or the nearest one, or nothing."""
    known = [*known]
    last = name.removeprefix("--").rpartition(".")[2]
    same = sorted({other for other in known if other.removeprefix("--").rpartition(".")[2] == last})
    return " or ".join(same or difflib.get_close_matches(name, known, n=1, cutoff=0.6))


def _flag_without_name(word: str, flags: dict[str, Flag], subject: str, is_first: bool) -> Flag:
    """Return the flag that a word without one is the value of."""
    if _spelled(word.partition("=")[0]) in flags and "=" in word:
        refuse(f"{word} stands there without its flag; did you mean --{word}?")
    if "://" in word:  # It may hold a password, and is not repeated.
        flag = next((flag for flag in ("--url", "--storage") if flag in flags), "--FLAG")
        refuse(f"an address stands there without its flag; write {flag} ADDRESS")
    if subject not in flags:
        refuse(f"{word} stands there without a flag; write --FLAG {word}, and --help lists the flags")
    if not is_first:  # Perhaps the second word of a list: it shall not become the name of a run.
        refuse(
            f"{word} stands there without a flag; a list is a,b without blanks, and a run stands first or "
            f"behind {subject}"
        )
    return flags[subject]


def _values(flag: Flag, rest: deque[str]) -> list[str]:
    """Take the words that are the values of a flag."""
    if flag.is_text and rest:
        return [rest.popleft()]
    values = []
    while rest and not _is_flag(rest[0]) and (flag.takes_words or not values):
        values.append(rest.popleft())
    if not values and not flag.alone:
        refuse(f"{flag.shown} has no value; write {flag.shown} VALUE")
    return values or [flag.alone]


def _add(given: list[Given], flag: Flag, value: str) -> None:
    """Add a value in the parser's spelling; that of a list joins those that were given before."""
    if flag.is_text:
        given.append(Given(flag.name, value))
        return
    if flag.alone and value.lower() in _ON + _OFF and (flag.holds(bool) or not value.isdigit()):
        off = "false" if flag.holds(bool) else "0"
        value = flag.alone if value.lower() in _ON else off
    elif (flag.holds(int) or flag.holds(float)) and (wrong := two_readings(value, f"{flag.name} {value}")):
        refuse(wrong)
    elif flag.item is not None and not (value == "null" and flag.holds(type(None))):
        before = next((one for one in given if one.flag == flag.name), None)
        if not value.startswith("[") or "],[" in value:  # Texts may be in brackets: [PAD],[SEP]
            items = [] if before is None else _items(before.value)
            more = _items(value) if flag.item is not str else [item.strip() for item in value.split(",")]
            if "" in more:
                shown = value or "empty"
                refuse(f"{flag.shown} is {shown}, and an item of a list has a name; [] is an empty list")
            value = _as_yaml([*items, *more])
        if before is not None:
            given.remove(before)
    given.append(Given(flag.name, value))


def _items(text: str) -> list[Any]:
    """Return the items of a list as YAML has them."""
    with suppress(ValueError):
        values = parse_yaml(text if text.startswith("[") else f"[{text}]", "")
        return values if isinstance(values, list) else []
    return [text]


def _as_yaml(items: list[Any]) -> str:
    """Return a list in one line: texts are quoted, since a leading * is no text to YAML."""
    text = json.dumps(items, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)

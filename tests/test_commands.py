"""Every command understands the same forms of its flags, and each verb of ./plumb is its program."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import export
import functional
import generate
import preflight
import recipes.base_config
import recipes.refactoring
import scraping.__main__
import serve
import suites.settings
import sweeps.settings
import trainingmanager
from config import RECIPES, Config, parse_config
from config.files import REPOSITORY
from config.flags import Flag, Given, flags_of, has_flag, read_words
from config.foreign import NAMES, RATES, ours_of
from guards.faults import FAULTS
from recipes.base_config import BaseConfig
from recipes.pipeline import parse_words
from recipes.refactoring import RefactorConfig
from sandbox.passing import FunctionalConfig
from verbs import completion, settings, verbs

# All flags of each command; those of several dataclasses together.
FLAGS: dict[str, dict[str, Flag]] = {name: verb.flags for name, verb in verbs().items() if verb.groups}
FLAGS["generate --recipe refactor"] = flags_of({"": RefactorConfig})
FLAGS["functional"] = flags_of({"": FunctionalConfig})
FLAGS["base"] = flags_of({"": BaseConfig})


def trained(words: list[str]) -> Config:
    return parse_config(trainingmanager.command_line(words))


def scraped(command: str) -> Callable[[list[str]], Any]:
    module, name, _ = scraping.__main__.COMMANDS[command]
    group = getattr(sys.modules[module], name)
    return lambda words: scraping.__main__.parse(group, command, words)


def in_recipe(name: str) -> Callable[[list[str]], Any]:
    return lambda words: parse_words(name, words)


# How each command reads its words, and words without which it is refused.
DOORS: dict[str, tuple[Callable[[list[str]], Any], str]] = {
    "train": (trained, ""),
    "plan": (lambda words: trained(["--plan", *words]), ""),
    "prepare": (lambda words: trained(["--prepare", *words]), ""),
    "sweep": (sweeps.settings.parse_settings, ""),
    "eval": (suites.settings.parse_settings, "--run r"),
    "generate": (generate.parse_settings, "--run r --prompt p"),
    "serve": (serve.parse_settings, ""),
    "export": (export.parse_settings, "--run r --out o"),
    "selftest": (preflight.main, ""),
    "generate --recipe refactor": (recipes.refactoring.parse_settings, "--run r --file f"),
    "functional": (functional.parse_settings, "--problems p --samples s"),
    "base": (recipes.base_config.parse_settings, "--family phi"),
    **{f"scrape {name}": (scraped(name), "") for name in scraping.__main__.COMMANDS},
    **{name: (in_recipe(name.split()[1]), "") for name in FLAGS if name.startswith("recipe ")},
}


def refused(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence by which a command refuses words, behind those that it needs."""
    door, needed = DOORS[command]
    with pytest.raises(SystemExit) as stop:
        door([*needed.split(), *words.split()])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_every_command_has_its_place_here() -> None:
    assert DOORS.keys() == FLAGS.keys()


# --- switches, lists and texts -----------------------------------------------------------------------


@pytest.mark.parametrize("command", FLAGS)
def test_every_switch_stands_alone_or_has_a_value(command: str) -> None:
    def read(*words: str) -> list[Given]:
        return read_words([*words, "--config", "c"], FLAGS[command])

    for flag in [flag for flag in {*FLAGS[command].values()} if flag.holds(bool)]:
        on, off = ([Given(flag.name, value), Given("--config", "c")] for value in ("true", "false"))
        assert read(flag.name) == on
        for yes, no in (("true", "false"), ("1", "0"), ("yes", "no"), ("On", "OFF")):
            assert read(flag.name, yes) == read(f"{flag.name}={yes}") == on
            assert read(flag.name, no) == read(f"{flag.name}={no}") == off
        assert read(flag.name, "maybe")[0] == Given(flag.name, "maybe")  # The parser refuses it.


@pytest.mark.parametrize("command", FLAGS)
def test_every_list_is_given_at_once_or_in_parts(command: str) -> None:
    for flag in [flag for flag in {*FLAGS[command].values()} if flag.item and not flag.is_text]:
        items = {int: ["1", "2", "3"], float: ["0.5", "2", "1e3"]}.get(flag.item, ["a", "*b", "null"])
        one, *others = items
        whole = read_words([flag.name, ",".join(items)], FLAGS[command])
        assert len(whole) == 1 and whole[0].value.count(",") == 2
        for words in (
            [f"{flag.name}={','.join(items)}"],
            [flag.name, *items] if flag.takes_words else [flag.name, whole[0].value],
            [part for item in items for part in (flag.name, item)],
            [flag.name, one, "--config", "c", flag.name, ",".join(others)],
            [flag.name, "9", f"{flag.name}={whole[0].value}"],  # Brackets begin anew.
            [flag.name, f"{whole[0].value.rpartition(',')[0]}]", flag.name, items[-1]],
        ):
            found = [given for given in read_words(words, FLAGS[command]) if given.flag == flag.name]
            assert found == whole, words


@pytest.mark.parametrize("text", ["--help", "-x", "--run=r", "[", "a: b", "null", ""])
def test_a_text_is_taken_as_it_is(text: str) -> None:
    found = [
        (read_words([flag.name, text], flags), flag)
        for flags in FLAGS.values()
        for flag in {*flags.values()}
        if flag.is_text
    ]
    assert found and all(given == [Given(flag.name, text)] for given, flag in found)


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("train", "--compile --model.qk_norm 0", {"train.compile": True, "model.qk_norm": False}),
        ("train", "--allow a --allow b,c", {"train.allow": ("a", "b", "c")}),
        ("train", "r --data.heal no --fix", {"data.heal": False, "train.run": "r", "data.regroup": True}),
        ("plan", "--seed 3", {"train.plan": True, "train.seed": 3}),
        ("prepare", "--seed 3", {"train.prepare": True, "train.seed": 3}),
        ("sweep", "--objectives bits_per_byte --objectives parameters", {"sweep.objectives": 2}),
        ("sweep", "--compile --data.suffixes .py,.kt", {"config.train.compile": True}),
        ("eval", "--memorisation", {"memorisation": True}),
        ("eval", "--memorisation 0 --stop a,b --stop null", {"stop": ("a,b", "null"), "memorisation": False}),
        ("generate", "--heal", {"heal": True}),
        ("generate", "--heal null --stop [ --suffix null", {"heal": None, "stop": ("[",), "suffix": "null"}),
        ("export", "--merge --tolerance 1", {"merge": True}),
        ("export", "--merge 1 --requantise yes", {"merge": True, "requantise": True}),
        ("generate --recipe refactor", "--write --check_behaviour off", {"check_behaviour": False}),
        ("functional", "--k 1,10 --k 100", {"k": (1, 10, 100)}),
        ("functional", "--k 3", {"k": (3,)}),
        ("scrape local", "--strip", {"strip": 1}),
        ("scrape local", "--strip 2 --extensions .py --extensions .kt", {"strip": 2}),
        ("scrape local", "--strip false --title-less", None),
        ("scrape clean", "--latin1 --personal 1 --unknown_licence false", {"latin1": True}),
        ("scrape crawl", "--recheck --language null", {"recheck": True, "language": "null"}),
        (
            "recipe refactor",
            "--check_behaviour --strategies names --strategies loops",
            {"settings.strategies": 2},
        ),
    ],
)
def test_the_settings_are_those_that_were_written(
    command: str, words: str, expected: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if expected is None:
        refused(command, words, capsys)
        return
    door, needed = DOORS[command]
    found = door([*needed.split(), *words.split()])
    for key, value in expected.items():
        one = found
        for name in key.split("."):
            one = getattr(one, name)
        assert (len(one) if key.endswith(("objectives", "strategies")) else one) == value


# --- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", FLAGS)
def test_a_hyphen_stands_for_an_underscore_in_every_flag(command: str) -> None:
    for name, flag in FLAGS[command].items():
        (found,) = read_words([name.replace("_", "-"), "1"], FLAGS[command])
        assert found.flag == flag.name and [found] == read_words([name, "1"], FLAGS[command])


@pytest.mark.parametrize("command", DOORS)
def test_a_mistyped_flag_is_answered_with_the_right_one(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flag in FLAGS[command].items():
        wrong = name[:-1] + "qz"
        if len(flag.name) > 6 and not dataclasses.is_dataclass(flag.kind):
            with pytest.raises(SystemExit):
                read_words([wrong, "1"], FLAGS[command])
            said = capsys.readouterr().err
            assert said.startswith(f"error: {wrong} is no flag; did you mean --"), said
    name = min(
        FLAGS[command], key=lambda name: (dataclasses.is_dataclass(FLAGS[command][name].kind), -len(name))
    )
    assert refused(command, f"{name}s 1", capsys) == f"error: {name}s is no flag; did you mean {name}?\n"
    assert "--help lists them" in refused(command, "--qqq 1", capsys)


THEIRS = {
    "learning_rate": "--optimizer.muon_lr or --optimizer.embedding_lr or --optimizer.head_lr",
    "num_train_epochs": "--max_epochs",
    "per_device_train_batch_size": "--batch_size",
    "gradient_accumulation_steps": "--accumulation",
    "output_dir": "--run",
    "model_name_or_path": "--base",
    "max_seq_length": "--row_length",
    "lr_scheduler_type": "--optimizer.schedule",
    "gradient-checkpointing": "--activation_checkpointing",
}


@pytest.mark.parametrize("theirs", THEIRS)
def test_a_flag_of_another_program_is_answered_with_ours(
    theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (f"--{theirs} 1", f"--seed 1 --{theirs}=1"):
        said = refused("train", words, capsys)
        assert said == f"error: --{theirs} is another program's name; here it is {THEIRS[theirs]}\n"


def test_warmup_steps_has_the_same_name_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("train", "--warmup_steps 5", capsys)
    assert said == "error: --warmup_steps is no flag; did you mean --optimizer.warmup_steps?\n"


@pytest.mark.parametrize("ours", NAMES)
def test_every_name_of_another_program_leads_to_its_flag_in_some_command(ours: str) -> None:
    for name in NAMES[ours].split():
        others = [flags for flags in FLAGS.values() if f"--{name}" not in flags]
        assert f"--{name}" in RATES or any(ours_of(name, flags) == ours for flags in others), name


@pytest.mark.parametrize("command", ["train", "eval", "generate", "generate --recipe refactor"])
def test_a_run_has_one_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    door, needed = DOORS[command]
    rest = needed.replace("--run r", "").split()
    old = {"eval": "--checkpoint", "train": "--run"}.get(command, "--model")
    found = [door(words) for words in (["--run", "r", *rest], ["r", *rest], [old, "r", *rest])]
    assert all(one == found[0] for one in found)
    said = refused(command, "--device cpu s", capsys)  # Such as the second word of a list, without a comma.
    assert said.startswith("error: s stands there without a flag; a list is")
    if old != "--run":
        said = refused(command, f"{old} s", capsys)
        assert said == f"error: --run and {old} are one setting; give one of them\n"


@pytest.mark.parametrize("command", ["sweep", "functional", "recipe kotlin", "scrape status"])
def test_a_word_without_a_flag_is_refused_where_it_is_no_run(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(command, "a_word", capsys).startswith("error: a_word stands there without a flag")
    said = refused(command, "sqlite://user:secret@host", capsys)
    assert said.startswith("error: an address stands there without its flag") and "secret" not in said
    assert refused(command, "--config", capsys) == "error: --config has no value; write --config VALUE\n"


# --- help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", DOORS)
def test_help_shows_every_flag_wherever_it_is_asked_for(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    door, _ = DOORS[command]
    own = settings().get(command, ({},))[0]
    for words in (["--help"], ["--seed", "1", "-h"]):
        with pytest.raises(SystemExit) as stop:
            door(words)
        said = capsys.readouterr()
        assert stop.value.code == 0 and said.err == "" and said.out.startswith("usage: python ")
        assert all(name in said.out for name in flags_of(own) if name.removeprefix("--") not in own)


@pytest.mark.parametrize("command", DOORS)
def test_every_command_prints_its_settings_as_yaml_and_reads_them_back(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    door, needed = DOORS[command]
    with pytest.raises(SystemExit) as stop:
        door([*needed.split(), "--print_config"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and isinstance(yaml.safe_load(said), dict)
    if command.startswith("recipe "):  # The file is of its training, whose folders the recipe decides.
        return
    (tmp_path / "printed.yaml").write_text(said, "utf-8")
    with pytest.raises(SystemExit):
        door(["--config", str(tmp_path / "printed.yaml"), "--print-config"])
    assert capsys.readouterr().out == said


def test_what_is_printed_has_texts_and_what_is_secret_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run", "r", "--prompt", "a: [b", "--stop", "null", "--suffix", "\n", "--print_config"]
    with pytest.raises(SystemExit):
        generate.parse_settings(words)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["prompt"], printed["stop"], printed["suffix"]) == (["a: [b"], ["null"], "\n")
    with pytest.raises(SystemExit):
        sweeps.settings.parse_settings(
            ["--storage", "postgresql://me:hunter22@host/db", "--trials", "7", "--print_config"]
        )
    said = capsys.readouterr().out
    assert "hunter22" not in said and yaml.safe_load(said)["sweep"]["trials"] == 7
    assert yaml.safe_load(said)["space"] == yaml.safe_load((RECIPES / "sweep.yaml").read_text())["space"]


SLIPS = {
    "max_steps=5": "max_steps=5 stands there without its flag; did you mean --max_steps=5?",
    "--max_steps 010": "--max_steps 010 is 8 to YAML, which takes a leading 0 for base 8",
    "--resume runs/none": "resume is runs/none; it must be true or false, or stand alone",
    "--config tiny": "--config is tiny, and there is no such file; did you mean recipes/tiny.yaml",
    "--data nowhere": "--data is nowhere, and there is no such file; give the path of one",
    "---seed 3": "---seed is no flag; did you mean --seed?",
    "--print_config=x": "--print_config has no value; write --print_config alone",
    "--lora.rank_pattern.h.0.c 8": "h.0.c has a dot; write --lora.rank_pattern '{h.0.c: VALUE}'",
    "--data.suffixes .py,,.md": "--data.suffixes is .py,,.md, and an item of a list has a name; [] is",
}


@pytest.mark.parametrize("words", SLIPS)
def test_a_slip_is_told_with_what_was_meant(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert SLIPS[words] in refused("train", words, capsys)


def test_items_have_no_blanks_around_them_and_may_be_in_brackets() -> None:
    given = read_words(["--data.suffixes", ".py, .md", "--lora.new_tokens", "[PAD],[SEP]"], FLAGS["train"])
    assert given == [("--data.suffixes", '[".py", ".md"]'), ("--lora.new_tokens", '["[PAD]", "[SEP]"]')]


def test_a_key_of_a_mapping_may_have_a_hyphen_and_its_flag_too() -> None:
    given = read_words(["--lora.rank-pattern.my-module", "8"], FLAGS["train"])
    assert given == [("--lora.rank_pattern.my-module", "8")]


@pytest.mark.parametrize("text", ["--help", "--recipe", "--print_config"])
def test_a_text_that_is_a_flags_name_asks_for_nothing(text: str) -> None:
    flags = FLAGS["generate"]
    assert not has_flag(["--prompt", text, "--stop", text], flags, [text])
    assert has_flag(["--prompt", "--suffix", text], flags, [text])


def test_help_imports_neither_torch_nor_the_parser() -> None:
    """Both take longer than all of `--help` may."""
    programs = [verb.program for name, verb in verbs().items() if name not in ("test", "docs")]
    code = (
        "import contextlib, io, runpy, sys\n"
        f"for program in {[*programs, 'functional.py', 'recipes/base.py']!r}:\n"
        "    words = program.removeprefix('-m ').split()\n"
        "    sys.argv = [words[0], *words[1:], '--help']\n"
        "    run = runpy.run_module if program.startswith('-m') else runpy.run_path\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "        try: run(words[0], run_name='__main__')\n"
        "        except SystemExit as stop: assert not stop.code, program\n"
        "    assert said.getvalue().startswith('usage: python '), program\n"
        "print({'torch', 'jsonargparse', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# --- ./plumb -----------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script, and an environment whose python prints its words and exits with 75."""
    for name in (
        "plumb",
        "pyproject.toml",
        "requirements.txt",
        "requirements-serve.txt",
        "requirements-dev.txt",
    ):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\nexit 75\n")
    python.chmod(0o755)
    checked = (
        "cat plumb requirements.txt requirements-serve.txt requirements-dev.txt | cksum "
        "> .venv/requirements-dev.txt.installed"
    )
    subprocess.run(["sh", "-c", checked], cwd=tmp_path, check=True)
    return tmp_path


def plumb(clone: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(["sh", "plumb", *words], cwd=clone, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_verb_is_its_program_with_the_same_words_and_exit_code(clone: Path) -> None:
    listed = plumb(clone, "--help")[1]
    for name, verb in verbs().items():
        if " " not in name:
            program, *own = verb.program.split()
            # A flag of the verb itself stands last: a word that follows a switch would be its value.
            last = own if own[:1] in (["--plan"], ["--prepare"], ["--selftest"]) else []
            words = [program, *own[len(last) :], "--run", "a b", "", *last]
            code, out, err = plumb(clone, name, "--run", "a b", "")
            assert (code, out, err) == (75, "".join(f"<{word}>" for word in words), "")
            assert f"\n{name} " in listed and f" python {verb.program}\n" in listed
            program = verb.program.removeprefix("-m ").split()[0]
            ours = (REPOSITORY / program).is_file() or (REPOSITORY / program / "__main__.py").is_file()
            assert ours or name in ("test", "docs")


def test_the_script_itself_answers_for_itself(clone: Path) -> None:
    assert plumb(clone, "--version") == (0, "plumb 0.1.0\n", "")
    code, out, _ = plumb(clone, "--help")
    assert code == 0 and out.startswith("usage: ./plumb VERB [flags]") and plumb(clone)[2] == out
    for wrong in ("--train", ".*", "a b", "./x", "xyz"):
        assert plumb(clone, wrong) == (2, "", f"plumb: {wrong} is no verb; ./plumb --help lists them\n")
    near = "plumb: trian is no verb; did you mean train or test? ./plumb --help lists them\n"
    assert plumb(clone, "trian") == (2, "", near)
    assert plumb(clone, "help")[1] == out
    assert plumb(clone, "help", "eval") == plumb(clone, "eval", "--help")
    assert plumb(clone)[0] == 2
    assert plumb(clone, "--print_completion", "bash")[1] == "<verbs.py><bash>"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("./plumb ge", ["generate"]),
        ("./plumb train --eval_pr", ["--eval_precision"]),
        ("./plumb train --eval_precision b", ["bf16"]),
        ("./plumb export --merge f", ["false"]),
        ("./plumb scrape cr", ["crawl"]),
        ("./plumb recipe kotlin --per_f", ["--per_file"]),
        ("./plumb eval --check", ["--checkpoint"]),
    ],
)
def test_bash_completes_verbs_flags_and_their_words(line: str, expected: list[str], tmp_path: Path) -> None:
    script = tmp_path / "plumb.bash"
    script.write_text(completion("bash"), "utf-8")
    words = line.split()
    code = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'\n"
        f"_shtab_plumb {words[0]} {words[-1]} {words[-2]}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_zsh_and_an_unknown_shell() -> None:
    assert completion("zsh").startswith("#compdef plumb")
    words = [sys.executable, "verbs.py", "fish-and-chips"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --print_completion needs the name of a shell: bash, zsh, ")


# --- prepare -----------------------------------------------------------------------------------------


def test_prepare_makes_what_a_run_then_finds(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.source", str(corpus), "--data.validation_one_in", "4", "--data.test_one_in", "4"]
    words += ["--tokenizer.vocab_size", "300", "--data.cache", str(tmp_path / "cache")]
    trainingmanager.main(trained([*words, "--prepare"]))
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("prepared: ") and (tmp_path / "cache").is_dir()
    assert any(line.startswith("train: ") for line in said)
    monkeypatch.setattr("data.prepare._build", None)  # Nothing is left to build, also by a run.
    monkeypatch.setattr("tokenizer.CodeTokenizer.train", None)
    config = trained(words)
    from dataset import prepare_data, prepare_tokenizer

    data = prepare_data(config.data, prepare_tokenizer(config.data, config.tokenizer))
    assert said[-1].endswith(str(data.folder))


def test_a_fault_is_explained_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name, meaning in FAULTS.items():
        preflight.main(["--explain", name])
        assert capsys.readouterr().out.split() == [name, *meaning.split()]
    for words, sentence in (
        (["--explain", "futre-visible"], "futre-visible is no fault; did you mean future-visible?"),
        (["--explain", "xyz"], "xyz is no fault; docs/faults.md lists them"),
        ([], "give --selftest, or --explain and the name of a fault"),
    ):
        with pytest.raises(SystemExit) as stop:
            preflight.main(words)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err

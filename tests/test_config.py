"""Settings: files, flags, and mistakes in one sentence."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import (
    RECIPES,
    Config,
    ModelConfig,
    files,
    one_sentence,
    parse_config,
    unused_keys,
)
from config.files import REPOSITORY, own_module, write_atomically
from config.yamlfile import read_yaml


def test_flags_override_files_and_files_override_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model:\n  n_layer: 7\n  n_head: 2\nmax_steps: 5\n")
    second.write_text("model:\n  n_layer: 8\n")
    config = parse_config(["--config", str(first), "--config", str(second), "--max_steps", "6"])
    assert (config.model.n_layer, config.model.n_head, config.train.max_steps) == (8, 2, 6)
    assert config.model.n_embd == ModelConfig().n_embd


def test_no_flags_are_the_defaults() -> None:
    assert parse_config([]) == Config()


def test_a_saved_config_comes_back_equal() -> None:
    config = parse_config(["--model.n_layer", "3", "--data.suffixes", "[.py,.kt]", "--max_seconds", "12"])
    assert config.data.suffixes == (".py", ".kt")
    assert Config.from_dict(config.to_dict()) == config


def test_overfit_is_a_switch_and_flags_still_override_its_settings() -> None:
    config = parse_config(["--overfit", "--max_steps", "3"])
    assert config.train.overfit and config.train.max_steps == 3
    assert config.data.validation_one_in == 0 and Path(config.data.source).is_dir()
    assert not parse_config(["--overfit", "false"]).train.overfit


OVERFIT = str(RECIPES / "overfit")


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (["--overfit"], OVERFIT),
        (["--overfit=true"], OVERFIT),
        (["--overfit", "yes"], OVERFIT),
        (["--overfit=Yes", "--max_steps", "3"], OVERFIT),
        (["--config", str(RECIPES / "overfit.yaml")], OVERFIT),
        (["--data.source", "mine", "--overfit"], "mine"),
        (["--overfit", "--data.source=mine"], "mine"),
        (["--data.source", "stdlib", "--overfit=true"], "stdlib"),
        (["--config", str(RECIPES / "overfit.yaml"), "--data.source", "mine"], "mine"),
    ],
)
def test_every_spelling_of_overfit_selects_its_preset_and_data(words: list[str], source: str) -> None:
    config = parse_config(words)
    assert config.train.overfit and config.data.source == source
    assert config.data.validation_one_in == 0 and config.model.n_layer == 2


@pytest.mark.parametrize("words", [["--fix"], ["--fix", "--seed", "3"], ["--fix=true"], ["--data.regroup"]])
def test_fix_is_short_for_regrouping(words: list[str]) -> None:
    assert parse_config(words).data.regroup
    assert not parse_config(["--fix", "false"]).data.regroup


@pytest.mark.parametrize(
    ("words", "regroup"),
    [
        ([], True),
        (["--fix", "false"], False),
        (["--data.regroup", "null"], True),
        (["--data.source", "mine"], False),
        (["--data.source", "mine", "--fix"], True),
        (["--overfit"], False),
    ],
)
def test_by_text_is_the_default_of_the_embedded_source_alone(words: list[str], regroup: bool) -> None:
    assert parse_config(words).data.resolved().regroup is regroup


def test_a_value_that_is_spelled_like_a_switch_is_no_switch() -> None:
    assert parse_config(["--run", "overfit", "--seed", "3"]).train.run == "overfit"


def test_a_file_may_hold_one_group(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("n_layer: 7\n")
    assert parse_config(["--model", str(tmp_path / "model.yaml")]).model.n_layer == 7


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.n_layr", "3"], "did you mean --model.n_layer?"),
        (["--n_layer", "3"], "did you mean --model.n_layer?"),
        (["--max_secnds", "3"], "--max_secnds is no flag; did you mean --max_seconds?"),
        (["--model.n_layer", "3.5"], "error: model.n_layer is 3.5; it must be a whole number"),
        (["--model.dropout", "x"], "error: model.dropout is x; it must be a number"),
        (["--overfit=maybe"], "error: overfit is maybe; it must be true or false"),
        (
            ["--lora.rank_pattern", "3"],
            "rank_pattern is 3; it must be a mapping of names, each to a whole number, spelled {NAME: VALUE}",
        ),
        (["--lora.rank_pattern", "{a: x}"], "lora.rank_pattern holds x; it must be a mapping of names"),
        (["--data.suffixes", "[1]"], "data.suffixes holds 1; it must be a list, each text"),
        (
            ["--base", "x", "--base_format", "nf3"],
            "error: base_format is nf3; it must be one of auto, fp32, bf16, nf4; did you mean nf4?",
        ),
        (["--base", "x", "--base_format="], "base_format is ''; it must be one of auto, fp32, bf16, nf4\n"),
        (
            ["--base", "x", "--base_format", "nf4", "--lora.r", "0"],
            "base_format is nf4 and lora.r is 0, by which all of the base would train, and weights can only "
            "in fp32: set lora.r to 1 or more to train adapters, or remove base_format",
        ),
        (
            ["--model.mlp", "gulu"],
            "it must be one of gelu, gelu_tanh, relu2, swiglu, geglu_tanh; did you mean gelu?",
        ),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--config", "no/such\x1b[2J.yaml"], "--config is no/such\\x1b[2J.yaml, and there is no such file"),
        (["--model.position", "learned", "--model.rope_theta", "5"], "model.position is not rotary"),
        (["--optimizer.name", "adamw", "--optimizer.muon_lr", "1"], "optimizer.name is not muon"),
        (["--tokenizer.kind", "bpe", "--tokenizer.min_count", "1"], "only a new `code` tokenizer counts"),
        (["--tokenizer.kind", "bpe", "--tokenizer.path", "x"], "tokenizer.kind is set, but tokenizer.path"),
        (["--tokenizer.kind", "code", "--base", "x"], "tokenizer.kind is set, but tokenizer.path or base br"),
        (
            ["--optimizer.schedule", "constant", "--optimizer.min_lr_factor", "0.5"],
            "optimizer.schedule is constant",
        ),
        (["--model.tie_embeddings", "true", "--optimizer.head_lr", "1"], "no separate head"),
        (
            ["--optimizer.lr", "1e-6"],
            "optimizer.lr is set, but no parameter of this run learns at it; what acts is optimizer.muon_lr, "
            "optimizer.embedding_lr and optimizer.head_lr; remove it",
        ),
        (["--optimizer.lr", "0.01"], "optimizer.lr is set, but no parameter of this run learns at it"),
        (["--config", "{optimizer: {lr: 0.5}}"], "optimizer.lr is set, but no parameter"),
        (["--base", "x", "--optimizer.embedding_lr", "0.1"], "learns at it; what acts is optimizer.lr; "),
        (["--base", "x", "--optimizer.name", "muon", "--optimizer.muon_lr", "1"], "acts is optimizer.lr; "),
        (
            ["--config", "{optimizer: {embedding_lr: 0.3, beta1: 0.8}}", "--optimizer.name", "adamw"],
            "optimizer.name is adamw, and --config brings the other optimizer's embedding_lr 0.3, beta1 0.8; "
            "give each as a flag, such as --optimizer.embedding_lr null for the value that adamw takes",
        ),
        (["--lr", "0.1"], "program's name; here it is --optimizer.muon_lr or --optimizer.embedding_lr or "),
        (["--seed", "3", "--lr=1e-3"], "--lr is another program's name; here it is --optimizer.muon_lr or "),
        (["--lr", "--optimizer.name", "adamw"], "another program's name; here it is --optimizer.lr\n"),
        (["--learning-rate", "1", "--base", "x"], "--learning_rate is another program's name; here it is "),
        (["--validate_every", "0", "--patience", "3"], "validate_every and save_every are 0"),
        (["--max_step", "5"], "did you mean --max_steps?"),
        (["--model.n_lay=5"], "did you mean --model.n_layer?"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--seed", str(2**63)], f"it must be at most {2**63 - 1}"),
        (["--max_seconds", ".inf"], "max_seconds is inf; it must be finite"),
        (["--optimizer.beta1", "1"], "optimizer.beta1 is 1.0; it must be below 1"),
        (["--model.rope_theta", "0"], "model.rope_theta is 0.0; it must be above 0"),
        (["--model.vocab_size", str(2**40)], f"it must be at most {2**24}"),
        (["--data.source", ""], "data.source is ''"),
        (["--data.loss_on", "prompt"], "completion"),
        (["--data.fim_rate", "1.5"], "data.fim_rate is 1.5; it must be at most 1"),
        (["--model.n_embd", "10"], "model.n_embd 10 is not a multiple of model.n_head 3"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(words)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_typos_in_a_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text("optimizer:\n  warmup_step: 3\n")
    with pytest.raises(SystemExit):
        parse_config(["--config", str(file)])
    assert "did you mean optimizer.warmup_steps?" in capsys.readouterr().err


def test_what_stands_in_a_file_twice_is_refused_of_which_the_parser_takes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    for text, sentence in (
        ("optimizer: {muon_lr: 0.05}\nseed: 3\noptimizer: {beta1: 0.9}\n", "again in line 3; leave one out"),
        ("optimizer:\n  muon_lr: 0.05\n  muon_lr: 0.02\n", f"muon_lr is twice in {file}, again in line 3"),
        ("optimizer.muon_lr: 0.05\noptimizer: {beta1: 0.9}\n", "write muon_lr inside optimizer"),
        ("optimizer: {muon_lr: 0.05}\noptimizer.muon_lr: 0.02\n", "write muon_lr inside optimizer"),
        ('{\t"seed": 1,\n\t"seed": 2}\n', f"seed is twice in {file}, again in line 2"),
        ("optimizer: [1\n", f"{file} is no YAML at line 2 column 1: expected ',' or ']', but got "),
        ("max_steps: !!int a\n", f"{file} is no YAML: invalid literal for int() "),
        ("space: {seed: [1, 2]}\n", "space is for a sweep; such a file is read by hyperparam_tune.py"),
        ("max_steps: 5\nsweep:\n  trials: 3\n", "sweep is for a sweep; such a file is read by"),
    ):
        file.write_text(text, "utf-8")
        with pytest.raises(SystemExit):
            parse_config(["--config", str(file)])
        printed = capsys.readouterr().err
        assert sentence in printed and printed.count("\n") == 1
    values = json.dumps({"run": "r" * 300})  # no file has so long a name
    assert parse_config(["--config", values]).train.run == "r" * 300
    file.write_text("data: {source: 2023-02-30}\ntokenizer: {path: 2026-11-23T07:00:00}\n", "utf-8")
    config = parse_config(["--config", str(file)])
    assert (config.data.source, config.tokenizer.path) == ("2023-02-30", "2026-11-23T07:00:00")
    assert read_yaml(file)["tokenizer"] == {"path": "2026-11-23T07:00:00"}
    file.write_text("optimizer: {beta1: 0.9}\noptimizer.muon_lr: 0.05\n", "utf-8")
    optimizer = parse_config(["--config", str(file)]).optimizer
    assert (optimizer.beta1, optimizer.muon_lr) == (0.9, 0.05)
    file.write_text('{\n\t"seed": 3\n}\n', "utf-8")
    assert parse_config(["--config", str(file)]).train.seed == 3 == read_yaml(file)["seed"]
    chain = "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: [*b, *b, {<<: *b, x: 3}]\n"
    file.write_text(chain, "utf-8")
    assert read_yaml(file)["c"] == [{"x": 1, "y": 2}, {"x": 1, "y": 2}, {"x": 3, "y": 2}]
    file.write_text("a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n", "utf-8")
    assert read_yaml(file)["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"model: 3\n", "model is 3; it must be a mapping"),
        (b"model: [1]\n", "model is [1]; it must be a mapping"),
        (b"- 1\n- 2\n", "must be a YAML mapping"),
        (b"", "must be a YAML mapping"),
        (b"\x00\xff\xfe\x01", "is no YAML"),
        (b"a: &a [*a]\n", "cannot be read"),
        (b"max_steps: [1\n", "is no YAML"),
        (None, "is not a file"),
    ],
)
def test_a_file_that_holds_no_settings_is_one_sentence(
    content: bytes | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        parse_config(["--config", str(file)])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "it must be a mapping"),
        (None, "it must be a mapping"),
        ({"model": None}, "model is None; it must be a mapping"),
        ({"model": 3}, "model is 3; it must be a mapping"),
        ({"config": "other.yaml"}, "config is not a known key"),
        ({"train": {}}, "train is not a known key"),
        ({5: 3}, "5 is not a known key"),
        ({"model": {"n_layr": 3}}, "model.n_layr is not a known key"),
        ({"model": {"n_layer": True}}, "model.n_layer is True; it must be a whole number"),
        ({"model": {"n_layer": 3.0}}, "model.n_layer is 3.0; it must be a whole number"),
        ({"model": {"mlp": "gulu"}}, "model.mlp is 'gulu'; it must be one of gelu, "),
        ({"model": {"mlp": ["gelu"]}}, "model.mlp is ['gelu']; it must be one of gelu, "),
        ({"resume": 1}, "resume is 1; it must be true or false"),
        ({"run": 1}, "run is 1; it must be text"),
        ({"max_seconds": "1"}, "max_seconds is '1'; it must be a number"),
        ({"max_seconds": True}, "max_seconds is True; it must be a number"),
        ({"max_seconds": 10**400}, "it must be a number"),
        ({"tokenizer": {"path": 3}}, "tokenizer.path is 3; it must be text"),
        ({"data": {"suffixes": [".py", 3]}}, "it must be a list, each text"),
        ({"data": {"suffixes": ".py"}}, "it must be a list, each text"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"model": {"n_head": 5}}, "192 is not a multiple of model.n_head 5"),
    ],
)
def test_a_saved_config_is_read_strictly(values: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        Config.from_dict(values)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_saved_config_reads_no_other_file(tmp_path: Path) -> None:
    """Each of these is a file that jsonargparse would have opened."""
    (tmp_path / "all.yaml").write_text("max_steps: 7\n")
    (tmp_path / "model.yaml").write_text("n_layer: 7\n")
    for values in ({"config": str(tmp_path / "all.yaml")}, {"model": str(tmp_path / "model.yaml")}):
        with pytest.raises(ValueError, match="the saved config cannot be read"):
            Config.from_dict(values)


def test_a_saved_whole_number_is_read_as_the_float_that_it_was() -> None:
    seconds = Config.from_dict({"max_seconds": 12}).train.max_seconds
    assert seconds == 12 and isinstance(seconds, float)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "error: memory is full; a smaller batch_size, model or corpus needs less\n"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: memory is full; a smaller "),
        (
            RuntimeError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.10 GiB of "
                "which 1.25 GiB is free. Process 7 has 77.85 GiB memory in use. Of the allocated memory 70"
            ),
            2,
            "error: the memory of GPU 1 is full: 2.00 GiB more were needed, and 1.25 GiB of its 79.10 GiB "
            "are free; a smaller batch_size or model needs less\n",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 2, "error: memory is full; "),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you"), 2, "error: memory is full; a smaller "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: memory is full; a smaller "),
    ],
)
def test_a_command_ends_with_one_sentence(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise error
    said = capsys.readouterr().err
    assert stop.value.code == code and said.startswith(printed) and said.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), one_sentence():
        raise RuntimeError("shapes differ")


def test_the_defaults_have_no_unused_key() -> None:
    assert list(unused_keys(Config())) == []


def test_a_base_brings_its_own_defaults_from_a_flag_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text("base: some/model\nlora:\n  rank_pattern: {c_attn: 8}\n")
    for words in (["--base", "some/model", "--lora.rank_pattern", "{c_attn: 8}"], ["--config", str(file)]):
        config = parse_config([*words, "--optimizer.lr", "1e-3", "--lora.targets", "*.attn.c_*,mlp"])
        assert (config.lora.r, config.optimizer.name, config.optimizer.lr) == (16, "adamw", 1e-3)
        assert config.lora.targets == ("*.attn.c_*", "mlp") and config.lora.rank_pattern == {"c_attn": 8}
        assert Config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lora.r", "4"], "lora.r is set, but base is not; remove it"),
        (["--base", "x", "--lora.r", "0", "--lora.dora", "true"], "lora.dora is set, but lora.r is 0"),
        (["--base", "x", "--lora.r", "0", "--base_format", "fp32"], "base_format is set, but without base"),
        (["--base", "x", "--lora.alpha", "0"], "lora.alpha is 0.0; it must be above 0"),
        (["--base", "x", "--lora.rank_pattern", "{a: 0}"], "lora.rank_pattern.a is 0; it must be above 0"),
        (
            ["--base", "x", "--tokenizer.vocab_size", "9"],
            "tokenizer.vocab_size is set, but tokenizer.path or",
        ),
    ],
)
def test_settings_of_an_adapter_that_nothing_reads_are_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(words)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "saved"),
    [
        ([], {"lr": 0.01, "embedding_lr": 0.3, "head_lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10}),
        (
            ["--optimizer.name", "adamw", "--model.tie_embeddings", "true"],
            {"lr": 3e-4, "embedding_lr": 0.3, "head_lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10},
        ),
        (["--base", "x"], {}),
    ],
)
def test_a_saved_config_keeps_its_rates_and_opens_again(
    words: list[str], saved: dict[str, float], tmp_path: Path
) -> None:
    """A file of settings does so too: what it names stays, whether or not anything reads it."""
    plain = parse_config(words).with_optimizer_defaults().to_dict()
    plain["optimizer"] |= saved
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain), "utf-8")
    for config in (Config.from_dict(read_yaml(file)), parse_config(["--config", str(file)])):
        assert config.to_dict() == plain
        assert config.with_optimizer_defaults() == config


def test_what_a_base_brings_is_its_own_whatever_the_optimizer() -> None:
    optimizer = parse_config(["--base", "x", "--optimizer.name", "muon", "--lora.r", "0"]).optimizer
    assert (optimizer.lr, optimizer.embedding_lr, optimizer.beta2) == (2e-4, 0.0, 0.999)


def test_a_key_that_something_reads_is_not_called_unused() -> None:
    parse_config(["--optimizer.lr", "0.5", "--model.norm_weight", "true"])
    parse_config(["--optimizer.lr", "0.5", "--optimizer.embedding_lr", "0"])
    parse_config(["--base", "x", "--lora.train_modules", "lm_head", "--optimizer.head_lr", "1"])
    parse_config(["--validate_every", "0", "--save_every", "5", "--patience", "3"])
    parse_config(["--validate_every", "0", "--validation_rows", "3"])
    parse_config(["--tokenizer.path", "x", "--tokenizer.kind", "pretrained"])
    parse_config(["--tokenizer.path", "x", "--data.fim_rate", "0.5"])
    parse_config(["--base", "x", "--data.fim_rate", "1", "--data.loss_on", "all"])


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"n_embd": 10, "n_head": 3}, ("10", "3")),
        ({"n_head": 4, "n_kv_head": 3}, ("4", "3")),
        ({"rotary_dim": 6, "n_embd": 8, "n_head": 2}, ("6", "4")),
        ({"n_layer": 0}, ("0", "1")),
        ({"dropout": 1.0}, ("1.0", "1")),
        ({"vocab_size": -1}, ("-1", "1")),
    ],
)
def test_a_shape_that_cannot_be_built_names_both_numbers(settings: Any, numbers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        replace(ModelConfig(vocab_size=8), **settings).resolved()
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize("command", ["trainingmanager.py", "eval.py"])
@pytest.mark.parametrize(("word", "expected"), [("--help", 0), ("--max_stps", 2), ("--num_train_epochs", 2)])
def test_help_and_typos_answer_without_torch(command: str, word: str, expected: int) -> None:
    """An answer in half a second needs torch and the parser to stay out: their imports take longer."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{command!r}, {word!r}]\n"
        f"try: runpy.run_path({str(REPOSITORY / command)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('exit', stop.code, {'torch', 'numpy', 'jsonargparse'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith(f"exit {expected} set()")


def test_a_folder_that_may_not_be_written_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit, one_sentence():
        raise OSError(errno.EROFS, "Read-only file system", "/data/run")
    assert exit.value.code == 2
    expected = "error: /data/run cannot be used (Read-only file system); name a folder you may write to\n"
    assert capsys.readouterr().err == expected


def test_a_module_of_this_program_is_run_whatever_the_working_directory_holds(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("raise SystemExit('a file of the user')\n", "utf-8")
    (tmp_path / "selftest.py").write_text("raise SystemExit('another file of the user')\n", "utf-8")
    command, environment = own_module("selftest.plan_child")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input="{}", capture_output=True, text=True, check=False
    )
    assert "of the user" not in done.stderr and "KeyError: 'config'" in done.stderr


def test_processes_that_write_one_file_at_once_leave_one_of_their_texts(tmp_path: Path) -> None:
    """The first trials of a sweep record one source together."""
    code = (
        "import sys; from pathlib import Path; from config import write_atomically\n"
        "for _ in range(40): write_atomically(Path(sys.argv[1]), sys.argv[2] * 5000)\n"
    )
    path = tmp_path / "record.json"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), letter], cwd=REPOSITORY) for letter in "abc"
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert path.read_text("utf-8") in [letter * 5000 for letter in "abc"]
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_process_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    code = (
        "import os, sys; from pathlib import Path; from config import write_atomically\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "write_atomically(Path(sys.argv[1]), 'a longer text, half written')\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPOSITORY, check=False)
    assert len([*tmp_path.iterdir()]) == 1 and not path.exists()
    write_atomically(path, "short")
    assert [*tmp_path.iterdir()] == [path] and path.read_text("utf-8") == "short"


def test_a_writer_that_waited_does_not_write_into_what_the_other_one_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, temporary, flock = tmp_path / "record.json", tmp_path / ".record.json.tmp", files.fcntl.flock
    waits = iter([True])

    def locked(file: Any, operation: int) -> None:
        if next(waits, False):  # Meanwhile the other writer, who holds the lock, ends.
            temporary.write_text("theirs", "utf-8")
            os.replace(temporary, path)
            os.link(path, tmp_path / "as they wrote it")
        flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", locked)
    write_atomically(path, "ours")
    assert path.read_text("utf-8") == "ours" and not temporary.exists()
    assert (tmp_path / "as they wrote it").read_text("utf-8") == "theirs"


def test_a_write_follows_no_link_and_its_error_is_told(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept", "utf-8")
    (tmp_path / ".record.json.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "record.json", "text")
    assert (tmp_path / "precious").read_text("utf-8") == "kept"
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone" / "record.json", "text")

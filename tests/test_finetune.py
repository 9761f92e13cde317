"""Runs that start from a published model: what trains, what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from architecture import Decoder
from config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    parse_config,
)
from config.files import REPOSITORY
from data.corpus import split_documents, training_texts
from guards.faults import Fault
from lora import adapters_disabled, add_adapter
from modules.dropout import Dropout
from modules.quantized_linear import Linear4bit
from modules.recompute import CheapRecompute, run_checkpointed_block
from pretrained import FAMILIES, load_pretrained, save_pretrained
from pretrained.family import to_model
from selftest.prove_resume import run_difference
from suites.evaluate import evaluate, table
from suites.settings import EvalConfig
from tokenizer import BPETokenizer, PretrainedTokenizer, load_tokenizer
from training import begin, loop
from training.announcements import say_groups
from training.begin import train
from training.loop import TrainingManager
from training.run import export_adapter, load_run, open_adapted, starting_tokenizer, with_base_config

pytestmark = pytest.mark.usefixtures("unguarded")
TOKENS = torch.arange(24).view(2, 12)
SHAPE = ModelConfig(
    block_size=64,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=16,
    norm_weight=True,
    norm_bias=True,
    position="learned",
    qk_norm=False,
    fused_qkv=True,
    qkv_bias=True,
    attention_bias=True,
    mlp="gelu_tanh",
    mlp_bias=True,
    tie_embeddings=True,
    dropout=0.1,
    init="normal",
)


def base_in(tmp_path: Path, corpus: Path) -> Path:
    """Write a folder like StarCoder's; its weights are drawn, and the guard for that has to let them pass."""
    tokenizer = BPETokenizer.train(
        training_texts(split_documents(DataConfig(str(corpus), validation_one_in=4, test_one_in=4))), 300
    )
    torch.manual_seed(0)
    model = Decoder(replace(SHAPE, vocab_size=tokenizer.vocab_size))
    save_pretrained(model, tokenizer, tmp_path / "base")
    return tmp_path / "base"


def config_in(tmp_path: Path, base: Path, corpus: Path) -> Config:
    return Config(
        data=DataConfig(
            source=str(corpus), validation_one_in=4, test_one_in=4, cache=str(tmp_path / "cache"), workers=1
        ),
        lora=LoraConfig(r=4, alpha=8, dropout=0.1, targets=("c_attn", "c_proj")),
        optimizer=OptimizerConfig(name="adamw", lr=1e-2, embedding_lr=0, head_lr=0, warmup_steps=1),
        train=TrainConfig(
            run=str(tmp_path / "run"),
            base=str(base),
            row_length=32,
            max_steps=6,
            batch_size=4,
            validate_every=3,
            log_every=1,
            precision="fp32",  # In native bf16 nothing would be equal to the bit.
            allow=("worse-than-unigram",),
        ),
    )


@pytest.fixture
def base(corpus: Path, tmp_path: Path) -> Path:
    return base_in(tmp_path, corpus)


@pytest.fixture
def config(base: Path, corpus: Path, tmp_path: Path) -> Config:
    return config_in(tmp_path, base, corpus)


def test_a_rate_of_no_parameter_is_refused_before_the_data_are_read(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's head is its embedding, which only the open base says."""

    def read(*_: object) -> None:
        raise ValueError("the data were read")

    monkeypatch.setattr(begin, "prepare_data", read)
    config = other(config, "lora", r=0)
    with pytest.raises(
        ValueError, match=r"optimizer.head_lr is set, but no parameter .*what acts is optimizer.lr;"
    ):
        train(other(config, "optimizer", head_lr=0.5))
    with pytest.raises(ValueError, match="the data were read"):
        train(config)


def test_muon_beside_adapters_alone_is_told_that_it_moves_nothing(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Decoder(replace(SHAPE, vocab_size=300))
    add_adapter(model, config.lora, load_pretrained(config.train.base or "").family.key)
    with pytest.raises(ValueError, match=r"optimizer.muon_lr is set, but .* what acts is optimizer.lr;"):
        say_groups(other(config, "optimizer", name="muon", muon_lr=0.5), model)
    say_groups(other(config, "optimizer", name="muon"), model)
    said = capsys.readouterr()
    assert "AdamW moves everything; set --optimizer.name adamw" in said.err and "Muon" not in said.out


def test_rows_are_as_long_as_the_examples_need_and_a_resumed_run_keeps_its_own(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_pretrained(config.train.base or "").tokenizer
    assert tokenizer is not None
    model = Decoder(replace(SHAPE, vocab_size=tokenizer.vocab_size, block_size=160))
    save_pretrained(model, tokenizer, tmp_path / "long")
    rows = [{"prompt": f"def f_{n}(x):\n", "completion": f"    return x + {n}\n"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = other(config, "data", source=str(tmp_path / "pairs.jsonl"))
    allowed = (*config.train.allow, "split-leaks")
    config = other(config, base=str(tmp_path / "long"), allow=allowed, max_steps=1, validate_every=0)
    for row_length, length in ((0, 64), (160, 160)):
        asked = other(config, row_length=row_length, run=str(tmp_path / f"run-{length}"))
        assert train(asked).config.row_length == length
        told = "rows: 64 tokens, which hold every example whole; --row_length sets another length\n"
        assert (told in capsys.readouterr().out) == (not row_length)
        assert yaml.safe_load((Path(asked.train.run) / "config.yaml").read_text())["row_length"] == length
        assert train(other(asked, row_length=0, resume=True, max_steps=2)).config.row_length == length
        assert "rows: " not in capsys.readouterr().out


def other(config: Config, group: str = "train", **values: Any) -> Config:
    return replace(config, **{group: replace(getattr(config, group), **values)})


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)


def test_adapters_train_and_the_base_stays(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    manager = train(config)
    printed = capsys.readouterr().out
    assert "transformer.h.*.attn.c_attn" in printed and "parameters train beside" in printed
    assert "parameters, adapters   learning rate 0.01     optimizer.lr\n" in printed
    stored = load_file(Path(config.train.base or "") / "model.safetensors")
    assert torch.equal(manager.model.embed.weight, stored["transformer.wte.weight"])
    with adapters_disabled(manager.model):
        plain = logits(manager.model)
    assert not torch.equal(plain, logits(manager.model))
    (kept,) = sorted((manager.folder / "checkpoints").glob("step-*6/model.safetensors"))
    with safe_open(kept, framework="pt") as file:
        names = list(file.keys())
    assert names and all(".adapters." in name for name in names)
    run = load_run(manager.folder, "last")
    assert torch.equal(logits(run.model), logits(manager.model))
    assert (run.config.row_length, run.config.model.block_size) == (32, 64)
    scores = evaluate(EvalConfig(str(manager.folder), samples=0, cache=config.data.cache))
    assert scores["base"]["loss"] != scores["model"]["loss"] and " base " in table(scores)


@pytest.mark.parametrize("base_format", ["bf16", "nf4"])
def test_a_base_stored_in_fewer_bits_opens_again_as_it_was(config: Config, base_format: str) -> None:
    manager = train(other(config, base_format=base_format, max_steps=2))
    run = load_run(manager.folder)
    assert torch.equal(logits(run.model), logits(manager.model))
    assert run.config.train.base_format == base_format


def test_a_run_in_bf16_opens_in_fp32_but_for_its_rounding(config: Config) -> None:
    manager = train(other(config, precision="bf16", max_steps=2))
    assert manager.model.embed.weight.dtype == torch.bfloat16
    run = load_run(manager.folder)
    assert run.config.train.base_format == "bf16"
    torch.testing.assert_close(logits(run.model), logits(manager.model).float(), rtol=0.02, atol=0.01)


@pytest.mark.guarded
def test_a_resumed_run_equals_one_that_was_never_stopped(config: Config, tmp_path: Path) -> None:
    config = other(config, "optimizer", schedule="constant")  # others follow the budget, which differs
    whole = train(config)
    train(other(config, run=str(tmp_path / "halves"), max_steps=3))
    halves = train(other(config, run=str(tmp_path / "halves"), resume=True))
    assert run_difference(whole.folder, halves.folder) is None


def test_all_of_a_base_trains_and_then_needs_it_no_more(config: Config) -> None:
    manager = train(replace(config, lora=LoraConfig()))
    stored = load_file(Path(config.train.base or "") / "model.safetensors")
    assert not torch.equal(manager.model.embed.weight, stored["transformer.wte.weight"])
    shutil.rmtree(config.train.base or "")
    assert torch.equal(logits(load_run(manager.folder).model), logits(manager.model))


def changed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_another_base_is_refused_by_resume_and_by_evaluation(config: Config) -> None:
    manager = train(other(config, max_steps=2))
    changed(Path(config.train.base or ""))
    with pytest.raises(ValueError, match=r"the base changed since .* \(in .*base\) and was \w+ then"):
        train(other(config, resume=True))
    with pytest.raises(ValueError, match=r"is not the base that the run was trained on: .* fingerprint"):
        load_run(manager.folder)


@pytest.mark.guarded
def test_weights_that_know_nothing_are_refused(config: Config) -> None:
    with pytest.raises(Fault, match="worse-than-unigram: the loaded weights have loss"):
        train(other(config, allow=()))


@pytest.mark.parametrize(
    ("group", "values", "sentence"),
    [
        ("train", {"row_length": 65}, "row_length is 65, and .*base has a context of 64 tokens; set"),
        (
            "model",
            {"n_layer": 3},
            "model.n_layer is 3, and .*base brings its own, 2; leave",
        ),
        ("lora", {"targets": ("q_proj",)}, "q_proj.*c_attn"),
        ("train", {"base": "no-such-folder"}, "no-such-folder is neither a folder nor a hub id"),
    ],
)
def test_what_the_base_cannot_do_is_one_sentence(
    config: Config, group: str, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        train(other(config, group, **values))
    assert "\n" not in str(error.value) and not (Path(config.train.run) / "config.yaml").exists()


def test_a_base_without_a_tokenizer_needs_one(config: Config, base: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(base / name, tmp_path / "tokenizer" / name)
    with pytest.raises(ValueError, match=r"base holds no tokenizer; name its folder with --tokenizer.path"):
        train(config)
    named = TokenizerConfig(kind="pretrained", path=str(tmp_path / "tokenizer"))
    manager: TrainingManager = train(replace(other(config, max_steps=1), tokenizer=named))
    assert json.loads((manager.folder / "fingerprints.json").read_text())["base"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_settings_that_a_run_saves_are_taken_back(config: Config, family: str, tmp_path: Path) -> None:
    """The keys that a base decides stand in config.yaml, and none may be called unused on resume."""
    tuned = parse_config(["--base", "some/model", "--lora.targets", "all-linear"])
    saved = replace(tuned, model=to_model(FAMILIES[family], {}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved.to_dict()), "utf-8")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == saved


@pytest.mark.parametrize(
    ("lora", "base_format"),
    [
        pytest.param({"new_tokens": ("<|a|>", "<|b|>"), "bias": "all"}, "fp32", marks=pytest.mark.slow),
        ({"init": "pissa", "dora": True, "rslora": True}, "nf4"),
        pytest.param({"train_modules": ("lm_head",), "lr_ratio": 4.0}, "bf16", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_adapter_resumes_and_opens_as_it_was(
    config: Config, tmp_path: Path, lora: dict[str, Any], base_format: str
) -> None:
    config = other(other(config, "optimizer", schedule="constant"), "lora", **lora)
    config = other(config, base_format=base_format, accumulation=2)
    whole = train(config)
    train(other(config, run=str(tmp_path / "halves"), max_steps=3))
    halves = train(other(config, run=str(tmp_path / "halves"), resume=True))
    assert run_difference(whole.folder, halves.folder) is None
    assert torch.equal(logits(load_run(whole.folder, "last").model), logits(whole.model))


def drawn_base(folder: Path, like: Path, **settings: Any) -> Path:
    """A base of another shape with the tokenizer of `like`."""
    tokenizer = load_tokenizer(like)
    torch.manual_seed(0)
    save_pretrained(Decoder(replace(SHAPE, vocab_size=tokenizer.vocab_size, **settings)), tokenizer, folder)
    return folder


@pytest.mark.guarded
def test_a_new_token_that_does_not_occur_stops_no_run(
    config: Config, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a head of its own, the row of its embedding gets no gradient."""
    untied = drawn_base(tmp_path / "untied", base, tie_embeddings=False)
    config = other(other(config, base=str(untied), row_length=16), "lora", new_tokens=("<|never|>",))
    manager = train(config)
    model: Any = manager.model
    assert (
        "warning: no training text holds '<|never|>': 1 of 1 lora.new_tokens occur 0 times in "
        f"{manager.data.train.n_tokens:,} tokens, and"
    ) in capsys.readouterr().err
    (rows,) = (change.rows for change in model.embed.adapters.values())
    assert torch.equal(rows, model.embed.adapters["default"].original)
    assert not torch.equal(model.head.adapters["default"].rows, model.head.adapters["default"].original)


def test_of_new_tokens_the_absent_ones_are_named(
    config: Config, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in corpus.glob("*.py"):
        path.write_text(f"# <|here|><|here|>\n{path.read_text()}")
    manager = train(other(other(config, max_steps=1), "lora", new_tokens=("<|never|>", "<|here|>")))
    assert (
        "warning: no training text holds '<|never|>': 1 of 2 lora.new_tokens occur 0"
        in capsys.readouterr().err
    )
    store, size = manager.data.train, manager.config.model.vocab_size
    assert store.occurrences([size - 1, 5]) == [
        2 * store.n_documents, int((store.gather(np.arange(store.n_tokens)) == 5).sum())
    ]  # fmt: skip
    with patch("data.tokenstore.READ_AT_ONCE", 7):
        assert store.occurrences([size - 2, size - 1]) == [0, 2 * store.n_documents]


def test_a_start_is_taken_from_the_checkpoint_and_not_made_again(config: Config, tmp_path: Path) -> None:
    """Another machine's decomposition rounds otherwise; here by more than it would."""
    config = other(other(config, "optimizer", schedule="constant"), "lora", init="pissa")
    whole = train(config)
    train(other(config, run=str(tmp_path / "halves"), max_steps=3))
    right = torch.linalg.svd

    def rounded(*args: Any, **options: Any) -> Any:
        u, s, vh = right(*args, **options)
        return u * 1.001, s, vh

    with patch.object(torch.linalg, "svd", rounded):
        halves = train(other(config, run=str(tmp_path / "halves"), resume=True))
        opened = load_run(whole.folder, "last")
    assert run_difference(whole.folder, halves.folder) is None
    assert torch.equal(logits(opened.model), logits(whole.model))


def test_new_tokens_get_ids_and_rows_and_go_with_the_adapter(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = train(other(config, "lora", new_tokens=("<|a|>", "<|b|>")))
    assert "no training text holds '<|a|>', '<|b|>': 2 of 2 lora.new_tokens" in capsys.readouterr().err
    run = load_run(manager.folder, "last")
    ids = run.tokenizer.encode("x<|b|>")
    size = run.config.model.vocab_size
    assert ids[-1] == size - 1 == run.tokenizer.vocab_size - 1 and run.tokenizer.decode(ids) == "x<|b|>"
    export_adapter(run, tmp_path / "adapter")
    opened = open_adapted(str(config.train.base), tmp_path / "adapter")
    assert opened.tokenizer is not None and opened.tokenizer.encode("x<|b|>") == ids
    assert torch.equal(logits(opened.model), logits(run.model))


def test_tokens_that_a_given_tokenizer_has_added_are_new_to_the_base(config: Config, tmp_path: Path) -> None:
    """The guard `token-never-trained` advises to name them."""
    own = PretrainedTokenizer.load(Path(str(config.train.base)))
    own.with_start().with_tokens(["<|a|>", "<|b|>"]).save(tmp_path / "added")
    config = other(other(config, max_steps=1), "tokenizer", path=str(tmp_path / "added"))
    manager = train(other(config, "lora", new_tokens=("<|b|>", "<|c|>", "<|a|>")))
    run = load_run(manager.folder, "last")
    size, model = run.tokenizer.vocab_size, run.model
    assert run.tokenizer.encode("<|a|><|b|><|c|>") == [size - 3, size - 2, size - 1]
    changed: Any = model.embed
    assert changed.adapters["default"].ids.tolist() == [size - 2, size - 1, size - 3]
    with pytest.raises(ValueError, match=r"has 2 ids more than .*, and lora.new_tokens names 1; name every"):
        train(other(other(config, run=str(tmp_path / "some")), "lora", new_tokens=("<|b|>",)))
    for tokens, problem in (("<|d|>", "<|d|>"), "given twice; leave it out"), (("",), "a new token is empty"):
        with pytest.raises(ValueError, match=problem):
            cast(PretrainedTokenizer, run.tokenizer).with_tokens(tokens)
    with pytest.raises(ValueError, match=r"'a' is in the vocabulary already, as id \d+; leave it out"):
        train(other(other(config, run=str(tmp_path / "known")), "lora", new_tokens=("a",)))


@pytest.mark.parametrize("size", [300, 280, 320])
def test_a_tokenizer_of_another_model_is_refused_whatever_its_size(
    config: Config, base: Path, tmp_path: Path, size: int
) -> None:
    """One of equal size used to pass, and the base began to train on ids that mean other text."""
    foreign = BPETokenizer.train([Path(json.__file__).read_text()[::-1]], size)
    foreign.save(tmp_path / "foreign")
    assert foreign.vocab_size == size
    named = other(config, "tokenizer", path=str(tmp_path / "foreign"))
    with pytest.raises(ValueError, match=r"is not that of .*base: its pieces have .*leave --token"):
        train(named)
    assert not (Path(config.train.run) / "config.yaml").exists()


def test_the_tokenizer_of_the_base_by_another_path_is_its_own(
    config: Config, base: Path, tmp_path: Path
) -> None:
    """So it is where a base's files put nothing before a text, and where transformers saved them anew."""
    own = load_pretrained(base)
    assert own.tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    theirs.save_pretrained(str(tmp_path / "saved"))
    own.tokenizer.save(tmp_path / "copy")
    state = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))
    for folder in ("saved", "copy"):
        named = other(config, "tokenizer", path=str(tmp_path / folder))
        assert starting_tokenizer(named, own).encode("def f(x):\n") == own.tokenizer.encode("def f(x):\n")
    theirs.add_tokens(["<|one|>"])
    theirs.save_pretrained(str(tmp_path / "longer"))
    longer = other(config, "tokenizer", path=str(tmp_path / "longer"))
    tokenizer = starting_tokenizer(longer, own)
    assert tokenizer.vocab_size == own.tokenizer.vocab_size + 1
    with pytest.raises(ValueError, match=r"has 1 ids more than .*new_tokens names 0; name every token"):
        with_base_config(longer, own, tokenizer, torch.float32)


def test_a_base_in_bf16_is_not_validated_in_fp32(config: Config) -> None:
    rounded = other(config, precision="bf16", base_format="bf16", max_steps=1)
    with pytest.raises(ValueError, match="eval_precision is fp32, and the base is stored as bfloat16"):
        train(other(rounded, eval_precision="fp32"))
    train(rounded)


def test_dropout_is_the_bases_unless_it_is_given(config: Config) -> None:
    manager = train(other(config, max_steps=1))
    assert {m.p for m in manager.model.modules() if isinstance(m, Dropout)} == {0.1}
    chosen = other(other(config, max_steps=1, run=config.train.run + "2"), "model", dropout=0.0)
    manager = train(other(chosen, "model", attention_dropout=0.3))
    assert {m.p for m in manager.model.modules() if isinstance(m, Dropout)} == {0.0, 0.3}
    assert load_run(manager.folder).config.model.attention_dropout == 0.3


@pytest.mark.guarded
def test_a_run_that_a_guard_refuses_leaves_its_folder_free(config: Config) -> None:
    with pytest.raises(Fault):
        train(other(config, allow=()))
    assert not Path(config.train.run).exists()


@pytest.mark.guarded
def test_a_base_in_4_bits_that_moves_is_seen(config: Config) -> None:
    right = loop.build_optimizers

    def wrong(model: Decoder, *args: Any) -> list[torch.optim.Optimizer]:
        optimizers = right(model, *args)
        linear = next(m for m in model.modules() if isinstance(m, Linear4bit))

        def move(*args: Any) -> None:
            linear.get_buffer("packed").add_(1)

        optimizers[0].register_step_post_hook(move)
        return optimizers

    with patch.object(loop, "build_optimizers", wrong), pytest.raises(Fault, match="frozen-param"):
        train(other(config, base_format="nf4"))


def test_what_is_counted_does_not_depend_on_the_format(config: Config, capsys: Any) -> None:
    lines = []
    for base_format in ("fp32", "nf4"):
        train(other(config, base_format=base_format, max_steps=1, run=config.train.run + base_format))
        lines.append(re.findall(r"(?m)^.* parameters (?:on|train beside) .*$", capsys.readouterr().out))
    assert lines[0] == lines[1] and len(lines[0]) == 2


@pytest.mark.parametrize(
    ("section", "values"),
    [("model", {"n_layer": 7}), ("model", {"vocab_size": 10**7}), ("lora", {"r": 60_000})],
)
def test_a_run_that_lies_about_its_base_is_refused(
    config: Config, section: str, values: dict[str, int]
) -> None:
    folder = train(other(config, max_steps=1)).folder
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved[section] |= values
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=r"describes another model|rank of 60000|must be at most"):
        load_run(folder)


def test_a_base_that_moved_is_named_and_can_be_pointed_to(config: Config, tmp_path: Path) -> None:
    manager = train(other(config, max_steps=1))
    shutil.move(str(config.train.base), tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the base of the run cannot be opened: .*; if it moved, say with"):
        load_run(manager.folder)
    run = load_run(manager.folder, base=str(tmp_path / "moved"))
    assert torch.equal(logits(run.model), logits(manager.model))


def test_an_adapter_on_another_base_is_refused(config: Config, tmp_path: Path) -> None:
    run = load_run(train(other(config, max_steps=1)).folder)
    export_adapter(run, tmp_path / "adapter")
    copied = shutil.copytree(str(config.train.base), tmp_path / "copy")
    assert torch.equal(logits(open_adapted(str(copied), tmp_path / "adapter").model), logits(run.model))
    changed(copied)
    with pytest.raises(ValueError, match=r"copy is not the base that .*adapter was trained on: .* fingerpr"):
        open_adapted(str(copied), tmp_path / "adapter")


def test_a_strangers_run_fetches_nothing(config: Config) -> None:
    folder = train(other(config, max_steps=1)).folder
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["base"] = "us/tiny"
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    words = [sys.executable, "generate.py", "--model", str(folder), "--prompt", "x"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    server.shutdown()
    server.server_close()
    assert done.returncode == 2 and "the base of the run cannot be opened" in done.stderr
    assert asked == []


def test_a_tuned_run_recomputes_cheap_outputs_or_whole_blocks(config: Config) -> None:
    chosen_by = {}
    for checkpointing in (False, True):
        chosen = other(config, activation_checkpointing=checkpointing, max_steps=1)
        manager = train(other(chosen, run=f"{config.train.run}{checkpointing}"))
        dropouts = {m.recompute for m in manager.model.modules() if isinstance(m, Dropout)}
        chosen_by[checkpointing] = manager.model.run_block, dropouts
    assert isinstance(chosen_by[False][0], CheapRecompute) and chosen_by[False][1] == {True}
    assert chosen_by[True] == (run_checkpointed_block, {False})

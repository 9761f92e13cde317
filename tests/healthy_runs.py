"""Healthy settings that nobody chose: small runs drawn at random over what a user can ask for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.mutant_runs import FAMILY_SHAPES
from selftest.data import function

Groups = dict[str, dict[str, Any]]
LANGUAGES = ("größe", "数据", "данные", "δεδομένα", "🙂", "e\u0301t\u00e9")
CORPORA = ("files", "examples", "rows", "one line", "unicode", "long", "tiny")
KNOWN = ("files", "examples", "rows", "long")  # Those that a base which knows little is not lost on.


def write_corpora(folder: Path) -> None:
    """Write a folder or a file of rows by each name of CORPORA but those that the bench has."""

    def text(seed: int, lines: int) -> str:
        draw = random.Random(seed)
        return "".join(function(draw) for _ in range(lines))

    def write(name: str, texts: list[str]) -> None:
        (folder / name).mkdir()
        for number, one in enumerate(texts):
            (folder / name / f"file{number}.py").write_text(one, "utf-8")

    write("one line", [text(100 + n, 3).replace("\n", "; ") for n in range(24)])
    write("unicode", [f"# {LANGUAGES[n % 6] * (n + 1)}\n{text(200 + n, 3)}" for n in range(24)])
    write("long", [text(300 + n, 40) for n in range(8)])
    write("tiny", [text(400 + n, 1) for n in range(12)])
    rows = ({"text": text(500 + n, 4)} for n in range(24))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def source_of(corpus: str, assets: Path) -> str:
    """Return the source of a corpus by its name."""
    return str(assets / (f"{corpus}.jsonl" if corpus in ("examples", "rows") else corpus))


def drawn(number: int, assets: Path) -> Groups:
    """Return the settings of a run by its number; some are refused in a sentence, as a user's would be."""
    draw = random.Random(f"healthy {number}")
    one = draw.choice
    is_tuned = draw.random() < 0.5
    corpus = one(KNOWN if is_tuned else CORPORA)
    groups: Groups = {
        "data": {
            "source": source_of(corpus, assets),
            "validation_one_in": one((3, 4)),
            "drop_comments": corpus not in ("examples", "rows") and one((False, False, True)),
            "order": one(("shuffled", "shuffled", "sequential", "easy-first")),
            "loss_on": one(("completion", "all")) if corpus == "examples" else "completion",
            "heal": one((True, True, False)),
        },
        "optimizer": {
            "schedule": one(("wsd", "cosine", "linear", "constant")),
            "warmup_steps": one((0, 1, 2)),
            "label_smoothing": one((0.0, 0.0, 0.1)),
            "z_loss": one((0.0, 0.0, 1e-4)),
            "weight_decay": one((0.0, 0.1)),
            "grad_clip": one((1.0, 0.0, 0.1)),
        },
        "": {
            "batch_size": one((2, 4)),
            "accumulation": one((1, 1, 2)),
            "seed": draw.randrange(1000),
            "precision": one(("fp32", "fp32", "bf16")),
            "activation_checkpointing": one((False, False, True)),
            "validate_every": one((2, 3, 100)),
            "samples": one((0, 2)),
        },
    }
    if is_tuned:
        _tune(groups, draw, assets)
    else:
        _from_scratch(groups, draw)
    return groups


def _from_scratch(groups: Groups, draw: random.Random) -> None:
    """Add a tokenizer and a model of its own."""
    one = draw.choice
    groups["tokenizer"] = {"kind": one(("code", "bpe")), "vocab_size": one((300, 400)), "min_count": 2}
    groups["optimizer"] |= {"name": one(("muon", "adamw"))}
    position = one(("rotary", "rotary", "learned", "sinusoidal", "none"))
    groups["model"] = {
        "block_size": one((48, 128)),
        "n_layer": one((1, 2, 3)),
        "n_head": 4,
        "n_kv_head": one((0, 1, 2)),
        "n_embd": one((16, 32)),
        "block": one(("sequential", "parallel")),
        "norm": (norm := one(("rms", "layer"))),
        "norm_weight": one((True, False)),
        "norm_bias": norm == "layer" and one((True, False)),
        "position": position,
        "mlp": one(("gelu", "gelu_tanh", "relu2", "swiglu")),
        "qk_norm": one((True, False)),
        "fused_qkv": one((True, False)),
        "tie_embeddings": one((True, False)),
        "sliding_window": one((0, 0, 9)),
        "dropout": one((0.0, 0.1)),
        "init": one(("normal", "xavier", "zero_output")),
        **{name: one((True, False)) for name in ("qkv_bias", "attention_bias", "mlp_bias", "head_bias")},
    }
    if position == "rotary":
        scaling = one(("none", "none", "linear", "dynamic", "llama3"))
        groups["model"] |= {"rotary_layout": one(("half", "interleaved")), "rope_scaling": scaling}
        groups["model"] |= {"rope_factor": 2.0} if scaling != "none" else {}
        groups["model"] |= {"rope_context": 32} if scaling in ("dynamic", "llama3") else {}


def _tune(groups: Groups, draw: random.Random, assets: Path) -> None:
    """Add a base of any family, whole or with an adapter of any kind."""
    one = draw.choice
    groups[""] |= {"base": str(assets / one((*FAMILY_SHAPES,))), "row_length": one((0, 0, 32))}
    groups["optimizer"] |= {"name": "adamw", "lr": one((1e-3, 1e-4)), "embedding_lr": 0.0, "head_lr": 0.0}
    if draw.random() < 0.25:
        return
    groups["lora"] = {
        "r": one((1, 4)),
        "alpha": one((4.0, 32.0)),
        "dropout": one((0.0, 0.1)),
        "rslora": one((True, False)),
        "dora": one((False, False, True)),
        "init": one(("default", "default", "pissa")),
        "bias": one(("none", "none", "all", "lora_only")),
        "new_tokens": one(((), (), ("zip_", "<|more|>"))),
        "lr_ratio": one((1.0, 4.0)),
    }
    groups[""] |= {"base_format": one(("auto", "fp32", "bf16", "nf4"))}

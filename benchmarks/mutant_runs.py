"""Small runs in which a mutant may show itself: trainings of six updates, and what is done with their models.

Each run of `RUNS` works in the current folder, beside the data that `write_assets` made, and leaves its files
there. The product is imported inside functions: a mutated module must be in place before it is.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ASSETS = Path("..", "..", "assets")
UPDATES, VALIDATED = 6, 3
FEW = 24  # New tokens of a completion.
Groups = dict[str, dict[str, Any]]
# Shapes of small published models; with these a family's own parts are complete.
FAMILY_SHAPES: Groups = {
    "gpt_bigcode": {"n_kv_head": 1, "mlp": "gelu_tanh", "tie_embeddings": True},
    "codegen": {"rotary_dim": 4, "mlp": "gelu_tanh"},
    "phi": {"rotary_dim": 4, "mlp": "gelu_tanh", "qk_norm": False},
    "llama": {
        "n_kv_head": 2,
        "n_inner": 64,
        "mlp": "swiglu",
        "rope_scaling": "llama3",
        "rope_factor": 2.0,
        "rope_context": 32,
    },
    "qwen2": {"n_kv_head": 2, "n_inner": 64, "mlp": "swiglu", "tie_embeddings": True},
    "starcoder2": {
        "n_kv_head": 2,
        "mlp": "gelu_tanh",
        "sliding_window": 20,
        "tie_embeddings": True,
        "qkv_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
TUNED: Groups = {
    "data": {"validation_one_in": 4},
    "optimizer": {"name": "adamw", "lr": 1e-3, "embedding_lr": 0.0, "head_lr": 0.0},
}


# --- data -----------------------------------------------------------------------------------------


def write_assets() -> dict[str, Any]:
    """Write corpora and a small published model of each family, which knows them a little, to `assets`."""
    from pretrained import FAMILIES
    from selftest.data import WORDS, function, write_examples
    from tokenizer import BPETokenizer

    folder = Path("assets")
    (folder / "files").mkdir(parents=True)
    texts = []
    for number in range(24):
        draw = random.Random(number)
        words = [word.capitalize() for word in draw.sample(WORDS.split(), 4)]
        text = "".join(function(draw) for _ in range(5))
        # Capitals, tabs, digits and characters of two to four bytes, for the tokenizers.
        text += (
            f'class {"".join(words[:2])}:\n\tMAX_{words[2].upper()} = "{words[3]} \u00e9\u2192\U0001d11e"\n'
        )
        (folder / "files" / f"part{number}.py").write_text(text, "utf-8")
        texts.append(text)
    write_examples(folder / "examples.jsonl")
    tokenizer = BPETokenizer.train(texts, 320)
    for family, shape in FAMILY_SHAPES.items():
        _write_base(folder / family, FAMILIES[family].parts | shape, tokenizer, texts)
    shutil.copy(folder / "llama" / "tokenizer.json", folder / "qwen2")
    return {"ended": "same"}


def _write_base(folder: Path, shape: dict[str, Any], tokenizer: Any, texts: list[str]) -> None:
    """Train a small model for 60 updates, and write it as a published one."""
    from architecture import Decoder
    from config import ModelConfig
    from pretrained import save_pretrained
    from selftest.data import train_briefly

    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**shape | sizes, init="normal"))
    train_briefly(model, tokenizer, texts)
    # Beside a Qwen2 transformers gives every tokenizer the splits of its own: `save_pretrained` refuses it.
    save_pretrained(model, None if folder.name == "qwen2" else tokenizer, folder)


# --- trainings ------------------------------------------------------------------------------------


def settings_of(groups: Groups, allow: bool) -> Any:
    """Return the settings of a small run in the folder `run`.

    Args:
        groups: Keys that differ from those of the plain run, by group.
        allow: Let every fault pass.
    """
    from config import CONFIG_GROUPS, Config
    from guards.faults import FAULTS

    own: Groups = {
        "data": {"source": str(ASSETS / "files"), "validation_one_in": 4, "test_one_in": 4, "workers": 1},
        "tokenizer": {"vocab_size": 320, "min_count": 2},
        "model": {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1},
        "optimizer": {"warmup_steps": 2},
        "": {
            "run": "run",
            "max_steps": UPDATES,
            "batch_size": 4,
            "validate_every": VALIDATED,
            "log_every": 1,
        },
    }
    own["data"] |= {"cache": "cache"}
    own[""] |= {
        "samples": 2,
        "log": (),
        "device": "cpu",
        "precision": "fp32",
        "allow": tuple(FAULTS) if allow else (),
    }
    if "base" in groups.get("", {}):
        own["tokenizer"], own["model"] = {}, {}
    values = {name: own.get(name, {}) | groups.get(name, {}) for name in CONFIG_GROUPS}
    return Config(**{name or "train": kind(**values[name]) for name, kind in CONFIG_GROUPS.items()})


def train(groups: Groups, allow: bool) -> Any:
    from training import begin

    return begin.train(settings_of(groups, allow))


def train_and_report(groups: Groups, allow: bool) -> None:
    """Train, then score the best checkpoint on the test files and complete two of their functions."""
    from training.report import report

    report(train(groups, allow), {"adapter", "scores", "samples"})


def train_and_continue(groups: Groups, allow: bool) -> None:
    """Train, open the best checkpoint, and continue two prompts greedily."""
    train(groups, allow)
    complete("run", {}, allow)


def complete(model: str, settings: dict[str, Any], allow: bool, adapter: str = "") -> None:
    """Print the greedy or sampled completions of two prompts, with their ids and log-probabilities.

    The reference is consulted first, as the command does.
    """
    from generation.command import open_model
    from generation.settings import GenerationConfig, OpeningConfig
    from generation.text import generate
    from guards.reference.opened import Opened, consult

    opened, tokenizer = open_model(OpeningConfig(model=model, adapter=adapter, device="cpu"))
    chosen: dict[str, Any] = {"max_new_tokens": FEW} | settings
    prompts = ["def add_fly(bag, log=3):\n    cat = ba", "    return [ow"]
    if not allow:
        consult(Opened(Path(model), opened, tokenizer, adapter=adapter), prompts, (), "cache")
    for completion in generate(opened, tokenizer, prompts, GenerationConfig(**chosen)):
        print(f"{completion.text!r} {completion.ids} {completion.log_prob:.6f} {completion.finish_reason}")


def resumed(allow: bool) -> None:
    """Train three updates, and go on to six in the way that the command does."""
    train({"": {"max_steps": VALIDATED}}, allow)
    train_and_continue({"": {"resume": True}}, allow)


def generated(allow: bool) -> None:
    """Train, and complete prompts in each way that tokens can be chosen."""
    train({"": {"max_steps": VALIDATED}, "model": {"n_kv_head": 1}}, allow)
    for settings in (
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 2},
        {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 3},
        {"num_beams": 3, "length_penalty": 0.5},
        {"temperature": 1.0, "stop": ("\n", "=")},
    ):
        complete("run", settings, allow)


def exported(allow: bool) -> None:
    """Train an adapter of every kind of layer, export it, merged and apart, and open both again."""
    from guards.faults import FAULTS
    from training.export import export
    from training.export_config import ExportConfig

    base = ASSETS / "codegen"
    lora = {"r": 4, "targets": ("qkv_proj", "wte"), "dora": True, "bias": "lora_only"}
    train(TUNED | {"": {"base": str(base)}, "lora": lora}, allow)
    allowed = tuple(FAULTS) if allow else ()
    print(export(ExportConfig("adapter", "run", allow=allowed)))
    print(export(ExportConfig("merged", "run", merge=True, allow=allowed)))
    complete(str(base), {}, allow, "adapter")
    complete("merged", {}, allow)


def _base(family: str, **groups: dict[str, Any]) -> Callable[[bool], None]:
    own = TUNED | {"": {"base": str(ASSETS / family)}} | groups
    return lambda allow: train_and_continue(own, allow)


PACKED: Groups = {
    "data": {"order": "easy-first", "drop_comments": True},
    "tokenizer": {"kind": "bpe", "min_count": 10},
    "model": {
        "block_size": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 16,
        "position": "learned",
        "norm": "rms",
        "norm_weight": True,
        "mlp": "swiglu",
        "tie_embeddings": True,
        "sliding_window": 40,
        "window_layers": (1,),
        "init": "normal",
    },
    "optimizer": {
        "name": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 2,
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
    },
    "": {"accumulation": 2, "save_every": 2, "keep": 1, "precision": "bf16"},
}
PROMPTS: Groups = {
    "data": {"source": str(ASSETS / "examples.jsonl")},
    "model": {"block_size": 128, "n_head": 2},
}
# By name what a run does; each takes whether all faults may pass.
RUNS: dict[str, Callable[[bool], None]] = {
    "plain": lambda allow: train_and_report({}, allow),
    "packed": lambda allow: train_and_continue(PACKED, allow),
    "prompts": lambda allow: train_and_report(PROMPTS, allow),
    "lora": _base("gpt_bigcode", lora={"r": 4, "dropout": 0.1, "new_tokens": ("zip_",)}),
    "nf4": _base("llama", lora={"r": 4}, **{"": {"base": str(ASSETS / "llama"), "base_format": "nf4"}}),
    **{family: _base(family) for family in FAMILY_SHAPES},
    "resume": resumed,
    "generate": generated,
    "export": exported,
}

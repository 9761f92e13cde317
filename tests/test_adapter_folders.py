"""Adapters in folders as people have them: of a base that was resized, of another base, damaged, hostile."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lazily import peft
from safetensors.torch import load_file, save_file
from test_adapter import Pair, assert_near, bases, scramble_adapters
from test_pretrained import TOKENS, make_oracle
from torch import Tensor

import lora
from config import LoraConfig
from lora import adapter_layers, adapters_of, add_adapter
from pretrained.load_adapter import adapter_base, load_adapter
from pretrained.save_adapter import save_adapter
from training.run import MOST_NEW_TOKENS, grow_vocabulary, open_adapted

__all__ = ["bases"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RESIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("llama gqa", {}),
    "pairs, tied": ("llama mha tied", {}),
    "both trained whole": ("llama gqa", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "one trained whole": ("llama gqa", {"modules_to_save": ["embed_tokens"]}),
    "one trained whole, tied": ("llama mha tied", {"modules_to_save": ["embed_tokens"]}),
    "rows": ("llama gqa", {"trainable_token_indices": [53, 55]}),
    "rows, tied": ("llama mha tied", {"trainable_token_indices": [53, 55]}),
    "rows of the head": ("llama gqa", {"trainable_token_indices": {"lm_head": [53, 55]}}),
    "both targets": ("llama gqa", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "a tied head that is a target": ("llama mha tied", {"target_modules": ["q_proj", "lm_head"]}),
    "a head with a bias": ("codegen", {"target_modules": ["qkv_proj"]}),
    "all biases": ("codegen", {"target_modules": ["qkv_proj"], "bias": "all"}),
    "a trained head with a bias": (
        "codegen", {"target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", RESIZED)
def test_an_adapter_of_a_base_that_was_resized_opens_on_the_published_one(case: str, tmp_path: Path) -> None:
    """PEFT then writes embedding and head beside the adapter, under a name by what is trained of them."""
    name, settings = RESIZED[case]
    make_oracle(name).save_pretrained(tmp_path / "base")
    longer: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    longer.resize_token_embeddings(57)
    # Trained rows are as far from a mean as these.
    torch.nn.init.normal_(longer.get_input_embeddings().weight.data[53:])
    torch.nn.init.normal_(longer.get_output_embeddings().weight.data[53:])
    config = peft().LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"]} | settings)
    theirs = peft().get_peft_model(longer, config).eval()
    scramble_adapters(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    opened = open_adapted(str(tmp_path / "base"), tmp_path / "adapter")
    tokens = TOKENS.clone()
    tokens[:, 3:7] = torch.arange(53, 57)
    assert_near(opened.model(tokens), theirs(tokens).logits, case)
    kinds = {type(layer).__name__ for layer in adapter_layers(opened.model, "default").values()}
    assert ("TrainableRows" in kinds) == ("trainable_token_indices" in settings)


GROWN: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("bigcode mqa", {"targets": ("c_attn",)}),
    "a tied embedding": ("bigcode mqa", {"targets": ("c_attn", "wte")}),
    "a tied embedding and its head": ("bigcode mqa", {"targets": ("c_attn", "wte", "lm_head")}),
    "a tied head": ("llama mha tied", {"targets": ("q_proj", "lm_head")}),
    "an embedding": ("llama gqa", {"targets": ("q_proj", "embed_tokens")}),
    "a head": ("llama gqa", {"targets": ("q_proj", "lm_head")}),
    "both": ("llama gqa", {"targets": ("q_proj", "lm_head", "embed_tokens"), "dora": True}),
    "a head with a bias": ("codegen", {"targets": ("qkv_proj", "wte")}),
    "a head with a bias that is a target": ("phi", {"targets": ("q_proj", "lm_head"), "bias": "all"}),
    "rows where the head has a bias": ("codegen", {"targets": ("qkv_proj",)}),
}  # fmt: skip


@pytest.mark.parametrize("case", GROWN)
def test_an_adapter_of_a_base_that_was_grown_here_is_the_same_in_peft(
    bases: Callable[[str], Pair], tmp_path: Path, case: str
) -> None:
    """Whatever PEFT's base was resized to: the rows that were added are in the folder."""
    name, settings = GROWN[case]
    pair = bases(name)
    pair.oracle.save_pretrained(tmp_path / "base")
    grow_vocabulary(pair.ours, 57)
    add_adapter(pair.ours, LoraConfig(r=2, **settings), pair.family.key, new_rows=[53, 54, 55, 56])
    scramble_adapters(pair.ours)
    save_adapter(pair.ours, pair.family, tmp_path / "adapter", base=None)
    longer: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    longer.resize_token_embeddings(57)
    theirs = peft().PeftModel.from_pretrained(longer, str(tmp_path / "adapter")).eval()
    tokens = TOKENS.clone()
    tokens[:, 3:7] = torch.arange(53, 57)
    wanted = pair.ours(tokens)
    assert_near(theirs(tokens).logits, wanted, "in PEFT")
    if case != "rows":  # In that case only a tokenizer in the folder could say how many tokens were added.
        assert_near(open_adapted(str(tmp_path / "base"), tmp_path / "adapter").model(tokens), wanted, "here")


def test_a_vocabulary_beyond_reason_is_not_grown(bases: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = bases("llama gqa")
    pair.oracle.save_pretrained(tmp_path / "base")
    add_adapter(pair.ours, LoraConfig(r=2, targets=("q_proj",)), pair.family.key)
    save_adapter(pair.ours, pair.family, tmp_path / "out", base=None)
    sizes = {"model.embed_tokens": (54 + MOST_NEW_TOKENS, 24), "lm_head": (60, 25), "model.norm": ()}
    for key, shape in sizes.items():
        extra = {f"base_model.model.{key}.weight": torch.zeros(shape)}
        tensors_of(tmp_path / "out", lambda tensors, extra=extra: tensors.update(extra))
        with pytest.raises(ValueError, match=r"\[53, 24\] of floats is expected|is left over"):
            open_adapted(str(tmp_path / "base"), tmp_path / "out")


def test_an_adapter_for_a_base_of_another_name_is_mentioned(
    bases: Callable[[str], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = bases("llama gqa")
    for folder in ("Llama-3.2-1B", "other"):
        pair.oracle.save_pretrained(tmp_path / folder)
    add_adapter(pair.ours, LoraConfig(r=2, targets=("q_proj",)), pair.family.key)
    for i, (named, folder, mentioned) in enumerate(
        [
            ("meta-llama/Llama-3.2-1B", "other", True),
            ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B", False),
            ("/home/them/Llama-3.2-1B/", "Llama-3.2-1B", False),
            (str(tmp_path / "other"), "other", False),
            (None, "other", False),
            ("", "other", False),
        ]
    ):
        save_adapter(pair.ours, pair.family, tmp_path / str(i), base=named)
        open_adapted(str(tmp_path / folder), tmp_path / str(i))
        said = capsys.readouterr().err
        expected = f"{tmp_path / str(i)} was written for '{named}', and {tmp_path / folder} is not called so"
        assert (expected in said and said.count("\n") == 1) if mentioned else not said


@pytest.fixture
def written(bases: Callable[[str], Pair], tmp_path: Path) -> tuple[Pair, Path]:
    pair = bases("llama gqa")
    add_adapter(pair.ours, LoraConfig(r=2, targets=("q_proj", "v_proj")), pair.family.key)
    scramble_adapters(pair.ours)
    save_adapter(pair.ours, pair.family, tmp_path / "out", base="meta/llama", revision="abc")
    return bases("llama gqa"), tmp_path / "out"


def values_of(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors_of(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


REMEDY = "open it on that base, or copy both of its files anew"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"r": 0}, "r is 0; a rank is a whole number"),
        ({"r": True}, "r is True"),
        (
            {"r": 4},
            "rank is 4, and the tensors of model.layers.0.self_attn.q_proj have rank 2; the two files",
        ),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]], which is not known"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"lora_bias": True}, "lora_bias is True, and model.layers.0.self_attn.q_proj has no bias"),
        ({"lora_bias": True, "use_dora": True}, "known is lora_bias alone, on linears that have a bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"made_up_in_2030": 1}, "made_up_in_2030 is 1, which is not known"),
        ({"init_lora_weights": "olora"}, "a start that changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "a start that changes the base"),
        ({"target_modules": ["c_attn"]}, "match no module of this model, which has embed_tokens"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.lora_A.weight is missing"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight' is left over"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern has '(a+)+$'"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of 'q_proj' is 0"),
        ({"alpha_pattern": {"q_proj": 2, "0.self_attn.q_proj": 3}}, "both 2 and 3"),
        ({"modules_to_save": ["score"]}, "modules_to_save has 'score', which this model lacks"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing"),
        ({"trainable_token_indices": [999]}, "known are ids below 53"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"bias": "all", "use_rslora": "yes"}, "use_rslora is 'yes'"),
    ],
)
def test_bad_settings_are_one_sentence(
    written: tuple[Pair, Path], changes: dict[str, Any], sentence: str
) -> None:
    pair, folder = written
    values_of(folder, **changes)
    with pytest.raises(ValueError) as error:
        load_adapter(pair.ours, pair.family, folder)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not adapters_of(pair.ours) and not lora.wrappers(pair.ours)  # the model is as it was


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(Q), f"written for 'meta/llama': {Q} is missing; {REMEDY}"),
        (lambda t: t.update(extra=torch.zeros(1)), f"'extra' is left over; {REMEDY}"),
        (lambda t: t[Q].fill_(float("nan")), f"{Q} with values that are not finite"),
        (lambda t: t.update({Q: torch.zeros(2, 30)}), "is F32[2, 30], [2, 24] of floats is expected"),
        (lambda t: t.update({Q: t[Q].to(torch.int32)}), "is I32[2, 24]"),
        (lambda t: t.update({Q.replace("layers.0", "layers.9"): t[Q].clone()}), "is left over"),
    ],
)
def test_bad_tensors_are_one_sentence(written: tuple[Pair, Path], change: Any, sentence: str) -> None:
    pair, folder = written
    tensors_of(folder, change)
    with pytest.raises(ValueError) as error:
        load_adapter(pair.ours, pair.family, folder)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not adapters_of(pair.ours)


def test_another_family_or_base_is_named(written: tuple[Pair, Path], bases: Callable[[str], Pair]) -> None:
    _, folder = written
    for other in ("phi", "qwen2 head_dim", "codegen", "starcoder2 head_dim"):
        pair = bases(other)
        with pytest.raises(ValueError, match=r"meta/llama|match no module"):
            load_adapter(pair.ours, pair.family, folder)
    assert adapter_base(folder) == ("meta/llama", "abc")


def test_an_embedding_of_another_base_is_refused(bases: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = bases("llama gqa")
    add_adapter(pair.ours, LoraConfig(r=2, targets=("embed_tokens",)), pair.family.key)
    save_adapter(pair.ours, pair.family, tmp_path / "out", base="meta/llama")
    other = bases("llama gqa")
    other.ours.embed.weight.data[3] += 1
    with pytest.raises(ValueError, match=r"base_layer.weight differs by 1 from this model's"):
        load_adapter(other.ours, other.family, tmp_path / "out")


def test_a_pickle_is_read_for_its_tensors_alone(written: tuple[Pair, Path]) -> None:
    pair, folder = written
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing"):
        load_adapter(pair.ours, pair.family, folder)
    torch.save({"run": os.system} | tensors, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_adapter(pair.ours, pair.family, folder)
    torch.save(tensors, folder / "adapter_model.bin")
    load_adapter(pair.ours, pair.family, folder)
    assert not any(p.requires_grad for p in pair.ours.parameters())


def test_saving_refuses_what_it_cannot_do(written: tuple[Pair, Path]) -> None:
    pair, folder = written
    with pytest.raises(ValueError, match="there is no adapter 'default' to save; the model has none"):
        save_adapter(pair.ours, pair.family, folder, base=None)
    load_adapter(pair.ours, pair.family, folder)
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        save_adapter(pair.ours, pair.family, folder, base=None)


def test_an_adapters_files_are_readable_by_whom_the_umask_lets(written: tuple[Pair, Path]) -> None:
    _, folder = written
    path = folder.parent / "any"
    path.touch()
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {
        stat.S_IMODE(path.stat().st_mode)
    }

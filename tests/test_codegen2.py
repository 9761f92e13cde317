"""CodeGen2, which has no class in transformers: against its CodeGen, with `qkv_proj` in eight shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lazily import peft
from pretrained_folders import change_json, change_tensors, tensors_of
from test_adapter import assert_near, scramble_adapters
from test_pretrained import CODEGEN, TOKENS, Pair, gap, layers_of, parity, same_bytes, scramble
from torch import Tensor

from generation.engine import generate_ids
from generation.kvcache import KVCache
from generation.reading import pad_left
from generation.settings import GenerationConfig
from pretrained import load_pretrained, save_pretrained
from pretrained.codegen2 import CODE, SHAPES_OF_1
from pretrained.load_adapter import load_adapter
from pretrained.save_adapter import save_adapter
from reference.forward import Rows, logits_of
from reference.published import PublishedWeights
from reference.published_settings import settings_of

SIZES = CODEGEN | {"n_embd": 32, "n_head": 8, "bos_token_id": None, "eos_token_id": None}
OTHERS = ({"n_inner": 17, "layer_norm_epsilon": 1e-3}, {"tie_word_embeddings": True}, {"rotary_dim": 2})


def regrouped(rows: Tensor) -> Tensor:
    """Put the rows of four shards, each query, value and key of its heads, into eight such shards."""
    parts = rows.unflatten(0, (4, 3, 2, -1))  # Of each shard two heads.
    return parts.permute(0, 2, 1, *range(3, parts.dim())).flatten(0, 3)


def make_pair(folder: Path, **settings: Any) -> Pair:
    sizes: dict[str, Any] = SIZES | settings
    config: Any = transformers.CONFIG_MAPPING["codegen"](**sizes)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    oracle: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    scramble(oracle)
    oracle.eval().save_pretrained(folder)
    change_tensors(
        folder, lambda t: t.update({key: regrouped(t[key]).contiguous() for key in t if "qkv_proj" in key})
    )
    change_json(folder / "config.json", auto_map=CODE)
    found = load_pretrained(folder)
    return Pair(oracle, found.model, found, folder)


def parity_of(pair: Pair) -> dict[str, float]:
    """The gaps of `parity`, with the oracle's gradients of fused projections in our order."""
    real = pair.oracle.named_parameters

    class Regrouped:
        def __call__(self, *args: Any, **named: Any) -> Any:
            return pair.oracle(*args, **named)

        def zero_grad(self) -> None:
            pair.oracle.zero_grad()

        def named_parameters(self) -> Any:
            for name, p in real():
                if "qkv_proj" in name:
                    p.grad = regrouped(p.grad)
                yield name, p

    return parity(pair._replace(oracle=Regrouped()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("codegen2") / "base")


def test_regrouping_moves_rows_and_loses_none() -> None:
    rows = torch.arange(3 * 8 * 2)
    assert regrouped(rows).sort().values.equal(rows) and not regrouped(rows).equal(rows)


@pytest.mark.parametrize("settings", [{}, *OTHERS], ids=str)
def test_logits_layers_and_gradients_are_those_of_codegen(settings: dict[str, Any], tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "base", **settings)
    assert pair.found.family.model_type == "codegen2" and pair.ours.config.qkv_layout == "shards8"
    gaps = parity_of(pair)
    assert max(gaps.values()) < 1e-5, gaps


def test_four_shards_would_be_seen(pair: Pair, tmp_path: Path) -> None:
    values = json.loads((pair.folder / "config.json").read_text("utf-8"))
    save_pretrained(pair.ours, None, tmp_path / "out")
    change_json(tmp_path / "out" / "config.json", model_type="codegen")
    wrong = load_pretrained(tmp_path / "out").model
    assert wrong.config.qkv_layout == "shards" and values["auto_map"] == CODE
    assert gap(wrong(TOKENS), pair.oracle(TOKENS).logits) > 1e-2


def test_padding_cache_and_generated_tokens_are_those_of_codegen(pair: Pair) -> None:
    rows = [TOKENS[0].tolist(), TOKENS[1, :13].tolist(), TOKENS[2, :7].tolist()]
    padded, positions, documents = pad_left(rows)
    ours, mask = pair.ours(padded, positions, documents), (documents >= 0).long()
    expected = pair.oracle(padded, attention_mask=mask, position_ids=positions).logits
    assert gap(ours[documents >= 0], expected[documents >= 0]) < 1e-5
    cache = KVCache(pair.ours.config.n_layer, 20)
    with torch.inference_mode():
        pieces = [pair.ours(TOKENS[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 20))]
        assert gap(torch.cat(pieces, dim=1), pair.oracle(TOKENS).logits) < 1e-5
    for width in (1, 3):
        settings = GenerationConfig(max_new_tokens=8, num_beams=width)
        (found,) = generate_ids(pair.ours, [rows[1]], settings)
        theirs = pair.oracle.generate(
            torch.tensor([rows[1]]), max_new_tokens=8, num_beams=width, do_sample=False, pad_token_id=0
        )
        assert found.ids == theirs[0, 13:].tolist()


def test_the_reference_agrees_in_fp64(pair: Pair) -> None:
    stored, config = PublishedWeights(pair.folder), settings_of(pair.folder)
    names = [name for name, _ in pair.ours.named_parameters()]
    weights = {name: stored.rows(name, 0, stored.shape(name)[0]).double() for name in names}
    positions = torch.arange(TOKENS.size(1)).expand_as(TOKENS)
    found = logits_of(config, weights, Rows(TOKENS, positions, torch.zeros_like(TOKENS)))
    with torch.inference_mode():
        exact = pair.ours.double()(TOKENS)
    pair.ours.float()
    assert (found - exact).abs().max() < 1e-9 * exact.abs().max()


def test_what_is_saved_is_every_byte_and_says_its_name(pair: Pair, tmp_path: Path) -> None:
    assert save_pretrained(pair.ours, None, tmp_path / "out").model_type == "codegen2"
    same_bytes(pair.folder, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.model.config == pair.ours.config and again.fingerprint == pair.found.fingerprint
    with pytest.raises(ValueError, match="codegen2"):  # Not opened as CodeGen 1, which would be silent.
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_adapter_means_the_same_both_ways(tmp_path: Path) -> None:
    """PEFT's of CodeGen 1 has the rows of B in four shards."""
    pair = make_pair(tmp_path / "base")
    targets = ["qkv_proj", "out_proj", "fc_in", "fc_out", "lm_head"]
    config = peft().LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=targets)
    theirs = peft().get_peft_model(pair.oracle, config).eval()
    scramble_adapters(theirs)
    theirs.save_pretrained(str(tmp_path / "four"))
    tensors = regrouped_adapter(tmp_path / "four", tmp_path / "eight", lambda rows: regrouped(rows))
    load_adapter(pair.ours, pair.found.family, tmp_path / "eight")
    assert_near(pair.ours(TOKENS), theirs(TOKENS).logits, "logits")
    save_adapter(pair.ours, pair.found.family, tmp_path / "ours", base=None)
    written = tensors_of(tmp_path / "ours")
    assert all(
        torch.equal(written[key], tensor) for key, tensor in tensors.items() if "base_layer" not in key
    )


def regrouped_adapter(source: Path, out: Path, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    from safetensors.torch import save_file

    tensors = tensors_of(source)
    for key in tensors:
        if "qkv_proj.lora_B" in key:
            tensors[key] = change(tensors[key]).contiguous()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return tensors


def test_it_loads_in_four_bits(pair: Pair) -> None:
    model = load_pretrained(pair.folder, weight_format="nf4").model
    assert torch.isfinite(model(TOKENS)).all()


@pytest.mark.parametrize("shape", SHAPES_OF_1)
def test_a_shape_of_codegen_1_is_not_certain(shape: tuple[int, int, int], pair: Pair, tmp_path: Path) -> None:
    save_pretrained(pair.ours, None, tmp_path / "out")
    of_first = dict(zip(("n_layer", "n_embd", "n_head"), shape, strict=True))
    change_json(tmp_path / "out" / "config.json", model_type="codegen", auto_map=CODE, **of_first)
    with pytest.raises(ValueError, match=r"auto_map names code of its own.*of CodeGen2, set model_type to"):
        load_pretrained(tmp_path / "out")


def test_other_code_and_heads_that_eight_does_not_divide_are_refused(pair: Pair, tmp_path: Path) -> None:
    save_pretrained(pair.ours, None, tmp_path / "out")
    evil = CODE | {"AutoModelForCausalLM": "modeling_evil.CodeGenForCausalLM"}
    change_json(tmp_path / "out" / "config.json", model_type="codegen", auto_map=evil)
    with pytest.raises(ValueError, match="auto_map names code of its own"):
        load_pretrained(tmp_path / "out")
    hub = {key: f"Salesforce/codegen2-1B--{name}" for key, name in CODE.items()}
    change_json(tmp_path / "out" / "config.json", auto_map=hub)
    _, states = layers_of(load_pretrained(tmp_path / "out").model, TOKENS)
    assert len(states) == 2
    change_json(tmp_path / "out" / "config.json", n_head=4)
    with pytest.raises(ValueError, match=r"qkv_layout shards8 needs a model\.n_head that 8 divides, not 4"):
        load_pretrained(tmp_path / "out")

"""Published families beside their forward pass: tokens generated as by transformers, and bases in 4 bits."""

import pytest
import torch
from test_pretrained import CONFIGS, gap, pairs, tokens_of, two_of_each_family

from config import LoraConfig
from generation.engine import generate_ids
from generation.settings import GenerationConfig
from guards.reference.observed import decoded
from lora import add_adapter
from modules.quantized_linear import Linear4bit
from pretrained import FAMILIES, load_pretrained
from pretrained.family import Values, to_model

__all__ = ["pairs"]  # A fixture.


@pytest.mark.parametrize("name", two_of_each_family())
def test_greedy_and_beam_tokens_are_those_of_transformers(name, pairs):
    pair = pairs(name)
    prompt = tokens_of(pair.ours)[0, :9]
    n = 3 if pair.ours.config.rotates_by_length else 8
    for width in (1, 3):
        theirs = pair.oracle.generate(
            prompt[None],
            # Beams are others with its cache of a window of one token than without a cache.
            use_cache=pair.ours.config.sliding_window != 1,
            max_new_tokens=n,
            num_beams=width,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        settings = GenerationConfig(max_new_tokens=n, num_beams=width)
        (ours,) = generate_ids(pair.ours, [prompt.tolist()], settings)
        assert ours.ids == theirs[0, len(prompt) :].tolist()


FIRST = {family: name for name, (family, _) in reversed(CONFIGS.items())}


@pytest.mark.parametrize("name", FIRST.values())
def test_a_base_in_four_bits_is_its_decoded_matrices_and_trains_an_adapter(name, pairs):
    pair = pairs(name)
    stored, plain = load_pretrained(pair.folder, weight_format="nf4"), load_pretrained(pair.folder).model
    n_decoded = 0
    with torch.no_grad():
        for path, module in stored.model.named_modules():
            if isinstance(module, Linear4bit):
                plain.get_submodule(path).get_parameter("weight").copy_(decoded(module))
                n_decoded += 1
    linears = [path for path, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    assert n_decoded == sum("blocks." in path for path in linears) > 0
    tokens = tokens_of(pair.ours)
    assert gap(stored.model(tokens), plain(tokens)) < 1e-5
    add_adapter(stored.model, LoraConfig(r=2), stored.family.key)
    stored.model(tokens).square().mean().backward()
    trained = [p for p in stored.model.parameters() if p.requires_grad]
    able = [path for path in linears if "blocks." in path and ".experts." not in path]
    assert len(trained) == 2 * len(able) and all(p.grad is not None for p in trained)


REFUSED: dict[str, tuple[str, Values, str]] = {
    "a norm of each head": ("stablelm", {"qk_layernorm": True}, "qk_layernorm is true"),
    "dropout of the MLP alone": ("stablelm", {"hidden_dropout": 0.1}, "hidden_dropout is 0.1"),
    "attention to later tokens": (
        "gemma",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    "another gate": ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    "too few layers": (
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0]},
        "no_rope_layers must say",
    ),
    "a layer half rotated": (
        "smollm3",
        {"num_hidden_layers": 1, "no_rope_layers": [2]},
        "no_rope_layers must say",
    ),
    "a scaling that it lacks": (
        "phi3",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type is 'linear'",
    ),
    "windows by layer": (
        "mistral",
        {"layer_types": ["sliding_attention"]},
        "layer_types is .*mistral model has no",
    ),
    "a divisor of 0": ("granite", {"logits_scaling": 0.0}, "model.logit_divisor is 0.0; it must be above 0"),
    "code of its own": (
        "phi3",
        {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Other"}},
        "auto_map names",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_lacks_is_refused_by_name(name: str) -> None:
    family, values, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        to_model(FAMILIES[family], values)


def test_the_code_of_phi3_is_passed_over_and_its_old_name_of_longrope_known() -> None:
    code = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    plain = to_model(FAMILIES["phi3"], {})
    assert to_model(FAMILIES["phi3"], {"auto_map": code}) == plain
    lists = {"short_factor": [1.0] * 48, "long_factor": [2] * 48}
    old = to_model(FAMILIES["phi3"], {"rope_scaling": {"type": "su"} | lists})
    assert old == to_model(FAMILIES["phi3"], {"rope_scaling": {"rope_type": "longrope"} | lists})
    assert old.rope_scaling == "longrope" and old.rope_long == (2.0,) * 48

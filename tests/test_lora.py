"""Adapters without PEFT: what is held, kept and trained; dropout, several at once, merging, the loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazily import bitsandbytes, peft
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from adapters import layers, products
from adapters.layers import LowRank, largest_parts
from adapters.products import DropMask, add_term, dropped, linear_with_term
from adapters.targets import matches, select_targets
from architecture import Decoder
from config import LoraConfig, ModelConfig
from dataset import IGNORE_INDEX, Batch
from lora import (
    LoraLinear,
    adapters_disabled,
    add_adapter,
    held_modules,
    trainable_table,
    use_adapters,
    wrappers,
)
from modules.quantized_linear import Linear4bit
from pretrained import FAMILIES
from pretrained.merging import merge, merge_checked, merge_report, unmerge
from training.loss import token_loss

TOKENS = torch.randint(53, (3, 16), generator=torch.Generator().manual_seed(1))
PROMPTS = [row.tolist() for row in TOKENS]


def scrambled(**settings: Any) -> Decoder:
    base: dict[str, Any] = {"vocab_size": 53, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    base |= {"fused_qkv": True, "norm_weight": True}
    model = Decoder(ModelConfig(**(base | settings)))
    scramble(model, 0)
    return model.eval()


def scramble(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)


def fused(model: Decoder) -> Any:
    """The wrapper of the first block's projection, (..., 16) -> (..., 48)."""
    return model.get_submodule("blocks.0.attention.qkv")


def adapted(config: dict[str, Any] | None = None, rows: tuple[int, ...] = (), **settings: Any) -> Decoder:
    model = scrambled(**settings)
    values: dict[str, Any] = {"r": 4} | (config or {})
    add_adapter(model, LoraConfig(**values), new_rows=rows)
    scramble(model)
    return model


class Rounded(nn.Module):
    """A linear stored as small integers: no nn.Linear, and its weight is made when it is asked for."""

    scale: Tensor
    stored: Tensor

    def __init__(self, linear: nn.Linear, levels: int = 7):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / levels
        self.register_buffer("scale", scale)
        self.register_buffer("stored", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        return self.stored.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def rounded(model: Decoder) -> Decoder:
    for name, module in held_modules(model).items():
        if isinstance(module, nn.Linear) and name != "head":
            model.set_submodule(name, Rounded(module))
    return model


# --- targets -------------------------------------------------------------------------------------------


def published(model_type: str, layers: int = 2) -> dict[str, str]:
    family = FAMILIES[model_type]
    linears = [our for our in family.modules if our.rsplit(".", 1)[-1] in
               ("embed", "head", "qkv", "q", "k", "v", "out", "up", "gate", "down")]  # fmt: skip
    names = [our.format(layer) for our in linears for layer in range(layers)]
    return {our: family.key(our) for our in dict.fromkeys(names)}


def test_wrong_names_are_answered_with_the_right_ones() -> None:
    with pytest.raises(ValueError) as error:
        select_targets(published("codegen"), ["c_attn", "c_proj", "c_fc"])
    assert str(error.value) == (
        "lora.targets: the model has no c_attn, no c_proj, no c_fc; it has wte, qkv_proj, out_proj, fc_in, "
        "fc_out, lm_head; probably meant: qkv_proj, out_proj, fc_in, fc_out"
    )
    for model_type, wanted, meant in (
        ("phi", ["o_proj"], "dense"),
        ("llama", ["fc1", "fc2"], "gate_proj, up_proj, down_proj"),
        ("gpt_bigcode", ["q_proj"], "c_attn"),
        ("llama", ["q_porj"], "q_proj"),
    ):
        with pytest.raises(ValueError) as error:
            select_targets(published(model_type), wanted)
        assert str(error.value).split("probably meant: ")[1].startswith(meant)


def test_roles_suffixes_and_patterns() -> None:
    names = published("gpt_bigcode")
    blocks = [our for our in names if our.startswith("blocks.")]
    assert select_targets(names, ["all-linear"]) == blocks
    assert select_targets(names, ["attention"]) == [our for our in blocks if ".attention." in our]
    assert select_targets(names, ["mlp.c_proj"]) == ["blocks.0.mlp.down", "blocks.1.mlp.down"]
    assert len(select_targets(names, ["c_proj"])) == 4
    assert select_targets(names, ["embedding", "lm_head"]) == ["embed", "head"]
    assert select_targets(names, ["transformer.h.1.*"]) == [our for our in blocks if ".1." in our]
    assert not matches("transformer.h.0.attn.c_attn", "attn.*") and not matches("a.xc_proj", "c_proj")
    with pytest.raises(ValueError, match=r"has no \*\.h\.7\.\*; it has wte"):
        select_targets(names, ["c_attn", "*.h.7.*"])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"alpha": 0.0}, "lora.alpha is 0.0; it must be above 0"),
        ({"r": 0}, "lora.r is 0; a rank"),
        ({"rank_pattern": {"up": 0}}, "lora.rank_pattern.up is 0"),
        (
            {"rank_pattern": {"c_fc": 2}},
            r"lora.rank_pattern has c_fc, which matches none of the targets; they are ",
        ),
        (
            {"alpha_pattern": {"attention": 2.0}},
            "lora.alpha_pattern has attention, which matches none of the targets",
        ),
        (
            {"targets": ("qkv",), "alpha_pattern": {"up": 2.0}},
            "which matches none of the targets; they are qkv; name",
        ),
        ({"train_modules": ("lm_head",)}, "lora.train_modules: the model has no lm_head"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"r": 17, "init": "pissa"}, "has rank 16 at most; lower r"),
        ({"r": 200}, "blocks.0.attention.qkv: a rank of 200 was asked for, and the weight is 48 x 16; lower"),
    ],
)
def test_a_bad_setting_is_one_sentence_and_changes_nothing(config: dict[str, Any], sentence: str) -> None:
    model = scrambled()
    values: dict[str, Any] = {"r": 4} | config
    with pytest.raises(ValueError) as error:
        add_adapter(model, LoraConfig(**values))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not wrappers(model) and all(p.requires_grad for p in model.parameters())


def test_names_and_rows_are_checked() -> None:
    model = adapted()
    for name, sentence in (("default", "already"), ("a.b", "cannot be called"), ("keys", "cannot be called")):
        with pytest.raises(ValueError, match=sentence):
            add_adapter(model, LoraConfig(r=2), name=name)
    for rows in ([53], [-1], [4, 4]):
        with pytest.raises(ValueError, match="must differ and be below 53"):
            add_adapter(model, LoraConfig(r=2), name="rows", new_rows=rows)
    with pytest.raises(ValueError, match="embed trains already, whole"):
        add_adapter(model, LoraConfig(r=2, train_modules=("embed",)), name="rows", new_rows=[5])
    with pytest.raises(ValueError, match="there is no adapter 'b'; the model has default"):
        use_adapters(model, {"b": 1.0})


def test_the_table_counts_what_trains() -> None:
    model = adapted(
        {"r": 4, "targets": ("qkv", "up"), "train_modules": ("norm",), "dora": True}, rows=(50, 51)
    )
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    table = trainable_table(model)
    assert (
        f"{trains:,} parameters train beside {frozen:,} frozen ones: {100 * trains / (trains + frozen):.2f}%"
        in table
    )
    lines = {tuple(line.split()[:2]): line.split() for line in table.splitlines()}
    assert lines["DoRA", "blocks.*.attention.qkv"] == [
        "DoRA", "blocks.*.attention.qkv", "2", "4", "32", f"{2 * (4 * 16 + 48 * 4 + 48)}"]  # fmt: skip
    assert ("rows", "embed") in lines and ("low rank", "head") not in lines


# --- forward and backward ------------------------------------------------------------------------------


def test_the_input_is_kept_once() -> None:
    """Kept for backward: the frozen weight, a, b, x a^T and the input, which is no copy of the one given."""
    for dropout in (0.0, 0.5):
        layer = fused(adapted({"dropout": dropout})).train()
        x = torch.randn(2, 5, 16, requires_grad=True)
        kept: list[Tensor] = []

        def note(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(x)
        fresh = [t for t in kept if not any(t.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
                                            for p in [*layer.parameters(), x])]  # fmt: skip
        inputs = [t for t in kept if t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()]
        assert [tuple(t.shape) for t in fresh] == [(10, 4)] and len(inputs) == 1


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_that_of_its_mask_on_the_input(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fused(adapted({"dropout": 0.4, "dora": dora}))
    change: Any = layer.adapters["default"]
    x = torch.randn(7, 16, requires_grad=True)
    # In evaluation there is no dropout.
    torch.testing.assert_close(layer(x), plain_form(layer, x, None), rtol=1e-5, atol=1e-5)
    layer.train()

    def compare() -> None:
        torch.manual_seed(5)
        ours = layer(x)
        torch.manual_seed(5)
        drop = DropMask.sample(0.4)
        assert drop is not None
        mask = whole_mask(drop, x.detach()) * drop.factor
        assert 0 < (mask == 0).float().mean() < 1 and math.isclose(drop.factor, 1 / 0.6, rel_tol=1e-4)
        other = plain_form(layer, x, mask)
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
        weights = torch.randn_like(ours)
        inputs = [*change.parameters(), x]
        got = torch.autograd.grad((ours * weights).sum(), inputs)
        for mine, wanted in zip(got, torch.autograd.grad((other * weights).sum(), inputs), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)

    compare()
    if dora:
        return

    def on_output(x: Tensor, w: Tensor, bias: Any, a: Tensor, b: Tensor, scale: float, drop: Any) -> Tensor:
        return F.linear(x, w, bias) + dropped(scale * x @ a.t() @ b.t(), drop)

    monkeypatch.setattr(lora, "linear_with_term", on_output)
    with pytest.raises(AssertionError):
        compare()


def plain_form(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """PEFT's formula by autograd."""
    change: LowRank = layer.adapters["default"]
    given = x if mask is None else x * mask
    term = change.scale * given @ change.a.t() @ change.b.t()
    if change.magnitude is None:
        return layer.base(x) + term
    weight = layer.base.weight
    length = (weight + change.scale * change.b @ change.a).norm(dim=1).detach()
    gain = change.magnitude / length
    return layer.base(x) + (gain - 1) * F.linear(given, weight) + gain * term


def test_a_share_of_the_elements_is_dropped() -> None:
    drop = DropMask(0.1, 7)
    x = torch.ones(1000, 700)  # several parts
    mask = whole_mask(drop, x)
    assert abs(mask.mean().item() - 0.9) < 0.002 and torch.equal(mask, whole_mask(drop, x))
    assert not torch.equal(mask, whole_mask(DropMask(0.1, 8), x)) and not torch.equal(
        mask[:374], mask[374:748]
    )
    assert abs(dropped(x, drop).mean().item() - 1) < 0.002


def whole_mask(drop: DropMask, x: Tensor) -> Tensor:
    return torch.cat([mask for _, mask in drop.masks(x)])


def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fused(adapted({"dropout": 0.3})).double().train()
    drop = DropMask(0.3, 11)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    change = layer.adapters["default"]
    a, b = (p.detach().double().requires_grad_() for p in (change.a, change.b))

    def added(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return add_term(layer.base(x), x, a, b, 1.7, drop)

    def fused_form(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_with_term(x, layer.base.weight, layer.base.bias, a, b, 1.7, drop)

    monkeypatch.setattr(products, "MASK_ELEMENTS", 16)  # a row at a time
    assert torch.equal(added(x, a, b), fused_form(x, a, b))
    for f in (added, fused_form):
        assert torch.autograd.gradcheck(f, (x, a, b))


def test_autocast_computes_in_its_dtype_and_keeps_fp32_adapters() -> None:
    model = adapted({"targets": ("all-linear", "embedding", "head")})
    exact = model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        layer = fused(model)
        assert layer(torch.randn(2, 3, 16)).dtype == torch.bfloat16
        logits = model(TOKENS)
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    logits.float().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters() if p.requires_grad)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_weights_get_no_gradient_and_do_not_move() -> None:
    model = adapted({"bias": "all"}, rows=(50,))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained(model)) and all(".base." not in name for name in moved)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_recomputed_activations_draw_the_same_masks() -> None:
    model = adapted({"dropout": 0.3, "targets": ("all-linear",)}).train()
    found = []
    for what in ("nothing", "blocks"):
        model.recompute_in_backward(what)
        model.zero_grad()
        torch.manual_seed(4)
        model(TOKENS).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == trained(model)
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_new_rows_train(tied: bool) -> None:
    model = scrambled(tie_embeddings=tied)
    plain = copy.deepcopy(model)
    add_adapter(model, LoraConfig(r=2, targets=("qkv",)), new_rows=[50, 7])
    rows = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("rows")]
    assert len(rows) == (1 if tied else 2) and all(p.shape == (2, 16) for p in rows)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-6, atol=1e-6)
    model(TOKENS).square().mean().backward()
    plain(TOKENS).square().mean().backward()
    wanted = [plain.embed.weight.grad, plain.head.weight.grad]
    for p, grad in zip(rows, wanted[:1] if tied else wanted, strict=True):
        assert p.grad is not None and grad is not None
        torch.testing.assert_close(p.grad, grad[[50, 7]], rtol=1e-4, atol=1e-6)


def test_new_rows_of_an_embedding_that_is_a_target_train_by_its_low_rank_term() -> None:
    model = scrambled()
    add_adapter(model, LoraConfig(r=2, targets=("qkv", "embedding")), new_rows=[50, 7])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith(("embed", "head"))} == {
        "embed.adapters.default.a",
        "embed.adapters.default.b",
        "head.adapters.default.rows",
    }
    model(torch.tensor([[50, 7, 50, 7]])).square().mean().backward()
    (gradient,) = [p.grad for name, p in model.named_parameters() if name == "embed.adapters.default.a"]
    assert gradient is not None
    rows = gradient if gradient.size(0) > gradient.size(1) else gradient.t()  # (vocabulary, r)
    assert set(rows.abs().sum(1).nonzero().flatten().tolist()) == {50, 7}


# --- several adapters ----------------------------------------------------------------------------------


def test_several_adapters_share_one_base() -> None:
    model = scrambled()
    held = {name: p.data_ptr() for name, p in model.named_parameters()}
    base = model(TOKENS)
    for name, targets in (("first", ("all-linear",)), ("second", ("qkv", "embedding")), ("third", ("head",))):
        add_adapter(model, LoraConfig(r=2, targets=targets, dora=name == "third"), name=name)
        scramble(model, len(name))
    after = {
        name.replace(".base.", "."): p.data_ptr()
        for name, p in model.named_parameters()
        if ".adapters." not in name
    }
    assert after == held
    alone = {}
    for name in ("first", "second", "third"):
        use_adapters(model, {name: 1.0})
        alone[name] = model(TOKENS)
        assert (alone[name] - base).abs().max() > 0.01
        with adapters_disabled(model):
            assert torch.equal(model(TOKENS), base)
            with adapters_disabled(model):
                pass
            assert torch.equal(model(TOKENS), base)
        assert torch.equal(model(TOKENS), alone[name])
    use_adapters(model, {})
    assert torch.equal(model(TOKENS), base)
    use_adapters(model, {"first": 0.5, "second": -2.0, "third": 1.0})
    mixed = model(TOKENS)
    merge(model)
    torch.testing.assert_close(model(TOKENS), mixed, rtol=1e-4, atol=1e-4)


def test_whole_copies_and_biases_are_not_mixed() -> None:
    model = scrambled(mlp_bias=True)
    for name in ("first", "second"):
        add_adapter(model, LoraConfig(r=2, bias="all", train_modules=("head",)), name=name)
        scramble(model)
    with pytest.raises(ValueError, match="cannot be active together"):
        use_adapters(model, {"first": 1.0, "second": 1.0})
    with pytest.raises(ValueError, match=r"has no weight of 0.5; use 1"):
        use_adapters(model, {"first": 0.5})
    with adapters_disabled(model):
        assert torch.equal(model.head.weight, model.get_parameter("head.base.weight"))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is made inside the block."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("base", [nn.Linear(24, 50), nn.Embedding(50, 24)])
def test_the_lengths_of_dora_are_taken_of_some_outputs_at_a_time(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ModuleDict({"it": base})
    add_adapter(model, LoraConfig(r=3, dora=True, targets=("it",)))
    change: Any = wrappers(model)["it"].adapters["default"]
    scramble(change)
    weight: Any = base.weight
    whole = weight.detach().double() + change.delta().detach().double()
    expected = change.magnitude / whole.norm(dim=0 if change.of_embedding else 1)
    monkeypatch.setattr(layers, "LENGTH_ELEMENTS", 170)
    with Largest() as largest, torch.no_grad():
        gain = change.gain(base)
    torch.testing.assert_close(gain, expected.float(), rtol=1e-6, atol=0)
    assert 50 <= largest.elements <= 170


@pytest.mark.parametrize(("power", "tolerance"), [(0.5, 1e-3), (0.0, 1.0)])
def test_the_largest_parts_leave_as_little_as_all_parts(power: float, tolerance: float) -> None:
    """Where the spectrum falls they are those of the full decomposition; where it is flat, none stand out."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 288)).Q for n in (288, 400))
    weight = left * torch.arange(1, 289) ** -power @ right.t() + 0.01 * torch.randn(288, 400)
    u, s, vh = torch.linalg.svd(weight)
    best = u[:, :8] * s[:8] @ vh[:8]
    for given, wanted in ((weight, best), (weight.t(), best.t())):
        left, values, right = largest_parts(given, 8)
        found = left * values @ right.t()
        assert (found - wanted).norm() < tolerance * wanted.norm()
        assert 0.99999 < (found - given).norm() / (wanted - given).norm() < 1.001


# --- merging -------------------------------------------------------------------------------------------

MERGED: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "plain": ({}, (), {}),
    "embedding and head": ({"targets": ("all-linear", "embedding", "head")}, (), {}),
    "embedding, tied": ({"targets": ("embedding",)}, (), {"tie_embeddings": True}),
    "dora and biases": (
        {"dora": True, "bias": "all", "targets": ("*",)},
        (),
        {"mlp_bias": True, "head_bias": True},
    ),
    "pissa": ({"init": "pissa", "rslora": True}, (), {}),
    "whole": ({"train_modules": ("head", "norm")}, (), {"norm_weight": True}),
    "rows": ({}, (3, 52), {}),
    "rows, tied": ({}, (3, 52), {"tie_embeddings": True}),
}


@pytest.mark.parametrize("case", MERGED)
@pytest.mark.parametrize("quantised", [False, True])
def test_merged_is_adapted_and_unmerged_is_bit_equal(case: str, quantised: bool) -> None:
    config, rows, settings = MERGED[case]
    model = scrambled(**settings)
    model = rounded(model) if quantised else model
    values: dict[str, Any] = {"r": 4} | config
    add_adapter(model, LoraConfig(**values), new_rows=rows)
    scramble(model)
    before, held = model(TOKENS), {name: p.clone() for name, p in model.named_parameters()}
    was = model.config
    merge(model)
    assert not wrappers(model)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-4)
    assert model.config.tie_embeddings == (model.head.weight is model.embed.weight)
    with pytest.raises(ValueError, match="call unmerge first"):
        merge(model)
    unmerge(model)
    assert model.config is was and torch.equal(model(TOKENS), before)
    after = dict(model.named_parameters())
    assert after.keys() == held.keys() and all(torch.equal(after[name], p) for name, p in held.items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_share_of_an_adapter_is_merged_as_it_is_applied(tied: bool) -> None:
    model = adapted({"dora": tied}, (3, 52), tie_embeddings=tied)
    whole = model.eval()(TOKENS)
    use_adapters(model, {"default": 0.4})
    expected = model(TOKENS)
    assert (expected - whole).abs().max() > 0.1
    merge(model)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_a_merge_can_let_go_of_the_old_weights() -> None:
    model = adapted()
    before = model(TOKENS)
    report = merge_checked(model, PROMPTS, keep=False)
    assert report.gap < 1e-4 and report.agreement == 1 and report.tokens == TOKENS.numel()
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="nothing to undo"):
        unmerge(model)
    add_adapter(model, LoraConfig(r=2))  # it is a plain model again


def test_a_requantised_merge_is_that_of_peft() -> None:
    """PEFT adds the change to the dequantised weight and quantises the sum."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 192)
    bnb = bitsandbytes()
    theirs: Any = nn.Sequential(bnb.nn.Linear4bit(128, 192, quant_type="nf4", compress_statistics=True))
    theirs[0].weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    theirs[0].bias = linear.bias
    theirs.is_loaded_in_4bit = True
    theirs = peft().get_peft_model(
        theirs.to("cpu"), peft().LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    )
    pair: Any = theirs.base_model.model[0]
    ours: Any = nn.Sequential(Linear4bit.from_linear(linear))
    add_adapter(ours, LoraConfig(r=4, alpha=8, targets=("0",)), lambda name: name)
    change = ours[0].adapters["default"]
    with torch.no_grad():
        for theirs_part, part in ((pair.lora_A, "a"), (pair.lora_B, "b")):
            change.get_parameter(part).copy_(theirs_part["default"].weight.normal_(std=0.1))
    before = ours[0].base.weight
    merge(ours, keep=False, requantise=True)
    with pytest.warns(UserWarning, match="rounding errors"):
        pair.merge()
    weight = pair.get_base_layer().weight
    merged = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert isinstance(ours[0], Linear4bit) and not torch.equal(ours[0].weight, before)
    assert float((ours[0].weight != merged).float().mean()) < 1e-3


def test_an_adapter_of_rounded_weights_is_not_merged_into_full_ones() -> None:
    """Fault M14: it was trained beside what rounding made of the base."""
    rough, full = rounded(scrambled()), scrambled()
    for model in (rough, full):
        add_adapter(model, LoraConfig(r=4))
        scramble(model)
    right = copy.deepcopy(rough)
    merge(right)
    assert merge_report(rough, right, PROMPTS).gap < 1e-4
    merge(full)
    with pytest.raises(ValueError, match="merged-differs: the largest logit gap is") as error:
        merge_report(rough, full, PROMPTS)
    assert "greedy choice agrees after" in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_merge_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before = model(TOKENS)
    monkeypatch.setattr(
        LowRank,
        "merge_into",
        lambda self, merged, base, adapter_weight: merged.add_(self.change(base), alpha=2),
    )
    with pytest.raises(ValueError, match="merged-differs"):
        merge_checked(model, PROMPTS)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("first", ["rows", "low rank"])
def test_rows_are_merged_beside_what_other_adapters_do_to_them(order: tuple[str, str], first: str) -> None:
    model = scrambled()
    targets, rows = (("qkv",), (50, 7)) if first == "rows" else (("embed",), ())
    add_adapter(model, LoraConfig(r=2, targets=targets), name="a", new_rows=rows)
    scramble(model, 1)
    add_adapter(model, LoraConfig(r=2, targets=("up",)), name="b", new_rows=(50,))
    scramble(model, 2)
    use_adapters(model, dict.fromkeys(order, 1.0))
    ids = torch.tensor([[50, 7, 3, 50]])
    before = model(ids)
    merge(model)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)


def test_a_merged_model_has_no_base_to_show_and_nothing_that_trains() -> None:
    model = adapted()
    merge(model)
    with pytest.raises(ValueError, match="are merged into its weights; call unmerge first"):
        adapters_disabled(model).__enter__()
    with pytest.raises(ValueError, match="are merged into its weights; call unmerge first"):
        trainable_table(model)


def test_a_merge_that_ends_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before, right, calls = model(TOKENS), LowRank.merge_into, []

    def fails(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        right(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(LowRank, "merge_into", fails)
        merge(model)
    assert torch.equal(model(TOKENS), before)
    merge(model)
    unmerge(model)
    assert torch.equal(model(TOKENS), before)


def test_what_was_cast_since_is_not_unmerged() -> None:
    model = adapted()
    before = model(TOKENS)
    merge(model)
    model.double()
    with pytest.raises(ValueError, match=r"was float32 on cpu when .* and is float64 on cpu now"):
        unmerge(model)
    model.float()
    unmerge(model)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize(
    "settings",
    [{"dora": True, "targets": ("qkv", "embed")}, {"train_modules": ("norm", "head")}, {"bias": "all"}],
    ids=str,
)
def test_an_adapted_model_may_be_cast(settings: dict[str, Any]) -> None:
    model = adapted(settings).eval()
    with torch.no_grad():
        expected = model(TOKENS)
        model.bfloat16()
        gap = (model(TOKENS).float() - expected).abs().mean() / expected.std()
    assert gap < 0.05


def test_weights_in_bf16_are_merged_with_one_rounding() -> None:
    """Added in fp32: a sum in bf16 would round the change first."""
    model = adapted({"targets": ("qkv",)})
    module: Any = wrappers(model)["blocks.0.attention.qkv"]
    module.base.weight.data = module.base.weight.data.bfloat16()
    change = module.adapters["default"]
    expected = (module.base.weight.double() + change.delta().double()).bfloat16()
    merge(model)
    actual: Any = model.get_submodule("blocks.0.attention.qkv").weight
    assert actual.dtype == torch.bfloat16
    assert (actual != expected).float().mean() < 0.001  # fp32 and fp64 may round a tie apart


def test_a_quantised_weight_is_made_again_only_for_dora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the products by autograd
    made: list[int] = []
    right = Rounded.__dict__["weight"].fget
    monkeypatch.setattr(Rounded, "weight", property(lambda self: made.append(1) or right(self)))
    for dora in (False, True):
        model = rounded(scrambled())
        add_adapter(model, LoraConfig(r=2, dora=dora, targets=("qkv",)))
        made.clear()
        fused(model)(torch.randn(3, 16))
        assert len(made) == 1 + dora  # one is the base's own product


def test_broken_adapters_and_empty_merges_are_refused() -> None:
    model = adapted()
    add_adapter(model, LoraConfig(r=2, targets=("up",)), name="broken")
    changed: Any = wrappers(model)["blocks.0.mlp.up"].adapters["broken"]
    changed.a.data.fill_(math.nan)
    changed.requires_grad_(False)
    with pytest.raises(ValueError, match="is not finite; the adapter is broken"):
        merge(model)
    use_adapters(model, {"default": 1.0})
    merge(model)  # An adapter that is not active is not judged.
    unmerge(model)
    with pytest.raises(ValueError, match="none was given"):
        merge_report(model, model, [[]])
    fused(model).adapters["default"].b.data.fill_(math.inf)
    with pytest.raises(ValueError, match="is not finite; the adapter is broken"):
        merge(model)
    use_adapters(model, {})
    with pytest.raises(ValueError, match="no adapter is active"):
        merge(model)


# --- the loss ------------------------------------------------------------------------------------------

HEADS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "low rank": ({"targets": ("all-linear", "head")}, ()),
    "dora": ({"targets": ("all-linear", "head"), "dora": True}, ()),
    "pissa": ({"targets": ("head",), "init": "pissa"}, ()),
    "rows": ({}, (50, 2)),
    "whole": ({"train_modules": ("head",), "bias": "all"}, ()),
    "bias": ({"targets": ("head",), "bias": "all"}, ()),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows_in_chunk", [7, 1000])
def test_the_chunked_loss_reads_an_adapted_head(
    monkeypatch: pytest.MonkeyPatch, head: str, smoothing: float, rows_in_chunk: int
) -> None:
    from training import loss as loss_module

    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 53 * 8 * rows_in_chunk)
    config, rows = HEADS[head]
    model = adapted(config, rows, head_bias=True)
    labels = TOKENS.roll(-1, 1).clone()
    labels[:, :5] = IGNORE_INDEX
    batch = Batch(TOKENS, labels, torch.zeros_like(TOKENS), torch.arange(16).expand(3, 16))
    result = token_loss(model, batch, smoothing)
    result.objective.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(TOKENS).flatten(0, 1)
    plain = F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, reduction="sum")
    plain.backward()
    torch.testing.assert_close(result.objective, plain, rtol=1e-5, atol=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == wanted.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in wanted.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_the_loss_of_a_rescaled_head_drops_the_same_and_makes_no_matrix_of_the_weights_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from training import loss as loss_module

    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 53 * 8 * 3)
    monkeypatch.setattr(layers, "LENGTH_ELEMENTS", 170)
    model = adapted({"targets": ("head",), "dora": True, "dropout": 0.3}, head_bias=True).train()
    tokens, labels = TOKENS[:1, :8], TOKENS[:1, 1:9]
    batch = Batch(tokens, labels, torch.zeros_like(tokens), torch.arange(8)[None])
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(5)
    with Largest() as largest:
        objective = token_loss(model, batch, 0.1).objective
        ours = torch.autograd.grad(objective, trained)
    assert largest.elements < model.head.weight.numel()
    torch.manual_seed(5)
    plain = F.cross_entropy(model(tokens)[0], labels[0], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(objective, plain, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(ours, torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_the_composed_form_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile the term is left to autograd."""
    model = adapted({"targets": ("all-linear", "head"), "bias": "all"}, mlp_bias=True)
    fast = model(TOKENS)
    monkeypatch.setattr(LoraLinear, "_in_place", LoraLinear._composed)
    torch.testing.assert_close(model(TOKENS), fast, rtol=1e-5, atol=1e-5)


def test_a_pattern_takes_linear_time_and_means_what_a_glob_means() -> None:
    name = "transformer.h.10.attn.c_attn"
    for wanted in ("*", "*c_attn", "*.attn.*", "transformer.*", "*h.*.attn*", "*a*a*a*"):
        assert matches(name, wanted), wanted
    for wanted in (
        "*c_proj",
        "h.*",
        "*.mlp.*",
        "*c_attn*c_attn",
        "*" * 40 + "Q",
        "transformer.*transformer*",
    ):
        assert not matches(name, wanted), wanted

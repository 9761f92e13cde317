"""The decoder against its definitions: PyTorch's encoder layer, the papers' formulas, itself done slowly.

Every parameter is scrambled: at initialisation biases are 0 and norms 1, so most faults would not show.
"""

import cmath
import math
from dataclasses import replace
from typing import Any

import decoders
import pytest
import torch
import torch.nn.functional as F
from decoders import scramble, scrambled
from torch import Tensor, nn

from architecture import (
    BLOCKS,
    INITS,
    MLPS,
    Context,
    Decoder,
    LayerNorm,
    ParallelBlock,
    RMSNorm,
    SequentialBlock,
)
from config import ModelConfig
from modules import blocked_attention
from modules.activations import GeluTanh
from modules.attention import ATTENTIONS, attention_mask
from modules.dropout import Dropout, kept
from modules.positions import (
    SinusoidalPosition,
    rotary_frequency,
    rotary_tables,
    rotate_half,
    rotate_interleaved,
)
from modules.recompute import CheapRecompute

SMALL = replace(decoders.SMALL, vocab_size=30, block_size=16, init="zero_output")
BIASED = replace(SMALL, **decoders.BIASES)
MODELS = {
    "sequential": SMALL,
    "parallel": replace(BIASED, block="parallel", head_dim=8, rotary_dim=4, rotary_layout="interleaved"),
    "grouped-query": replace(SMALL, n_kv_head=2, qk_norm=False, mlp="swiglu", norm_weight=True),
    "multi-query": replace(BIASED, n_kv_head=1, fused_qkv=True, position="learned", mlp="gelu"),
    "sinusoidal": replace(BIASED, position="sinusoidal", tie_embeddings=True, mlp="gelu_tanh"),
    "window": replace(SMALL, sliding_window=3, window_layers=(1,)),
    "shards": replace(BIASED, block="parallel", fused_qkv=True, qkv_layout="shards", head_bias=True),
    "heads": replace(BIASED, fused_qkv=True, qkv_layout="heads"),
    "llama3": replace(SMALL, rope_scaling="llama3", rope_factor=4.0, rope_context=8, rope_high_freq=1.5),
}
TOKENS = torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 6]])


def part(module: nn.Module, name: str) -> Any:
    """A submodule whose attributes the type checker does not follow."""
    return module.get_submodule(name)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def close_gradients(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """To 1e-5 of the largest element of all: some are in the hundreds, and that of a key's bias is 0 but for
    rounding, as it adds the same to all scores of a query."""
    scale = max(gradient.abs().max().item() for gradient in expected if gradient is not None)
    for a, b in zip(actual, expected, strict=True):
        assert a is not None and b is not None and b.any()
        torch.testing.assert_close(a, b, atol=1e-5 * scale, rtol=1e-5)


def backward(logits: Tensor) -> None:
    """A loss that weighs every logit differently."""
    (logits * noise(*logits.shape, seed=9)).sum().backward()


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_fast_attention_equals_reference(name, documents):
    fast, reference = (scrambled(replace(MODELS[name], attention=kind)) for kind in ("fast", "reference"))
    fast_logits, reference_logits = (m(TOKENS, None, documents) for m in (fast, reference))
    close(fast_logits, reference_logits)
    backward(fast_logits)
    backward(reference_logits)
    close_gradients(*([p.grad for p in model.parameters()] for model in (fast, reference)))


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_written_with_loops(kind):
    q, k, v = noise(2, 3, 4, 5, seed=1), noise(2, 3, 4, 5, seed=2), noise(2, 3, 4, 5, seed=3)
    mask = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(4)) < 0.6
    mask |= torch.eye(4, dtype=torch.bool)
    y = ATTENTIONS[kind](q, k, v, mask, False, Dropout(0.0))
    for b in range(2):
        for h in range(3):
            for t in range(4):
                sees = [s for s in range(4) if mask[b, 0, t, s]]
                weights = torch.stack([q[b, h, t] @ k[b, h, s] / math.sqrt(5) for s in sees]).softmax(0)
                close(
                    y[b, h, t],
                    sum((w * v[b, h, s] for w, s in zip(weights, sees, strict=True)), torch.zeros(5)),
                )


def test_mask_lets_a_token_see_its_own_documents_past():
    keys = torch.tensor([[-1, -1, 0, 0, 1, 0]])
    expected = [
        [q == k and s <= t for s, k in enumerate(keys[0].tolist())] for t, q in enumerate(keys[0].tolist())
    ]
    assert attention_mask(keys, keys)[0, 0].tolist() == expected
    assert attention_mask(keys[:, 4:], keys)[0, 0].tolist() == expected[4:]  # queries are the last tokens
    assert attention_mask(keys, keys).shape == (1, 1, 6, 6)
    for window in (1, 2, 3):
        near = [[see and i - j < window for j, see in enumerate(row)] for i, row in enumerate(expected)]
        assert attention_mask(keys, keys, window)[0, 0].tolist() == near
        assert attention_mask(keys[:, 4:], keys, window)[0, 0].tolist() == near[4:]


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_fewer_key_heads_equal_full_attention_with_those_heads_repeated(n_kv_head):
    config = replace(SMALL, n_kv_head=n_kv_head, qkv_bias=True)
    grouped, full = scrambled(config), scrambled(replace(config, n_kv_head=4))
    state = grouped.state_dict()
    for name in state:
        if ".k." in name or ".v." in name:
            heads = state[name].unflatten(0, (n_kv_head, 4))
            state[name] = heads.repeat_interleave(4 // n_kv_head, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    close(grouped(TOKENS), full(TOKENS))


def test_fused_projection_is_query_key_value_in_that_order():
    fused = scrambled(replace(SMALL, n_kv_head=2, fused_qkv=True, qkv_bias=True))
    separate = scrambled(replace(SMALL, n_kv_head=2, qkv_bias=True))
    state = fused.state_dict()
    for name in list(state):
        if "qkv" in name:
            for part, value in zip("qkv", state.pop(name).split([16, 8, 8]), strict=True):
                state[name.replace("qkv", part)] = value
    separate.load_state_dict(state)
    close(fused(TOKENS), separate(TOKENS))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_block_equals_torchs_encoder_layer(attention):
    torch_layer = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    scramble(torch_layer)
    config = replace(
        BIASED, attention=attention, position="none", mlp="gelu", qk_norm=False, fused_qkv=True, norm_eps=1e-5
    ).resolved()
    block = SequentialBlock(config, 0)
    pairs = {
        "attention_norm": "norm1",
        "attention.qkv": "self_attn.in_proj",
        "attention.out": "self_attn.out_proj",
        "mlp_norm": "norm2",
        "mlp.up": "linear1",
        "mlp.down": "linear2",
    }
    theirs = dict(torch_layer.named_parameters())
    matched = {}
    for ours, name in pairs.items():
        for part in ("weight", "bias"):
            matched[f"{ours}.{part}"] = theirs.pop(
                f"{name}_{part}" if "in_proj" in name else f"{name}.{part}"
            )
    assert not theirs
    block.load_state_dict(matched)

    x = noise(3, 7, 16).requires_grad_()
    x_torch = x.detach().clone().requires_grad_()
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    y = block(x, Context(rotary=None, mask=None, is_causal=True, cache=None))
    y_torch = torch_layer(x_torch, src_mask=causal, is_causal=True)
    close(y, y_torch)
    backward(y)
    backward(y_torch)
    parameters = dict(block.named_parameters())
    close_gradients(
        [x.grad, *(parameters[name].grad for name in matched)],
        [x_torch.grad, *(parameter.grad for parameter in matched.values())],
    )


def test_parallel_block_adds_both_paths_of_one_norm():
    block = ParallelBlock(replace(BIASED, position="none").resolved(), 0)
    scramble(block)
    x, context = noise(2, 5, 16), Context(None, None, True, None)
    y = block.norm(x)
    close(block(x, context), x + block.attention(y, context) + block.mlp(y))


# --- what a token may depend on -------------------------------------------------------------------


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_token_depends_on_its_own_documents_past_and_on_nothing_else(name, attention, documents):
    model = scrambled(replace(MODELS[name], attention=attention))
    embedded = []
    model.embed.register_forward_hook(lambda _, __, output: embedded.append(output))
    logits = model(TOKENS, None, documents)
    B, T = TOKENS.shape
    ids = torch.zeros_like(TOKENS) if documents is None else documents
    for row in range(B):
        for t in range(T):
            target = (logits[row, t] * noise(30)).sum()
            (gradient,) = torch.autograd.grad(target, embedded[0], retain_graph=True)
            depends = gradient.abs().amax(-1) > 0
            for other in range(B):
                for s in range(T):
                    allowed = other == row and s <= t and bool(ids[row, s] == ids[row, t])
                    assert bool(depends[other, s]) == allowed, (row, t, other, s)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_each_document_alone(name, attention):
    model = scrambled(replace(MODELS[name], attention=attention))
    logits = model(TOKENS, POSITIONS, DOCUMENTS)
    for row in range(len(TOKENS)):
        for document in DOCUMENTS[row].unique():
            inside = DOCUMENTS[row] == document
            close(logits[row, inside], model(TOKENS[row, inside][None])[0])


def test_batch_order_does_not_matter():
    model = scrambled(SMALL)
    order = torch.tensor([2, 0, 1])
    close(
        model(TOKENS[order], POSITIONS[order], DOCUMENTS[order]), model(TOKENS, POSITIONS, DOCUMENTS)[order]
    )


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rotary_turns_each_pair_by_position_times_frequency(theta):
    x, positions = noise(2, 3, 4, 6), torch.tensor([[0, 1, 7], [2, 900, 5]])
    cos, sin = rotary_tables(positions, rotary_frequency(6, theta))
    assert cos.shape == sin.shape == (2, 3, 1, 3)
    half, interleaved = rotate_half(x, cos, sin), rotate_interleaved(x, cos, sin)
    for b in range(2):
        for t in range(3):
            for i in range(3):
                turn = cmath.exp(1j * positions[b, t].item() * theta ** (-2 * i / 6))
                for y, pair in ((half, (i, i + 3)), (interleaved, (2 * i, 2 * i + 1))):
                    for h in range(4):
                        expected = complex(*(x[b, t, h, d].item() for d in pair)) * turn
                        got = complex(*(y[b, t, h, d].item() for d in pair))
                        assert abs(got - expected) < 2e-4  # an fp32 angle of 900 is exact to 6e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 9])
def test_interleaved_pairs_turn_alike_as_complex_and_as_real_numbers(monkeypatch, dtype, head_dim):
    x = noise(2, 3, 4, head_dim).to(dtype)[..., :6]  # An odd head has no complex view.
    tables = rotary_tables(torch.tensor([[0, 1, 7], [2, 900, 5]]), rotary_frequency(6, 100.0))
    turned = rotate_interleaved(x, *tables)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    real = rotate_interleaved(x, *tables)
    assert turned.dtype == real.dtype == dtype
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(turned, real, atol=bound, rtol=bound)


def test_rotary_layouts_agree_under_the_permutation_of_dimensions():
    config = replace(SMALL, head_dim=8, rotary_dim=6, qkv_bias=True)
    half, interleaved = scrambled(config), scrambled(replace(config, rotary_layout="interleaved"))
    state = half.state_dict()
    for name in state:
        if ".q." in name or ".k." in name:
            heads = state[name].unflatten(0, (4, 8))
            state[name] = heads[:, [0, 3, 1, 4, 2, 5, 6, 7]].flatten(0, 1)
    interleaved.load_state_dict(state)
    close(half(TOKENS), interleaved(TOKENS))
    interleaved.load_state_dict(half.state_dict())
    assert not torch.allclose(half(TOKENS), interleaved(TOKENS), atol=1e-2)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_depends_on_relative_positions_only(layout):
    model = scrambled(replace(SMALL, rotary_layout=layout))
    torch.testing.assert_close(model(TOKENS, POSITIONS + 50), model(TOKENS, POSITIONS), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(TOKENS, POSITIONS * 2), model(TOKENS, POSITIONS), atol=1e-2)


def test_partial_rotary_leaves_the_other_dimensions_alone():
    """Queries that use those alone do not notice positions; queries that use the rotated ones do."""
    for used, notices in ((slice(4, 8), False), (slice(0, 4), True)):
        model = scrambled(replace(SMALL, head_dim=8, rotary_dim=4, qk_norm=False))
        with torch.no_grad():
            for block in model.blocks:
                weight = part(block, "attention.q").weight.unflatten(0, (4, 8))
                kept = weight[:, used].clone()
                weight.zero_()
                weight[:, used] = kept
        assert torch.allclose(model(TOKENS, POSITIONS * 2), model(TOKENS, POSITIONS), atol=1e-5) != notices


def test_rotary_angles_are_fp32_in_a_bf16_model():
    positions = torch.tensor([[4099]])
    cos, sin = rotary_tables(positions, rotary_frequency(4, 10_000.0))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0, 0].tolist() == pytest.approx([math.cos(4099), math.cos(40.99)], abs=1e-3)
    logits = scrambled(SMALL).bfloat16()(TOKENS, POSITIONS + 4099)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("size", [6, 7])
def test_sinusoidal_table_is_the_papers(size):
    y = SinusoidalPosition(40, size)(torch.tensor([[0, 1, 39]]))
    for i, position in enumerate((0, 1, 39)):
        for d in range(size):
            angle = position / 10_000 ** ((d - d % 2) / size)
            expected = math.cos(angle) if d % 2 else math.sin(angle)
            assert y[0, i, d].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_positions_count_from_zero_and_matter(position):
    model = scrambled(replace(SMALL, position=position))
    close(model(TOKENS), model(TOKENS, torch.arange(7).expand(3, 7)))
    assert not torch.allclose(model(TOKENS), model(TOKENS, torch.zeros(3, 7, dtype=torch.long)), atol=1e-2)


def test_without_positions_the_order_of_the_past_does_not_matter():
    model = scrambled(replace(SMALL, position="none", n_layer=1))
    swapped = TOKENS[:, [1, 0, 3, 2, 4, 5, 6]]
    close(model(TOKENS)[:, -1], model(swapped)[:, -1])


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_a_text_longer_than_the_position_table_is_refused(position):
    model = scrambled(replace(SMALL, position=position))
    model(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ValueError, match=r"17 tokens do not fit the model's 16 positions; shorten"):
        model(torch.zeros(1, 17, dtype=torch.long))


# --- norms and MLPs -------------------------------------------------------------------------------


def test_norms_are_their_formulas():
    x, weight, bias = noise(3, 5) + 1, noise(5, seed=1), noise(5, seed=2)
    rms = RMSNorm(5, 0.1, weight=True)
    layer = LayerNorm(5, 0.1, weight=True, bias=True)
    rms.load_state_dict({"weight": weight})
    layer.load_state_dict({"weight": weight, "bias": bias})
    scaled = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    standard = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    close(rms(x), scaled * weight)
    close(RMSNorm(5, 0.1, weight=False)(x), scaled)
    close(layer(x), standard * weight + bias)
    close(LayerNorm(5, 0.1, weight=False, bias=False)(x), standard)


def test_queries_and_keys_are_normalised_a_head_at_a_time():
    model = scrambled(replace(SMALL, n_layer=1))
    before = model(TOKENS)
    with torch.no_grad():
        scales = torch.tensor([1.0, 3.0, 5.0, 0.2]).repeat_interleave(4)[:, None]  # one a head
        part(model, "blocks.0.attention.q").weight.mul_(scales)
        part(model, "blocks.0.attention.k").weight.mul_(2.0)
    # The outputs differ by the eps of a norm.
    torch.testing.assert_close(model(TOKENS), before, atol=1e-3, rtol=1e-3)


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
}
ACTIVATIONS["geglu_tanh"] = ACTIVATIONS["gelu_tanh"]
GATED = ("swiglu", "geglu_tanh")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MLPS)
def test_mlps_are_their_formulas(name, bias):
    kind, activation = MLPS[name]
    mlp = kind(replace(SMALL, n_inner=24, mlp_bias=bias).resolved(), activation())
    scramble(mlp)
    weights = dict(mlp.named_parameters())
    x = (noise(2, 3, 16) * 2).requires_grad_()

    def linear(x: Tensor, name: str) -> Tensor:
        assert (f"{name}.bias" in weights) == bias
        return x @ weights[f"{name}.weight"].T + (weights[f"{name}.bias"] if bias else 0)

    inner = ACTIVATIONS[name](linear(x, "gate" if name in GATED else "up"))
    expected = linear(inner * linear(x, "up") if name in GATED else inner, "down")
    torch.testing.assert_close(mlp(x), expected, atol=1e-4, rtol=1e-5)  # values in the tens
    gradients = []
    for y in (mlp(x), expected):
        gradients.append(torch.autograd.grad((y * noise(*y.shape)).sum(), [x, *weights.values()]))
    close_gradients(*map(list, gradients))
    assert weights["down.weight"].shape == (16, 24)


# --- dropout --------------------------------------------------------------------------------------


def mean_loss(model: Decoder) -> Tensor:
    return F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("place", ["embedding", "attention weights", "attention output", "mlp output"])
@pytest.mark.parametrize("block", BLOCKS)
def test_dropout_is_applied_at_each_place_in_training_only(block, place):
    model = scrambled(replace(SMALL, dropout=0.5, block=block))
    if place != "embedding":
        model.dropout.p = 0.0
    for layer in model.blocks:
        if place != "attention weights":
            part(layer, "attention").dropout.p = 0.0
        if place not in ("attention output", "mlp output"):
            part(layer, "dropout").p = 0.0
        with torch.no_grad():  # an output of zeros shows no dropout: leaves the other output's alone
            if place == "attention output":
                part(layer, "mlp.down").weight.zero_()
            if place == "mlp output":
                part(layer, "attention.out").weight.zero_()
    assert torch.equal(model(TOKENS), model(TOKENS))
    quiet = model(TOKENS)
    model.train()
    torch.manual_seed(0)
    first, second = model(TOKENS), model(TOKENS)
    assert not torch.allclose(first, quiet, atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-2)
    model.eval()
    assert torch.equal(model(TOKENS), quiet)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_drops_each_element_alike_and_keeps_the_mean(p):
    torch.manual_seed(0)
    # Eight elements share a random number, and 8 divides neither the rows nor the columns.
    x = torch.full((7, 100_001), 3.0, requires_grad=True)
    y = Dropout(p)(x)
    dropped = (y == 0).float()
    for lane in range(8):  # Each lane is 8 of the 64 random bits.
        assert abs(dropped.flatten()[lane::8].mean() - p) < 0.005
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 3 / (1 - p)), rtol=1e-2, atol=0)
    assert abs(float(y.detach().mean()) - 3) < 3 * 0.005 / (1 - p)
    y.sum().backward()
    assert x.grad is not None
    close(x.grad, y.detach() / 3)
    assert Dropout(p).eval()(x) is x


@pytest.mark.parametrize("shape", [(3, 5), (0,), (2, 2**17 + 3)])
def test_gelu_in_bf16_is_as_near_as_its_format_allows(shape):
    torch.manual_seed(0)
    x = (4 * torch.randn(shape)).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = GeluTanh()(x), F.gelu(exact, approximate="tanh")
    # Half a step of bf16, and where the tanh is -1 in fp32, the zeros of its product.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)
    weight = torch.randn(shape).bfloat16()
    (grad,) = torch.autograd.grad(y, x, weight)
    (expected_grad,) = torch.autograd.grad(expected, exact, weight.double())
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dropped", [0, 1, 255, 256, 5_243, 32_768, 60_293, 2**16 - 1])
def test_an_element_is_dropped_in_as_many_of_65536_cases(dropped):
    """Finer than the 8 random bits of an element: the rest of the probability is a column's chance."""
    parts = [kept(3, part, torch.Size((64, 512)), dropped, torch.float32) for part in range(256)]
    share = 1 - torch.stack(parts).mean((0, 1)).double()
    p = dropped / 2**16
    # Columns of a part share 8 bits of the limit, which 256 parts draw.
    spread = math.sqrt(p * (1 - p) / (64 * 256) + 1 / (4 * 256**2 * 256))
    assert abs(share.mean() - p) <= 4 * spread / math.sqrt(512) and (share - p).abs().max() <= 6 * spread
    assert torch.equal(parts[7], kept(3, 7, torch.Size((64, 512)), dropped, torch.float32))


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_dropout_drops_that_share_of_the_weights(kind):
    q = torch.zeros(1, 1, 50, 4)
    torch.manual_seed(0)
    y = ATTENTIONS[kind](q, q, torch.eye(50)[None, None], None, False, Dropout(0.25))
    kept = y > 0
    assert 0.2 < (~kept).float().mean() < 0.3
    close(y[kept], torch.full_like(y[kept], 1 / 50 / 0.75))


@pytest.mark.parametrize("window", [0, 5])
def test_a_token_of_many_heads_that_share_keys_may_be_masked(window, monkeypatch):
    """The heads of one token are rows of one matrix, which are not tokens that follow each other."""
    monkeypatch.setattr(blocked_attention, "BLOCK_ELEMENTS", 1)
    q, k, v = (torch.randn(2, heads, n, 4) for heads, n in ((20, 1), (1, 30), (1, 30)))
    documents = torch.tensor([[-1] * 7 + [0] * 23, [0] * 30])
    mask = attention_mask(documents[:, -1:], documents, window)
    for training in (False, True):
        dropout = Dropout(0.0).train(training)
        found, expected = (attend(q, k, v, mask, False, dropout) for attend in ATTENTIONS.values())
        close(found, expected)


def test_dropout_compiles_to_what_it_is():
    x = torch.randn(64, 64)
    results = []
    for function in (Dropout(0.3), torch.compile(Dropout(0.3), backend="aot_eager")):
        torch.manual_seed(0)
        results.append(function(x))
    assert torch.equal(*results) and (results[0] == 0).any()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (2, 0, 5)])
def test_dropout_of_nothing_or_of_a_number(shape):
    assert Dropout(0.5)(torch.ones(shape)).shape == shape


def test_two_dropouts_give_two_losses_in_training_and_one_in_evaluation():
    losses = []
    for dropout in (0.0, 0.1, 0.2):
        model = scrambled(replace(SMALL, dropout=dropout))
        evaluated = mean_loss(model).item()
        torch.manual_seed(0)
        losses.append((mean_loss(model.train()).item(), evaluated))
    assert losses[0][0] == losses[0][1] == losses[1][1] == losses[2][1]
    assert len({round(trained, 3) for trained, _ in losses}) == 3


# --- head and initialisation ----------------------------------------------------------------------


def test_a_tied_head_is_the_embedding():
    tied, untied = Decoder(replace(SMALL, tie_embeddings=True)), Decoder(SMALL)
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight.data_ptr() != untied.embed.weight.data_ptr()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 30 * 16
    scramble(tied)
    untied.load_state_dict(tied.state_dict())  # the state holds both names
    close(tied(TOKENS), untied(TOKENS))
    backward(tied(TOKENS))
    backward(untied(TOKENS))
    assert tied.embed.weight.grad is not None
    assert untied.embed.weight.grad is not None and untied.head.weight.grad is not None
    close(tied.embed.weight.grad / 100, (untied.embed.weight.grad + untied.head.weight.grad) / 100)


def first_loss(config: ModelConfig) -> float:
    torch.manual_seed(0)
    model = Decoder(config)
    tokens = torch.randint(config.vocab_size, (2, 65))
    with torch.no_grad():
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("block", BLOCKS)
def test_zero_output_starts_at_exactly_ln_v(block):
    assert first_loss(replace(SMALL, vocab_size=777, block=block)) == pytest.approx(math.log(777), abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_starts_near_ln_v(init, norm, tied):
    """Narrow and wide: a tied embedding's own logit grows with the width."""
    for n_embd in (64, 512):
        config = replace(
            SMALL, vocab_size=1000, n_embd=n_embd, n_inner=64, init=init, norm=norm, tie_embeddings=tied
        )
        assert abs(first_loss(replace(config, block_size=64)) - math.log(1000)) < 0.5


@pytest.mark.parametrize("init", INITS)
def test_initialisation_leaves_biases_zero_and_norms_one(init):
    model = Decoder(replace(BIASED, position="learned", init=init))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif init != "zero_output":
            assert parameter.std() > 0.002, name


def test_scaled_normal_makes_projections_into_the_residual_smaller():
    torch.manual_seed(0)
    model = Decoder(replace(SMALL, n_embd=128, n_layer=8, init="normal", mlp="swiglu"))
    for name, parameter in model.named_parameters():
        std = 0.02 / 4 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.1), name


def test_xavier_follows_the_paper():
    torch.manual_seed(0)
    model = Decoder(replace(SMALL, n_embd=128, n_kv_head=2, init="xavier"))
    for name, parameter in model.named_parameters():
        if name.startswith("blocks"):
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"vocab_size": 0}, r"vocab_size is 0; .*at least 1"),
        ({"block_size": 0}, r"block_size is 0; .*at least 2"),
        ({"n_layer": 0}, r"n_layer is 0; .*at least 1"),
        ({"n_head": 0}, r"n_head is 0; .*at least 1"),
        ({"n_embd": -8}, r"n_embd is -8; .*at least 1"),
        ({"n_embd": 18}, r"n_embd 18 is not a multiple of model.n_head 4; change"),
        ({"n_kv_head": 3}, r"n_head 4 is not a multiple of model.n_kv_head 3"),
        ({"rotary_dim": 3}, r"rotary_dim 3 must be even .* 4 dimensions"),
        ({"rotary_dim": 6}, r"rotary_dim 6 must be .* at most the head's 4 dimensions"),
        ({"dropout": 1.0}, r"dropout is 1.0; .*below 1"),
        ({"dropout": -0.1}, r"dropout is -0.1; .*at least 0"),
        ({"norm_bias": True}, r"norm rms has no shift; set model.norm_bias to false or model.norm to layer"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_in_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        Decoder(replace(SMALL, **wrong))
    assert "\n" not in str(error.value)


# --- activation checkpointing and the cache -------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_memory_only(dropout):
    plain, saving = (scrambled(replace(SMALL, dropout=dropout)).train() for _ in range(2))
    saving.recompute_in_backward("blocks")
    forwards = []
    for model in (plain, saving):
        count = []
        model.blocks[1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)
        loss = mean_loss(model)
        loss.backward()
        forwards.append((loss.item(), len(count)))
    assert forwards == [(forwards[0][0], 1), (forwards[0][0], 2)]  # the second block ran again backward
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name  # pyright: ignore[reportArgumentType]
    saving.eval()
    count.clear()
    mean_loss(saving).backward()
    assert len(count) == 1


def test_a_recomputed_block_keeps_no_mask_of_dropout():
    """Dropout's factor is a saved tensor, which checkpointing drops, not an attribute, which it cannot."""
    x = torch.ones(64, 32, requires_grad=True)
    layer = Dropout(0.5).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: layer_factor):
        y = layer(x)
    layer_factor = y.detach().clone()  # x is all ones.
    assert kept == [x.shape]
    assert not any(isinstance(value, Tensor) for value in vars(y.grad_fn).values())
    y.sum().backward()
    assert torch.equal(x.grad, layer_factor)  # pyright: ignore[reportArgumentType]


class Growing:
    """The least a cache can be; it notes its calls."""

    def __init__(self):
        self.length = 0
        self.documents: Tensor | None = None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls = []

    def extend_documents(self, document_ids: Tensor) -> Tensor:
        self.calls.append(("documents", tuple(document_ids.shape)))
        parts = [document_ids] if self.documents is None else [self.documents, document_ids]
        self.documents = torch.cat(parts, dim=1)
        return self.documents

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((layer, tuple(k.shape), tuple(v.shape)))
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        self.length = k.size(2) if layer == 1 else self.length  # the last layer's
        return k, v


def test_cache_is_called_once_for_documents_and_once_a_layer():
    model, cache = scrambled(replace(SMALL, n_kv_head=2)), Growing()
    model(TOKENS, cache=cache)
    shape = (3, 2, 7, 4)
    assert cache.calls == [("documents", (3, 7)), (0, shape, shape), (1, shape, shape)]
    assert cache.documents is not None and not cache.documents.any()


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_reading_in_pieces_equals_reading_at_once(name, attention, documents):
    model, cache = scrambled(replace(MODELS[name], attention=attention)), Growing()
    pieces = []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        ids = None if documents is None else documents[:, start:end]
        pieces.append(model(TOKENS[:, start:end], None, ids, cache))  # positions count on from the cache
    close(torch.cat(pieces, dim=1), model(TOKENS, None, documents))


def test_a_cache_does_not_let_a_text_outgrow_the_position_table():
    model, cache = scrambled(MODELS["multi-query"]), Growing()
    model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match=r"17 tokens do not fit the model's 16 positions"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_forward_is_the_head_of_hidden():
    model = scrambled(MODELS["parallel"])
    close(model(TOKENS, POSITIONS, DOCUMENTS), model.head(model.hidden(TOKENS, POSITIONS, DOCUMENTS)))
    assert model.hidden(TOKENS).shape == (3, 7, 16)


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {"mlp": "gelu_tanh"},
        {"mlp": "swiglu", "norm": "rms"},
        {"block": "parallel", "mlp": "gelu"},
        {"mlp": "relu2"},
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_recomputed_in_backward_is_what_was_there(
    parts: dict[str, Any], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed, pack = [], CheapRecompute._pack

    def counted(self: CheapRecompute, saved: Tensor) -> Any:
        packed = pack(self, saved)
        recomputed.append(not isinstance(packed, Tensor))
        return packed

    monkeypatch.setattr(CheapRecompute, "_pack", counted)
    config = ModelConfig(
        50, 32, n_layer=2, n_head=2, n_embd=16, dropout=0.1, norm_weight=True, init="normal", **parts
    )
    results = []
    for less in (False, True):
        torch.manual_seed(0)
        model = Decoder(config)
        if less:
            model.recompute_in_backward("cheap outputs")

        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(torch.arange(40).view(2, 20))
        y.float().square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name
    assert any(recomputed) and not all(recomputed)


def test_a_norm_with_a_shift_and_no_scale_trains_in_bf16():
    """torch's own backward pass of such a norm fails on mixed formats."""
    norm = LayerNorm(8, 1e-6, weight=False, bias=True)
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    norm(x).sum().backward()
    assert norm.bias is not None and norm.bias.grad is not None and x.grad is not None
    torch.testing.assert_close(norm.bias.grad, torch.full((8,), 3.0))

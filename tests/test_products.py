"""The ways to multiply few rows: each against fp64, the choice among them, and kernels that are wrong."""

import copy
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architecture import Decoder
from config import ModelConfig
from data.cache import write_sealed
from generation.engine import generate_ids
from generation.settings import GenerationConfig
from modules import products
from modules.integer_linear import GROUP, Int4Linear, Int8Linear, bf16_above
from modules.linear import Linear
from modules.products import MANY, PLAIN, MeasuredProducts, Products, Way, speed_up
from modules.quantized_linear import KINDS, hold, quantize_linears

LINEARS: dict[str, type] = {
    "Linear fp32": Linear,
    "Linear bf16": Linear,
    **KINDS,
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "CACHE", tmp_path)
    monkeypatch.setattr(products, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(products, "BUDGET", 60.0)
    monkeypatch.setattr(products, "CLEAR", float("inf"))  # Turns of microseconds differ on a busy machine.
    monkeypatch.setattr(Products, "wrong", set())


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def made(kind: str, n_out: int, n_in: int, bias: bool, dtype: torch.dtype) -> MeasuredProducts:
    """Return a linear whose rows differ in size by factors of some thousands."""
    weight = normal(n_out, n_in) * torch.logspace(-2, 2, n_out)[:, None]
    dense = Linear(n_in, n_out, bias)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if bias:
            dense.bias.copy_(normal(n_out, seed=1))
    if kind in KINDS:
        return KINDS[kind].from_linear(dense).to(dtype)
    return dense.to(dtype)


def bound(module: MeasuredProducts, x: Tensor, way: str) -> tuple[Tensor, Tensor]:
    """Return the product in fp64 and how far from it a result may be.

    Sums of n terms in fp32 are off by n 2^-24 of their magnitudes at most, a result in bf16 by 2^-8 of
    itself, twice with a bias, and weights that are decoded to bf16 by 2^-9 of themselves.
    """
    weight, exact = module.weight_rows(torch.arange(module.out_features)), x.double()
    magnitude = exact.abs() @ weight.abs().t()
    off = magnitude * (x.size(-1) + 8) * 2**-24
    if way == "decoded" and x.dtype == torch.bfloat16:
        off += magnitude * 2**-9
    exact = exact @ weight.t()
    if isinstance(module.bias, Tensor):
        off += exact.abs() * 2**-8 if x.dtype == torch.bfloat16 else 0
        exact = exact + module.bias.double()
        off += module.bias.double().abs() * 2**-24
    off += (exact.abs() + off) * (2**-8 if x.dtype == torch.bfloat16 else 2**-22)
    return exact, off + 1e-30


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(48, 64), (80, 192), (4112, 64), (33, 100), (7, 31), (130, 256)])
@pytest.mark.parametrize("kind", LINEARS)
def test_each_way_gives_the_product_of_the_stored_weight(kind, n_out, n_in, bias):
    dtypes = {"Linear fp32": DTYPES[:1], "Linear bf16": DTYPES[1:]}
    for dtype in dtypes.get(kind, DTYPES):
        module = made(kind, n_out, n_in, bias, dtype)
        tried: set[str] = set()
        for rows in (1, 2, 3, 4, 5, 8, 16, 17, 33):
            wide = normal(rows, 2 * n_in, seed=rows).to(dtype)
            for x in (wide[:, :n_in], wide.reshape(rows, n_in, 2)[..., 0]):  # not contiguous
                for name, way in module.ways(rows, dtype).items():
                    tried.add(name)
                    exact, off = bound(module, x, name)
                    with torch.no_grad():
                        found = way.make()(x), way.make()(x[:, None]).squeeze(1)
                    for y in found:
                        assert y.dtype == dtype and y.shape == (rows, n_out)
                        assert ((y.double() - exact).abs() <= off).all(), (name, rows, x.stride())
        kernel = {"int8": n_in % 32 == 0, "int4": n_in % 64 == 0 and n_out % 16 == 0}.get(kind, False)
        expected = {"decoded"}
        if kind not in KINDS:
            expected = {"packed", "tiles"} | ({"own", "widened"} if dtype == torch.bfloat16 else set())
        elif kernel and dtype == torch.bfloat16:
            expected |= {f"{type(module).__name__}'s kernel"}
        assert tried == expected


@pytest.mark.parametrize("n_in", [64, 192, 100, 31, 1])
def test_int4_is_within_half_a_step(n_in):
    weight = normal(50, n_in) * torch.logspace(-20, 20, 50)[:, None] + torch.linspace(-3, 3, 50)[:, None]
    weight[3], weight[4] = 0, 0.3
    module = Int4Linear.from_weight(weight)
    step, zero = (
        t.double().t().repeat_interleave(GROUP, dim=1)[:, :n_in] for t in (module.scale, module.zero)
    )
    error = (module.weight.double() - weight.double()).abs()
    # The zero is rounded to bf16, which the outermost codes cannot make up for.
    assert (error <= step / 2 + zero.abs() * 2**-8 + weight.double().abs() * 2**-22).all()
    assert (module.weight[3].abs() < 1e-28).all()
    index = torch.tensor([0, 7, 49])
    assert torch.equal(module.weight_rows(index).float(), module.weight[index])


def test_scales_are_numbers_of_bf16_not_below_what_is_asked():
    x = torch.cat((torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1e-6, torch.ones(1)))
    above = bf16_above(x).float()
    assert (above >= x).all() and (above <= x * (1 + 2**-7)).all() and above[-1] == 1
    assert torch.equal(above.bfloat16().float(), above)
    scale = Int8Linear.from_weight(normal(40, 30)).scale
    assert torch.equal(scale.bfloat16().float(), scale)


class Waiting(Linear):
    """A linear whose plain way is slow, with a fast one and one that is slower still."""

    calls: list[str]

    def plain(self, x: Tensor) -> Tensor:
        return self.slow(x, 300, PLAIN)

    def slow(self, x: Tensor, steps: int, name: str) -> Tensor:
        self.calls.append(name)
        for _ in range(steps):
            F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def ways(self, rows: int, dtype: torch.dtype) -> dict[str, Way]:
        return {
            "slower": Way(lambda: lambda x: self.slow(x, 3000, "slower")),
            "fast": Way(lambda: lambda x: self.slow(x, 1, "fast")),
            "large": Way(lambda: lambda x: self.slow(x, 1, "large"), 2**60),
        }


def waiting() -> Any:
    model: Any = nn.Sequential(Waiting(64, 32), Waiting(64, 32))
    for module in model:
        module.calls = []
    return model


def test_the_fastest_way_is_chosen_and_remembered(tmp_path):
    model = waiting()
    speed_up(model)
    first = model[0]
    assert isinstance(first, Waiting) and "large" not in first.calls
    (file,) = tmp_path.iterdir()
    known = json.loads(file.read_text())["value"]
    assert known == {"Waiting 32 x 64, 1 rows of float32": "fast"}
    first.calls.clear()
    with torch.no_grad():
        first(normal(1, 64))
        assert first.calls == ["fast"]
        first(normal(2, 64))  # not measured yet
        assert first.calls == ["fast"]
        model.products.choose(3)  # pyright: ignore
        first.calls.clear()
        for rows in (3, 4):
            first(normal(rows, 64))
        assert first.calls == ["fast", "fast"]
    first.calls.clear()
    first(normal(1, 64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first(normal(1, 64))
    assert not first.calls  # with gradients and under autocast: F.linear
    again = waiting()
    speed_up(again)
    assert set(again[0].calls) == {"fast"}, "what is remembered is compared, and not measured again"


def test_what_is_remembered_is_no_command(tmp_path):
    speed_up(waiting())
    (file,) = tmp_path.iterdir()
    key = "Waiting 32 x 64, 1 rows of float32"
    for value in ({key: "rm"}, {key: ["fast"]}, {key: {}}, {key: None}, ["fast"], "fast"):
        write_sealed(file, value)
        model = waiting()
        speed_up(model)
        assert "fast" in model[0].calls
    file.write_text("{}")
    speed_up(waiting())


def test_without_time_the_first_way_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "BUDGET", -1.0)
    model = waiting()
    speed_up(model)
    assert set(model[0].calls) == {"slower", "fast"}, "each is compared once, and none is timed"
    assert not list(tmp_path.iterdir())
    model[0].calls.clear()
    with torch.no_grad():
        model[0](normal(1, 64))
    assert model[0].calls == ["slower"]
    model.products.choose(MANY)
    with torch.no_grad():
        model[0].calls.clear()
        model[0](normal(MANY, 64))
    assert not model[0].calls, "the plain way, of many rows"


@pytest.mark.parametrize("second, remembered", [(1.9, False), (1.4, True)])
def test_a_best_way_whose_turns_disagree_is_not_remembered(second, remembered, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "CLEAR", 1.5)
    # One turn of the plain way, the slower and the fast one with one weight each, then some of the fast one.
    turns = iter([9.0, 9.0, 1.0, 1.0])
    monkeypatch.setattr(products, "_seconds", lambda ways, x: next(turns, second))
    speed_up(waiting())
    assert bool(list(tmp_path.iterdir())) == remembered


@pytest.mark.parametrize("fault", ["wrong", "nan", "error", "one output"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_kernel_that_gives_wrong_numbers_is_replaced(kind, fault, monkeypatch, capsys):
    name = "_by_kernel"
    own = getattr(KINDS[kind], name)

    def faulty(self):
        product = own(self)

        def other(x):
            if fault == "error":
                raise RuntimeError("could not create a primitive")
            y = product(x)
            if fault == "one output":
                y[..., -1] *= 1.1
                return y
            return y * (torch.nan if fault == "nan" else 1.05)

        return other

    monkeypatch.setattr(KINDS[kind], name, faulty)
    model: Any = nn.Sequential(made(kind, 64, 128, True, torch.bfloat16))
    x = normal(1, 128).bfloat16()
    expected = model(x)
    speed_up(model)
    said = capsys.readouterr().err
    assert ("fails (could not create a primitive)" if fault == "error" else "gives wrong numbers") in said
    assert said.count("\n") == 1
    with torch.no_grad():
        assert model[0].fast is None and torch.equal(model(x), expected)
    speed_up(model)
    assert not capsys.readouterr().err, "said once"


def test_copies_and_casts_have_no_choices():
    model = waiting()
    speed_up(model)
    assert model[0].fast
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].fast is None and other.products is None
    model.double()
    assert model[0].fast is None


def decoder(**settings: object) -> Decoder:
    torch.manual_seed(0)
    config = {"vocab_size": 96, "n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 64} | settings
    return Decoder(ModelConfig(**config)).eval()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_generates_the_same_by_measured_products(tied, monkeypatch):
    model = decoder(tie_embeddings=tied)
    nn.init.normal_(model.head.weight, std=0.2)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    settings = GenerationConfig(max_new_tokens=12)
    expected = [result.ids for result in generate_ids(model, prompts, settings)]
    monkeypatch.setattr(Linear, "plain", lambda self, x: [F.linear(x, self.weight) for _ in range(300)][-1])
    speed_up(model)
    assert [result.ids for result in generate_ids(model, prompts, settings)] == expected
    assert model.products is not None and {1, 4} <= model.products.done
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    assert any(m.fast for m in linears)
    loss = model(torch.tensor(prompts[1:2])).sum()
    loss.backward()
    twin = decoder(tie_embeddings=tied)
    twin.load_state_dict(model.state_dict())
    twin(torch.tensor(prompts[1:2])).sum().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name  # pyright: ignore


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_decoder_is_held_in_fewer_bits(kind):
    model = decoder(tie_embeddings=True)
    embedding = model.embed.weight.clone()
    hold(model, kind)
    assert torch.equal(model.embed.weight, embedding)
    assert isinstance(model.head, Linear if kind == "nf4" else KINDS[kind])
    assert not [n for n, m in model.named_modules() if "blocks." in n and isinstance(m, nn.Linear)]
    hold(model, kind)  # what is stored so stays
    with torch.no_grad():
        assert model.head(torch.zeros(2, 0, 64)).shape == (2, 0, 96)
        before = model.bfloat16()(torch.tensor([[1, 2, 3]]))
        speed_up(model)
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])), before, atol=0.02, rtol=0.05)


def test_many_rows_are_measured_as_one_number():
    model = waiting()
    speed_up(model)
    for rows in (65, 300, 10_000):
        model.products.choose(rows)  # pyright: ignore
    assert model.products.done == {1, MANY}  # pyright: ignore
    with torch.no_grad():
        model[0].calls.clear()
        model[0](normal(500, 64))
    assert model[0].calls == ["fast"]


def test_loading_a_state_drops_the_copy_of_another():
    one, other = (Int8Linear.from_weight(normal(64, 64, seed=seed)) for seed in (0, 1))
    with torch.no_grad():
        one.fast = {(1, torch.float32): one.ways(1, torch.float32)["decoded"].make()}
        one.load_state_dict(other.state_dict())
        x = normal(1, 64)
        torch.testing.assert_close(one(x), other(x))


def test_quantized_names_are_checked_before_anything_is_replaced():
    model = decoder()
    with pytest.raises(ValueError, match="no module"):
        quantize_linears(model, "int4", ["blocks.0.attention.out", "blocks.9.mlp.up"])
    assert isinstance(model.blocks[0].attention.out, Linear)  # pyright: ignore

"""`Linear` against the product in fp64, and when it takes which way."""

import pytest
import torch
import torch.nn.functional as F

from modules import linear
from modules.linear import Linear, emulated_bf16, few_rows


def made(
    rows: int, n_in: int, n_out: int, bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    draw = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, n_in, generator=draw), torch.randn(n_out, n_in, generator=draw)
    return x, weight, torch.randn(n_out, generator=draw) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(33, 128), (7, 130), (300, 1000), (5, 3)])
@pytest.mark.parametrize("rows", [1, 2, 8, 40])
def test_products_are_those_of_fp64(rows, n_in, n_out, bias, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 2**12)  # several blocks, the last one short
    x, weight, b = made(rows, n_in, n_out, bias)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(few_rows(x, weight, b).double(), exact, atol=1e-4, rtol=1e-5)
    low = [None if t is None else t.bfloat16() for t in (x, weight, b)]
    exact = F.linear(*[None if t is None else t.double() for t in low])  # pyright: ignore
    result = emulated_bf16(*low)  # pyright: ignore
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, atol=1e-3, rtol=2**-8)  # rounded once


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("emulated", "before"), [(True, True), (True, False), (False, True)])
def test_one_row_of_bf16_goes_to_torchs_own_kernel(bias, emulated, before, monkeypatch):
    monkeypatch.setattr(linear, "EMULATED_BF16", emulated)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
    seen, product = [], F.linear

    def spied(*args):
        seen.append(torch.backends.mkldnn.enabled)
        return product(*args)

    monkeypatch.setattr(linear.F, "linear", spied)
    layer = Linear(768, 3072, bias=bias).bfloat16()
    x = torch.randn(1, 1, 768).bfloat16()
    with torch.no_grad():
        y = layer(x)
    assert seen == [before and not emulated] and torch.backends.mkldnn.enabled == before
    exact = product(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    # Rounded once, the bias within, in any of the ways.
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=2**-8)
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(x[..., 1:])
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 3), (torch.bfloat16, 5)])
def test_few_rows_take_their_way_and_gradients_do_not(dtype, rows, monkeypatch):
    monkeypatch.setattr(linear, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(linear, "EMULATED_BF16", True)
    taken = []
    for name in ("few_rows", "emulated_bf16"):
        way = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, way=way, name=name: taken.append(name) or way(*args))
    layer = Linear(96, 70).to(dtype)
    x = torch.randn(rows, 1, 96).to(dtype)
    trained = layer(x)
    assert torch.equal(trained, F.linear(x, layer.weight, layer.bias)) and not taken
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x.float())
        layer(x[: linear.MAX_ROWS_DOT] if dtype == torch.bfloat16 else x[:1])
        assert not taken
        torch.testing.assert_close(layer(x), trained.detach())
    # The blocks of a bf16 weight are multiplied as a weight in fp32 is.
    assert taken == (["few_rows"] if dtype == torch.float32 else ["emulated_bf16", "few_rows"])
    assert layer(x[:0]).shape == (0, 1, 70)


def test_which_products_take_the_way_of_few_rows(monkeypatch):
    monkeypatch.setattr(linear, "MIN_ELEMENTS", 70 * 70)
    taken, way = [], linear.few_rows
    monkeypatch.setattr(linear, "few_rows", lambda x, *rest: taken.append(len(x)) or way(x, *rest))
    few, wide = linear.MAX_ROWS_WIDE, linear.MAX_ROWS_TALL
    for n_in, n_out, expected in ((70, 69, []), (71, 70, [2, few]), (70, 70, [2, few, few + 1, wide])):
        layer = Linear(n_in, n_out)
        with torch.no_grad():
            for rows in (1, 2, few, few + 1, wide, wide + 1):
                x = torch.randn(rows, n_in)
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert taken == expected, (n_in, n_out)
        taken.clear()


@pytest.mark.parametrize("rows", [1, 3])
def test_two_dtypes_are_refused_as_f_linear_does(rows, monkeypatch):
    monkeypatch.setattr(linear, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(linear, "EMULATED_BF16", True)
    with torch.no_grad():
        for x, weight in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            with pytest.raises(RuntimeError, match="dtype"):
                Linear(8, 70).to(weight)(torch.randn(rows, 8, dtype=x))

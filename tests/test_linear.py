"""The ways of `Linear` against the product in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules import linear
from modules.linear import Linear, few_rows, own_kernel, widened


def made(rows: int, n_in: int, n_out: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, n_in, generator=draw), torch.randn(n_out, n_in, generator=draw)
    return x, weight, torch.randn(n_out, generator=draw) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(33, 128), (7, 130), (300, 1000), (5, 3)])
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 40])
def test_products_are_those_of_fp64(rows, n_in, n_out, bias, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 2**12)  # several blocks, the last one short
    x, weight, b = made(rows, n_in, n_out, bias)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(few_rows(x, weight, b).double(), exact, atol=1e-4, rtol=1e-5)
    low = [None if t is None else t.bfloat16() for t in (x, weight, b)]
    exact = F.linear(*[None if t is None else t.double() for t in low])  # pyright: ignore
    for product in (widened, own_kernel):
        result = product(*low)  # pyright: ignore
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), exact, atol=1e-3, rtol=2**-8)  # rounded once


@pytest.mark.parametrize("before", [True, False])
def test_onednn_is_off_for_one_product_only(before, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
    seen, product = [], F.linear

    def spied(*args):
        seen.append(torch.backends.mkldnn.enabled)
        return product(*args)

    monkeypatch.setattr(linear.F, "linear", spied)
    x, weight = torch.randn(1, 96).bfloat16(), torch.randn(70, 96).bfloat16()
    own_kernel(x, weight, None)
    assert seen == [False] and torch.backends.mkldnn.enabled == before
    with pytest.raises(RuntimeError):
        own_kernel(x[:, 1:], weight, None)
    assert torch.backends.mkldnn.enabled == before


def test_a_packed_copy_of_a_weight_that_changed_is_not_used():
    layer = Linear(96, 70)
    x = torch.randn(3, 96)
    for change in (
        lambda: layer.weight.add_(1),
        lambda: layer.load_state_dict({"weight": torch.ones(70, 96), "bias": torch.zeros(70)}),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.ones(70, 96))),
    ):
        with torch.no_grad():
            way = layer.ways(3, torch.float32)["packed"].make()
            layer.fast = {(3, torch.float32): way}
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
            change()
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and layer.fast is None
            assert torch.equal(way(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("rows", [1, 3])
def test_two_dtypes_are_refused_as_f_linear_does(rows):
    with torch.no_grad():
        for x, weight in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            layer = Linear(8, 70).to(weight)
            for way in layer.ways(rows, weight).values():
                layer.fast = {(rows, weight): way.make()}
                with pytest.raises(RuntimeError, match="dtype"):
                    layer(torch.randn(rows, 8, dtype=x))

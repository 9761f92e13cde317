"""The weights that the run begins with against the reference: sampled, read from a base, or resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from adapters.layers import Bias, FullCopy, LowRank, TrainableRows
from config import ModelConfig
from guards.reference import said
from guards.reference.comparison import Comparison, Differs
from guards.reference.observed import adapter_of
from guards.subject import GuardSubject
from modules.quantized_linear import Linear4bit, StoredLinear
from reference import adapters
from reference.formats import BLOCK, NESTED_BLOCK, nf4_decoded, nf4_rounding
from reference.published import PUBLISHED, PublishedWeights, published_name
from reference.published_settings import behaviour, settings_of
from reference.weights import Start, shapes, start_of, unlike

WHOLE = 2**20  # Numbers: of a larger tensor some rows are compared.
SAMPLED = 2**17
STEP32 = torch.finfo(torch.float32).eps
INIT = "compare the initialisation with reference/weights.py and model.init"
LOADED = "compare the names and the order of rows with the published files"
ADAPTED = "compare what was added with the settings of lora"


def compare(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare every parameter with where it should come from, before the first update."""
    _names(subject, comparison)
    _memory(subject, comparison)
    said.compare(subject, comparison)
    if subject.start == "fresh":
        _fresh(subject, comparison)
    base = _base(subject, comparison)
    if base is not None and subject.base_folder is not None:
        _settings(subject, comparison, subject.base_folder)
    if base is not None and (subject.config.lora.r or subject.start == "loaded"):
        _loaded(subject, comparison, base)
    if base is not None and subject.config.lora.r:
        _adapted(subject, comparison, base)
    if subject.checkpoint is not None:
        _resumed(subject, comparison)


def _base(subject: GuardSubject, comparison: Comparison) -> PublishedWeights | None:
    """Return the published files of the base, if it has any that the reference reads."""
    if subject.base_folder is None:
        return None
    try:
        base = PublishedWeights(subject.base_folder)
    except FileNotFoundError:
        comparison.leave_out("the base", "its files are not safetensors")
        return None
    if base.family not in PUBLISHED:
        comparison.leave_out("the base", f"reference/published.py does not know the family {base.family}")
        return None
    return base


def _settings(subject: GuardSubject, comparison: Comparison, folder: Path) -> None:
    """Compare the settings of the model with those that config.json of the base means."""
    own = subject.config.model
    try:
        published = replace(settings_of(folder), vocab_size=own.vocab_size)  # New tokens may have been added.
    except (KeyError, ValueError) as error:
        comparison.leave_out("the base's settings", f"config.json cannot be read ({error})")
        return
    remedy = "compare what is read of config.json with reference/published_settings.py"
    compare_settings(comparison, "config.json of the base", own, published, remedy)


def compare_settings(
    comparison: Comparison, where: str, own: ModelConfig, published: ModelConfig, remedy: str
) -> None:
    """Compare the settings that bear on what a model computes, one by one."""
    found, expected = behaviour(own), behaviour(published)
    for key in found:
        comparison.exact(f"{where}, {key}", found[key], expected.get(key), remedy)


# --- names and memory ---------------------------------------------------------------------------------


def _own(subject: GuardSubject, name: str) -> tuple[nn.Module, nn.Module | None, str]:
    """Return the base's module of a parameter, its adapter layer, and whether it is a weight or a bias."""
    path, _, kind = name.rpartition(".")
    base, layer = adapter_of(subject.model.get_submodule(path))
    return base, layer, kind


def shape_of(base: nn.Module, kind: str) -> tuple[int, ...] | None:
    """Return the shape of a parameter, also where it is stored in fewer bits."""
    if kind == "weight" and isinstance(base, Linear4bit | StoredLinear):
        return base.out_features, base.in_features
    parameter = base._parameters.get(kind)
    return None if parameter is None else tuple(parameter.shape)


def _names(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare names and shapes of all parameters with those that the settings mean."""
    expected = shapes(subject.config.model)
    found: dict[str, tuple[int, ...]] = {}
    for path, module in subject.model.named_modules():
        is_inner = ".base." in f".{path}." or ".adapters." in f".{path}."
        if is_inner or not path:
            continue
        for kind in ("weight", "bias"):
            shape = shape_of(adapter_of(module)[0], kind)
            if shape is not None:
                found[f"{path}.{kind}"] = shape
    if subject.config.model.tie_embeddings:
        comparison.exact("head.weight, shape", found.pop("head.weight", None), expected["embed.weight"], INIT)
    for name in dict.fromkeys([*expected, *found]):
        comparison.exact(f"{name}, shape", found.get(name), expected.get(name), INIT)


def _memory(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare which parameters lie in one memory: none but those of a tied embedding and head."""
    places: dict[int, str] = {}
    for name, parameter in subject.model.named_parameters(remove_duplicate=False):
        if not parameter.numel():
            continue
        first = places.setdefault(parameter.data_ptr(), name)
        tied = subject.config.model.tie_embeddings and _is_table(first) and _is_table(name)
        if first != name and not tied:
            raise Differs(f"{name}, memory", f"it is that of {first}", INIT)
    if subject.config.model.tie_embeddings:
        head, embed = (adapter_of(module)[0].weight for module in (subject.model.head, subject.model.embed))
        comparison.exact("head.weight, memory", head is embed, True, "tie the head to the embedding")


def _is_table(name: str) -> bool:
    return name.startswith(("embed.", "head."))


# --- a fresh model ------------------------------------------------------------------------------------


def _fresh(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare every tensor with the distribution that it should be sampled from; no two may be equal."""
    config = subject.config.model
    digests: dict[tuple[Any, ...], str] = {}
    for name, shape in shapes(config).items():
        base, _, kind = _own(subject, name)
        values, start = base.get_parameter(kind).detach(), start_of(config, name, shape)
        wrong = unlike(values, start)
        if wrong is not None:
            raise Differs(f"{name}, first values", wrong, INIT)
        comparison.exact(f"{name}, first values", None, None, INIT)
        if start.kind != "constant":
            _refuse_equal(digests, name, values, f"{name}, first values")


def _refuse_equal(digests: dict[tuple[Any, ...], str], name: str, values: Tensor, stage: str) -> None:
    """Raise Differs for a tensor that begins as another one, up to its scale: one that was sampled anew."""
    line = values.flatten()[:8].double()
    if len(line) < 4 or not float(line.abs().max()):
        return
    key = tuple(round(float(x), 4) for x in line / line.abs().max())
    other = digests.setdefault(key, name)
    if other != name:
        raise Differs(stage, f"they are those of {other}", "sample each tensor by itself")


# --- a loaded base ------------------------------------------------------------------------------------


def _loaded(subject: GuardSubject, comparison: Comparison, base: PublishedWeights) -> None:
    """Compare the weights of the base in memory with the published files, through the reference's names."""
    for name, shape in shapes(subject.config.model).items():
        module, _, kind = _own(subject, name)
        stored, in_4_bits = base.shape(name), kind == "weight" and isinstance(module, Linear4bit)
        asked = subject.config.lora.r > 0 and subject.config.train.base_format == "nf4"
        asked = asked and name.startswith("blocks.") and len(shape) == 2
        comparison.exact(f"{name} of the base, in 4 bits", in_4_bits, asked, "what base_format asks for")
        if isinstance(module, Linear4bit) and in_4_bits:
            _loaded_nf4(comparison, base, name, module)
            continue
        n = stored[0]
        for start, stop in pieces(stored):
            expected = base.rows(name, start, stop)
            found = _rows(module, kind, start, stop)
            expected = as_stored(expected, module, _format(subject)).to(found.dtype).double()
            explanations = {}
            if shape[0] == shape[-1]:
                explanations["the matrix transposed"] = lambda name=name, n=n, piece=slice(start, stop): (
                    base.rows(name, 0, n).T[piece]
                )
            comparison.close(f"{name} of the base", found, expected, 0.0, LOADED, explanations)
        if shape[0] > n:
            _new_rows(subject, comparison, base, name, n)


def as_stored(values: Tensor, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return published numbers as a module has them, whose base is stored in a number format."""
    if isinstance(module, StoredLinear) and values.dtype == torch.float16 and values.dim() > 1:
        return values  # It has 16 bits already, which bf16 would round.
    return values.to(dtype)


def _format(subject: GuardSubject) -> torch.dtype:
    """Return the number format that a base's own numbers are rounded to, by `base_format`.

    With nf4 it is that of all that is not in 4 bits. Weights that train are fp32.
    """
    if not subject.config.lora.r or subject.config.train.base_format in ("fp32", "auto"):
        return torch.float32
    return torch.bfloat16


def pieces(shape: tuple[int, ...], most: int = WHOLE) -> Iterator[tuple[int, int]]:
    """Yield the rows that are compared, from and up to: all, or some anywhere, and the last ones.

    Args:
        most: Numbers of a tensor that is compared whole.
    """
    n, width = shape[0], shape[-1] if len(shape) > 1 else 1
    if n * width <= most:
        yield 0, n
        return
    # Of a nested block of NF4 each piece has all, so that it can be decoded by itself.
    step = BLOCK * NESTED_BLOCK // gcd(width, BLOCK * NESTED_BLOCK)
    rows = max(step, SAMPLED // width // step * step)
    start = int(torch.randint(max(1, n - rows), ())) // step * step
    yield start, min(n, start + rows)
    yield (n - 1) // step * step, n


def _rows(module: nn.Module, kind: str, start: int, stop: int) -> Tensor:
    """Return rows of a parameter in the format in which it is stored."""
    if kind == "weight" and isinstance(module, StoredLinear):
        return module.stored_weight[start:stop]
    return module.get_parameter(kind).detach()[start:stop]


def _loaded_nf4(comparison: Comparison, base: PublishedWeights, name: str, module: Linear4bit) -> None:
    """Compare a matrix in 4 bits with the file's: each number is one of 16, times its block's scale."""
    packed, absmax, nested, offset = module.stored
    for start, stop in pieces(base.shape(name)):
        file = base.rows(name, start, stop).double()
        first, last = start * module.in_features, stop * module.in_features
        scales = absmax[first // BLOCK : -(last // -BLOCK)]
        nested_scales = nested[first // BLOCK // NESTED_BLOCK :]
        codes = packed.flatten()[first // 2 : -(last // -2)]
        found = nf4_decoded(codes, scales, nested_scales, offset, tuple(file.shape)).cpu()
        bound = nf4_rounding(file, nested_scales.cpu()) * (1 + 4 * STEP32)
        beyond = (found - file).abs() > bound
        if bool(beyond.any()):
            what = f"{int(beyond.sum())} of {beyond.numel()} numbers are not what the file's round to"
            raise Differs(f"{name} of the base, in 4 bits", what, LOADED)
        comparison.exact(f"{name} of the base, in 4 bits", None, None, LOADED)


def _new_rows(
    subject: GuardSubject, comparison: Comparison, base: PublishedWeights, name: str, n: int
) -> None:
    """Compare rows of new tokens, from `n` on, with the mean of the published ones (Hewitt 2021)."""
    module, _, kind = _own(subject, name)
    found = _rows(module, kind, n, subject.config.model.vocab_size)
    known = as_stored(base.rows(name, 0, n), module, _format(subject))
    mean = known.double().mean(dim=0, keepdim=True) if known.numel() <= WHOLE * 128 else None
    if mean is None:
        comparison.leave_out(f"{name}, rows of new tokens", "the table is large")
        return
    # A mean of n numbers in fp32, relative to the largest mean: the numbers themselves may be larger.
    # Of a mean of zero, such as that of a bias of zeros, differences are absolute.
    step = torch.finfo(found.dtype).eps + STEP32 * float(known.abs().max()) / (float(mean.abs().max()) or 1.0)
    tolerance = step * max(1.0, n**0.5 / 4)
    expected = mean.expand(found.shape)
    comparison.close(f"{name}, rows of new tokens", found, expected, tolerance, LOADED)


# --- adapters -----------------------------------------------------------------------------------------


def _adapted(subject: GuardSubject, comparison: Comparison, base: PublishedWeights) -> None:
    """Compare which modules have which adapter, and with what it starts."""
    lora, config = subject.config.lora, subject.config.model
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in [*shapes(config), "head.weight"]))
    for path in modules:
        full = published_name(base.family, path)
        _, layer = adapter_of(subject.model.get_submodule(path))
        copied = any(adapters.named(full, key) for key in lora.train_modules)
        is_norm = path.endswith("norm")
        targeted = not copied and not is_norm and adapters.is_target(lora, path, full)
        is_table = path in ("embed", "head")
        expected = (
            "a full copy" if copied else "a low-rank term" if targeted
            else "rows of new tokens" if lora.new_tokens and is_table
            else "a bias" if lora.bias == "all" and f"{path}.bias" in shapes(config) else "nothing"
        )  # fmt: skip
        comparison.exact(f"{full}, what trains", _kind(layer), expected, ADAPTED)
        if isinstance(layer, LowRank):
            _low_rank(subject, comparison, base, path, layer)
    _shared_rows(subject, comparison)
    _what_trains(subject, comparison)


def _shared_rows(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare whether embedding and head train the same rows of new tokens: those that are tied do."""
    embed, head = (adapter_of(module)[1] for module in (subject.model.embed, subject.model.head))
    if isinstance(embed, TrainableRows) and isinstance(head, TrainableRows):
        is_shared, tied = head.rows is embed.rows, subject.config.model.tie_embeddings
        comparison.exact("rows of new tokens, one for embedding and head", is_shared, tied, ADAPTED)


KINDS = {
    FullCopy: "a full copy",
    LowRank: "a low-rank term",
    TrainableRows: "rows of new tokens",
    Bias: "a bias",
}


def _kind(layer: nn.Module | None) -> str:
    return "nothing" if layer is None else KINDS[type(layer)]


def _low_rank(
    subject: GuardSubject, comparison: Comparison, base: PublishedWeights, path: str, layer: LowRank
) -> None:
    """Compare rank, scale and first values of a low-rank term."""
    lora, full = subject.config.lora, published_name(base.family, path)
    stage = f"{full}, adapter"
    table = "embed" if path == "head" and subject.config.model.tie_embeddings else path
    n_out, n_in = shapes(subject.config.model)[f"{table}.weight"]
    if path in ("embed", "position"):
        n_out, n_in = n_in, n_out
    r, scale = adapters.rank(lora, full), adapters.scale(lora, full)
    comparison.exact(
        f"{stage}, shapes", [(*layer.a.shape,), (*layer.b.shape,)], [(r, n_in), (n_out, r)], ADAPTED
    )
    comparison.exact(f"{stage}, DoRA", layer.magnitude is not None, lora.dora, ADAPTED)
    own = torch.tensor([float(layer.scale)])
    comparison.close(f"{stage}, scale", own, torch.tensor([scale]), 1e-9, ADAPTED)
    has_bias = layer.bias is not None
    wants = lora.bias != "none" and f"{path}.bias" in shapes(subject.config.model)
    comparison.exact(f"{stage}, trains its bias", has_bias, wants, ADAPTED)
    if subject.start == "loaded":
        _first_change(comparison, stage, layer, path, lora.init)


def _first_change(comparison: Comparison, stage: str, layer: LowRank, path: str, init: str) -> None:
    """Compare the start of an adapter: it changes nothing, and one of its factors is random.

    A is sampled as PEFT does, uniformly up to 1 / sqrt(inputs); of an embedding it is B, N(0, 1). With PiSSA
    both are singular parts, and their product is taken off again.
    """
    a, b = layer.a.detach(), layer.b.detach()
    if path in ("embed", "position"):
        starts = (Start("constant", 0.0), Start("normal", 1.0))
    elif init == "pissa":
        equal = (
            layer.start_a is not None
            and layer.start_b is not None
            and torch.equal(layer.start_a, a)
            and torch.equal(layer.start_b, b)
        )
        comparison.exact(f"{stage}, PiSSA's start is taken off", equal, True, ADAPTED)
        return
    else:
        starts = (Start("uniform", a.size(1) ** -0.5), Start("constant", 0.0))
    for name, values, start in (("A", a, starts[0]), ("B", b, starts[1])):
        wrong = unlike(values, start)
        if wrong is not None:
            raise Differs(f"{stage}, first {name}", wrong, ADAPTED)
        comparison.exact(f"{stage}, first {name}", None, None, ADAPTED)


def _what_trains(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare which parameters train: those of the adapter and no other."""
    for name, parameter in subject.model.named_parameters():
        comparison.exact(f"{name}, trains", parameter.requires_grad, ".adapters." in f".{name}", ADAPTED)


# --- a resumed run ------------------------------------------------------------------------------------


def _resumed(subject: GuardSubject, comparison: Comparison) -> None:
    """Compare every parameter that trains with the checkpoint's file, which has tied ones once."""
    assert subject.checkpoint is not None
    remedy = "look for what changes weights after they were restored"
    with safe_open(subject.checkpoint / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        found = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
        for name, parameter in found.items():
            comparison.exact(f"{name} is in the checkpoint", name in keys, True, remedy)
            stored = file.get_slice(name)
            for start, stop in pieces(tuple(parameter.shape)) if parameter.dim() else ():
                stage = f"{name} of the checkpoint"
                comparison.close(stage, parameter[start:stop], stored[start:stop], 0.0, remedy)

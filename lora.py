"""Low-rank adapters beside any linear or embedding (LoRA, arXiv:2106.09685), which stays as it is.

    add_adapter(model, LoraConfig(r=16, targets=("c_attn", "c_proj")), family.key)
    print(trainable_table(model))                # what trains
    with adapters_disabled(model): ...           # the base alone

A module that an adapter changes is replaced by a wrapper that has it as `.base` and one layer of each
adapter: a low-rank term, rows of new tokens, a trained bias, or a full trained copy. The base is only ever
called and asked for its weight, so that it may be stored in 4 bits. It is never written to, not even by a
PiSSA start; so any number of adapters share it, and switching them off gives it back bit for bit.

The meaning is that of Hugging Face PEFT, tensor by tensor; `pretrained/load_adapter.py` and
`pretrained/save_adapter.py` read and write its files, and `pretrained/merging.py` puts adapters into the
weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.layers import (
    AdapterLayer,
    Bias,
    FullCopy,
    LowRank,
    TrainableRows,
    is_embedding,
    is_linear,
    is_plain,
    sizes,
    weight_of,
)
from adapters.products import add_term, dropped, linear_with_term
from adapters.targets import matches, pattern_value, select_targets
from config import LoraConfig
from modules.quantized_linear import n_weights

# --- wrappers ----------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A module with the layers of its adapters: here a bias or a full copy, as a norm may have.

    Attributes it lacks are its base's; `weight` and `bias` are those of a trained copy while it is active.
    """

    base: nn.Module

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.adapter_weights: dict[str, float] = {}  # By name the weight of each active adapter.
        self.enabled = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    def active(self) -> list[tuple[Any, float]]:
        """Return the active adapter layers, each with its adapter weight."""
        if not self.enabled:
            return []
        return [
            (self.adapters[name], adapter_weight)
            for name, adapter_weight in self.adapter_weights.items()
            if name in self.adapters
        ]

    def whole(self) -> nn.Module | None:
        """Return the full copy that stands in for the base, if an active adapter has one."""
        return next((layer.copy for layer, _ in self.active() if isinstance(layer, FullCopy)), None)

    def trained_bias(self) -> Tensor | None:
        """Return the bias of an active adapter, if one trains it."""
        for layer, _ in self.active():
            if getattr(layer, "bias", None) is not None:
                return layer.bias
        return None

    @property
    def weight(self) -> Any:
        return weight_of(self.whole() or self.base)

    @property
    def bias(self) -> Any:
        whole, bias = self.whole(), self.trained_bias()
        return getattr(whole or self.base, "bias", None) if bias is None else bias

    def _by_base(self, x: Tensor) -> Tensor:
        """Call the base, with the trained bias in the place of its own."""
        bias = self.trained_bias()
        if bias is None:
            return self.base(x)
        kept: Any = self.base.bias
        return torch.func.functional_call(self.base, {"bias": bias.to(kept.dtype)}, (x,))

    def forward(self, x: Tensor) -> Tensor:
        layers = self.active()
        if layers and isinstance(layers[0][0], FullCopy):
            out = layers[0][0](x)
            return out.to(x.dtype) if x.is_floating_point() else out.to(weight_of(self.base).dtype)
        return self._by_base(x)


class LogitTerms(NamedTuple):
    """The terms that a head's adapters add to its logits, hidden (N, I) x weight (O, I)^T + bias (O)."""

    u: Tensor  # (N, k)
    v: Tensor  # (O, k); u v^T is added.
    inputs: tuple[Tensor, ...]  # (N, I) for each DoRA, what it is given.
    factors: tuple[Tensor, ...]  # (O,) for each DoRA; factor * (input weight^T) is added.


class LoraLinear(Adapted):
    """A linear (in_features, out_features) with adapters: x (..., I) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        layers = self.active()
        if not any(isinstance(layer, LowRank | TrainableRows) for layer, _ in layers):
            return super().forward(x)
        # With more than two dimensions the product would be a view, which cannot be added to in place.
        flat = x.reshape(-1, x.size(-1))
        composed = torch.compiler.is_compiling() or any(
            isinstance(layer, LowRank) and layer.magnitude is not None for layer, _ in layers
        )
        out = self._composed(flat, layers) if composed else self._in_place(flat, layers)
        return out.view(*x.shape[:-1], out.size(-1))

    def _in_place(self, x: Tensor, layers: list[tuple[Any, float]]) -> Tensor:
        """Add each low-rank term to the base's output where it lies, by gradients that are written out."""
        terms = [(layer, adapter_weight) for layer, adapter_weight in layers if isinstance(layer, LowRank)]
        if is_plain(self.base) and self.trained_bias() is None and len(terms) == len(layers) == 1:
            ((layer, adapter_weight),), base = terms, cast(nn.Linear, self.base)
            return linear_with_term(
                x, base.weight, base.bias, *layer.factors(), adapter_weight * layer.scale, layer.sample_mask()
            )
        out = self._by_base(x)
        for layer, adapter_weight in terms:
            out = add_term(out, x, *layer.factors(), adapter_weight * layer.scale, layer.sample_mask())
        return self._with_rows(out, x, layers)

    def _composed(self, x: Tensor, layers: list[tuple[Any, float]]) -> Tensor:
        """Compute by autograd what `_in_place` does, and DoRA: gain * (x W^T + scale * x a^T b^T) + bias."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        plain = self._without_bias(x)
        out = plain
        for layer, adapter_weight in layers:
            if not isinstance(layer, LowRank):
                continue
            (a, b), drop = layer.factors(), layer.sample_mask()
            given = dropped(x, drop)
            term = F.linear(F.linear(given.to(out.dtype), a.to(out.dtype)), b.to(out.dtype)) * layer.scale
            gain = layer.gain(self.base)
            if gain is not None:
                gain = gain.to(out.dtype)
                term = gain * term + (gain - 1) * (plain if drop is None else self._without_bias(given))
            out = out + (adapter_weight * term).to(out.dtype)
        trained = self.trained_bias()
        bias = bias if trained is None else trained
        out = out if bias is None else out + bias.to(out.dtype)
        return self._with_rows(out, x, layers)

    def _without_bias(self, x: Tensor) -> Tensor:
        bias: Tensor | None = getattr(self.base, "bias", None)
        return self.base(x) if bias is None else self.base(x) - bias

    def _with_rows(self, out: Tensor, x: Tensor, layers: list[tuple[Any, float]]) -> Tensor:
        for layer, adapter_weight in layers:
            if isinstance(layer, TrainableRows):
                term = F.linear(x, adapter_weight * layer.delta().to(x.dtype))
                out = out.index_add(-1, layer.ids, term.to(out.dtype))
        return out

    def terms(self, hidden: Tensor) -> LogitTerms | None:
        """Return what adapters add to the logits of `hidden` (N, I), for a loss that makes them in chunks."""
        pairs: list[tuple[Tensor, Tensor]] = []
        inputs: list[Tensor] = []
        factors: list[Tensor] = []
        for layer, adapter_weight in self.active():
            if isinstance(layer, LowRank):
                given, (a, b) = dropped(hidden, layer.sample_mask()), layer.factors()
                u = F.linear(given, a.to(given.dtype)) * (adapter_weight * layer.scale)
                gain = layer.gain(self.base)
                if gain is not None:
                    b = gain[:, None] * b
                    inputs.append(given)
                    factors.append(adapter_weight * (gain - 1))
                pairs.append((u.to(hidden.dtype), b))
            elif isinstance(layer, TrainableRows):
                u = F.linear(hidden, adapter_weight * layer.delta().to(hidden.dtype))
                columns = torch.zeros(self.out_features, len(layer.ids), device=u.device)
                columns[layer.ids, torch.arange(len(layer.ids), device=u.device)] = 1
                pairs.append((u.to(hidden.dtype), columns))
        if not pairs:
            return None
        u, v = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
        return LogitTerms(u, v, tuple(inputs), tuple(factors))


class LoraEmbedding(Adapted):
    """An embedding (V, C) with adapters: ids (...) -> (..., C). An embedding's adapter has no dropout."""

    def forward(self, x: Tensor) -> Tensor:
        layers = self.active()
        if not any(isinstance(layer, LowRank | TrainableRows) for layer, _ in layers):
            return super().forward(x)
        out = plain = self.base(x)
        for layer, adapter_weight in layers:
            if isinstance(layer, LowRank):
                a, b = layer.factors()
                term = F.linear(F.embedding(x, a.t()), b) * layer.scale
                gain = layer.gain(self.base)
                if gain is not None:
                    term = gain * term + (gain - 1) * plain
            else:
                slots = layer.slots[x]
                inside = (slots >= 0).unsqueeze(-1)
                term = torch.where(inside, F.embedding(slots.clamp(min=0), layer.delta()), 0.0)
            out = out + (adapter_weight * term).to(out.dtype)
        return out


# --- adapters of a model ---------------------------------------------------------------------------


def held_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have weights, by name; a wrapper stands for what it wraps."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            # is_linear comes first: the weight of a quantised linear is decoded at each access.
            if is_linear(child) or is_embedding(child) or getattr(child, "weight", None) is not None:
                found[full] = child
            if not isinstance(child, Adapted):
                walk(child, f"{full}.")

    walk(model, "")
    return found


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was added."""

    config: LoraConfig
    published: dict[str, str]  # By our name the published one, of every module of the model.


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters that were added, by name."""
    return model.__dict__.setdefault("_adapters", {})


def wrappers(model: nn.Module) -> dict[str, Adapted]:
    """Return the modules that adapters change, by our names."""
    return {name: module for name, module in held_modules(model).items() if isinstance(module, Adapted)}


def adapter_layers(model: nn.Module, name: str) -> dict[str, AdapterLayer]:
    """Return the layers of an adapter, by our module name."""
    found: Any = {
        our: module.adapters[name] for our, module in wrappers(model).items() if name in module.adapters
    }
    return found


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    published: Callable[[str], str] = lambda name: name,
    name: str = "default",
    new_rows: Sequence[int] | Mapping[str, Sequence[int]] = (),
    any_rank: bool = False,
) -> None:
    """Freeze the model and add an adapter, which alone is active and alone trains.

    Args:
        model: Its linears and embeddings are replaced in place by wrappers that hold them.
        config: What trains; `new_tokens` is not read, their ids are `new_rows`.
        published: Our module name -> published name, as `pretrained.Family.key`.
        name: The adapter's name, an identifier.
        new_rows: Token ids whose rows of `embed` and `head` train while the rest of both is frozen; tied,
            they are the same rows. In one that is a target they train as its other rows do, by its low-rank
            term, where each row has r numbers of its own. A mapping gives ids by module, `embed` or `head`.
        any_rank: Take a rank above a weight's larger side, as files may have; a user who wants one errs.

    Raises:
        ValueError: A name matches no module, a value is out of range, or the name is taken.
    """
    _refuse_bad(model, config, name)
    modules = held_modules(model)
    names = {our: published(our) for our in modules}
    selection = _select(modules, names, config, new_rows)
    layers = _make_layers(modules, names, config, selection, any_rank)
    model.requires_grad_(False)
    for our, layer in layers.items():
        module = modules[our]
        if not isinstance(module, Adapted):
            kind = LoraLinear if is_linear(module) else LoraEmbedding if is_embedding(module) else Adapted
            wrapper = kind(module).train(module.training)
            model.set_submodule(our, wrapper)
            module = wrapper
        layer.requires_grad_(True)
        module.adapters[name] = layer.train(module.training)
    adapters_of(model)[name] = Adapter(config, names)
    use_adapters(model, {name: 1.0})


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter and what it takes; the modules stay wrapped, which changes nothing."""
    for module in wrappers(model).values():
        module.adapter_weights.pop(name, None)
        if name in module.adapters:
            del module.adapters[name]
    adapters_of(model).pop(name, None)


class _Selection(NamedTuple):
    """The modules that an adapter trains, by our names."""

    targets: list[str]  # These get a low-rank term.
    copies: list[str]  # A full copy of these trains.
    rows: dict[str, list[int]]  # The rows of these ids train.


def _select(
    modules: Mapping[str, nn.Module],
    names: Mapping[str, str],
    config: LoraConfig,
    new_rows: Sequence[int] | Mapping[str, Sequence[int]],
) -> _Selection:
    """Return the modules that the settings mean; `names` are ours -> published.

    Experts are none of them: PEFT knows no adapter of one expert, whose matrices transformers holds as one.
    """
    names = {our: full for our, full in names.items() if ".experts." not in our}
    copies = select_targets(names, config.train_modules, "lora.train_modules")
    able = {
        our: full
        for our, full in names.items()
        if our not in copies and (is_linear(modules[our]) or is_embedding(modules[our]))
    }
    targets = select_targets(able, config.targets)
    _refuse_unmatched_patterns(config, [names[our] for our in targets])
    rows = _rows_by_module(modules, new_rows, copies, names)
    return _Selection(targets, copies, {our: ids for our, ids in rows.items() if our not in targets})


def _refuse_unmatched_patterns(config: LoraConfig, targets: Sequence[str]) -> None:
    """Refuse a rank or an alpha of its own for a module that is no target; `targets` are published names."""
    for setting, pattern in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        unmatched = [key for key in pattern if not any(matches(full, key) for full in targets)]
        if unmatched:
            leaves = dict.fromkeys(full.rsplit(".", 1)[-1] for full in targets)
            raise ValueError(
                f"lora.{setting}_pattern has {', '.join(unmatched)}, which matches none of the targets; they "
                f"are {', '.join(leaves)}; name them by the end of their full name, or by all of it with *"
            )


def _make_layers(
    modules: Mapping[str, nn.Module],
    names: Mapping[str, str],
    config: LoraConfig,
    selection: _Selection,
    any_rank: bool,
) -> dict[str, AdapterLayer]:
    """Return a new adapter layer for each module that the adapter changes, by our name."""
    layers: dict[str, AdapterLayer] = {}
    shared: nn.Parameter | None = None  # the rows of a tied embedding, which the head trains too
    for our, module in modules.items():
        base = base_of(module)
        has_bias = config.bias == "all" or (config.bias == "lora_only" and our in selection.targets)
        old = getattr(base, "bias", None)
        bias = nn.Parameter(old.detach().float().clone()) if has_bias and old is not None else None
        if our in selection.copies:
            layers[our] = FullCopy(base)
        elif our in selection.targets:
            layers[our] = _make_low_rank(base, names[our], config, bias, any_rank)
        elif our in selection.rows:
            ids = selection.rows[our]
            tied = weight_of(base) is weight_of(base_of(modules["embed"]))
            tied = tied and ids == selection.rows.get("embed")
            layer = TrainableRows(base, ids, bias, shared if tied else None)
            layers[our], shared = layer, layer.rows
        elif bias is not None:
            layers[our] = Bias(bias)
    return layers


def _make_low_rank(
    base: nn.Module, full: str, config: LoraConfig, bias: nn.Parameter | None, any_rank: bool
) -> LowRank:
    """Return the low-rank term of a target; errors call it by its published name `full`."""
    r = pattern_value(config.rank_pattern, full, config.r)
    alpha = pattern_value(config.alpha_pattern, full, config.alpha)
    if r > max(sizes(base)) and not any_rank:
        raise ValueError(
            f"{full}: a rank of {r} was asked for, and the weight is "
            f"{' x '.join(map(str, sizes(base)))}; lower lora.r or its pattern to "
            f"{max(sizes(base))} at most"
        )
    try:
        return LowRank(base, config, r, alpha, bias)
    except ValueError as error:
        raise ValueError(f"{full}: {error}") from None


def base_of(module: nn.Module) -> nn.Module:
    """Return the module that a wrapper has as its base; a module without adapters is returned itself."""
    return module.base if isinstance(module, Adapted) else module


def refuse_merged(model: nn.Module) -> None:
    """Raise a ValueError if the model's adapters are merged into its weights."""
    if "_merged" in model.__dict__:
        raise ValueError("the model's adapters are merged into its weights; call unmerge first")


def _refuse_bad(model: nn.Module, config: LoraConfig, name: str) -> None:
    refuse_merged(model)
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be called {name!r}; use letters, digits and underscores")
    if name in adapters_of(model):
        raise ValueError(f"the model has an adapter {name!r} already; give the new one another name")
    if not config.targets:
        raise ValueError("lora.targets is empty; name at least one module, or use all-linear")
    for setting, r in {
        "r": config.r,
        **{f"rank_pattern.{k}": v for k, v in config.rank_pattern.items()},
    }.items():
        if type(r) is not int or r < 1:
            raise ValueError(f"lora.{setting} is {r!r}; a rank is a whole number of at least 1")
    for setting, alpha in {
        "alpha": config.alpha,
        **{f"alpha_pattern.{k}": v for k, v in config.alpha_pattern.items()},
    }.items():
        if not 0 < alpha < math.inf:
            raise ValueError(f"lora.{setting} is {alpha}; it must be above 0, or the adapter changes nothing")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"lora.dropout is {config.dropout}; it must be at least 0 and below 1")


def _rows_by_module(
    modules: Mapping[str, nn.Module],
    new_rows: Sequence[int] | Mapping[str, Sequence[int]],
    whole: Sequence[str],
    names: Mapping[str, str],
) -> dict[str, list[int]]:
    """Return the ids whose rows train, by module."""
    if not new_rows:
        return {}
    if "embed" not in modules:
        raise ValueError("rows of new tokens were asked for, but the model has no module `embed`")
    if not isinstance(new_rows, Mapping):
        new_rows = {our: new_rows for our in ("embed", "head") if our in modules}
    for our, ids in new_rows.items():
        if our in whole:
            raise ValueError(f"{names[our]} trains already, whole; leave it out there, or train no rows")
        size = weight_of(modules[our]).size(0)
        if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= size:
            raise ValueError(
                f"rows of the ids {min(ids)} to {max(ids)} were asked for; they must differ and be below "
                f"{size}, the model's vocabulary"
            )
    return {our: list(ids) for our, ids in new_rows.items()}


def use_adapters(model: nn.Module, adapter_weights: Mapping[str, float]) -> None:
    """Make exactly these adapters active: the base plus the sum of adapter weight * change of each.

    For low-rank terms this is what PEFT's `add_weighted_adapter` makes with `combination_type="cat"` without
    rsLoRA, whose scale that leaves out (its "linear" adds a and b apart, which gives products across
    adapters). Each DoRA's change is taken against the base alone. An empty mapping gives the base. What
    trains is left as it is.

    Raises:
        ValueError: An adapter is not known, or whole copies or biases would have to be mixed.
    """
    refuse_merged(model)
    known = adapters_of(model)
    for name, adapter_weight in adapter_weights.items():
        if name not in known:
            raise ValueError(f"there is no adapter {name!r}; the model has {', '.join(known) or 'none'}")
        if not math.isfinite(adapter_weight):
            raise ValueError(
                f"the adapter {name!r} was given the weight {adapter_weight}; it must be a number"
            )
    found = wrappers(model)
    for our, module in found.items():
        here = [(name, module.adapters[name]) for name in adapter_weights if name in module.adapters]
        whole = [name for name, layer in here if isinstance(layer, FullCopy)]
        biased = [name for name, layer in here if getattr(layer, "bias", None) is not None]
        if (whole and len(here) > 1) or len(biased) > 1:
            raise ValueError(
                f"the adapters {' and '.join(name for name, _ in here)} cannot be active together: "
                f"they train {our} whole, or its bias; use one of them at a time"
            )
        for name in whole + biased:
            if adapter_weights[name] != 1:
                raise ValueError(
                    f"the adapter {name!r} trains {our} whole, or its bias, which has no weight of "
                    f"{adapter_weights[name]}; use 1"
                )
    for module in found.values():
        module.adapter_weights = dict(adapter_weights)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Give the base alone, bit for bit, inside the block; ValueError where adapters are merged into it."""
    refuse_merged(model)
    found = wrappers(model).values()
    before = [module.enabled for module in found]
    try:
        for module in found:
            module.enabled = False
        yield
    finally:
        for module, enabled in zip(found, before, strict=True):
            module.enabled = enabled


# --- what trains -------------------------------------------------------------------------------------


def trainable_table(model: nn.Module, published: Callable[[str], str] | None = None) -> str:
    """Return a table of what trains, by kind and published name, with its percentage of all parameters.

    ValueError where the adapters are merged.
    """
    refuse_merged(model)
    named: dict[str, str] = {}
    for adapter in adapters_of(model).values():
        named |= adapter.published
    lines: dict[tuple[str, ...], list[int]] = {}
    seen: set[int] = set()
    for our, module in held_modules(model).items():
        full = published(our) if published else named.get(our, our)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", full)
        layers: Any = module.adapters.values() if isinstance(module, Adapted) else [module]
        for layer in layers:
            fresh = [p for p in layer.parameters() if p.requires_grad and id(p) not in seen]
            if not fresh:
                continue
            seen |= {id(p) for p in fresh}
            rank, alpha = ("", "")
            kind = {TrainableRows: "rows", Bias: "bias"}.get(type(layer), "whole")
            if isinstance(layer, LowRank):
                kind = "low rank" if layer.magnitude is None else "DoRA"
                rank, alpha = str(layer.r), f"{layer.alpha:g}"
            elif isinstance(layer, TrainableRows):
                rank = str(len(layer.ids))
            line = lines.setdefault((kind, pattern, rank, alpha), [0, 0])
            line[0] += 1
            line[1] += sum(p.numel() for p in fresh)
    total = sum(count for _, count in lines.values())
    frozen = n_weights(model) - sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = max([len(key[1]) for key in lines] + [len("module")])
    head = f"{'trains':<9} {'module':<{width}} {'modules':>7} {'rank':>5} {'alpha':>6} {'parameters':>13}"
    body = [
        f"{kind:<9} {pattern:<{width}} {modules:>7} {rank:>5} {alpha:>6} {count:>13,}"
        for (kind, pattern, rank, alpha), (modules, count) in lines.items()
    ]
    percent = 100 * total / max(total + frozen, 1)
    last = f"{total:,} parameters train beside {frozen:,} frozen ones: {percent:.2f}%"
    return "\n".join([head, "-" * len(head), *body, last])

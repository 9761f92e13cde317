"""What the run's own model holds and computes, as the reference names it: effective weights, and stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from adapters.layers import FullCopy, LowRank, TrainableRows
from architecture import Decoder
from config import LoraConfig, ModelConfig
from guards.subject import GuardSubject
from lora import Adapted, adapters_of
from modules.quantized_linear import Linear4bit, StoredLinear
from reference.adapters import effective, scale, with_rows
from reference.formats import BLOCK, NESTED_BLOCK, nf4_decoded
from reference.published import PUBLISHED, family_of, published_name

ADAPTER = "default"  # The name of the adapter that a run trains.
TABLES = ("embed", "position")


class RunWeights(Mapping[str, Tensor]):
    """The weights that the run's model multiplies by, in fp64, decoded and with their adapters.

    They are computed at each access, since those of a large model would not fit beside it. The name
    `blocks.0.mlp.up.weight` is that of a model without adapters.

    Args:
        published: Our module name -> published name, by which settings give ranks and alphas.
    """

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        lora: LoraConfig,
        published: Callable[[str], str] = lambda name: name,
    ):
        self.model, self.config, self.lora, self.published = model, config, lora, published

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, slice(None))

    def part(self, name: str, rows: slice) -> Tensor:
        """Return some rows of a weight; a table that has no adapter stays in its format."""
        path, _, kind = name.rpartition(".")
        module = self.model.get_submodule(path)
        base, layer = adapter_of(module)
        if path == "head" and kind == "weight" and self.config.tie_embeddings:
            base = adapter_of(self.model.embed)[0]
        if isinstance(layer, FullCopy):
            return _plain(layer.copy.get_parameter(kind)[rows])
        if kind == "bias":
            trained = getattr(layer, "bias", None)
            return _plain((base.get_parameter("bias") if trained is None else trained)[rows])
        is_table = path in TABLES
        if is_table and layer is None:
            return base.get_parameter("weight").detach()[rows].cpu()
        weight = decoded(base, rows)
        if isinstance(layer, TrainableRows):
            n, ids = len(weight), layer.ids.cpu()
            return with_rows(weight, ids[ids < n], _plain(layer.rows)[ids < n])
        if isinstance(layer, LowRank):
            return self._changed(weight, layer, path, rows)
        return weight

    def _changed(self, weight: Tensor, layer: LowRank, path: str, rows: slice) -> Tensor:
        """Return rows of a weight with a low-rank term, whose scale is that of the settings.

        The lengths of DoRA on a table are over its rows, of which all must be given.
        """
        start, s = None, scale(self.lora, self.published(path))
        magnitude = None if layer.magnitude is None else _plain(layer.magnitude)
        if path in TABLES:  # It has no PiSSA start.
            return effective(weight.T, _plain(layer.a)[:, rows], _plain(layer.b), s, start, magnitude).T
        if layer.start_a is not None and layer.start_b is not None:
            start = (_plain(layer.start_a), _plain(layer.start_b)[rows])
        magnitude = None if magnitude is None else magnitude[rows]
        return effective(weight, _plain(layer.a), _plain(layer.b)[rows], s, start, magnitude)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in set(self)

    def __iter__(self) -> Iterator[str]:
        for path, module in self.model.named_modules():
            if path and ".base" not in f".{path}" and ".adapters." not in f".{path}.":
                yield from (f"{path}.{kind}" for kind in ("weight", "bias") if _has(module, kind))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def adapter_of(module: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Return the module that an adapter wraps, and the layer of the run's adapter, if it has one."""
    if not isinstance(module, Adapted):
        return module, None
    return module.base, dict(module.adapters.items()).get(ADAPTER)


def decoded(base: nn.Module, rows: slice = slice(None)) -> Tensor:
    """Return rows of the weight of a module without adapters; a stored one is decoded by the reference."""
    if isinstance(base, Linear4bit):
        stored: tuple[Tensor, ...] = base.stored
        packed, absmax, nested, offset = stored
        start, stop, _ = rows.indices(base.out_features)
        first, last = start * base.in_features, stop * base.in_features
        whole = first // (BLOCK * NESTED_BLOCK) * (BLOCK * NESTED_BLOCK)  # Nested blocks are decoded whole.
        codes = packed.flatten()[whole // 2 : -(last // -2)]
        scales, nested = absmax[whole // BLOCK : -(last // -BLOCK)], nested[whole // BLOCK // NESTED_BLOCK :]
        values = nf4_decoded(codes, scales, nested, offset, (last - whole,))[first - whole :]
        return values.view(stop - start, base.in_features).cpu()
    if isinstance(base, StoredLinear):
        return _plain(base.stored_weight[rows])
    return _plain(base.get_parameter("weight")[rows])


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().double().cpu()


def _has(module: nn.Module, kind: str) -> bool:
    base, _ = adapter_of(module)
    return (kind in base._parameters and base._parameters[kind] is not None) or (
        kind == "weight" and isinstance(base, Linear4bit | StoredLinear)
    )


# --- stages -----------------------------------------------------------------------------------------


def run_weights(subject: GuardSubject) -> RunWeights:
    """Return the weights of the model that will train."""
    folder, lora = subject.base_folder, subject.config.lora
    published: Callable[[str], str] = str
    if folder is not None and (lora.rank_pattern or lora.alpha_pattern):
        family = family_of(folder)
        names = adapters_of(subject.model)[ADAPTER].published  # The run's own, of a family that is not known.
        published = partial(published_name, family) if family in PUBLISHED else names.__getitem__
    return RunWeights(subject.model, subject.config.model, lora, published)


class Seen:
    """What modules of the model took and gave, by stage, each time that they were called."""

    def __init__(self):
        self.calls: dict[str, list[Tensor]] = {}

    def note(self, stage: str, value: Tensor) -> None:
        """Note the value of a stage; what comes later may overwrite it, so a copy is taken."""
        self.calls.setdefault(stage, []).append(value.detach().clone())


@contextlib.contextmanager
def observed(model: Decoder, layers: set[int]) -> Iterator[Seen]:
    """Let the model's modules note what they compute: all that can be seen of these blocks.

    Of the other blocks only what goes in and comes out is noted.
    """
    seen = Seen()
    hooks: list[Any] = []
    attends: list[tuple[Any, Callable[..., Tensor]]] = []

    def outputs(module: nn.Module, stage: str) -> None:
        hooks.append(module.register_forward_hook(lambda _, args, out: seen.note(stage, cast(Any, out))))

    def inputs(module: nn.Module, stage: str) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _, args: seen.note(stage, args[0])))

    try:
        outputs(model.norm, "last norm")
        inputs(model.norm, "last norm's input")
        for layer, block in enumerate(model.blocks):
            inputs(block, f"block {layer}, input")
            outputs(block, f"block {layer}, residual")
            if layer in layers:
                _observe_block(block, layer, inputs, outputs)
                attention: Any = block.get_submodule("attention")
                attends.append((attention, attention.attend))
                attention.attend = _noting(attention.attend, seen, layer)
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for attention, attend in attends:
            attention.attend = attend


def _observe_block(
    block: nn.Module,
    layer: int,
    inputs: Callable[[nn.Module, str], None],
    outputs: Callable[[nn.Module, str], None],
) -> None:
    """Hook the modules of a block that stand for a stage."""
    stages = {
        "norm": ("norm",),
        "attention_norm": ("attention norm",),
        "mlp_norm": ("MLP norm",),
        "attention.q": ("queries projected",),
        "attention.k": ("keys projected",),
        "attention.q_norm": ("queries normalised",),
        "attention.k_norm": ("keys normalised",),
        "attention.out": ("attention output",),
        "mlp": ("MLP output",),
    }
    for path, (stage,) in stages.items():
        with contextlib.suppress(AttributeError):
            module = block.get_submodule(path)
            if not isinstance(module, nn.Identity):
                outputs(module, f"block {layer}, {stage}")
    with contextlib.suppress(AttributeError):
        inputs(block.get_submodule("mlp_norm"), f"block {layer}, residual after attention")
    with contextlib.suppress(AttributeError):  # Experts have no inner state in common.
        inputs(block.get_submodule("mlp.down"), f"block {layer}, MLP inner")


def _noting(attend: Callable[..., Tensor], seen: Seen, layer: int) -> Callable[..., Tensor]:
    """Return attention's own function, noting queries, keys and values (B, H, T, D), and what it gives."""

    def noting(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        for stage, value in (("queries", q), ("keys", k), ("values", v)):
            seen.note(f"block {layer}, {stage}", value.transpose(1, 2))
        out = attend(q, k, v, *rest, **named)
        seen.note(f"block {layer}, attention", out.transpose(1, 2))
        return out

    return noting

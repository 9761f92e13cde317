"""The kinds of frozen linears, and models whose linears are replaced by them.

quantize_linears(model, "nf4", names)                  every named nn.Linear, in place, one by one
hold(model, "int4")                                    those of a decoder, to generate with it
replace_linear(model, name, "nf4", weight)             one, from a tensor just read: a loader's way in
dequantize_linears(model)                              all of them again as nn.Linear, in fp32

kind   class         bits a weight   for
nf4    Linear4bit    4.127           QLoRA: 4-bit NormalFloat with double quantisation (arXiv:2305.14314)
int4   Int4Linear    4.5             decoding: a scale and a zero for 64 weights (modules/integer_linear.py)
int8   Int8Linear    8 + 32 / in     decoding: one scale an output row
bf16   StoredLinear  16              a frozen base on hardware that multiplies only in fp32
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Self

import torch
from torch import Tensor, nn

from modules.frozen_linear import FrozenLinear
from modules.integer_linear import Int4Linear, Int8Linear
from modules.nf4 import (
    BLOCK,
    NESTED_BLOCK,
    NF4,
    DecodeRows,
    checked_weight,
    dynamic_map,
    nf4_code,
    nf4_decoder,
    quantize_nf4,
)

BITSANDBYTES_STATE = "weight.quant_state.bitsandbytes__nf4"  # JSON in bytes
BITSANDBYTES = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    BITSANDBYTES_STATE,
)


class Linear4bit(FrozenLinear):
    """4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

    names = NF4._fields

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n = in_features * out_features
        # By rows where rows are whole bytes, so that a transposed weight's state is seen to be another.
        packed = (out_features, in_features // 2) if in_features % 2 == 0 else ((n + 1) // 2,)
        return {
            "packed": (packed, torch.uint8),
            "absmax": ((-(n // -BLOCK),), torch.uint8),
            "nested_absmax": ((-(n // -(BLOCK * NESTED_BLOCK)),), torch.float32),
            "offset": ((), torch.float32),
        }

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        return quantize_nf4(weight)

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        return nf4_decoder(NF4(*stored), rows, columns, dtype)

    def to_bitsandbytes(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return `weight`, `weight.absmax` and so on, as bitsandbytes and transformers save a linear.

        `dtype` is the one that bitsandbytes then decodes to. The bias is not among them.
        """
        stored = NF4(*self.stored)
        values = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": stored.offset.item(),
        }
        return {
            "weight": stored.packed.reshape(-1, 1),
            "weight.absmax": stored.absmax,
            "weight.quant_map": nf4_code().to(stored.packed.device),
            "weight.nested_absmax": stored.nested_absmax,
            "weight.nested_quant_map": dynamic_map().to(stored.packed.device),
            BITSANDBYTES_STATE: stored.packed.new_tensor(list(json.dumps(values).encode())),
        }

    @classmethod
    def from_bitsandbytes(cls, tensors: Mapping[str, Tensor], bias: Tensor | None = None) -> Self:
        """Return the linear that `to_bitsandbytes` describes, bit for bit.

        Raises:
            ValueError: Tensors are missing or do not fit together, or it is not NF4 with double quantisation
                in blocks of 64 and 256.
        """
        missing = [name for name in BITSANDBYTES if name not in tensors]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} missing; only bitsandbytes' NF4 with double quantisation is read"
            )
        try:
            values = json.loads(bytes(tensors[BITSANDBYTES_STATE][:4096].tolist()))
            out_features, in_features = (int(size) for size in values["shape"])
            offset = float(values["nested_offset"])
            kind = values["quant_type"], values["blocksize"], values["nested_blocksize"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{BITSANDBYTES_STATE} is not a description that bitsandbytes writes") from None
        if kind != ("nf4", BLOCK, NESTED_BLOCK) or min(out_features, in_features) < 1:
            raise ValueError(
                f"only nf4 in blocks of 64 and 256 is read, but this is {kind} of {values['shape']}"
            )
        maps = nf4_code(), dynamic_map()
        for name, expected in zip(("weight.quant_map", "weight.nested_quant_map"), maps, strict=True):
            if not torch.equal(tensors[name].cpu(), expected):
                raise ValueError(f"{name} is another than that of NF4; quantise the base again")
        module = cls(in_features, out_features, bias=False, device="meta")
        stored = NF4(
            tensors["weight"],
            tensors["weight.absmax"],
            tensors["weight.nested_absmax"],
            tensors["weight"].new_tensor(offset, dtype=torch.float32),
        )
        for name, given in zip(cls.names, stored, strict=True):
            own = module.get_buffer(name)
            if (given.dtype, given.numel()) != (own.dtype, own.numel()):
                raise ValueError(
                    f"{name} holds {given.numel():,} values of {given.dtype}, but a weight of shape "
                    f"{(out_features, in_features)} has {own.numel():,} of {own.dtype}"
                )
            if given.is_floating_point() and not given.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity; quantise the base again")
            setattr(module, name, given.detach().reshape(own.shape))
        module._set_bias(bias)
        return module


class StoredLinear(FrozenLinear):
    """The weight in 16 bits: fp16 where it comes in fp16, which bf16 would round, or else bf16."""

    names = ("stored_weight",)
    stored_weight: Tensor

    @staticmethod
    def layout(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"stored_weight": ((out_features, in_features), torch.bfloat16)}

    @staticmethod
    def encode(weight: Tensor) -> tuple[Tensor, ...]:
        if weight.dtype == torch.float16:
            return (weight,)
        return (checked_weight(weight.to(torch.bfloat16)),)  # fp32 goes a little further than bf16

    @staticmethod
    def decoder(stored: tuple[Tensor, ...], rows: int, columns: int, dtype: torch.dtype) -> DecodeRows:
        (weight,) = stored
        if weight.dtype == dtype:
            return lambda start, stop: weight[start:stop]
        values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
        return lambda start, stop: values[: stop - start].copy_(weight[start:stop])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take either dtype of 16 bits as it comes."""
        own, given = self.stored_weight, state_dict.get(prefix + "stored_weight")
        if given is not None and given.shape == own.shape and given.dtype in (torch.float16, torch.bfloat16):
            self.stored_weight = own.to(given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


KINDS: dict[str, type[FrozenLinear]] = {
    "nf4": Linear4bit,
    "int4": Int4Linear,
    "int8": Int8Linear,
    "bf16": StoredLinear,
}
INTEGERS = ("int8", "int4")  # kinds to decode with, whose kernels take inputs in bf16


# --- models ----------------------------------------------------------------------------------------


def quantize_linears(model: nn.Module, kind: str, names: Iterable[str]) -> None:
    """Replace the named nn.Linear modules of `model` in place, freeing each full weight before the next.

    Raises:
        ValueError: A name is unknown, is quantised already, is no nn.Linear, or shares its weight with
            another module, which would keep it in full; nothing is replaced then. Or a weight holds NaN.
    """
    names = list(dict.fromkeys(names))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        linear = _linear(model, name)
        shared = [owner for owner in owners[id(linear.weight)] if owner != f"{name}.weight"]
        if shared:
            raise ValueError(
                f"{name}.weight is also {shared[0]}, which would keep it in full; leave {name} as it is"
            )
    for name in names:
        replace_linear(model, name, kind, _linear(model, name).weight)


def hold(model: nn.Module, kind: str | None) -> None:
    """Store a decoder's matrices in fewer bits, in place: its blocks', and for INTEGERS its head; None: none.

    The head of a model of 117M parameters is a third of what a step of decoding reads. Where it is the
    embedding too, that stays as it is, since a step looks up one row a token in it. Matrices that are stored
    so already stay.
    """
    if kind is None:
        return
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantize_linears(model, kind, [name for name in linears if "blocks." in name])
    if kind in INTEGERS and "head" in linears:
        replace_linear(model, "head", kind, _linear(model, "head").weight)


def n_weights(model: nn.Module) -> int:
    """Return the number of parameters and of the weights that frozen linears stand for."""
    stored = (m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
    return sum(p.numel() for p in model.parameters()) + sum(stored)


def dequantize_linears(model: nn.Module) -> None:
    """Replace every quantised linear of `model` in place by an nn.Linear of what it stands for, in fp32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
            linear.weight = nn.Parameter(module.weight, requires_grad=False)
            linear.register_parameter("bias", module.bias)
            model.set_submodule(name, linear.train(module.training))


def replace_linear(
    model: nn.Module, name: str, kind: str, weight: Tensor, bias: Tensor | None = None
) -> FrozenLinear:
    """Put `weight` (out, in), quantised, in the place of the nn.Linear called `name`; returns the module.

    The nn.Linear may be on the meta device: a model that is loaded so, tensor by tensor, never stands in full
    precision. Without `bias` the linear's own parameter is kept, to be loaded like any other.

    Raises:
        ValueError: As quantize_linears, or the shapes differ.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of quantised linear; use one of {', '.join(KINDS)}")
    linear = _linear(model, name)
    if weight.shape != linear.weight.shape:
        raise ValueError(
            f"the weight of {name} has shape {(*weight.shape,)}, but the model's is {(*linear.weight.shape,)}"
        )
    try:
        module = KINDS[kind].from_weight(weight, linear.bias if bias is None else bias)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    module.train(linear.training)
    model.set_submodule(name, module)
    return module


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:  # A table of all modules would take too long for each of 18,000 experts.
        module = model.get_submodule(name)
    except AttributeError:
        linears = [known for known, m in model.named_modules() if isinstance(m, nn.Linear)]
        close = get_close_matches(name, linears, 3, 0.4) or linears[:3]
        raise ValueError(
            f"the model has no module {name!r}; did you mean {' or '.join(close) or 'another'}?"
        ) from None
    if isinstance(module, FrozenLinear):
        raise ValueError(
            f"{name} is quantised already, as {type(module).__name__}; quantise a base in full precision"
        )
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is {type(module).__name__}, which cannot be quantised; name an nn.Linear")
    return module

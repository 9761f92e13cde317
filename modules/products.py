"""Which way to multiply a few rows by a weight is fastest on this machine: measured, not guessed.

    speed_up(model)                  at load; one row is measured at once, other numbers when they first come
    class Linear(MeasuredProducts)   a module with several ways; its `forward` asks `measured(x)`

torch has several kernels for one product, and which is fastest depends on the processor, the shape and the
number of rows, by factors of two and more. `Products` runs the ways of each kind of weight in turns over a
ring of the model's own weights, larger than most caches, and keeps the fastest. Each way is first compared
with the product in fp64: one that raises an error or gives other numbers is left out, with one sentence. The
measuring of a number of rows ends after BUDGET seconds, and what was clear is remembered in the clone's cache
for this processor, version of torch and number of threads.

Training, compilation, autocast to another dtype and everything that takes gradients use none of it, nor does
a model for which nobody called `speed_up`. Two ways differ by rounding only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from data.cache import read_sealed, write_sealed

Product = Callable[[Tensor], Tensor]  # x (..., in) -> (..., out)


class Way(NamedTuple):
    """A way to multiply by one module's weight.

    make: Returns the product, after making what it needs.
    copied: Bytes of what it needs beside the module's own tensors.
    """

    make: Callable[[], Product]
    copied: int = 0


PLAIN = "plain"  # the way of every module, which is never checked
# Seconds of measuring for a number of rows. A kind that is not reached takes its first way, and the plain one
# for many rows, where the other is for processors without an instruction for bf16.
BUDGET = 0.3
TURNS = 3
HOPELESS = 3.0  # A way that takes so many times the best time with one weight is not tried with others.
CLEAR = 1.5  # The best way's two best turns agree up to this factor, or it is not remembered.
RING_BYTES = 2**26  # of weights multiplied one after the other
MIN_ELEMENTS = 2**16  # Smaller weights are multiplied the plain way.
ROWS = (1, 2, 4, 8, 16, 32, 64)  # A number of rows is measured as the next of these,
MANY, MANY_MEASURED = 65, 128  # and any above as this.
COPIES_SHARE = 0.25  # of the memory that is free, for second copies of weights
PACKED_FOR = 8  # rows that oneDNN is told of when it orders a weight
CHECKED_OUTPUTS = 128  # of a product, compared with fp64
# How far a result may be from fp64: as a share of itself, and of the sum of its terms' magnitudes.
BOUNDS = {torch.float32: (2**-20, 2**-18), torch.bfloat16: (2**-7, 2**-10)}
CACHE = Path(__file__).resolve().parents[1] / "cache"
VERSION = 1  # of what is remembered


class MeasuredProducts(nn.Module):
    """A linear with several ways to multiply; `fast` has those that were chosen, by rows and dtype."""

    in_features: int
    out_features: int
    fast: dict[tuple[int, torch.dtype], Product] | None = None
    copies: WeakValueDictionary[str, Tensor] | None = None  # what `copied` made, as long as a product has it

    def ways(self, rows: int, dtype: torch.dtype) -> dict[str, Way]:
        """Return the ways besides the plain one for inputs (rows, in) of `dtype`, by name."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) the way that is always there."""
        raise NotImplementedError

    def weight_rows(self, index: Tensor) -> Tensor:
        """Return these rows of the weight, (len(index), in) in fp64."""
        raise NotImplementedError

    def copied(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the copy of the weight that `make` makes, or the one that a product has already."""
        if self.copies is None:
            self.copies = WeakValueDictionary()
        there = self.copies.get(name)
        if there is None:
            self.copies[name] = there = make()
        return there

    def extra(self, name: str, size: int) -> int:
        """Return the bytes that `copied` will take."""
        return 0 if self.copies is not None and name in self.copies else size

    def forget(self) -> None:
        """Multiply the plain way again, and free the copies."""
        self.fast = self.copies = None

    def measured(self, x: Tensor) -> Product | None:
        """Return the way that was chosen for inputs like x (..., in); None for the plain one."""
        if self.fast is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if x.size(-1) != self.in_features:
            return None
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype:
            return None
        return self.fast.get((min(x.numel() // self.in_features, MANY), x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Forget the choices: the weight may get another dtype or device."""
        self.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the choices out of copies of the module: they hold its own weight."""
        return {name: value for name, value in self.__dict__.items() if name not in ("fast", "copies")}


def in_onednns_order(weight: Tensor) -> Tensor:
    """Return a copy of a weight (out, in) that oneDNN need not reorder in every product."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)


def onednn_product(copy: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the product of (x, bias) with what `in_onednns_order` returned."""
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x, bias: multiply(x, copy, bias, "none", [], "")


def speed_up(model: nn.Module) -> None:
    """Multiply few rows the fastest way from now on, where no gradient is taken; nothing changes on a GPU.

    Products of one row are measured at once, those of other numbers of rows when `Decoder.hidden` meets them.
    """
    products = Products(model)
    products.choose(1)
    model.products = products  # pyright: ignore[reportArgumentType]


class Products:
    """The choices of one model, as made by `choose`."""

    deadline = 0.0  # when the measuring under way ends
    wrong: set[str] = set()  # noqa: RUF012 (ways that gave wrong numbers or failed, in this process)

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        """Take the linears of `model`, for inputs of `dtype`; by default that of its parameters."""
        self.dtype = dtype or next(model.parameters()).dtype
        groups: dict[str, list[MeasuredProducts]] = defaultdict(list)
        for module in model.modules():
            if isinstance(module, MeasuredProducts) and _may_be_fast(module):
                shape = f"{module.out_features} x {module.in_features}"
                groups[f"{type(module).__name__} {shape}"].append(module)
        sizes = {name: sum(map(_bytes, group)) for name, group in groups.items()}
        self.groups = {name: groups[name] for name in sorted(groups, key=lambda name: -sizes[name])}
        self.room = COPIES_SHARE * _free_memory()
        self.done: set[int] = set()
        self.path = CACHE / f"products-{_machine()}.json"
        remembered = read_sealed(self.path) if self.groups else None
        items = remembered.items() if isinstance(remembered, dict) else ()
        self.remembered = {key: way for key, way in items if isinstance(way, str)}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as None: a copy of the model may be trained."""
        return type(None), ()

    def choose(self, rows: int) -> None:
        """Choose the ways for this many rows, unless that was done."""
        most = next((most for most in ROWS if rows <= most), MANY)
        if most in self.done or not rows:
            return
        self.done.add(most)
        numbers = range(max((less for less in ROWS if less < most), default=0) + 1, most + 1)
        before, self.deadline = len(self.remembered), time.perf_counter() + BUDGET
        with torch.inference_mode():
            for name, group in self.groups.items():
                self._choose(name, group, MANY_MEASURED if most == MANY else most, numbers)
        if len(self.remembered) > before:
            write_sealed(self.path, self.remembered)

    def _choose(self, name: str, group: list[MeasuredProducts], rows: int, numbers: Iterable[int]) -> None:
        key = f"{name}, {rows} rows of {str(self.dtype).removeprefix('torch.')}"
        ways = {
            way: how
            for way, how in group[0].ways(rows, self.dtype).items()
            if way not in self.wrong and how.copied * len(group) <= self.room
        }
        known = self.remembered.get(key)
        if known == PLAIN or not ways:
            return
        drawn = torch.randn(rows, group[0].in_features, generator=torch.Generator().manual_seed(rows))
        x = drawn.to(self.dtype)
        tried = [known] if known in ways else list(ways)
        agreeing = [way for way in tried if self._agrees(way, key, group[0], ways[way], x)]
        best = agreeing[0] if agreeing and (rows < MANY or known in agreeing) else PLAIN
        if agreeing and known not in agreeing and time.perf_counter() < self.deadline:
            best, clear = self._fastest(agreeing, group, rows, x)
            if clear:
                self.remembered[key] = best
        if best != PLAIN:
            self.room -= ways[best].copied * len(group)
            for module in group:
                product = module.ways(rows, self.dtype)[best].make()
                module.fast = (module.fast or {}) | dict.fromkeys(((n, self.dtype) for n in numbers), product)

    def _fastest(
        self, names: list[str], group: list[MeasuredProducts], rows: int, x: Tensor
    ) -> tuple[str, bool]:
        """Return the fastest of the plain way and the named ones, and whether two of its turns agree."""
        ring = group[: max(1, RING_BYTES // _bytes(group[0]))]
        products = {PLAIN: [group[0].plain]}
        products |= {name: [group[0].ways(rows, self.dtype)[name].make()] for name in names}
        first = {name: _seconds(ways, x) for name, ways in products.items()}
        kept = [name for name in products if first[name] <= HOPELESS * min(first.values())]
        for name in kept:
            others = ring[1:]
            products[name] += [
                module.plain if name == PLAIN else module.ways(rows, self.dtype)[name].make()
                for module in others
            ]
        # Products of one weight were timed already.
        times: dict[str, list[float]] = {name: [first[name]] if len(ring) == 1 else [] for name in kept}
        for _ in range(TURNS):
            for name in kept:
                if len(times[name]) < 2 or time.perf_counter() < self.deadline:
                    times[name].append(_seconds(products[name], x))
        name = min(times, key=lambda name: min(times[name]))
        best, *others = sorted(times[name])
        return name, bool(others) and others[0] <= CLEAR * best

    def _agrees(self, name: str, key: str, module: MeasuredProducts, way: Way, x: Tensor) -> bool:
        """Say whether a way gives the product of fp64 within BOUNDS; if not, it is never used again."""
        index = torch.linspace(0, module.out_features - 1, min(CHECKED_OUTPUTS, module.out_features)).long()
        weight, exact = module.weight_rows(index), x.double()
        relative, absolute = BOUNDS[x.dtype]
        allowed = absolute * (exact.abs() @ weight.abs().t())
        exact = exact @ weight.t()
        bias = module.bias
        if isinstance(bias, Tensor):
            exact += bias[index].double()
            allowed += absolute * bias[index].double().abs()
        allowed += relative * exact.abs()
        try:
            over = (way.make()(x)[:, index].double() - exact).abs() - allowed
            fault = "gives wrong numbers" if bool((~(over <= 0)).any()) else ""
        except Exception as error:  # A kernel may refuse a shape, or a CPU, by any error.
            fault = f"fails ({' '.join(str(error).split())[:200]})"
        if fault:
            self.wrong.add(name)
            print(
                f"warning: the product {name!r} {fault} here for {key}; the plain one is used instead",
                file=sys.stderr,
            )
        return not fault


def _seconds(products: Iterable[Product], x: Tensor) -> float:
    """Return the time of the products of x, one after the other."""
    started = time.perf_counter()
    for multiply in products:
        multiply(x)
    return time.perf_counter() - started


def _may_be_fast(module: MeasuredProducts) -> bool:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    large = module.in_features * module.out_features >= MIN_ELEMENTS
    return large and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _free_memory() -> int:
    """Return the bytes that a process can still take, by the kernel's estimate; 0 where it gives none."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def _machine() -> str:
    """Return a hash of all that decides how fast a product is, as far as it can be known."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    except OSError:
        pass
    known = (VERSION, processor, os.cpu_count(), torch.get_num_threads(), torch.__version__)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]

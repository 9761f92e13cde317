"""The device, number format and memory of a run, chosen by what the machine does well."""

from __future__ import annotations

import contextlib
import ctypes
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """Weights stay fp32; matrix products run in `dtype` under autocast."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def autocast(self) -> AbstractContextManager:
        """Return the context for a forward pass; backward runs outside it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_device(requested: str) -> torch.device:
    """Return the requested device; `auto` is the first GPU, or else the CPU.

    `cuda:N` becomes the process's current GPU too: compiled kernels and libraries take that one.
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ValueError(f"device {requested!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {requested!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {requested!r} was asked for, but torch sees no GPU here; use --device cpu")
    if device.index is not None and device.type == "cuda":
        gpus = torch.cuda.device_count()
        if device.index >= gpus:
            raise ValueError(
                f"device {requested!r} was asked for, but torch sees {gpus} GPUs here, the last of which is "
                f"cuda:{gpus - 1}; use one of them"
            )
        torch.cuda.set_device(device)
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bf16 itself.

    torch answers "supported" on CPUs that emulate it, where a product takes 4.6 times as long as in fp32
    (measured on a Xeon with AVX-512 but neither AVX512-BF16 nor AMX).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(device: torch.device, requested: str) -> Precision:
    """Return the requested precision; `auto` is bf16 where it is native, fp16 on other GPUs, else fp32.

    Raises:
        ValueError: bf16 is requested on a GPU without it (it computes NaN or garbage), or fp16 on a CPU.
    """
    name = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
    native = has_native_bf16(device)
    if requested == "auto":
        if native:
            return Precision(device, torch.bfloat16, f"bf16, native on this {name}")
        if device.type == "cuda":
            return Precision(device, torch.float16, f"fp16 with loss scaling: {name} has no bf16")
        return Precision(device, torch.float32, "fp32: this CPU has neither AVX512-BF16 nor AMX")
    if requested == "bf16" and not native:
        if device.type == "cuda":
            raise ValueError(
                f"precision bf16 was asked for, but {name} has none; use --precision fp16 or fp32"
            )
        return Precision(device, torch.bfloat16, "bf16, as asked; this CPU only emulates it, fp32 is faster")
    if requested == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 was asked for on a CPU, which has no fast fp16; use bf16 or fp32")
    # eval.json records this reason, so it keeps its spelling.
    return Precision(device, DTYPES[requested], f"{requested}, as asked")


def evaluation_precision(training: Precision, requested: str, weight_dtype: torch.dtype) -> Precision:
    """Return the precision of validation; `auto` is that of training.

    Args:
        weight_dtype: The dtype of the weights in memory.

    Raises:
        ValueError: The device has no such precision, or the weights are stored in less than that.
    """
    found = training if requested == "auto" else choose_precision(training.device, requested)
    if found.dtype == torch.float32 != weight_dtype:
        raise ValueError(
            f"eval_precision is fp32, and the base is stored as {str(weight_dtype).removeprefix('torch.')}, "
            "in which validation would compute all the same; leave it out, or set --precision fp32"
        )
    return found


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, for its next step; False where the C library is not glibc.

    By default glibc maps each large tensor afresh and gives it back, and the kernel clears every page of it
    in every step: 10% of the default run's step. Both limits are needed: one alone switches off the other's
    own adjustment, which made a step twice as long. The numbers are those of malloc.h.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    return bool(mallopt(m_mmap_threshold, 2**30) and mallopt(m_trim_threshold, 2**31 - 1))


def release_freed_memory() -> None:
    """Give back what `keep_freed_memory` keeps, before work of other sizes, which would come on top of it.

    Only pages that hold nothing are given back. The next step takes its own anew, once: 0.4 s for 1 GB.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # The C library is not glibc.
        ctypes.CDLL(None).malloc_trim(0)

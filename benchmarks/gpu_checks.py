"""The checks of `benchmarks/gpu.py`, which runs each as a process of its own:

    python benchmarks/gpu_checks.py NUMBER DEVICE FOLDER RESULT [small]

A check takes a `CheckRequest` and returns a `CheckResult`, which is written to RESULT as JSON. A new one is a
function and a line in CHECKS. With `small` a check is what a CPU does in seconds, to try the check itself.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from config.console import one_line
from config.files import REPOSITORY
from guards.faults import FAULTS, Fault
from guards.preflight import overrides
from modules.precision import choose_device, has_native_bf16
from recipes.base_config import BaseConfig
from recipes.small_base import make_base
from selftest.data import write_corpus
from training.begin import train


class CheckRequest(NamedTuple):
    """What a check is run on, and a folder for what it makes on the way."""

    device: torch.device
    folder: Path
    small: bool


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check, in one line and in numbers."""

    passed: bool
    line: str
    values: dict[str, Any] = field(default_factory=dict)


# --- 1: the environment ------------------------------------------------------------------------------

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ATTENTION_CASES = ("causal", "mask", "grouped")  # What the decoder asks for, and fewer heads of keys.
HEAD_DIMS = (64, 128)


def attends(backend: SDPBackend, case: str, head_dim: int, device: torch.device) -> bool:
    """Return whether a backend of F.scaled_dot_product_attention runs a case, forward and backward."""
    dtype = torch.bfloat16 if has_native_bf16(device) else torch.float16
    dtype = torch.float32 if device.type == "cpu" else dtype
    kv_heads = 2 if case == "grouped" else 4
    q, k, v = (
        torch.randn(2, heads, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    mask = torch.ones(2, 1, 128, 128, dtype=torch.bool, device=device).tril() if case == "mask" else None
    with warnings.catch_warnings(), sdpa_kernel([backend]):
        warnings.simplefilter("ignore")  # Each backend that does not run says why not.
        try:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=case == "grouped"
            )
            y.sum().backward()
        except RuntimeError:
            return False
    return True


def driver_version() -> str:
    """Return the version of NVIDIA's driver as nvidia-smi says it, or `unknown`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()
    return said[0].strip() if said else "unknown"


def environment(request: CheckRequest) -> CheckResult:
    """Say which device this is, and which kernels of attention run on it."""
    device = request.device
    runs = {
        name: {case: [d for d in HEAD_DIMS if attends(backend, case, d, device)] for case in ATTENTION_CASES}
        for name, backend in BACKENDS.items()
    }
    values: dict[str, Any] = {
        "name": device_name(device),
        "bf16": has_native_bf16(device),
        "torch": str(torch.__version__),
        "attention": runs,
    }
    words = [values["name"]]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "gpus": torch.cuda.device_count(),
        }
        words[0] += f" (1 of {values['gpus']}), capability {values['capability']}"
        words += [f"{properties.total_memory / 2**30:.0f} GiB", f"driver {values['driver']}"]
    words += [f"torch {torch.__version__}", "bf16" if values["bf16"] else "no native bf16"]
    attention = [f"{name}: {_cases_that_run(cases)}" for name, cases in runs.items()]
    everything_runs = all(runs["math"][case] == [*HEAD_DIMS] for case in ATTENTION_CASES)
    return CheckResult(everything_runs, f"{', '.join(words)}; attention by {'; '.join(attention)}", values)


def _cases_that_run(cases: dict[str, list[int]]) -> str:
    """Return the cases that a backend runs, with the head dimensions where it does not run all."""
    said = [
        case if len(dims) == len(HEAD_DIMS) else f"{case} of {dims[0]}"
        for case, dims in cases.items()
        if dims
    ]
    return ", ".join(said) or "nothing"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- 2: the tests ------------------------------------------------------------------------------------


def tests(request: CheckRequest) -> CheckResult:
    """Run the tests that take a device; on the CPU those of its half."""
    report = request.folder / "tests.xml"
    words = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
    words += ["-m", "gpu"] if request.device.type == "cuda" else ["-k", "cpu"]
    if request.small:
        words += ["tests/test_device_adapters.py"]
    elif request.device.type == "cpu":
        words += [str(path) for path in sorted((REPOSITORY / "tests").glob("test_device_*.py"))]
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, check=False)
    if not report.is_file():
        return CheckResult(False, f"pytest ended with exit code {done.returncode} and ran no test")
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failed = [
        f"{case.get('classname')}.{case.get('name')}: {one_line(problem.get('message', ''))[:300]}"
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    ]
    line = f"{counts['passed']} passed, {len(failed)} failed, {counts['skipped']} left out"
    first = f"; the first: {failed[0]}" if failed else ""
    passed = done.returncode == 0 and counts["passed"] > 0
    return CheckResult(passed, line + first, counts | {"failed": failed})


# --- 3: the guards -----------------------------------------------------------------------------------

# Case -> the rank of its adapters and how the base is stored; without a base all weights train from scratch.
GUARD_CASES: dict[str, tuple[int, str] | None] = {"default": None, "LoRA": (8, "auto"), "nf4": (8, "nf4")}
STEPS = 8  # Updates; the guards of the first updates look at four.


def guard_config(case: str, request: CheckRequest, base: str) -> Config:
    """Return the settings of a case: all defaults but for the length, or in small those of a tiny model."""
    run = request.folder / f"run-{case}"
    shutil.rmtree(run, ignore_errors=True)
    settings = Config(
        data=data_config(request),
        train=TrainConfig(
            run=str(run), device=str(request.device), max_steps=STEPS, validate_every=0, allow=(*FAULTS,)
        ),
    )
    if request.small:
        settings = replace(
            settings,
            tokenizer=TokenizerConfig(vocab_size=300, min_count=2),
            model=ModelConfig(block_size=64, n_layer=2, n_head=2, n_embd=16),
            train=replace(settings.train, batch_size=4),
        )
    adapter = GUARD_CASES[case]
    if adapter is None:
        return settings
    rank, stored_as = adapter
    return replace(
        settings,
        tokenizer=TokenizerConfig(),
        model=ModelConfig(),
        lora=LoraConfig(r=rank, targets=("all-linear",)),
        optimizer=OptimizerConfig(name="adamw", lr=2e-4),
        train=replace(settings.train, base=base, base_format=stored_as),  # pyright: ignore[reportArgumentType]
    )


def data_config(request: CheckRequest) -> DataConfig:
    """Return the interpreter's own library as a corpus, or in small a few sampled functions."""
    if not request.small:
        return DataConfig(cache=str(REPOSITORY / "cache"))
    source = request.folder / "corpus"
    if not source.exists():
        write_corpus(source)
    cache = str(request.folder / "cache")
    return DataConfig(str(source), validation_one_in=4, test_one_in=4, cache=cache, workers=1)


def small_base(request: CheckRequest) -> str:
    """Train a base in the shape of StarCoder, as the recipes do; in small for two seconds."""
    data = data_config(request)
    settings = BaseConfig("gpt_bigcode", max_seconds=30, source=data.source, cache=data.cache)
    if request.small:
        size = {"vocab_size": 300, "n_layer": 1, "n_embd": 32, "block_size": 64, "batch_size": 8}
        settings = replace(settings, max_seconds=2, **size)
    return str(make_base(settings))


def guards(request: CheckRequest) -> CheckResult:
    """Start healthy runs; every fault that a guard finds in one is a false alarm.

    All are let pass, so that one run shows every one of them.
    """
    found: dict[str, str] = {}
    alarms: dict[str, dict[str, str]] = {}
    base = ""
    for case, adapter in GUARD_CASES.items():
        print(f"--- {case}", flush=True)
        try:
            if adapter is not None:
                base = base or small_base(request)
            config = guard_config(case, request, base)
            train(config)
            alarms[case] = overrides(Path(config.train.run))
        except Fault as fault:  # Of the training of the base.
            alarms[case] = {fault.name: fault.evidence}
        except Exception as error:  # A crash of one case leaves the others their turn.
            found[case] = f"{type(error).__name__}: {one_line(str(error))}"
        else:
            found[case] = "passed"
        if alarms.get(case):
            found[case] = "; ".join(f"false alarm {name}: {one_line(e)}" for name, e in alarms[case].items())
        if request.device.type == "cuda":
            torch.cuda.empty_cache()
    passed = all(said == "passed" for said in found.values())
    return CheckResult(
        passed,
        "; ".join(f"{case} {said}" for case, said in found.items()),
        {"cases": found, "alarms": alarms},
    )


# --- the table ---------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A check, and the seconds after which it is stopped."""

    title: str
    seconds: float
    run: Callable[[CheckRequest], CheckResult]


CHECKS = {
    1: Check("environment", 120, environment),
    2: Check("tests", 290, tests),
    3: Check("guards without a false alarm", 290, guards),
}


def main(words: list[str]) -> None:
    """Run one check and write its result."""
    number, device, folder, result, *small = words
    request = CheckRequest(choose_device(device), Path(folder), small == ["small"])
    request.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(request.folder):  # Relative paths of a run stay out of the user's folder.
        found = CHECKS[int(number)].run(request)
    Path(result).write_text(json.dumps(asdict(found)), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

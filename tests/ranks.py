"""Several processes that share a run as under torchrun, forked from the test's process as in commands.py.

Like torchrun's agent, the test's process has the store by which they find each other.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from commands import forked
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    one_sentence,
)
from training.checkpoint import checkpoints
from training.distributed import World, joined

LIMIT = 120.0  # Seconds; what has not ended by then hangs, and is killed.
SHUTDOWN = 5.0  # Seconds from the first failure.


def small_run(folder: Path) -> Config:
    """A run of six updates of eight ragged rows, more than an epoch, of a tiny model without dropout."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"def f{n}(x):\n    ", "completion": "return x\n" * (n % 9 + 1)}) + "\n"
            for n in range(90)
        )
    )
    return Config(
        data=DataConfig(source=str(rows), validation_one_in=6, cache=str(folder / "cache"), workers=1),
        tokenizer=TokenizerConfig(vocab_size=300, min_count=2),
        model=ModelConfig(block_size=64, n_layer=2, n_head=2, n_embd=16),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            run=str(folder / "run"),
            max_steps=6,
            batch_size=8,
            validate_every=3,
            log_every=1,
            precision="fp32",
            device="cpu",
            log=(),
        ),
    )


def changed(config: Config, **train: Any) -> Config:
    return replace(config, train=replace(config.train, **train))


def last_weights(run: Path) -> dict[str, Tensor]:
    return load_file(checkpoints(run / "checkpoints")[-1].folder / "model.safetensors")


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Ended(NamedTuple):
    """The exit code of a process, or minus the signal that killed it, and what it wrote."""

    code: int
    out: str
    err: str


def shared(work: Callable[[World], Any]) -> Callable[[], None]:
    """Return a function that joins the processes, and then does `work` with them."""

    def together() -> None:
        with joined() as world:
            work(world)

    return together


def on_ranks(
    size: int,
    work: Callable[[], Any],
    folder: Path,
    attempt: int = 0,
    beside: Callable[[list[int]], None] = lambda children: None,
) -> list[Ended]:
    """Let `size` processes do `work`, as a command would; return how each ended.

    Args:
        work: It joins them, or is made by `shared`.
        folder: What they write goes there.
        attempt: How often they were started again before.
        beside: Called with their process ids, once all are started.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    files = [[folder / f"rank-{rank}-{attempt}.{name}" for name in ("out", "err")] for rank in range(size)]
    children = []
    for rank in range(size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        own |= {"TORCHELASTIC_RUN_ID": "a test", "TORCHELASTIC_RESTART_COUNT": attempt}
        own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}

        def begin(own: dict[str, Any] = own) -> None:
            faulthandler.dump_traceback_later(LIMIT / 3)  # Where it hangs.
            os.environ.update({name: str(value) for name, value in own.items()})
            with one_sentence(shares=True):
                work()

        children.append(forked(begin, *files[rank]))
    # Not before: the store has threads, with which a fork may hang.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    beside(children)
    codes = _codes(children)
    del store
    return [
        Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, files, strict=True)
    ]


def _codes(children: list[int]) -> list[int]:
    """Wait for all; like torchrun, kill those that do not end when another one has failed."""
    codes: dict[int, int] = {}
    until = time.monotonic() + LIMIT
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
                if codes[child]:
                    until = min(until, time.monotonic() + SHUTDOWN)
        if time.monotonic() > until:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]

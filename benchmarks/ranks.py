"""What several processes send and how long they take to begin: `python benchmarks/ranks.py [--ranks 2,4]`.

torchrun starts them in a network namespace of their own (it needs root), whose loopback counts every byte
between them, headers included. The least that each can send to add up a gradient is 2 (n - 1) / n of its
bytes; what Muon sends of its updates is beside that. Early is the share of the gradients that had been added
up when the backward pass ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from config.files import REPOSITORY

STEPS, COUNTED_FROM = 30, 10  # The watch of the first updates sends more.


def bytes_so_far() -> int:
    """Return the bytes that the loopback has sent."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.split()[0] == "lo:")


def train_and_count(optimizer: str, folder: Path) -> None:
    """Train in one of the processes; the first one prints what was counted."""
    from guards import preflight
    from training import reduction
    from training.begin import train
    from training.distributed import joined
    from training.loop import Observer, TrainingManager

    preflight.GUARDS = {}
    config = Config(
        data=DataConfig(source=str(REPOSITORY / "config"), cache=str(folder / "cache"), workers=1),
        tokenizer=TokenizerConfig(vocab_size=1000),
        model=ModelConfig(block_size=64, n_layer=4, n_head=4, n_embd=256),
        optimizer=OptimizerConfig(name=optimizer),  # pyright: ignore[reportArgumentType]
        train=TrainConfig(
            run=str(folder / "run"), max_steps=STEPS, batch_size=16, validate_every=0, device="cpu", log=()
        ),
    )
    reduction.BUCKET_BYTES = 2**20  # As many buckets as a large model has of 25 MiB.
    early, finish = [0, 0], reduction.Reduction.finish

    def noting(self: reduction.Reduction) -> None:
        early[0] += sum(flat.numel() for flat, work in self.sent if work.is_completed())
        early[1] += sum(p.numel() for bucket in self.buckets for p in bucket)
        finish(self)

    reduction.Reduction.finish = noting
    counted = {"began": 0.0, "bytes": 0, "gradient": 0}

    def count(manager: TrainingManager, values: dict[str, float]) -> bool:
        if manager.state.step == 1:
            counted["began"] = time.time()
            counted["gradient"] = sum(p.numel() * p.element_size() for p in manager.parameters)
        if manager.state.step in (COUNTED_FROM, STEPS):
            counted["bytes"] = bytes_so_far() - counted["bytes"]
        return False

    with joined() as world:
        train(config, Observer(on_step=count), world=world)
    if world.is_first:
        print("COUNTED", json.dumps(counted | {"early": early[0] / max(1, early[1])}))


def measured(ranks: int, optimizer: str) -> str:
    """Return a line of the table for so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        own = [__file__, "--child", optimizer, "--folder", folder]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*start, "--nproc_per_node", str(ranks), "--", *own]
        inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
        began = time.time()
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("COUNTED")]
        if not found:
            raise SystemExit(done.stderr[-2000:])
        counted = json.loads(found[0].removeprefix("COUNTED"))
    each = counted["bytes"] / (STEPS - COUNTED_FROM) / ranks
    least = 2 * (ranks - 1) / ranks * counted["gradient"]
    over = f"{each / least:.3f}" if least else "-"
    return (
        f"| {optimizer} | {ranks} | {counted['gradient'] / 1e6:.2f} | {each / 1e6:.2f} | {least / 1e6:.2f} | "
        f"{over} | {counted['early']:.0%} | {counted['began'] - began:.1f} |"
    )


def main() -> None:
    """Print the table, or be one of the processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--optimizers", default="adamw,muon")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train_and_count(args.child, Path(args.folder))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(
        "| optimizer | processes | gradient, MB | sent by each, MB | least, MB | ratio | early | begins, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for optimizer in args.optimizers.split(","):
        for ranks in args.ranks.split(","):
            print(measured(int(ranks), optimizer), flush=True)


if __name__ == "__main__":
    main()

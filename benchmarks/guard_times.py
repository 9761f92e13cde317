"""Time each guard at a published shape: `python benchmarks/guard_times.py [SHAPE] [--held bf16] [--full]`.

The weights are random, at the published size, with adapters as in `adapters.py` (with --full all weights
train), on rows of 512 tokens of this repository. Beside the wall clock stands the processor time over the
number of threads, which is more accurate on a busy machine. First one forward pass of one row is timed: no
guard that goes through the whole model takes less. docs/guards.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.adapters import SHAPES, random_model
from config import Config, DataConfig, LoraConfig, OptimizerConfig, TrainConfig
from config.files import REPOSITORY
from dataset import prepare_data
from guards.preflight import GUARDS, run_guard
from guards.subject import GuardSubject
from lora import add_adapter
from modules.precision import choose_device, choose_precision, keep_freed_memory
from modules.quantized_linear import n_weights
from pretrained import FAMILIES
from pretrained.family import to_model
from tokenizer import BPETokenizer
from training.loop import TrainingManager


def timed(what: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds by the clock, and the processor's seconds for each thread."""
    wall, used = time.perf_counter(), time.process_time()
    what()
    return time.perf_counter() - wall, (time.process_time() - used) / torch.get_num_threads()


def subject_of(shape: str, weight_format: str, full: bool, folder: Path) -> GuardSubject:
    """Return the subject that `training.begin.train` would give to the guards, with random weights."""
    family, values, (r, alpha, dropout, targets) = SHAPES[shape]
    precision = choose_precision(choose_device("cpu"), "auto")
    lora = LoraConfig() if full else LoraConfig(r, alpha, dropout, targets)
    tokenizer = BPETokenizer.train([path.read_text("utf-8") for path in REPOSITORY.glob("*.py")], 1000)
    torch.manual_seed(0)
    model = random_model(
        to_model(FAMILIES[family], values),
        precision.dtype,
        None if weight_format == "auto" else weight_format,
    )
    if not full:
        add_adapter(model, lora, FAMILIES[family].key)
    config = Config(
        data=DataConfig(str(REPOSITORY), cache=str(folder / "cache"), workers=1),
        model=model.config,
        lora=lora,
        optimizer=OptimizerConfig(name="adamw", lr=2e-4, embedding_lr=0.0, head_lr=0.0),
        train=TrainConfig(base="drawn", row_length=512, batch_size=4),
    )
    keep_freed_memory()
    data = prepare_data(config.data, tokenizer)
    manager = TrainingManager(config, model, data, precision, folder)
    return manager.subject(tokenizer, "loaded", tokenizer.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES), nargs="?", default="starcoder")
    parser.add_argument("--held", default="auto", choices=("auto", "bf16", "nf4"))
    parser.add_argument("--full", action="store_true", help="every weight trains, instead of adapters")
    parser.add_argument("--profile", metavar="GUARD", help="print what this guard spends its time on")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        subject = subject_of(asked.shape, asked.held, asked.full, Path(name))
        # Random weights with another vocabulary fail the guards' verdicts, which are not measured here.
        allowed = {"worse-than-unigram", "vocabulary-too-large"}
        size = n_weights(subject.model) / 1e9
        print(f"{asked.shape}: {size:.2f}e9 weights, {torch.get_num_threads()} threads", flush=True)
        batch = next(iter(subject.validation_batches(1)))
        row = type(batch)(*(t[:1] for t in batch))
        seconds = timed(lambda: subject.score([row]))
        print(f"{'one row forward':16}{seconds[0]:8.2f} s{seconds[1]:8.2f} s of the processor")
        total = torch.zeros(2)
        for guard in GUARDS:

            def run(guard: str = guard) -> None:
                run_guard(subject, guard, allowed)

            if guard == asked.profile:
                from torch.profiler import profile

                with profile(record_shapes=True) as found:
                    run()
                print(found.key_averages(group_by_input_shape=True).table("self_cpu_time_total", 25))
                continue
            seconds = timed(run)
            total += torch.tensor(seconds)
            print(f"{guard:16}{seconds[0]:8.2f} s{seconds[1]:8.2f} s of the processor", flush=True)
        print(f"{'together':16}{total[0]:8.2f} s{total[1]:8.2f} s of the processor")


if __name__ == "__main__":
    main()

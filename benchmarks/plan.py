"""What `python trainingmanager.py --plan` says beside what runs then take, each in a process of its own.

    python benchmarks/plan.py                      # all shapes
    python benchmarks/plan.py scratch-deep nf4     # some

Runs train on this repository's own files, guards included, on bases with drawn weights. Printed are peak
memory and seconds a step, estimated and measured, and their ratio. Speeds mean little on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1]
sys.path[0] = str(HOUSE)

from config import DataConfig, parse_config

# Name -> the family of its base, if any, and flags.
SHAPES: dict[str, tuple[str | None, str]] = {
    "scratch": (None, ""),
    "scratch-deep": (None, "--model.n_layer 10 --model.n_embd 256 --model.n_head 4 --optimizer.name adamw"),
    "scratch-recompute": (
        None,
        "--model.n_layer 8 --model.n_embd 256 --model.n_head 4 --activation_checkpointing true",
    ),
    "lora": ("llama", "--row_length 512 --batch_size 2"),
    "nf4": ("phi", "--row_length 512 --batch_size 2 --base_format nf4"),
    "full": ("gpt_bigcode", "--row_length 256 --batch_size 2 --lora.r 0"),
}
STEPS = 4

# The run's peak is read when its updates are done, and their times are those of the steps after the first.
CHILD = """
import sys, time, json, pathlib
sys.path[0] = HOUSE
import trainingmanager as t
from config import parse_config
times, update = [], t.TrainingManager.update
def timed(self):
    start = time.perf_counter()
    found = update(self)
    times.append(time.perf_counter() - start)
    return found
t.TrainingManager.update = timed
t.train(parse_config(sys.argv[1:]))
status = pathlib.Path("/proc/self/status").read_text()
peak = 1024 * int(next(l for l in status.splitlines() if l.startswith("VmHWM")).split()[1])
print(json.dumps([peak, min(times[1:])]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    asked = parser.parse_args()
    from plan import plan

    print(
        f"{'shape':<20}{'estimated':>12}{'measured':>12}{'ratio':>8}{'estimated':>14}{'measured':>12}{'ratio':>8}"
    )
    with tempfile.TemporaryDirectory() as place:
        for name in asked.shapes:
            family, flags = SHAPES[name]
            words = [*flags.split(), "--data.source", str(HOUSE), "--data.cache", f"{place}/cache"]
            words += ["--max_steps", str(STEPS), "--run", f"{place}/{name}"]
            words += ["--allow", "worse-than-unigram,past-invisible,split-leaks"]
            if family is not None:
                words += ["--base", drawn_base(family, Path(place))]
            found = plan(parse_config(words))
            child = [sys.executable, "-c", CHILD.replace("HOUSE", repr(str(HOUSE))), *words]
            made = subprocess.run(child, capture_output=True, text=True)
            if made.returncode:
                sys.exit(made.stderr)
            peak, seconds = json.loads(made.stdout.strip().rpartition("\n")[2])
            memory = f"{found.cost.peak / 1e6:>9,.0f} MB{peak / 1e6:>9,.0f} MB{found.cost.peak / peak:>8.2f}"
            speed = f"{found.step_seconds:>12.2f} s{seconds:>10.2f} s{found.step_seconds / seconds:>8.2f}"
            print(f"{name:<20}{memory}{speed}", flush=True)


def drawn_base(family: str, place: Path) -> str:
    """A folder of a middling width and 8 blocks."""
    import torch

    from architecture import Decoder
    from corpus import training_texts
    from pretrained import save_pretrained
    from recipes.base import BaseConfig, model_of
    from tokenizer import BPETokenizer

    folder = place / family
    shape = model_of(BaseConfig(family, n_layer=8, n_head=8, n_embd=512))  # pyright: ignore[reportArgumentType]
    tokenizer = BPETokenizer.train(training_texts(DataConfig(str(HOUSE))), 8000)
    torch.manual_seed(0)
    model = Decoder(replace(shape, vocab_size=tokenizer.vocab_size, init="normal"))
    save_pretrained(model, tokenizer, folder, family)
    return str(folder)


if __name__ == "__main__":
    main()

"""Compare the estimates of `python trainingmanager.py --plan` with measured runs, each in its own process.

    python benchmarks/plan.py                      # all shapes
    python benchmarks/plan.py scratch-deep nf4     # some
    python benchmarks/plan.py recipes              # the estimates for each recipe on its published base

Runs train on this repository's own files, guards included, on bases with random weights. The output has peak
memory and seconds a step, estimated and measured, and their ratio. A measured step is given twice: as
processor time of the thread that drives it, which the ratio is of, and by the clock. Where these two differ,
the machine was busy. docs/recipes/index.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import DataConfig, parse_config
from config.files import REPOSITORY

# Name -> the family of its base, if any, and flags. All bases but the last are small enough for
# training/plan.py to measure whole; of the last it measures some blocks.
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
    "lora-large": ("gpt_bigcode", "--row_length 256 --batch_size 1 --lora.targets c_attn,c_proj"),
}
BASES = {"refactor": "starcoder", "kotlin": "phi", "fastapi": "codegen", "summaries": "llama"}
SMALL, LARGE = (8, 8, 512), (12, 12, 768)  # blocks, heads, width
STEPS = 9  # the guards watch the first four; the fastest of the last five counts

# The run's peak is read after its last update and its last validation.
CHILD = """
import sys, time, json, pathlib
sys.path[0] = REPOSITORY
from training import loop as t
from config import parse_config
times, update = [], TrainingManager.update
def timed(self):
    start = time.thread_time(), time.perf_counter()
    found = update(self)
    times.append((time.thread_time() - start[0], time.perf_counter() - start[1]))
    return found
TrainingManager.update = timed
train(parse_config(sys.argv[1:]))
status = pathlib.Path("/proc/self/status").read_text()
peak = 1024 * int(next(l for l in status.splitlines() if l.startswith("VmHWM")).split()[1])
print(json.dumps([peak, *(min(kind) for kind in zip(*times[-5:]))]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*SHAPES, "recipes"]
    parser.add_argument("shapes", nargs="*", help=", ".join(known))  # `choices` would refuse an empty list
    asked = parser.parse_args().shapes or list(SHAPES)
    if unknown := [name for name in asked if name not in known]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(known)}")
    if "recipes" in asked:
        recipes()
    if shapes := [name for name in asked if name != "recipes"]:
        compare(shapes)


def recipes() -> None:
    """Print the plan of the four recipes that tune a published model, from its shape alone."""
    from benchmarks.adapters import SHAPES as PUBLISHED
    from training.plan import plan

    for recipe, base in BASES.items():
        family, values, _ = PUBLISHED[base]
        with tempfile.TemporaryDirectory() as folder:
            config = json.dumps({"model_type": family} | values)
            (Path(folder) / "config.json").write_text(config, "utf-8")
            words = ["--base", folder, "--config", str(REPOSITORY / "recipes" / f"{recipe}.yaml")]
            print(f"{recipe}, {base}\n{plan(parse_config(words))}\n", flush=True)


def compare(shapes: list[str]) -> None:
    """Train in each shape, and print the estimates beside the measured values."""
    from training.plan import plan

    memory, speed = ("peak memory", "measured", "ratio"), ("a step", "measured", "ratio", "by the clock")
    print(f"{'shape':<20}" + "".join(f"{name:>13}" for name in (*memory, *speed)))
    with tempfile.TemporaryDirectory() as place:
        for name in shapes:
            family, flags = SHAPES[name]
            words = [*flags.split(), "--data.source", str(REPOSITORY), "--data.cache", f"{place}/cache"]
            words += ["--max_steps", str(STEPS), "--run", f"{place}/{name}-run"]
            words += ["--allow", "worse-than-unigram,past-invisible,split-leaks"]
            if family is not None:
                words += [
                    "--base",
                    random_model(family, Path(place) / name, LARGE if "large" in name else SMALL),
                ]
            found = plan(parse_config(words))
            child = [sys.executable, "-c", CHILD.replace("REPOSITORY", repr(str(REPOSITORY))), *words]
            made = subprocess.run(child, capture_output=True, text=True)
            if made.returncode:
                sys.exit(made.stderr)
            peak, seconds, clock = json.loads(made.stdout.strip().rpartition("\n")[2])
            own = found.step_seconds
            cells = [f"{found.cost.peak / 1e6:,.0f} MB", f"{peak / 1e6:,.0f} MB"]
            cells += [f"{found.cost.peak / peak:.2f}", f"{own:.3f} s", f"{seconds:.3f} s"]
            cells += [f"{own / seconds:.2f}", f"{clock:.3f} s"]
            print(f"{name:<20}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def random_model(family: str, folder: Path, shape: tuple[int, int, int]) -> str:
    """Write a base with random weights, of (blocks, heads, width); return its folder."""
    import torch

    from architecture import Decoder
    from data.corpus import split_documents, training_texts
    from pretrained import save_pretrained
    from recipes.base_config import BaseConfig
    from recipes.small_base import model_of
    from tokenizer import BPETokenizer

    n_layer, n_head, n_embd = shape
    settings = BaseConfig(family, n_layer=n_layer, n_head=n_head, n_embd=n_embd)  # pyright: ignore[reportArgumentType]
    config = model_of(settings)
    tokenizer = BPETokenizer.train(training_texts(split_documents(DataConfig(str(REPOSITORY)))), 8000)
    torch.manual_seed(0)
    model = Decoder(replace(config, vocab_size=tokenizer.vocab_size, init="normal"))
    save_pretrained(model, tokenizer, folder, family)
    return str(folder)


if __name__ == "__main__":
    main()

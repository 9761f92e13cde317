"""What `python trainingmanager.py --plan` says beside what runs then take, each in a process of its own.

    python benchmarks/plan.py                      # all shapes
    python benchmarks/plan.py scratch-deep nf4     # some
    python benchmarks/plan.py recipes              # what --plan says of each recipe on its published base

Runs train on this repository's own files, guards included, on bases with drawn weights. Printed are peak
memory and seconds a step, estimated and measured, and their ratio. A measured step is given twice,
as processor time of the thread that drives it, which is what the ratio is of, and by the clock: on a quiet
machine they agree, and where they do not, it was busy.
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

# Name -> the family of its base, if any, and flags. Bases are small enough to be measured whole, but for the
# last, of which training/plan.py makes some blocks.
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
STEPS = 9  # the least of the last five counts: the guards watch the first four

# The run's peak is read when its updates are done and its last validation is made.
CHILD = """
import sys, time, json, pathlib
sys.path[0] = HOUSE
from training import loop as t
from config import parse_config
times, update = [], t.TrainingManager.update
def timed(self):
    start = time.thread_time(), time.perf_counter()
    found = update(self)
    times.append((time.thread_time() - start[0], time.perf_counter() - start[1]))
    return found
t.TrainingManager.update = timed
t.train(parse_config(sys.argv[1:]))
status = pathlib.Path("/proc/self/status").read_text()
peak = 1024 * int(next(l for l in status.splitlines() if l.startswith("VmHWM")).split()[1])
print(json.dumps([peak, *(min(kind) for kind in zip(*times[-5:]))]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*SHAPES, "recipes"]
    parser.add_argument("shapes", nargs="*", help=", ".join(known))  # `choices` would refuse none at all
    asked = parser.parse_args().shapes or list(SHAPES)
    if unknown := [name for name in asked if name not in known]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(known)}")
    if "recipes" in asked:
        recipes()
    if shapes := [name for name in asked if name != "recipes"]:
        compare(shapes)


def recipes() -> None:
    """What the plan says of the four recipes that tune a published model, from its shape alone."""
    from benchmarks.adapters import SHAPES as PUBLISHED
    from training.plan import plan

    for recipe, base in BASES.items():
        family, values, _ = PUBLISHED[base]
        with tempfile.TemporaryDirectory() as folder:
            config = json.dumps({"model_type": family} | values)
            (Path(folder) / "config.json").write_text(config, "utf-8")
            words = ["--base", folder, "--config", str(HOUSE / "recipes" / f"{recipe}.yaml")]
            print(f"{recipe}, {base}\n{plan(parse_config(words))}\n", flush=True)


def compare(shapes: list[str]) -> None:
    """Train in each shape, and print what was foreseen beside what it took."""
    from training.plan import plan

    memory, speed = ("peak memory", "measured", "ratio"), ("a step", "measured", "ratio", "by the clock")
    print(f"{'shape':<20}" + "".join(f"{name:>13}" for name in (*memory, *speed)))
    with tempfile.TemporaryDirectory() as place:
        for name in shapes:
            family, flags = SHAPES[name]
            words = [*flags.split(), "--data.source", str(HOUSE), "--data.cache", f"{place}/cache"]
            words += ["--max_steps", str(STEPS), "--run", f"{place}/{name}-run"]
            words += ["--allow", "worse-than-unigram,past-invisible,split-leaks"]
            if family is not None:
                words += [
                    "--base",
                    drawn_base(family, Path(place) / name, LARGE if "large" in name else SMALL),
                ]
            found = plan(parse_config(words))
            child = [sys.executable, "-c", CHILD.replace("HOUSE", repr(str(HOUSE))), *words]
            made = subprocess.run(child, capture_output=True, text=True)
            if made.returncode:
                sys.exit(made.stderr)
            peak, seconds, clock = json.loads(made.stdout.strip().rpartition("\n")[2])
            own = found.step_seconds
            cells = [f"{found.cost.peak / 1e6:,.0f} MB", f"{peak / 1e6:,.0f} MB"]
            cells += [f"{found.cost.peak / peak:.2f}", f"{own:.3f} s", f"{seconds:.3f} s"]
            cells += [f"{own / seconds:.2f}", f"{clock:.3f} s"]
            print(f"{name:<20}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def drawn_base(family: str, folder: Path, shape: tuple[int, int, int]) -> str:
    """Its folder; the shape is its blocks, heads and width."""
    import torch

    from architecture import Decoder
    from data.corpus import training_texts
    from pretrained import save_pretrained
    from recipes.base_config import BaseConfig
    from recipes.small_base import model_of
    from tokenizer import BPETokenizer

    n_layer, n_head, n_embd = shape
    settings = BaseConfig(family, n_layer=n_layer, n_head=n_head, n_embd=n_embd)  # pyright: ignore[reportArgumentType]
    config = model_of(settings)
    tokenizer = BPETokenizer.train(training_texts(DataConfig(str(HOUSE))), 8000)
    torch.manual_seed(0)
    model = Decoder(replace(config, vocab_size=tokenizer.vocab_size, init="normal"))
    save_pretrained(model, tokenizer, folder, family)
    return str(folder)


if __name__ == "__main__":
    main()

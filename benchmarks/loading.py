"""Compare loading a model folder with transformers' `from_pretrained`: seconds and memory.

    python benchmarks/loading.py [--layers 24] [--repeats 5] [--folder FOLDER] [--only "fp32 -> bf16" ...]

Random weights at the shape of StarCoderBase-1B (GPTBigCode, multi-query; 1.1B parameters at 24 layers) are
written once: bf16 in one file, bf16 in shards, fp32. Each load is a process of its own, and the two sides
take turns with the files in the page cache. Medians of:

- call: from an imported torch to the model, with the imports that each side needs;
- again: the same call once more in the same process, after the first model is dropped, so without imports.
  Where the requested dtype is the file's, transformers maps the file and returns before a weight is copied,
  so that the two do different work;
- CPU: the processor time of `again`, in the program and in the system, which clears each page of new memory;
  other processes add little to it, and much to the seconds;
- read: the first pass over every weight after that;
- peak: the peak memory of the process by the end of the first model's first pass, less its memory with torch
  imported. Pages of a mapped file count here, though the system may reclaim them and read them again;
- own: the peak of the process's private memory, which only swapping could reclaim, sampled each 2 ms. Where
  transformers maps the file it is little, and grows with every weight that is then written to.

Both are also shown over the weights' size in the requested dtype. docs/models.md has figures, with their
machine.
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
from statistics import median
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

STARCODER_1B = {
    "vocab_size": 49152,
    "n_positions": 8192,
    "n_embd": 2048,
    "n_layer": 24,
    "n_head": 16,
    "n_inner": 8192,
    "multi_query": True,
}
CASES = {
    "bf16 -> bf16": ("bf16", "bfloat16"),
    "bf16, shards -> bf16": ("shards", "bfloat16"),
    "fp32 -> bf16": ("fp32", "bfloat16"),
    "bf16 -> fp32": ("bf16", "float32"),
}


def write_folders(folder: Path, layers: int) -> int:
    """Write the model folders that are missing; return the number of parameters."""
    from architecture import Decoder
    from pretrained import FAMILIES, save_pretrained
    from pretrained.family import to_model

    config = to_model(FAMILIES["gpt_bigcode"], STARCODER_1B | {"n_layer": layers})
    with torch.device("meta"):
        model = Decoder(config)
    parameters = sum(p.numel() for p in model.parameters())
    whole = 2**40
    kinds = {  # fp32 first, before it is rounded
        "fp32": (torch.float32, whole),
        "bf16": (torch.bfloat16, whole),
        "shards": (torch.bfloat16, 2**29),
    }
    missing = {name: kind for name, kind in kinds.items() if not (folder / name).exists()}
    if missing:
        model = model.to_empty(device="cpu")
        model.head.weight = model.embed.weight
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        for name, (dtype, most) in missing.items():
            save_pretrained(model.to(dtype), None, folder / name, max_shard_bytes=most)
    return parameters


def held(kind: str) -> int:
    """Return bytes of this process: `VmHWM`, its peak so far, or `RssAnon`, its private memory now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(kind + ":")).split()[1])


class OwnPeak(Thread):
    """A sampler of the peak of private memory, of which the system keeps no record."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = held("RssAnon")
        self.ended = Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, held("RssAnon"))

    def end(self) -> int:
        """Return the peak in bytes above those at the start."""
        self.ended.set()
        self.join()
        return max(self.most, held("RssAnon")) - self.first


def child(side: str, folder: str, dtype: str) -> None:
    """Load twice in this process, and print the times and the memory."""
    before, own = held("VmHWM"), OwnPeak()
    own.start()

    def load() -> torch.nn.Module:
        wanted = getattr(torch, dtype)
        if side == "ours":
            from pretrained import load_pretrained

            return load_pretrained(folder, wanted).model
        import transformers

        transformers.utils.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)

    def seconds(action: Any) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    kept: list[torch.nn.Module] = []
    first = seconds(lambda: kept.append(load()))
    touch(kept[0])
    peak, most = held("VmHWM") - before, own.end()
    kept.clear()
    used = time.process_time()
    again = seconds(lambda: kept.append(load()))
    used = time.process_time() - used
    read = seconds(lambda: touch(kept[0]))
    found = {"call": first, "again": again, "read": read, "cpu": used, "peak": peak, "own": most}
    print(json.dumps(found))


def touch(model: torch.nn.Module) -> None:
    """Read a byte of every page of every weight, which brings it into memory."""
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        flat[:: 4096 // flat.itemsize].sum()


def main(folder: Path, layers: int, repeats: int, only: list[str]) -> None:
    parameters = write_folders(folder, layers)
    print(f"{parameters:,} parameters, {repeats} processes a side in turn, medians\n")
    columns = "call, s | again, s | again, read, s | again, CPU s | peak, GB | own, GB | of the weights"
    print(f"| file -> model | | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for title in only:
        name, dtype = CASES[title]
        size = parameters * getattr(torch, dtype).itemsize
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
        for _ in range(repeats):
            for side, seen in runs.items():
                command = [sys.executable, __file__, "--child", side, str(folder / name), dtype]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
                seen.append(json.loads(out.stdout.splitlines()[-1]))
        rows = {}
        for side, seen in runs.items():
            values = {key: median(run[key] for run in seen) for key in seen[0]}
            values["read"] += values["again"]
            rows[side] = [values[key] for key in ("call", "again", "read", "cpu")]
            rows[side] += [values[key] / 1e9 for key in ("peak", "own")]
            print(f"| {title} | {side} | " + " | ".join(f"{value:.2f}" for value in rows[side]), end="")
            print(f" | {values['peak'] / size:.3f}, {values['own'] / size:.3f} |")
        ratios = [ours / theirs for ours, theirs in zip(*rows.values(), strict=True)]
        print("| | ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " | |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the folders are kept; None: thrown away after")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some of the loads")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
    elif arguments.folder:
        main(arguments.folder, arguments.layers, arguments.repeats, arguments.only)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary), arguments.layers, arguments.repeats, arguments.only)

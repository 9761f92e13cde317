"""Compare training from scratch with nanoGPT, on the same data, in one run on one machine.

    python benchmarks/against_nanogpt.py quality NANOGPT_FOLDER [--seconds 300]
    python benchmarks/against_nanogpt.py speed NANOGPT_FOLDER

NANOGPT_FOLDER is a checkout of github.com/karpathy/nanoGPT; only its model.py is used.

quality: bits per byte of the standard library's test files after the same wall-clock budget. nanoGPT
gets a byte-level BPE, AdamW, the learning rate and size that did best for it (4 layers x 256, vocabulary
4,096), and the precision that the hardware computes natively. Ours is `python trainingmanager.py` as it
stands. Neither side's tokenizer training or final scoring counts.

speed: tokens/s of one training step (forward, backward, clip, AdamW) at 4 layers x 256, vocabulary 22,812,
16 rows x 256, dropout 0.1, random tokens. Each is set up as its own training command sets it up, in a
process of its own; the two take turns, five each, and the median of each counts.

Figures: docs/figures.md, on two cores with AVX-512, without native bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from architecture import Decoder
from config import DataConfig, ModelConfig, OptimizerConfig
from config.files import REPOSITORY
from data.corpus import split_documents
from data.documents import SPLITS
from dataset import Batch
from modules.precision import choose_device, choose_precision, keep_freed_memory
from tokenizer import BPETokenizer
from training.loss import token_loss
from training.optim import build_optimizers

SPEED_SHAPE = 22_812, 16, 256  # vocabulary size, rows, tokens a row


def nanogpt(folder: Path, **settings: Any) -> Any:
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    return GPT(GPTConfig(**settings))


def peer_bits_per_byte(folder: Path, seconds: float) -> dict[str, float]:
    """Train nanoGPT for `seconds` and score every test token once, in windows of 256."""
    texts: dict[str, list[str]] = {side: [] for side in SPLITS}
    for side, document in split_documents(DataConfig()):
        texts[side].append(document.text)
    tokenizer = BPETokenizer.train(texts["train"], 4096)

    def stream(side: str) -> Tensor:
        ids = [i for text in texts[side] for i in [tokenizer.eos_id, *tokenizer.encode(text)]]
        return torch.tensor(np.array(ids, dtype=np.int64))

    x, y = stream("train"), stream("test")
    rows, length, peak = 16, 256, 2e-3
    torch.manual_seed(0)
    model = nanogpt(
        folder, n_layer=4, n_head=4, n_embd=256, block_size=length, vocab_size=4096, dropout=0.0, bias=False
    )
    optimizer = model.configure_optimizers(0.1, peak, (0.9, 0.95), "cpu")
    precision = choose_precision(torch.device("cpu"), "auto")
    started, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        share = elapsed / seconds
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, steps / 50) * (1 if share < 0.5 else max(0.05, 2 * (1 - share)))
        starts = torch.randint(len(x) - length - 1, (rows,)).tolist()
        tokens = torch.stack([x[i : i + length] for i in starts])
        targets = torch.stack([x[i + 1 : i + 1 + length] for i in starts])
        with precision.autocast():
            loss = model(tokens, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    model.eval()
    nats = 0.0
    with torch.no_grad(), precision.autocast():
        for i in range(0, len(y) - 1, length):
            tokens, targets = y[i : i + length], y[i + 1 : i + length + 1]
            nats += model(tokens[None, : len(targets)], targets[None])[1].item() * len(targets)
    n_bytes = sum(len(text.encode()) for text in texts["test"])
    return {"bits per byte": nats / math.log(2) / n_bytes, "tokens/s": steps * rows * length / seconds}


def our_bits_per_byte(seconds: float) -> dict[str, float]:
    """Run `python trainingmanager.py --max_seconds N`, and read the scores that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "trainingmanager.py", "--run", str(run), "--max_seconds", str(seconds)]
        subprocess.run(command, cwd=REPOSITORY, check=True)
        scores = json.loads((run / "eval.json").read_text())["model"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    return {"bits per byte": scores["bits_per_byte"], "tokens/s": rates[-1]}


def quality(folder: Path, seconds: float) -> None:
    peer, ours = peer_bits_per_byte(folder, seconds), our_bits_per_byte(seconds)
    print(f"\n{'':12}{'bits per byte':>14}{'tokens/s':>10}")
    for name, values in (("nanoGPT", peer), ("ours", ours)):
        print(f"{name:12}{values['bits per byte']:14.4f}{values['tokens/s']:10,.0f}")
    print(f"ours is {1 - ours['bits per byte'] / peer['bits per byte']:.1%} lower")


def seconds_a_step(side: str, folder: Path) -> float:
    """Return the median time of a training step of one side, in this process."""
    vocab_size, rows, length = SPEED_SHAPE
    # Random tokens teach nothing; at 1e-3 they drive both models to saturation and denormal numbers.
    rate = 1e-6
    precision = choose_precision(choose_device("cpu"), "auto")
    shape: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": length, "dropout": 0.1}
    if side == "nanoGPT":
        model = nanogpt(folder, vocab_size=vocab_size, bias=False, **shape)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=rate, fused=True)]
    else:
        keep_freed_memory()
        # These settings compute nanoGPT's function: learned positions, norms with a scale, GELU, a tied head.
        shape |= {"position": "learned", "qk_norm": False, "norm_weight": True, "tie_embeddings": True}
        model = Decoder(ModelConfig(vocab_size=vocab_size, init="normal", mlp="gelu", **shape))
        settings = OptimizerConfig(name="adamw", lr=rate, embedding_lr=rate, head_lr=rate)
        optimizers = build_optimizers(model, settings)
    print(f"{side}: {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    positions = torch.arange(length).expand(rows, length)
    documents = torch.zeros(rows, length, dtype=torch.long)
    times = []
    for _ in range(9):
        row = torch.randint(vocab_size, (rows, length + 1))
        tokens, targets = row[:, :-1].contiguous(), row[:, 1:].contiguous()
        started = time.perf_counter()
        with precision.autocast():
            if side == "nanoGPT":
                loss = model(tokens, targets)[1]
            else:
                batch = Batch(tokens, targets, documents, positions)
                loss = token_loss(model, batch).objective / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return median(times[2:])


def speed(folder: Path) -> None:
    _, rows, length = SPEED_SHAPE
    rates: dict[str, list[float]] = {"nanoGPT": [], "ours": []}
    for _ in range(5):
        for side, values in rates.items():
            command = [sys.executable, __file__, "speed", str(folder), "--side", side]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            values.append(rows * length / float(out.splitlines()[-1]))
    print(choose_precision(choose_device("cpu"), "auto").reason)
    for side, values in rates.items():
        print(f"{side:8} {median(values):,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})")
    print(f"ours is {median(rates['ours']) / median(rates['nanoGPT']):.2f} times as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--side", choices=("nanoGPT", "ours"), help="measure this one alone; print seconds")
    arguments = parser.parse_args()
    if arguments.side:
        print(seconds_a_step(arguments.side, arguments.folder))
    elif arguments.what == "quality":
        quality(arguments.folder, arguments.seconds)
    else:
        speed(arguments.folder)

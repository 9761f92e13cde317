"""Measure memorisation of a secret by how often it was trained on: `python benchmarks/canaries.py FOLDER`.

Canaries, lines such as `token_3 = "824193"`, are planted in small Python files, one once, one twice, one four
times and so on. A run trains on the files, and the exposure of each canary is measured (Carlini et al. 2019,
arXiv:1802.08232): log2 of the number of secrets among which the model's loss ranks it, less log2 of its rank.
A secret that was not trained on has 1.44 bits on average; with N others the maximum is log2(N + 1). Flags
after FOLDER go to trainingmanager.py. docs/evaluate.md has a result.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from architecture import Decoder
from config.files import REPOSITORY
from dataset import IGNORE_INDEX
from tokenizer import Tokenizer
from training.run import load_run

TIMES = (0, 1, 2, 4, 8, 16, 32)
DIGITS = 6
OTHERS = 1023  # number of random secrets among which a canary is ranked
FILES = 120
NAMES = ("count", "total", "value", "price", "length", "width", "index", "score")


def secrets(n: int, seed: int) -> list[str]:
    draw = np.random.Generator(np.random.PCG64(seed))
    return ["".join(map(str, digits)) for digits in draw.integers(0, 10, (n, DIGITS))]


def line(number: int, secret: str) -> str:
    return f'token_{number} = "{secret}"\n'


def planted(times: Sequence[int], seed: int = 0) -> tuple[list[str], list[str]]:
    """Return the texts of files, and the secret of each canary; canary i is in `times[i]` of the files."""
    own = secrets(len(times), seed)
    draw = np.random.Generator(np.random.PCG64([seed, 1]))
    texts = []
    for number in range(max([FILES, *times])):
        a, b, c = draw.choice(NAMES, 3, replace=False)
        body = f"def {a}_{number}({b}):\n    {c} = {b} + {number}\n    return {c} * 2\n"
        kept = [line(i, own[i]) for i, n in enumerate(times) if number < n]
        texts.append("".join(draw.permutation([*kept, body]).tolist()))
    return [texts[i] for i in draw.permutation(len(texts))], own


def nll(model: Decoder, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Return the negative log-likelihood of each text as a document of its own, (texts,), in nats."""
    rows = [[tokenizer.start_id or 0, *tokenizer.encode(text)] for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row[1:] + [IGNORE_INDEX] * (width - len(row)) for row in rows])
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), 256):
            logits = model(tokens[start : start + 256, :-1]).float().transpose(1, 2)
            lost = torch.nn.functional.cross_entropy(
                logits, labels[start : start + 256], ignore_index=IGNORE_INDEX, reduction="none"
            )
            found.append(lost.sum(1).double().numpy())
    return np.concatenate(found)


def exposure(own: float, others: np.ndarray) -> float:
    """Return the exposure in bits; of equal losses, half rank before it."""
    rank = 1 + (others < own).sum() + (others == own).sum() / 2
    return math.log2(len(others) + 1) - math.log2(rank)


def exposures(model: Decoder, tokenizer: Tokenizer, own: Sequence[str], seed: int = 1) -> list[float]:
    """Return the exposure of each canary among random secrets in its own line."""
    found = []
    for number, secret in enumerate(own):
        others = [other for other in secrets(OTHERS, seed + number) if other != secret]
        losses = nll(model, tokenizer, [line(number, one) for one in [secret, *others]])
        found.append(exposure(losses[0], losses[1:]))
    return found


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked, flags = parser.parse_known_args()
    texts, own = planted(TIMES, asked.seed)
    corpus, run = asked.folder / "corpus", asked.folder / "run"
    corpus.mkdir(parents=True)
    # The files name their split, since a split by hash would hold out some of the secrets.
    for side, rows in (("train", texts), ("validation", planted((), asked.seed + 1)[0])):
        lines = (json.dumps({"text": text, "name": f"{side}{i}.py"}) + "\n" for i, text in enumerate(rows))
        (corpus / f"{side}.jsonl").write_text("".join(lines), "utf-8")
    words = ["--data.source", corpus, "--run", run, "--data.cache", asked.folder / "cache"]
    words += ["--data.test_one_in", "0", *flags]
    subprocess.run([sys.executable, REPOSITORY / "trainingmanager.py", *map(str, words)], check=True)
    found = load_run(run, "last")
    print(f"\ncanaries after step {found.step}, ranked among {OTHERS:,} random secrets")
    print("times seen  exposure, bits")
    for times, bits in zip(TIMES, exposures(found.model.cpu().eval(), found.tokenizer, own), strict=True):
        print(f"{times:>10}  {bits:14.2f}")


if __name__ == "__main__":
    main()

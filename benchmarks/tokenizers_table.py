"""Compare the tokenizers on the standard library: compression, speed, and bits per byte after equal training.

    python benchmarks/tokenizers_table.py [--seconds 60]

Characters a token and MB/s of encoding (one core, cold caches) are over the test files; bits per byte
is that of `python trainingmanager.py` with each tokenizer after the same wall-clock budget, all else equal.
docs/tokenizers.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import DataConfig, TokenizerConfig
from config.files import REPOSITORY
from data.corpus import split_documents
from dataset import prepare_tokenizer


def main(seconds: float, sizes: list[int]) -> None:
    documents = split_documents(DataConfig())
    texts = [document.text for split, document in documents if split == "test"]
    characters, n_bytes = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    print("| tokenizer | vocabulary | characters a token | encode, MB/s | bits per byte |")
    print("|---|---|---|---|---|")
    for kind in ("code", "bpe"):
        for size in sizes:
            with contextlib.redirect_stdout(sys.stderr):
                tokenizer = prepare_tokenizer(DataConfig(), TokenizerConfig(kind=kind, vocab_size=size))
            started = time.perf_counter()
            tokens = sum(len(tokenizer.encode(text)) for text in texts)
            rate = n_bytes / 1e6 / (time.perf_counter() - started)
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                words = ["--tokenizer.kind", kind, "--tokenizer.vocab_size", str(size), "--run", str(run)]
                command = [sys.executable, "trainingmanager.py", *words, "--max_seconds", str(seconds)]
                subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
                score = json.loads((run / "eval.json").read_text())["model"]["bits_per_byte"]
            size_and_fertility = f"{tokenizer.vocab_size:,} | {characters / tokens:.2f}"
            print(f"| {kind} | {size_and_fertility} | {rate:.1f} | {score:.3f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192])
    arguments = parser.parse_args()
    main(arguments.seconds, arguments.sizes)

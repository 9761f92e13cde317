"""Measure what proposals bring a trained run: tokens a second with them over those without, text by text.

    python benchmarks/speculation.py RUN [--held int8] [--texts 8] [--new 128] [--turns 3]

Each text is completed alone, greedily, without proposals, by lookup in the text, and by an n-gram model of
the run's training files, in turns. The texts are

- `files`: beginnings of test files of the run;
- `edits`: a passage of a test file, and then its beginning again, as in an edit that repeats its input;
- `noise`: random tokens, which nothing foresees.

The output has the median ratio over the texts, with its range; the share of proposed tokens that were taken;
and tokens a pass. In fp32 the texts have to be equal.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from architecture import Decoder
from data.ngram import NGramModel
from dataset import prepare_data
from generation.engine import Engine
from generation.requests import Request
from generation.settings import GenerationConfig
from generation.speculation import Lookup, NGram, Proposer
from modules.products import speed_up
from modules.quantized_linear import INTEGERS
from training.run import hold_run, load_run

Make = Callable[[], Proposer] | None


def completed(model: Decoder, prompt: list[int], new: int, make: Make) -> tuple[float, list[int], int, int]:
    """Return the seconds of a completion, its ids, and how many tokens were proposed and taken."""
    engine = Engine(model, proposer=make)
    handle = engine.add(Request(prompt, GenerationConfig(max_new_tokens=new)))
    while not handle.texts[0].ids:
        engine.step()
    text, started = handle.texts[0], time.perf_counter()
    while engine.step():
        pass
    seconds, found = time.perf_counter() - started, text.speculation
    proposed, taken = (0, 0) if found is None else (found.proposed, found.taken)
    return seconds, handle.result()[0].ids, proposed, taken


def prompts_of(
    documents: list[list[int]], n: int, length: int, vocab_size: int
) -> dict[str, list[list[int]]]:
    """Return the prompts of each kind, at most `length` tokens each."""
    long = [ids for ids in documents if len(ids) > length][:n]
    draw = torch.Generator().manual_seed(0)
    half = length // 2
    return {
        "files": [ids[:half] for ids in long],
        "edits": [[*ids[:half], *ids[: half // 4]] for ids in long],
        "noise": [torch.randint(4, vocab_size, (half,), generator=draw).tolist() for _ in long],
    }


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    run = load_run(arguments.run)
    data = prepare_data(run.config.data, run.tokenizer)
    hold_run(run, arguments.held)
    if arguments.held in INTEGERS:
        run.model.bfloat16()
    speed_up(run.model)
    ngrams = NGramModel(map(data.train.document, range(data.train.n_documents)), run.tokenizer.vocab_size)
    ways: dict[str, Make] = {"none": None, "lookup": Lookup, "n-gram": partial(NGram, ngrams)}
    documents = [data.test.document(i).tolist() for i in range(data.test.n_documents)]
    length = run.config.model.block_size - arguments.new
    kinds = prompts_of(documents, arguments.texts, length, run.tokenizer.vocab_size)
    print(f"{arguments.run}, held {arguments.held}, {arguments.threads} threads")
    print("| texts | proposals | times as fast | taken of those proposed | tokens a pass |")
    print("|---|---|---|---|---|", flush=True)
    for kind, prompts in kinds.items():
        best: dict[str, list[float]] = {name: [] for name in ways}
        counts = {name: [0, 0] for name in ways}
        for prompt in prompts:
            turns: dict[str, list[float]] = {name: [] for name in ways}
            texts = {}
            for turn in range(arguments.turns + 1):  # The first one warms up.
                for name, make in ways.items():
                    seconds, texts[name], proposed, taken = completed(run.model, prompt, arguments.new, make)
                    if turn:
                        turns[name].append(seconds)
                    if turn == 1:
                        counts[name] = [counts[name][0] + proposed, counts[name][1] + taken]
            if arguments.held == "full" and len({tuple(ids) for ids in texts.values()}) > 1:
                sys.exit(f"error: the texts of {kind} differ")
            for name in ways:
                best[name].append(median(turns["none"]) / median(turns[name]))
        for name in [name for name in ways if name != "none"]:
            (proposed, taken), ratios = counts[name], sorted(best[name])
            new = arguments.new * len(prompts)
            print(
                f"| {kind} | {name} | {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
                f"| {taken} of {proposed} | {new / (new - taken):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--held", choices=["full", "int8", "int4", "nf4"], default="full")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    main(parser.parse_args())

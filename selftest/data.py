"""The data that planted faults train on: small corpora, and a small published model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch

import pretrained
import pretrained.gpt_bigcode
from architecture import Decoder
from config import DataConfig, ModelConfig
from data.corpus import split_documents, training_texts
from tokenizer import BPETokenizer, PretrainedTokenizer, Tokenizer
from training.optim import AdamW

WORDS = (
    "add all any ask bag bar bit box bus cap car cat cup cut day dog dot ear egg end eye fan far fit fly fog "
    "gap gas hat hen ice ink jar jet key kid lab leg lid log map mat net nut oak oil owl pan pen pin pot rat "
    "row sea sky sun tea tip toe toy urn van wax web zip"
)


def function(draw: random.Random) -> str:
    """Return a small function of sampled words; two of them share little but their form."""
    words = WORDS.split()
    name, x, y, z = draw.sample(words, 4)
    other, n, operator = draw.choice(words), draw.randrange(100), draw.choice("+-*")
    return (
        f"def {name}_{other}({x}, {y}={n}):\n    {z} = {x} {operator} {y}\n"
        f"    return [{z} for {other} in range({draw.randrange(100)})]\n\n\n"
    )


def write_corpus(folder: Path, lines: int = 6) -> None:
    """Write 24 different files of Python, each of that many functions."""
    folder.mkdir()
    for i in range(24):
        draw = random.Random(i)
        text = "".join(function(draw) for _ in range(lines))
        (folder / f"part{i}.py").write_text(text, encoding="utf-8")


def write_graded(folder: Path) -> None:
    """Write 24 files, of which each has more different words than the one before."""
    folder.mkdir()
    for i in range(24):
        draw = random.Random(i)
        words = WORDS.split()[: 3 * i + 3]
        lines = (f"{draw.choice(words)} = {draw.choice(words)}\n" for _ in range(40))
        (folder / f"part{i}.py").write_text("".join(lines), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_examples(path: Path) -> None:
    """Write 48 examples, the head of a function as the prompt and its body as the completion."""
    texts = [function(random.Random(i)).rstrip() + "\n" for i in range(48)]
    parts = (text.split("\n", 1) for text in texts)
    write_rows(path, ({"prompt": head + "\n", "completion": body} for head, body in parts))


def write_long_prompts(path: Path) -> None:
    """Write examples whose prompts have 12 functions more before them, which do not fit a row."""
    draw = random.Random(48)
    rows = []
    for i in range(48):
        head, body = (function(random.Random(i)).rstrip() + "\n").split("\n", 1)
        before = "".join(function(draw) for _ in range(12))
        rows.append({"prompt": f"{before}{head}\n", "completion": body})
    write_rows(path, rows)


def write_variants(path: Path) -> None:
    """Write five degraded variants of each of 24 functions, to be turned back into it."""
    rows = []
    for i in range(24):
        text = function(random.Random(i)).rstrip() + "\n"
        for j in range(5):
            worse = text.replace(" = ", " =" + " " * (j + 1)).replace("    ", " " * (j + 1))
            rows.append({"input": worse, "output": text, "origin": str(i)})
    write_rows(path, rows)


def write_windows(path: Path, size: int, stride: int) -> None:
    """Write windows of `size` lines of 12 files, a row each, which begin `stride` lines apart."""
    rows = []
    for i in range(12):
        draw = random.Random(i)
        lines = "".join(function(draw) for _ in range(12)).splitlines(keepends=True)
        for start in range(0, len(lines) - size + 1, stride):
            text = "".join(lines[start : start + size])
            rows.append({"text": text, "path": f"file{i}.py:{start}", "origin": str(i)})
    write_rows(path, rows)


def write_lines(path: Path) -> None:
    """Write pages that repeat their lines, a row each; they differ in white space only."""
    rows = []
    for i in range(12):
        draw = random.Random(i)
        lines = [function(draw) for _ in range(6)]
        for j in range(24):
            text = lines[j % 6] + "\n" * (j // 6)
            rows.append({"text": text, "origin": str(i)})
    write_rows(path, rows)


def write_data(folder: Path) -> None:
    """Write every corpus that a planted fault trains on."""
    write_corpus(folder / "long")
    write_graded(folder / "graded")
    write_examples(folder / "examples.jsonl")
    write_long_prompts(folder / "prompts.jsonl")
    write_variants(folder / "variants.jsonl")
    write_lines(folder / "lines.jsonl")
    write_windows(folder / "windows.jsonl", size=8, stride=2)
    write_windows(folder / "chunks.jsonl", size=8, stride=8)


def train_briefly(model: Decoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Train a small model for 60 updates on rows of the texts, so that it knows them a little."""
    ids = torch.tensor([id for text in texts for id in tokenizer.encode(text)])
    rows = ids[: len(ids) // 33 * 33].view(-1, 33)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        chosen = rows[torch.randint(len(rows), (32,))]
        logits = model(chosen[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def write_base(folder: Path) -> None:
    """Write a small published model, like StarCoder, that knows the corpus a little, and two that do not fit.

    `other-base` has one other weight; `more-tokens` is its tokenizer with a token that it never saw.
    """
    config = DataConfig(str(folder / "long"), validation_one_in=4, test_one_in=4)
    texts = [*training_texts(split_documents(config))]
    tokenizer = BPETokenizer.train(texts, 290)
    shape = pretrained.gpt_bigcode.FAMILY.parts | {"n_kv_head": 1, "mlp": "gelu_tanh", "tie_embeddings": True}
    shape |= {"vocab_size": 300, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 32, "init": "normal"}
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**shape))
    train_briefly(model, tokenizer, texts)
    pretrained.save_pretrained(model, tokenizer, folder / "base")
    with torch.no_grad():
        model.norm.get_parameter("bias")[0] += 1
    pretrained.save_pretrained(model, tokenizer, folder / "other-base")
    more = PretrainedTokenizer.load(folder / "base").with_tokens([":\n    "])
    (folder / "more-tokens").mkdir()
    more.save(folder / "more-tokens")

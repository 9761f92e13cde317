"""Type into real servers: time to the first token of a next keystroke, and tokens a second of many editors.

    python benchmarks/serving_keys.py FOLDER --prepare                     writes the model, once
    python benchmarks/serving_keys.py FOLDER [--held int8] [--llama COMMAND] [--keys 60] [--seconds 12]

The model has the shape of a StarCoder of 117M parameters (benchmarks/serving.py), with random weights and a
tokenizer of this repository's files. `serve.py` serves it, and where --llama names a llama-server (its first
words, such as `llama-server` or a loader with its libraries), that serves the same weights in q8_0, or in f16
for `--held full`. Both get the same bodies, on llama.cpp's own paths /completion and /infill.

One editor types a file of this repository: behind some 900 tokens, a request follows each 1 to 4 characters,
streamed, and ends with its sixteenth token. Told are the median and the 95th percentile of the milliseconds
until the first text: without a suffix, and with one of at most 64 tokens. Then 1, 4 and 16 editors, each of
which asks for its next edit as soon as it has an answer: tokens a second, and the ratio to one editor. At
last the sixteen leave half of their requests after 30 ms: tokens a second of those that they wait for.

A processor that is busy with other work gives no times. docs/figures.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.serving_load import HEAD, start

NEW, BEFORE, AFTER = 16, 2_700, 160  # new tokens; characters before the cursor at first, and after it
EDITORS = (1, 4, 16)


class Asked(NamedTuple):
    """A request: its path, and its body."""

    path: str
    body: dict[str, Any]


def prepare(folder: Path) -> None:
    """Write the model, and the same as GGUF."""
    import torch

    from architecture import Decoder
    from benchmarks.serving import SHAPE
    from pretrained import save_pretrained
    from pretrained.save_gguf import save_gguf
    from tokenizer import BPETokenizer

    texts = [path.read_text("utf-8") for path in sources()]
    tokenizer = BPETokenizer.train(texts, 8_192)
    torch.manual_seed(0)
    model = Decoder(SHAPE.resolved()).eval()
    save_pretrained(model, tokenizer, folder / "model")
    for kind in ("q8_0", "f16"):
        save_gguf(model, tokenizer, folder / f"{kind}.gguf", kind)


def sources() -> list[Path]:
    """Return the files that are typed, and that the tokenizer is trained on."""
    parts = (ROOT / name for name in ("generation", "training", "data"))
    return [path for part in parts for path in sorted(part.glob("*.py")) if path.stat().st_size > 2 * BEFORE]


def edits(editor: int, has_suffix: bool) -> Iterator[Asked]:
    """Yield the requests of an editor, who types one file and then another."""
    draw, files = random.Random(editor), sources()
    for number in range(editor, 10**6, EDITORS[-1]):
        text = files[number % len(files)].read_text("utf-8")
        place = BEFORE
        while place < min(len(text), 2 * BEFORE) - 4 * AFTER:
            place += draw.randrange(1, 5)
            before, after = text[:place], text[place:][:AFTER]
            asked = {"n_predict": NEW, "temperature": 0, "stream": True, "cache_prompt": True}
            asked |= {"id_slot": editor, "ignore_eos": True}
            if has_suffix:
                yield Asked("/infill", asked | {"input_prefix": before, "input_suffix": after, "prompt": ""})
            else:
                yield Asked("/completion", asked | {"prompt": before})


class Answered(NamedTuple):
    """What one request brought: seconds to the first text, tokens, and whether the client left."""

    first: float
    tokens: int
    left: bool


async def ask(port: int, asked: Asked, leave: float | None = None) -> Answered:
    """Send a request and read its stream, or leave after `leave` seconds."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(asked.body).encode()
    first, tokens = 0.0, 0
    try:
        writer.write(HEAD.format(asked.path, len(data)).encode() + data)
        async with asyncio.timeout(leave):
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.splitlines()[0]:
                raise ValueError(head.decode("latin-1") + (await reader.read(300)).decode("latin-1"))
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    if line == b"0\r\n":
                        break
                    continue
                part = json.loads(line[6:])
                first = first or (time.perf_counter() - started if part.get("content") else 0.0)
                tokens = part.get("tokens_predicted", tokens)
                if part.get("stop"):
                    break
    except TimeoutError:
        return Answered(first, 0, True)
    finally:
        writer.close()
    return Answered(first or time.perf_counter() - started, tokens, False)


async def keystrokes(port: int, n: int, has_suffix: bool) -> list[float]:
    """Return the seconds to the first text of `n` edits of one editor, after one that opens the file."""
    typed, found = edits(0, has_suffix), []
    for number in range(n + 1):
        answered = await ask(port, next(typed))
        found += [answered.first] * (number > 0)
    return found


async def throughput(port: int, editors: int, seconds: float, cancelled: float = 0.0) -> tuple[float, int]:
    """Return tokens a second of editors who ask without a pause, and of the requests that they left."""
    typed = [edits(editor, False) for editor in range(editors)]
    await asyncio.gather(*(ask(port, next(one)) for one in typed))  # The files are open.
    begun, draw, tokens, left = time.perf_counter(), random.Random(7), 0, 0

    async def editor(own: Iterator[Asked]) -> None:
        nonlocal tokens, left
        while time.perf_counter() < begun + seconds:
            answered = await ask(port, next(own), 0.03 if draw.random() < cancelled else None)
            tokens, left = tokens + answered.tokens, left + answered.left

    await asyncio.gather(*map(editor, typed))
    return tokens / (time.perf_counter() - begun), left


def measure(name: str, port: int, given: argparse.Namespace) -> None:
    """Print what one server takes."""
    for has_suffix in (False, True):
        times = [1000 * one for one in asyncio.run(keystrokes(port, given.keys, has_suffix))]
        told = "a suffix of at most 64 tokens" if has_suffix else "no suffix"
        p95 = quantiles(times, n=20)[-1]
        print(
            f"{name}: first text of a next keystroke, {told}: p50 {median(times):.0f} ms, p95 {p95:.0f} ms",
            flush=True,
        )
    of_one = 0.0
    for editors in EDITORS:
        rate, _ = asyncio.run(throughput(port, editors, given.seconds))
        of_one = of_one or rate
        print(f"{name}: {editors} editors: {rate:.0f} tokens/s, {rate / of_one:.1f} times one", flush=True)
    rate, left = asyncio.run(throughput(port, EDITORS[-1], given.seconds, 0.5))
    print(f"{name}: {EDITORS[-1]} editors who leave half: {rate:.0f} tokens/s, {left} requests were left")


def start_llama(command: str, file: Path, port: int) -> subprocess.Popen[bytes]:
    """Start llama-server, and wait until it listens."""
    slots = str(EDITORS[-1])
    more = ["-m", str(file), "-t", "2", "-np", slots, "-c", str(2_048 * EDITORS[-1]), "--port", str(port)]
    log = file.with_suffix(".log").open("wb")
    process = subprocess.Popen([*shlex.split(command), *more], stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
            asyncio.run(ask(port, Asked("/completion", {"prompt": "a", "n_predict": 1, "stream": True})))
            return process
        time.sleep(0.2)
    process.kill()
    raise SystemExit(f"llama-server does not listen; see {log.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--held", default="int8", choices=["int8", "int4", "full"])
    parser.add_argument("--llama", default="")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--keys", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=12.0)
    given = parser.parse_args()
    if given.prepare:
        prepare(given.folder)
        return
    served = start(given.folder / "model", given.folder / "cache", ("--held", given.held), threads=2)
    try:
        measure(f"plumb, {given.held}", served.port, given)
    finally:
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(60)
    if given.llama:
        kind = "f16" if given.held == "full" else "q8_0"
        process = start_llama(given.llama, given.folder / f"{kind}.gguf", given.port)
        try:
            measure(f"llama-server, {kind}", given.port, given)
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()

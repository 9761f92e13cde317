"""Load the real server process: a replayed trace of edits with cancellations, and a client under attack.

    python benchmarks/serving_load.py [--requests 10000] [--cancelled 0.3] [--attacks loris,endless,...]

A tiny model of random weights is served by `serve.py`. Sixteen editors type files of this repository: each
asks after some characters more, on /v1/completions and /infill, whole and streamed, with and without a
suffix. The share `cancelled` of the requests is closed after some milliseconds. Every other answer is
compared with the text that `generate` writes for it alone. Memory is the process's own (VmRSS), before, when
each request of the trace was asked twice, and after.

An attack goes on in a process of its own while one honest client asks one request after another: its p95 is
told as a ratio to its p95 without the attack. docs/figures.md has figures, with their machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from architecture import Decoder
from config import ModelConfig
from generation.settings import GenerationConfig
from generation.text import generate
from pretrained import save_pretrained
from pretrained.gpt_bigcode import FAMILY
from tokenizer import BPETokenizer

EDITORS, EDITS = 16, 25  # The trace has so many requests of each editor.
NEW = 4  # tokens of a completion
START = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEAD = START + "Content-Length: {}\r\n\r\n"


class Edit(NamedTuple):
    """A request of the trace, and the text that answers it."""

    path: str
    body: dict[str, Any]
    expected: str


class Served(NamedTuple):
    """A server process."""

    process: subprocess.Popen[str]
    port: int

    @property
    def memory(self) -> int:
        """Its memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


def write_model(folder: Path) -> tuple[Decoder, BPETokenizer]:
    """Write a tiny model of random weights, and return it with its tokenizer."""
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "generation").glob("*.py"))]
    tokenizer = BPETokenizer.train(texts, 700)
    sizes: dict[str, Any] = {"block_size": 256, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    parts: dict[str, Any] = FAMILY.parts | {"mlp": "gelu_tanh", "tie_embeddings": True, "init": "normal"}
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes, **parts).resolved()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    save_pretrained(model, tokenizer, folder)
    return model, tokenizer


def trace(model: Decoder, tokenizer: BPETokenizer) -> list[Edit]:
    """Return the requests of editors in turn, each with the text that it gets alone."""
    draw, files = random.Random(0), sorted((ROOT / "generation").glob("*.py"))
    found: list[Edit] = []
    places = [draw.randrange(300, 500) for _ in range(EDITORS)]
    for number in range(EDITORS * EDITS):
        editor = number % EDITORS
        text = files[editor % len(files)].read_text("utf-8")
        places[editor] += draw.randrange(1, 9)
        before, after = text[max(0, places[editor] - 300) : places[editor]], text[places[editor] :][:80]
        suffix = after if draw.random() < 0.5 else None
        asked = GenerationConfig(max_new_tokens=NEW)
        (made,) = generate(model, tokenizer, [before], asked, suffix=suffix)
        body: dict[str, Any] = {"temperature": 0, "stream": draw.random() < 0.5}
        if suffix is not None and draw.random() < 0.3:
            path, body = "/infill", body | {"input_prefix": before, "input_suffix": suffix, "n_predict": NEW}
        else:
            path = "/v1/completions"
            body |= {"prompt": before, "suffix": suffix, "max_tokens": NEW, "user": str(editor)}
        found.append(Edit(path, body, cut(made.text, before, suffix)))
    return found


def cut(text: str, before: str, suffix: str | None) -> str:
    """Return a completion as the server ends it, before it repeats the suffix."""
    from serving.ending import Ending

    if suffix is None:
        return text
    ending = Ending("free", before, suffix)
    return ending.feed(text) + ending.finish()


def start(folder: Path, cache: Path, more: Sequence[str] = (), threads: int = 1) -> Served:
    """Start the server with more flags, and wait until it listens."""
    words = ["--model", str(folder), "--port", "0", "--device", "cpu", "--cache", str(cache), *more]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MALLOC_ARENA_MAX": "2"}
    command, log = [sys.executable, str(ROOT / "serve.py"), *words], cache.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        said = log.read_text("utf-8")
        if port := re.findall(r"listening at http://127.0.0.1:(\d+);", said):
            return Served(process, int(port[0]))
        if process.poll() is not None:
            raise ValueError(f"the server ended: {said}")
        time.sleep(0.1)
    raise ValueError("the server does not listen")


async def ask(port: int, path: str, body: dict[str, Any], leave: float | None = None) -> str | None:
    """Return the text that answers a request; None where the client leaves after `leave` seconds.

    Raises:
        ValueError: The answer is no text.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    try:
        writer.write(HEAD.format(path, len(data)).encode() + data)
        await writer.drain()
        if leave is not None:
            await asyncio.sleep(leave)
            return None
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if not head.startswith("http/1.1 200"):
            raise ValueError(head.splitlines()[0])
        if size := re.findall(r"content-length: (\d+)", head):
            return text_of(json.loads(await reader.readexactly(int(size[0]))))
        whole = b""
        while (n := int((await reader.readline()).strip() or b"0", 16)) > 0:
            whole += await reader.readexactly(n)
            await reader.readline()
        lines = [line[6:] for line in whole.decode().split("\n\n") if line.startswith("data: {")]
        return "".join(text_of(json.loads(line)) for line in lines)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def text_of(answer: dict[str, Any]) -> str:
    """Return the text of an answer, or of a part of one."""
    if "content" in answer:
        return answer["content"]
    return "".join(choice["text"] for choice in answer["choices"])


async def replay(port: int, edits: list[Edit], n: int, cancelled: float) -> tuple[int, list[str]]:
    """Send `n` requests of the trace, by sixteen editors; returns how many left, and what went wrong."""
    draw, wrong, left = random.Random(1), list[str](), 0
    jobs = [(number, draw.uniform(0, 0.03) if draw.random() < cancelled else None) for number in range(n)]

    async def editor(own: list[tuple[int, float | None]]) -> None:
        nonlocal left
        for number, leave in own:
            edit = edits[number % len(edits)]
            try:
                found = await ask(port, edit.path, edit.body, leave)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                wrong.append(f"request {number}: {type(error).__name__} {error}")
                continue
            left += leave is not None
            if leave is None and found != edit.expected:
                wrong.append(f"request {number}: {found!r}, and alone {edit.expected!r}")

    await asyncio.gather(*(editor(jobs[first::EDITORS]) for first in range(EDITORS)))
    return left, wrong


async def texts_under_way(port: int) -> float:
    """Return the texts that run or wait, as the server counts them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    return sum(float(value) for value in re.findall(r"^plumb_(?:texts|waiting) (\S+)$", page, re.MULTILINE))


def load(served: Served, edits: list[Edit], n: int, cancelled: float) -> dict[str, Any]:
    """Replay the trace; returns counts, and memory before and after."""
    _, wrong = asyncio.run(replay(served.port, edits, len(edits), 0.0))
    asyncio.run(replay(served.port, edits, len(edits), cancelled))
    before, started = served.memory, time.perf_counter()
    left, more = asyncio.run(replay(served.port, edits, n, cancelled))
    seconds, until = time.perf_counter() - started, time.monotonic() + 20
    while (under_way := asyncio.run(texts_under_way(served.port))) and time.monotonic() < until:
        time.sleep(0.1)
    found = {"requests": n, "cancelled": left, "wrong": [*wrong, *more], "under_way": under_way}
    return found | {"seconds": seconds, "before": before, "after": served.memory}


# --- attacks ------------------------------------------------------------------------------------------


async def _send(port: int, parts: list[bytes], pause: float, reads: bool) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            if reads:
                await reader.read(100)
        finally:
            writer.close()


def _post(body: bytes, path: str = "/v1/completions") -> bytes:
    return HEAD.format(path, len(body)).encode() + body


NOT_ENDING = (START.format("/infill") + "Transfer-Encoding: chunked\r\n\r\n").encode()
# The parts that a connection sends, the pause after each, whether it waits for an answer, and connections.
ATTACKS: dict[str, tuple[list[bytes], float, bool, int]] = {
    "loris": ([b"POST /v1/completions HTTP/1.1\r\n", *[b"X-A: b\r\n"] * 100], 0.5, False, 300),
    "endless": ([NOT_ENDING, *[b"1000\r\n" + b" " * 0x1000 + b"\r\n"] * 400], 0.01, True, 30),
    "connections": ([], 2.0, True, 1000),
    "malformed": ([_post(b'{"prompt": "\xff' + b"[" * 5000)], 0.02, True, 30),
    "huge": (
        [_post(b'{"prompt": "a", "n": 1000000, "logprobs": 100000, "max_tokens": 1e9}')],
        0.02,
        True,
        30,
    ),
    "ids": ([_post(b'{"prompt": [1000000000, -1]}')], 0.02, True, 30),
    "headers": ([b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"x" * 60_000 + b"\r\n\r\n"], 0.02, True, 30),
    "paths": ([_post(b"{}", "/v1/../../etc/passwd")], 0.02, True, 30),
    "flood": ([_post(b'{"prompt": "def f(", "max_tokens": 100, "temperature": 1}')], 0.0, True, 8),
}


def attack(port: int, name: str) -> None:
    """Go on with an attack until the process is ended."""
    parts, pause, reads, n = ATTACKS[name]

    async def again() -> None:
        while True:
            started = time.monotonic()
            await _send(port, parts, pause, reads)
            await asyncio.sleep(max(0.0, (0.02 if parts else 2.0) - (time.monotonic() - started)))

    async def all_of_them() -> None:
        await asyncio.gather(*(again() for _ in range(n)))

    asyncio.run(all_of_them())


def honest(port: int, edits: list[Edit], n: int) -> tuple[float, list[str]]:
    """Return the p95 of the seconds that one client's requests take, and what went wrong."""

    async def one_after_another() -> tuple[list[float], list[str]]:
        times, wrong = [], []
        for edit in edits[:n]:
            started = time.perf_counter()
            try:
                found = await ask(port, edit.path, edit.body)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                wrong.append(f"{type(error).__name__} {error}")
                continue
            times.append(time.perf_counter() - started)
            if found != edit.expected:
                wrong.append(f"{found!r}, and alone {edit.expected!r}")
        return times, wrong

    times, wrong = asyncio.run(one_after_another())
    return sorted(times)[int(0.95 * len(times))] if times else float("inf"), wrong


def under_attack(served: Served, edits: list[Edit], name: str, n: int) -> tuple[float, float, list[str]]:
    """Return the honest client's p95 without and with an attack, and what went wrong."""
    before, wrong = honest(served.port, edits, n)
    attacker = multiprocessing.get_context("spawn").Process(
        target=attack, args=(served.port, name), daemon=True
    )
    attacker.start()
    try:
        time.sleep(3)  # It has imported what it needs, and its connections are there.
        during, more = honest(served.port, edits, n)
    finally:
        attacker.terminate()
        attacker.join()
    if served.process.poll() is not None:
        more.append("the server ended")
    return before, during, [*wrong, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--cancelled", type=float, default=0.3)
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer = write_model(Path(temporary) / "tiny")
        edits = trace(model, tokenizer)
        served = start(Path(temporary) / "tiny", Path(temporary) / "cache")
        try:
            if given.requests:
                found = load(served, edits, given.requests, given.cancelled)
                wrong = found.pop("wrong")
                print(found, f"memory {found['after'] / found['before'] - 1:+.1%}", *wrong[:5], sep="\n")
                print(f"{len(wrong)} answers lost or mixed up")
            for name in filter(None, given.attacks.split(",")):
                before, during, wrong = under_attack(served, edits, name, 100)
                told = f"p95 {1000 * before:.1f} ms, under attack {1000 * during:.1f} ms"
                print(
                    f"{name}: {told}, {during / before:.2f} times; {len(wrong)} wrong {wrong[:1]}", flush=True
                )
        finally:
            served.process.send_signal(signal.SIGTERM)
            print(f"the server ended with {served.process.wait(60)}")


if __name__ == "__main__":
    main()

"""A GGUF file as llama.cpp itself reads it, where its server is on the PATH: ids of texts, and greedy tokens.

llama.cpp rounds what goes into each product, to 16 bits or to 8, so that of two tokens that are nearly as
likely it may choose the other one. Hence each token that it chooses is judged by the model with the file's
numbers: after the tokens that llama.cpp chose before it, its logit is the largest within that rounding.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from architecture import Decoder
from guards.faults import Fault
from guards.reference.comparison import Comparison, Differs
from guards.reference.exported import judged
from guards.reference.exported_gguf import OpenedGguf
from guards.reference.rounding import of_logits
from pretrained.save import JUDGED
from tokenizer import Tokenizer

SERVER = "llama-server"
SECONDS = 300  # For a file to be loaded, and for an answer.
NEW_TOKENS = 24
# The relative error of one product by the type of its matrix. llama.cpp rounds the other factor too: to fp16
# beside 16 and 32 bits, and to blocks of 8 bits beside 8 and 4.
STEPS = {"F16": 2.0**-10, "F32": 2.0**-10, "Q8_0": 1 / 127, "Q4_0": 1 / 127}
REMEDY = "compare pretrained/save_gguf.py with how this llama.cpp reads the architecture"


def refuse_other_answers(
    path: Path, model: Decoder, tokenizer: Tokenizer, allowed: Collection[str]
) -> list[Fault]:
    """Compare llama.cpp's answers with a model's, whose weights become those of the file.

    Returns:
        The difference, if there is one that is allowed.

    Raises:
        Fault: They differ, or llama.cpp does not open the file.
    """

    def compare(comparison: Comparison) -> None:
        program = shutil.which(SERVER)
        if program is None:
            comparison.leave_out("llama.cpp's own ids and tokens", f"{SERVER} is not on the PATH")
            return
        opened = OpenedGguf(path)
        context = min(int(opened.values["context_length"]), 2048)
        with _served(program, path, context) as port:
            comparison.begin("ids")
            _compare_ids(comparison, port, tokenizer)
            comparison.begin("greedy tokens")
            _compare_tokens(comparison, port, as_written(model, opened), tokenizer, opened)

    return judged("llama.cpp", compare, allowed)


@torch.no_grad()
def as_written(model: Decoder, opened: OpenedGguf) -> Decoder:
    """Give a model the numbers of the file, in fp32, and return it in evaluation."""
    for name in dict(model.named_parameters()):
        model.get_parameter(name).data = opened.parameter(name, model.config).float()
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval()


@contextlib.contextmanager
def _served(program: str, path: Path, context: int) -> Iterator[int]:
    """Run the server on a free port of this machine until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "--model", str(path), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--ctx-size", str(context), "--parallel", "1", "--gpu-layers", "0"]
    words += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + SECONDS
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").splitlines()
                    said = next((line for line in lines if "error" in line), lines[-1] if lines else "")
                    raise Differs(
                        f"{SERVER} {path.name}", f"it does not open the file: {said[-200:]}", REMEDY
                    )
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(port: int) -> bool:
    try:
        return _answer(port, "GET", "/health") == {"status": "ok"}
    except (OSError, http.client.HTTPException, Differs):
        return False


def _answer(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        text = answer.read(2**24)
        if answer.status != 200:
            raise Differs(f"{SERVER} {path}", f"status {answer.status}, {text[:200]!r}", REMEDY)
        return json.loads(text)
    finally:
        connection.close()


def _compare_ids(comparison: Comparison, port: int, tokenizer: Tokenizer) -> None:
    """Compare the ids of texts, and of the spelling of each special token, which a document may hold."""
    spelt = " ".join(token["content"] for token in (tokenizer.rules() or {})["added_tokens"][:100])
    for number, text in enumerate((*JUDGED, Path(__file__).read_text("utf-8"), spelt), 1):
        found = _answer(
            port, "POST", "/tokenize", {"content": text, "add_special": True, "parse_special": False}
        )
        comparison.exact(f"ids of text {number}", found["tokens"], tokenizer.prompt_ids(text), REMEDY)


@torch.no_grad()
def _compare_tokens(
    comparison: Comparison, port: int, model: Decoder, tokenizer: Tokenizer, opened: OpenedGguf
) -> None:
    """Compare what llama.cpp chooses with what is likeliest for the model."""
    context = int(opened.values["context_length"])
    prompt = tokenizer.prompt_ids(JUDGED[0])[: context // 2]
    asked = {"prompt": prompt, "n_predict": min(NEW_TOKENS, context - len(prompt) - 1), "return_tokens": True}
    asked |= {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
    tokens = _answer(port, "POST", "/completion", asked)["tokens"]
    if not tokens:
        comparison.leave_out("a greedy token", "the likeliest one ends the text")
        return
    logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].double()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    behind = (logits.max(dim=1).values - chosen) / logits.abs().max()
    kinds = {tensor.tensor_type.name for tensor in opened.tensors.values()}
    tolerance = of_logits(model.config, max(STEPS[kind] for kind in kinds))
    at = int(behind.argmax())
    equal = int((behind == 0).sum())
    if not float(behind[at]) <= tolerance:
        raise Differs(
            f"greedy token {at + 1} of {len(tokens)}",
            f"its logit is {float(behind[at]):.2g} of the largest below the model's own choice, and rounding "
            f"explains {tolerance:.2g}; {equal} are equal",
            REMEDY,
        )
    comparison.close("greedy tokens", chosen, chosen, 0.0, REMEDY)
    rest = "" if equal == len(tokens) else f", the rest within rounding ({float(behind[at]):.1e})"
    print(f"llama.cpp chose {equal} of {len(tokens)} greedy tokens as the model does{rest}")

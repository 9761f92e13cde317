"""Adapters by name in the server: each writes what it writes alone, and is read again between requests."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from commands import exit_code, forked
from decoders import scrambled
from test_adapter import scramble_adapters
from test_generate_command import STARCODER
from test_serve_command import SHAPE
from test_serving import PROMPT, SETTINGS, SUFFIX, Running, post, running, until

from config import LoraConfig, ModelConfig
from config.files import REPOSITORY
from generation.settings import GenerationConfig
from generation.text import generate
from lora import adapters_of, add_adapter
from pretrained import load_pretrained, save_pretrained
from pretrained.save_adapter import save_adapter
from serving import formats
from serving.adapters import open_with_adapters
from serving.formats import token_losses
from serving.service import Service
from serving.settings import ServeConfig
from training.run import open_adapted, open_base_of, with_adapter

NAMES = ("one", "two")


def write_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> None:
    found = load_pretrained(base)
    add_adapter(found.model, LoraConfig(r=2, targets=("c_attn", "c_fc"), **settings), found.family.key)
    scramble_adapters(found.model)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.mul_(seed if parameter.requires_grad else 1)
    save_adapter(found.model, found.family, folder, base=str(base))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    size: dict[str, Any] = {"block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = scrambled(ModelConfig(**SHAPE, **size, vocab_size=STARCODER.vocab_size))
    save_pretrained(model, STARCODER, root / "base")
    for seed, name in enumerate(NAMES, 1):
        write_adapter(root / "base", root / name, seed)
    return root


def with_adapters(root: Path, token: str = "", **more: Any) -> Any:
    names = tuple(f"{name}={root / name}" for name in NAMES)
    settings = replace(SETTINGS, model=str(root / "base"), adapter=names, device="cpu", **more)
    adapters = open_with_adapters(settings)
    return running(settings, token, Service(adapters.model, adapters.tokenizer, "base", settings, adapters))


@pytest.fixture(scope="module")
def served(folders: Path) -> Iterator[Running]:
    with with_adapters(folders) as found:
        yield found


def alone(
    root: Path, name: str, prompts: list[str], suffix: str | None = None, tokens: int = 12
) -> list[str]:
    base = str(root / "base")
    found = load_pretrained(base) if name == "base" else open_adapted(base, root / name)
    assert found.tokenizer is not None
    config = GenerationConfig(max_new_tokens=tokens)
    made = [generate(found.model, found.tokenizer, [one], config, suffix=suffix)[0] for one in prompts]
    return [one.text for one in made]


@pytest.mark.parametrize("suffix", [None, SUFFIX])
def test_a_mixed_load_gets_the_text_of_each_adapter_alone(
    served: Running, folders: Path, suffix: str | None
) -> None:
    """The prompts are equal, and long enough that the prefix cache is asked for each."""
    prompts = [PROMPT * 3, PROMPT * 3 + "a", "x"]
    expected = {name: alone(folders, name, prompts, suffix) for name in ("base", *NAMES)}
    assert len({*map(str, expected.values())}) == 3
    asked = [(name, i) for _ in range(3) for i in range(3) for name in ("base", *NAMES)]

    def ask(one: tuple[str, int]) -> str:
        name, i = one
        body = {"model": name, "prompt": prompts[i], "suffix": suffix, "max_tokens": 12, "temperature": 0}
        return post(served, body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, asked))
    assert found == [expected[name][i] for name, i in asked]


def test_names_are_those_of_the_start_and_no_paths(served: Running, folders: Path) -> None:
    listed = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["base", *NAMES]
    tags = httpx.get(f"{served.url}/api/tags").json()["models"]
    assert [one["name"] for one in tags] == ["base:latest", "one:latest", "two:latest"]
    of_page = httpx.get(f"{served.url}/page.json").json()["models"]
    assert [(one["id"], one["gaps"]) for one in of_page] == [("base", True), ("one", True), ("two", True)]
    for name in (str(folders / "one"), "../one", "three", 7, ["one"]):
        answered = post(served, {"model": name, "prompt": "a"})
        assert answered.status_code == 404
        sentence = answered.json()["error"]["message"]
        assert sentence == "there is no model of that name here; ask for base, one, two or plumb"
    assert post(served, {"model": "two:latest", "prompt": "a", "max_tokens": 1}).json()["model"] == "two"
    assert post(served, {"model": "plumb", "prompt": "a", "max_tokens": 1}).json()["model"] == "base"


def test_an_adapter_is_read_again_between_requests_and_a_broken_one_leaves_the_old(
    folders: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(folders, root)
    body = {"model": "one", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    right = {"Authorization": "Bearer s3cret"}
    with with_adapters(root, "s3cret") as served:

        def text(model: str = "one") -> str:
            return post(served, body | {"model": model}, headers=right).json()["choices"][0]["text"]

        (before,), (base,) = alone(root, "one", [PROMPT]), alone(root, "base", [PROMPT])
        (expected,) = alone(root, "one", [PROMPT], tokens=60)
        assert text() == before
        assert post(served, {}, "/v1/adapters").status_code == 401
        shutil.rmtree(root / "one")
        write_adapter(root / "base", root / "one", 3)
        (after,) = alone(root, "one", [PROMPT])
        # A text that is under way ends with the weights that it began with, whatever else is read.
        long = body | {"max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=long, headers=right) as stream:
            lines = stream.iter_lines()
            begun = next(lines)
            assert served.service.adapters
            for _ in range(8):
                served.service.loop.between(partial(served.service.adapters.read, "two"))
                time.sleep(0.005)
            read = post(served, {}, "/v1/adapters", headers=right)
            assert read.status_code == 200 and read.json() == {"read": ["one", "two"]}
            assert text() == after != before and text("base") == base
            rest = [begun, *lines]
        parts = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
        whole = "".join(choice["text"] for part in parts for choice in part["choices"])
        assert whole == expected
        until(lambda: not served.service.loop.leaving)
        assert len(served.service.loop.places) == 3
        (root / "two" / "adapter_config.json").write_text("{")
        broken = post(served, {}, "/v1/adapters", headers=right)
        assert broken.status_code == 409 and "two stays as it was: " in broken.json()["error"]["message"]
        assert text("two") == alone(folders, "two", [PROMPT])[0] and text() == after and text("base") == base


def test_sighup_reads_them_again_and_a_broken_one_leaves_the_old(folders: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(folders, root)
    out.touch()

    def work() -> None:
        sys.argv = [str(REPOSITORY / "serve.py"), "--model", str(root / "base"), "--port", "0"]
        sys.argv += ["--adapter", f"one={root / 'one'}", "--cache", str(tmp_path / "cache")]
        sys.argv += ["--device", "cpu"]
        runpy.run_path(sys.argv[0], run_name="__main__")

    child = forked(work, out)
    try:
        until(lambda: "listening" in out.read_text(), 60)
        (url,) = re.findall(r"listening at (http://127\.0\.0\.1:\d+);", out.read_text())

        def text() -> str:
            body = {"model": "one", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]

        assert text() == alone(root, "one", [PROMPT])[0]
        refused = httpx.post(f"{url}/v1/adapters", json={})
        assert refused.status_code == 403 and "send SIGHUP" in refused.json()["error"]["message"]
        shutil.rmtree(root / "one")
        write_adapter(root / "base", root / "one", 3)
        os.kill(child, signal.SIGHUP)
        until(lambda: "adapter one was read again" in out.read_text(), 30)
        (after,) = alone(root, "one", [PROMPT])
        assert text() == after != alone(folders, "one", [PROMPT])[0]
        (root / "one" / "adapter_config.json").write_text("{")
        os.kill(child, signal.SIGHUP)
        until(lambda: "adapter one stays as it was: " in out.read_text(), 30)
        assert text() == after
    finally:
        os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 0 and "Traceback" not in out.read_text()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("one",), "--adapter one is not NAME=FOLDER"),
        (("a/b=one",), "--adapter a/b=one is not NAME=FOLDER"),
        (("plumb=one",), "two models would have one name"),
        (("a=one", "a=two"), "two models would have one name"),
    ],
)
def test_names_that_cannot_be(given: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ServeConfig(adapter=given)


def test_another_format_is_measured_and_has_to_be_allowed(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change that is told is the difference of the losses of two models that are opened plainly."""
    monkeypatch.setattr(formats, "N_FILES", 3)
    base, other = str(folders / "base"), tmp_path / "other"
    known = {"fingerprint": load_pretrained(base).fingerprint, "base_format": "nf4"}
    shutil.copytree(folders / "two", other)
    (other / "base.json").write_text(json.dumps(known))
    settings = ServeConfig(model=base, adapter=(f"a={folders / 'one'}", f"b={other}"), device="cpu")
    losses = {}
    for held in ("nf4", "fp32", "int8"):
        found = with_adapter(open_base_of(other, base, held, "cpu"), base, str(other))
        assert found.tokenizer is not None
        losses[held] = token_losses(found.model.eval(), found.tokenizer).mean().item()
    for more, held in (({}, "fp32"), ({"held": "int8"}, "int8")):
        change = losses[held] - losses["nf4"]
        told = f"format-differs: b was .*stored as nf4, and is served on {held}: .* is {losses['nf4']:.4f} "
        with pytest.raises(ValueError, match=rf"{told}.*changes by {re.escape(f'{change:+.4f}')} "):
            open_with_adapters(replace(settings, **more))
        adapters = open_with_adapters(replace(settings, allow=("format-differs",), **more))
        assert re.search(f"ALLOWED {told}", capsys.readouterr().err)
        assert not adapters_of(adapters.model) and adapters.read("b").adapter == "adapter1"
    open_with_adapters(replace(settings, adapter=settings.adapter[1:]))  # In its own.
    (other / "base.json").write_text(json.dumps(known | {"base_format": "bf16"}))
    with pytest.raises(ValueError, match="is now of a base stored as bf16, which the server's start did not"):
        adapters.read("b")


def test_what_adapters_are_not_served_on(folders: Path, tmp_path: Path) -> None:
    settings = ServeConfig(model=str(tmp_path), adapter=(f"a={folders / 'one'}",))
    with pytest.raises(ValueError, match="is a run; --adapter is for published models"):
        open_with_adapters(settings)
    with pytest.raises(ValueError, match="leave --dtype out"):
        open_with_adapters(replace(settings, model=str(folders / "base"), dtype="bf16"))

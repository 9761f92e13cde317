"""`python serve.py` as a child: what it says, what it refuses, and how a signal ends it."""

from __future__ import annotations

import os
import re
import runpy
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import command, exit_code, forked
from decoders import scrambled
from test_generate_command import STARCODER
from test_serving import CONFIG, until

from config import ModelConfig
from config.files import REPOSITORY
from pretrained import save_pretrained
from pretrained.gpt_bigcode import FAMILY
from serving.command import name_of, newest_run
from serving.gate import read_token
from serving.loop import EngineLoop
from serving.settings import ServeConfig

SHAPE: dict[str, Any] = FAMILY.parts | {
    "n_kv_head": 1,
    "mlp": "gelu_tanh",
    "tie_embeddings": True,
    "init": "normal",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size: dict[str, Any] = {
        "vocab_size": CONFIG.vocab_size,
        "block_size": 128,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
    }
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_pretrained(scrambled(ModelConfig(**SHAPE, **size)), STARCODER, path)
    return path


def test_a_child_serves_and_sigterm_ends_it_with_0(folder: Path, tmp_path: Path) -> None:
    def work() -> None:
        sys.argv = [str(REPOSITORY / "serve.py"), "--model", str(folder), "--port", "0"]
        sys.argv += ["--cache", str(tmp_path)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    out = tmp_path / "out"
    out.touch()
    child = forked(work, out)
    try:
        until(lambda: "listening" in out.read_text(), 60)
        (url,) = re.findall(r"listening at (http://127\.0\.0\.1:\d+);", out.read_text())
        asked = {"prompt": "def ", "max_tokens": 4}
        found = httpx.post(f"{url}/v1/completions", json=asked, timeout=30).json()
        assert found["model"] == "tiny" and found["usage"]["completion_tokens"] >= 1
    finally:
        os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 0
    assert "a second opinion agrees: weights exactly" in out.read_text()
    assert "serving tiny: " in out.read_text() and "Traceback" not in out.read_text()


def test_the_engine_is_at_rest_when_the_process_ends(folder: Path, tmp_path: Path) -> None:
    """A client had gone, and the step that was left computed on while Python ended, which aborted it."""
    began = tmp_path / "began"

    def step(self: EngineLoop) -> bool:
        if self.texts:
            began.touch()
            time.sleep(0.5)
        return own(self)

    def work() -> None:
        EngineLoop._step = step
        sys.argv = [str(REPOSITORY / "serve.py"), "--model", str(folder), "--port", "0"]
        sys.argv += ["--cache", str(tmp_path)]
        runpy.run_path(sys.argv[0], run_name="__main__")
        print(f"threads at the end: {[one.name for one in threading.enumerate()]}")

    own, out = EngineLoop._step, tmp_path / "out"
    out.touch()
    child = forked(work, out)
    try:
        until(lambda: "listening" in out.read_text(), 60)
        (port,) = re.findall(r"listening at http://127\.0\.0\.1:(\d+);", out.read_text())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://127.0.0.1:{port}/completion", json={"prompt": "def "}, timeout=0.2)
        until(began.exists)
    finally:
        os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 0
    assert "threads at the end: ['MainThread'" in out.read_text() and "'engine'" not in out.read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is reached by other machines, and there is no token"),
        (
            ["--host", "192.0.2.1", "--token_file", "secret"],
            "secret has mode 644, so that others may read it",
        ),
        (["--token_file", "empty"], "empty holds no token"),
        (["--port", "70000"], "port is 70000; it must be from 0"),
        (["--most_body", "0"], "most_body is 0; it must be above 0"),
        (["--most_choices", "33"], "most_choices is 33 and most_rows 32"),
        (["--tls_cert", "x"], "tls_cert and tls_key belong together"),
        ([], "there is no run in runs/ to serve"),
    ],
)
def test_what_is_refused_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o644)
    (tmp_path / "empty").touch(0o600)
    done = (
        command("serve.py", "--port", "0", *words, cwd=tmp_path)
        if "--port" not in words
        else command("serve.py", *words, cwd=tmp_path)
    )
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_https_with_a_certificate_on_an_open_address(folder: Path, tmp_path: Path) -> None:
    """With a token and a certificate any address is served without a warning."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*words, "-keyout", str(key), "-out", str(cert), *names], check=True, capture_output=True)

    def work() -> None:
        os.environ["PLUMB_TOKEN"] = "s3cret"
        files = ["--tls_cert", str(cert), "--tls_key", str(key), "--cache", str(tmp_path / "cache")]
        model = ["--model", str(folder), "--host", "0.0.0.0", "--port", "0"]
        sys.argv = [str(REPOSITORY / "serve.py"), *model, *files]
        runpy.run_path(sys.argv[0], run_name="__main__")

    out = tmp_path / "out"
    out.touch()
    child = forked(work, out)
    try:
        until(lambda: "listening" in out.read_text(), 60)
        (port,) = re.findall(r"listening at https://0\.0\.0\.0:(\d+);", out.read_text())
        url = f"https://127.0.0.1:{port}/v1/completions"
        trusted = ssl.create_default_context(cafile=str(cert))
        asked = {"prompt": "def ", "max_tokens": 2}
        right = {"Authorization": "Bearer s3cret"}
        assert httpx.post(url, json=asked, verify=trusted, timeout=30).status_code == 401
        found = httpx.post(url, json=asked, verify=trusted, headers=right, timeout=30)
        assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] >= 1
        with pytest.raises(httpx.ConnectError):
            httpx.post(url, json=asked, headers=right, timeout=30)
    finally:
        os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 0
    assert "warning" not in out.read_text() and "s3cret" not in out.read_text()


def test_tokens_come_from_a_file_of_ones_own_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" abc\n")
    (tmp_path / "token").chmod(0o600)
    assert read_token(str(tmp_path / "token"), {}) == "abc"
    assert read_token("", {"PLUMB_TOKEN": "xyz"}) == "xyz" and read_token("", {}) == ""
    with pytest.raises(ValueError, match="at most 4,096 characters of ASCII"):
        read_token("", {"PLUMB_TOKEN": "a b"})


def test_an_address_is_local_or_not() -> None:
    for host, local in {
        "127.0.0.1": 1,
        "localhost": 1,
        "::1": 1,
        "127.8.0.1": 1,
        "0.0.0.0": 0,
        "a.b": 0,
    }.items():
        assert ServeConfig(host=host).is_local == bool(local)


def test_the_newest_run_is_served(tmp_path: Path) -> None:
    for name, when in (("b", 100), ("a", 200), ("unfinished", 300)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
        os.utime(tmp_path / name / "config.yaml", (when, when))
        if name != "unfinished":
            (tmp_path / name / "checkpoints" / "step-1").mkdir()
    assert newest_run(tmp_path) == str(tmp_path / "a")
    assert name_of(str(tmp_path / "a" / "checkpoints" / "step-1")) == name_of(str(tmp_path / "a")) == "a"

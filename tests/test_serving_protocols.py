"""The protocols besides OpenAI's, each as its clients send it, and where completions end."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from decoders import scrambled
from test_generate_command import STARCODER
from test_serving import CONFIG, PROMPT, SETTINGS, SUFFIX, Running, post, running, until, written

from architecture import Decoder
from data.context import commented
from generation.settings import GenerationConfig
from generation.text import generate
from serving.ending import Ending
from serving.protocol import compact
from serving.service import Event


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def model() -> Decoder:
    return scrambled(CONFIG)


def events(answered: httpx.Response) -> list[Any]:
    """The parts of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in answered.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# --- llama.cpp ------------------------------------------------------------------------------------------

# The body that llama.vim sends.
LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": "import sys\n\n",
    "input_suffix": "\nprint(1)\n",
    "input_extra": [{"filename": "a.py", "text": "x = 1\ny = 2", "time": 3}],
    "prompt": "def add(a, b):",
    "n_predict": 12,
    "n_indent": 0,
    "stop": [],
    "top_k": 40,
    "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 10_000,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "no/such"],
}


def test_infill_is_the_gap_with_other_files_as_comments(served: Running, model: Decoder) -> None:
    answered = post(served, LLAMA_VIM, "/infill")
    prefix = "# a.py\n# x = 1\n# y = 2\nimport sys\n\ndef add(a, b):"
    (expected,) = written(model, prefix, suffix="\nprint(1)\n", max_new_tokens=12)
    found = answered.json()
    assert found["content"] == expected and expected
    assert set(found) == {"content", "timings/prompt_n", "timings/predicted_ms", "truncated"}
    assert re.match(rb'\{"content":"', answered.content)  # llama.vim looks for these bytes


def test_a_warm_up_reads_and_writes_nothing(served: Running) -> None:
    before = post(served, LLAMA_VIM | {"n_predict": 0, "response_fields": []}, "/infill").json()
    assert before["content"] == "" and before["tokens_predicted"] == 0 and before["stop"] is True
    after = post(served, LLAMA_VIM | {"response_fields": []}, "/infill").json()
    assert after["tokens_cached"] > 0 and after["timings"]["prompt_n"] < after["tokens_evaluated"]


def test_time_for_writing_is_a_bound(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served.service.loop.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])
    body = {"prompt": PROMPT, "n_predict": -1, "t_max_predict_ms": 400, "temperature": 0}
    found = post(served, body, "/completion").json()
    assert found["stop_type"] in ("limit", "eos") and 1 < found["tokens_predicted"] < 30
    # The first token is timed though nothing is sent at it.
    assert found["timings"]["predicted_ms"] >= 20 * (found["tokens_predicted"] - 1)


def test_completion_streams_its_content(served: Running, model: Decoder) -> None:
    body = {"prompt": PROMPT, "n_predict": 12, "temperature": 0, "top_k": 40}
    (expected,) = written(model, PROMPT, max_new_tokens=12)
    assert post(served, body, "/completion").json()["content"] == expected
    parts = events(post(served, body | {"stream": True}, "/completion"))
    assert "".join(part["content"] for part in parts) == expected
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    defaults = {"prompt": PROMPT, "n_predict": 3}
    assert post(served, defaults, "/completion").status_code == 200


def test_pieces_of_files_are_bounded() -> None:
    pieces = [(f"{i}.kt", "val x = 1\n" * 5) for i in range(50)]
    text = commented(pieces, 300)
    assert len(text) <= 300 and text.endswith("// 49.kt\n" + "// val x = 1\n" * 5) and "// 0.kt" not in text
    assert commented([("a\nb.py", "c")]) == "# a b.py\n# c\n" and commented([]) == ""


# --- Mistral, Ollama, TGI, Tabby ------------------------------------------------------------------------


def test_mistral(served: Running, model: Decoder) -> None:
    body = {"model": "plumb", "prompt": PROMPT, "suffix": SUFFIX, "max_tokens": 12, "temperature": 0}
    (expected,) = written(model, PROMPT, suffix=SUFFIX, max_new_tokens=12)
    found = post(served, body, "/v1/fim/completions").json()
    assert found["choices"][0]["message"]["content"] == expected and found["usage"]["completion_tokens"]
    *parts, last, done = events(post(served, body | {"stream": True}, "/v1/fim/completions"))
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == expected
    assert done == "[DONE]" and last["choices"][0]["finish_reason"] and last["usage"] == found["usage"]


def test_ollama(served: Running, model: Decoder) -> None:
    options = {"num_predict": 12, "temperature": 0, "top_p": 0.9}
    body = {"model": "tiny:latest", "prompt": PROMPT, "suffix": SUFFIX, "raw": True, "options": options}
    (expected,) = written(model, PROMPT, suffix=SUFFIX, max_new_tokens=12)
    answered = post(served, body | {"keep_alive": 1800}, "/api/generate")
    assert answered.headers["content-type"].startswith("application/x-ndjson")
    parts = [json.loads(line) for line in answered.text.splitlines()]
    assert "".join(part["response"] for part in parts) == expected
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    whole = post(served, body | {"stream": False}, "/api/generate").json()
    assert whole["response"] == expected and whole["done_reason"] == parts[-1]["done_reason"]
    assert post(served, {"model": "tiny"}, "/api/generate").json()["done"] is True  # opens the model
    assert httpx.get(f"{served.url}/api/tags").json()["models"][0]["name"] == "tiny:latest"


def test_tgi(served: Running, model: Decoder) -> None:
    body: dict[str, Any] = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "return_full_text": False}}
    (expected,) = written(model, PROMPT, max_new_tokens=12)
    assert post(served, body, "/generate").json() == {"generated_text": expected}
    body["parameters"] |= {"temperature": 0.2, "top_p": 0.95}
    assert post(served, body, "/generate").status_code == 200


def test_tabby(served: Running, model: Decoder) -> None:
    body = {
        "language": "python",
        "segments": {"prefix": PROMPT, "suffix": SUFFIX, "filepath": "a.py", "clipboard": ""},
        "temperature": 0,
        "seed": 1,
    }
    (expected,) = written(model, PROMPT, suffix=SUFFIX, max_new_tokens=64)
    found = post(served, body).json()
    assert found["choices"] == [{"index": 0, "text": expected}] and found["id"]
    for kind in ("view", "select", "select", "nonsense"):
        told = {"type": kind, "completion_id": found["id"], "choice_index": 0}
        assert post(served, told, "/v1/events").status_code == 200
    page = httpx.get(f"{served.url}/metrics").text
    assert 'plumb_events_total{kind="select"} 2.0' in page and "nonsense" not in page


ERRORS = {
    "/completion": {"code", "message", "type"},
    "/infill": {"code", "message", "type"},
    "/v1/fim/completions": {"object", "message", "type", "param", "code"},
    "/api/generate": {"error"},
    "/generate": {"error", "error_type"},
}


@pytest.mark.parametrize("path", ERRORS)
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"prompt": 5, "inputs": 5, "input_prefix": 5}', {}, 400),
        (b'{"prompt": "a", "inputs": "a", "stop": 5, "parameters": 5, "options": 5}', {}, 400),
        (b"{}", {"Origin": "http://evil.example"}, 403),
        (b" " * 30_000, {}, 413),
    ],
)
def test_a_mistake_has_the_protocols_own_body(
    served: Running, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    answered = post(served, body, path, headers=headers)
    found = answered.json()
    assert answered.status_code == status and answered.content == compact(found)
    error = found["error"] if path in ("/completion", "/infill") else found
    assert set(error) == ERRORS[path]


ASKING = {
    "/v1/completions": {"prompt": "a"},
    "/completion": {"prompt": "a"},
    "/infill": {"input_prefix": "a"},
    "/v1/fim/completions": {"prompt": "a"},
    "/api/generate": {"prompt": "a"},
    "/generate": {"inputs": "a"},
}


@pytest.mark.parametrize("path", ASKING)
def test_a_full_queue_is_429_in_each_protocol(
    served: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert post(served, ASKING[path], path).status_code == 200
    monkeypatch.setattr(served.service, "waiting", SETTINGS.most_waiting)
    answered = post(served, ASKING[path], path)
    assert answered.status_code == 429 and answered.headers["retry-after"] == "1"
    assert "8 requests wait, as many as may; send it again later" in answered.text


class Held:
    """A server with one place whose engine waits, while requests come."""

    def __init__(self, served: Running):
        self.served, self.engine = served, served.service.loop.engine
        self.going, self.ended, self.threads = threading.Event(), list[str](), list[threading.Thread]()
        step = self.engine.step
        self.engine.step = lambda: self.going.wait(20) and step()  # type: ignore
        self.name, begin = "", served.service.begin

        def noted(asked: Any, model: str, told: Callable[[Event], None]) -> Any:
            """Note which request ends when, in the server: threads of clients come in any order."""
            name = self.name

            def tell(event: Event) -> None:
                if event.number < 0:
                    self.ended.append(name)
                told(event)

            return begin(asked, model, tell)

        served.service.begin = noted  # type: ignore

    def ask(self, name: str, path: str, body: dict[str, Any]) -> None:
        """Send a request, which waits."""
        self.name, before = name, self.served.service.loop.waiting

        def send() -> None:
            assert post(self.served, body, path).status_code == 200

        self.threads.append(threading.Thread(target=send))
        self.threads[-1].start()
        until(lambda: self.served.service.loop.waiting > before)

    def go(self) -> list[str]:
        """Let the engine go on; returns the requests in the order of their answers."""
        self.going.set()
        for thread in self.threads:
            thread.join(20)
        return self.ended


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/v1/completions", ({"user": "a"}, {"user": "b"})),
        ("/completion", ({"id_slot": 0}, {"id_slot": 1})),
        ("/infill", ({"id_slot": 0}, {})),
    ],
)
def test_the_newest_request_of_an_editor_is_answered_first(
    path: str, names: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    with running(replace(SETTINGS, most_rows=1, most_choices=1)) as served:
        held = Held(served)
        body = ASKING[path] | {"max_tokens": 50, "n_predict": 50, "temperature": 0}
        for name, who in (("old", names[0]), ("other", names[1]), ("new", names[0])):
            held.ask(name, path, body | who)
        editors = {handle.request.editor for handle in held.engine.queue.waiting} - {None}
        assert all(str(editor).startswith("127.0.0.1 ") for editor in editors) and editors
        assert held.go() == ["new", "other", "old"]


def test_a_warm_up_comes_after_what_somebody_waits_for() -> None:
    with running(replace(SETTINGS, most_rows=1, most_choices=1)) as served:
        held = Held(served)
        held.ask("warm-up", "/infill", {"input_prefix": "a", "n_predict": 0})
        held.ask("text", "/completion", {"prompt": "a", "n_predict": 5})
        scored = {"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 1}
        held.ask("scores", "/v1/completions", scored)
        assert held.go() == ["text", "scores", "warm-up"]


def test_metrics_count_requests_and_tokens(served: Running) -> None:
    def count(name: str) -> float:
        page = httpx.get(f"{served.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE))

    asked = 'plumb_requests_total{path="/v1/completions",status="200"}'
    before, tokens = count(asked), count('plumb_tokens_total{kind="written"}')
    used = post(served, {"prompt": PROMPT, "max_tokens": 5}).json()["usage"]["completion_tokens"]
    assert count(asked) == before + 1
    assert count('plumb_tokens_total{kind="written"}') == tokens + used
    assert count("plumb_first_token_seconds_count") > 0 == count("plumb_texts")
    httpx.get(f"{served.url}/a-path-of-a-stranger")
    assert "stranger" not in httpx.get(f"{served.url}/metrics").text


# --- where completions end ------------------------------------------------------------------------------

ENDINGS = [
    # end, before, suffix, what the model writes, what is left
    ("free", "x = ", None, "1\ny = 2\n", "1\ny = 2\n"),
    ("line", "x = ", None, "1\ny = 2\n", "1"),
    ("line", "x = f(", None, "\n  1,\n  2)\ny", "\n  1,\n  2)"),
    ("line", "x = f(", ")\n", "1\ny", "1"),
    ("line", "x = 1\n", None, "\n\ny = [\n  2]\nz", "\n\ny = [\n  2]"),
    ("line", "x = ", None, '"[("\ny', '"[("'),
    ("block", "def f():", None, "\n    a\n    b\n\n\nc = 1", "\n    a\n    b"),
    (
        "block",
        "def f():\n    ",
        None,
        "a\n    if b:\n        c\n\n    d\ne",
        "a\n    if b:\n        c\n\n    d",
    ),
    ("block", "    ", None, "a = [\n1,\n2]\n    b\nc", "a = [\n1,\n2]\n    b"),
    ("block", "  if (a) {", None, "\n    b\n  }\n  c", "\n    b\n  }"),
    ("free", "f(", ")\n", "a, g(b))\nc", "a, g(b)"),
    ("free", "f(", ")\n", "g(b)", "g(b)"),
    ("free", "x = ", " + 1\n", "2 + 1\nb", "2"),
    ("free", "a\n", "\nreturn x\n", "b\nreturn x\nc", "b"),
    ("free", "a\n", "\nreturn x\n", "b\n    return x\nc", "b\n    return x\nc"),
    ("free", "a\n", "\n\nreturn x", "b\nreturn xy\nreturn", "b\nreturn xy\nreturn"),
]


@pytest.mark.parametrize(("end", "before", "suffix", "written_", "left"), ENDINGS)
def test_an_ending_is_the_same_however_the_text_comes(
    end: Any, before: str, suffix: str | None, written_: str, left: str
) -> None:
    for size in (1, 2, 3, 99):
        ending = Ending(end, before, suffix)
        parts = [ending.feed(written_[at : at + size]) for at in range(0, len(written_), size)]
        parts.append(ending.finish())
        assert "".join(parts) == left == ending.text
        assert ending.is_over == (left != written_)


def test_a_line_ends_the_text_and_frees_the_place(model: Decoder) -> None:
    shorter = 0
    with running(replace(SETTINGS, end="line")) as served:
        for seed in range(4):
            asked = {"prompt": PROMPT, "max_tokens": 60, "temperature": 1.5, "seed": seed}
            chosen = GenerationConfig(max_new_tokens=60, temperature=1.5, seed=seed)
            (free,) = generate(model, STARCODER, [PROMPT], chosen)
            ending = Ending("line", PROMPT, None)
            expected = ending.feed(free.text) + ending.finish()
            found = post(served, asked).json()
            assert found["choices"][0]["text"] == expected
            assert found["choices"][0]["finish_reason"] == "stop" or not ending.is_over
            if ending.is_over and len(expected) < len(free.text) // 2:
                assert found["usage"]["completion_tokens"] < len(free.ids)
                shorter += 1
            parts = events(post(served, asked | {"stream": True}))[:-1]
            assert "".join(part["choices"][0]["text"] for part in parts) == expected
    assert shorter

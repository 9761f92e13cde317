"""The completion server, by real connections: what it answers is what `generate` writes."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import torch
from decoders import SMALL, log_prob, scrambled
from test_generate_command import STARCODER

from architecture import Decoder
from data.fim import FOREIGN, MARKERS, fim_prompt_ids, marked_prompt_ids
from generation.settings import GenerationConfig
from generation.text import generate, requested_prompt
from serving.api import Patience
from serving.asking import SLACK, Asked, fit
from serving.command import listen, make_server
from serving.connections import BoundedConnection
from serving.gate import Gate
from serving.protocol import compact
from serving.service import Service
from serving.settings import ServeConfig
from tokenizer import Tokenizer

CONFIG = replace(SMALL, vocab_size=STARCODER.vocab_size, block_size=256)
PROMPT, SUFFIX = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
SETTINGS = ServeConfig(
    model="tiny", port=0, most_tokens=200, most_waiting=8, most_body=20_000, most_seconds=20.0
)


class Running(NamedTuple):
    """A server under way in a thread."""

    service: Service
    port: int
    server: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **more)

    def texts(self) -> int:
        return self.service.loop.texts


@contextlib.contextmanager
def running(
    settings: ServeConfig = SETTINGS,
    token: str = "",
    service: Service | None = None,
    scores: str = "",
    tokenizer: Tokenizer = STARCODER,
) -> Iterator[Running]:
    """A server on a free port, by default of the small model; closed as a signal closes it."""
    if service is None:
        config = replace(CONFIG, vocab_size=tokenizer.vocab_size)
        service = Service(scrambled(config), tokenizer, "tiny", settings)
    service.scores[service.name] = scores
    listener = listen(settings)
    server = make_server(service, Gate(token, [settings.host]), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(service, listener.getsockname()[1], server)
    finally:
        server.handle_exit(15, None)
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def model() -> Decoder:
    return scrambled(CONFIG)


def until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)


def written(model: Decoder, *prompts: str, suffix: str | None = None, **settings: Any) -> list[str]:
    """What `generate` writes."""
    torch.manual_seed(0)
    return [one.text for one in generate(model, STARCODER, prompts, GenerationConfig(**settings), 0, suffix)]


def post(served: Running, body: Any, path: str = "/v1/completions", **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | more.pop("headers", {})
    return httpx.post(served.url + path, content=content, headers=headers, timeout=20, **more)


# --- the same texts as `generate` -----------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}])
@pytest.mark.parametrize("suffix", [None, SUFFIX])
def test_a_text_is_that_of_generate_whole_and_streamed(
    served: Running, model: Decoder, sampled: dict[str, Any], suffix: str | None
) -> None:
    (expected,) = written(model, PROMPT, suffix=suffix, max_new_tokens=24, **sampled)
    asked: dict[str, Any] = {"temperature": 0} | sampled | {"max_tokens": 24, "suffix": suffix}
    client = served.client()
    whole = client.completions.create(model="tiny", prompt=PROMPT, **asked)
    assert whole.choices[0].text == expected and expected
    assert whole.usage is not None and whole.usage.completion_tokens >= 1
    stream = client.completions.create(
        model="plumb", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    (reason,) = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert reason == whole.choices[0].finish_reason and len(chunks) > 5


def test_prompts_and_samples_are_numbered_and_each_is_its_own(served: Running, model: Decoder) -> None:
    prompts = [PROMPT, "for i in range(10):"]
    client = served.client()
    found = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=12, temperature=1.2, seed=5
    )
    expected = written(
        model, prompts[0], prompts[0], prompts[1], prompts[1], max_new_tokens=12, temperature=1.2, seed=5
    )
    assert [choice.text for choice in found.choices] == expected and len({*expected}) == 4
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    stream = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=12, temperature=1.2, seed=5, stream=True
    )
    texts = ["", "", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_ids_are_taken_as_they_are(served: Running, model: Decoder) -> None:
    ids = STARCODER.prompt_ids(PROMPT)
    found = served.client().completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
    assert found.choices[0].text == written(model, PROMPT, max_new_tokens=8, heal=False)[0]
    assert found.usage is not None and found.usage.prompt_tokens == len(ids)


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(served: Running, model: Decoder) -> None:
    (whole,) = written(model, PROMPT, max_new_tokens=24)
    stop = whole[6:8]
    found = served.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop
    )
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_defaults_are_those_of_the_protocol(served: Running) -> None:
    """Temperature 1, other each time; 16 tokens; top_p beside temperature 0 is no error."""
    client = served.client()
    found = [client.completions.create(model="tiny", prompt=PROMPT) for _ in range(4)]
    assert {one.usage.completion_tokens for one in found if one.usage} <= set(range(1, 20))
    assert len({one.choices[0].text for one in found}) > 1
    for more in ({"top_p": 0.9, "temperature": 0}, {"top_p": 0.0}):
        assert post(served, {"prompt": PROMPT, "max_tokens": 2} | more).status_code == 200


def test_log_probs_are_the_models_own_and_echo_scores_the_prompt(served: Running, model: Decoder) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "logprobs": 2}
    found = served.client().completions.create(max_tokens=5, echo=True, **asked).choices[0]
    scores = found.logprobs
    assert scores is not None and scores.tokens and scores.token_logprobs and scores.text_offset
    assert "".join(scores.tokens) == found.text and found.text.startswith(PROMPT)
    assert [
        found.text[at:][: len(token)] for at, token in zip(scores.text_offset, scores.tokens, strict=True)
    ] == scores.tokens
    n = len(STARCODER.encode(PROMPT))
    ids = STARCODER.prompt_ids(PROMPT)
    expected = log_prob(model, ids[:1], ids[1:])
    assert sum(scores.token_logprobs[:n]) == pytest.approx(expected, abs=1e-3)
    alone = served.client().completions.create(max_tokens=0, echo=True, **asked).choices[0]
    assert alone.text == PROMPT and alone.logprobs is not None and alone.logprobs.token_logprobs is not None
    assert alone.logprobs.token_logprobs == pytest.approx(scores.token_logprobs[:n], abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "suffix"), [(PROMPT, None), ("def add(a, b):\n    ret", None), (PROMPT, SUFFIX)]
)
def test_a_stream_ends_with_the_log_probs_and_the_offsets_find_the_text(
    served: Running, prompt: str, suffix: str | None
) -> None:
    """A token of a healed prompt's end begins before the text, and the rest of the tokens are the text."""
    asked = {"prompt": prompt, "suffix": suffix, "max_tokens": 12, "temperature": 0, "logprobs": 3}
    (whole,) = post(served, asked).json()["choices"]
    chunks = post(served, asked | {"stream": True}).text.split("\n\n")
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks if "{" in chunk]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    scores, last = whole["logprobs"], choices[-1]["logprobs"]
    assert [choice["logprobs"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert [last["tokens"], last["text_offset"]] == [scores["tokens"], scores["text_offset"]]
    assert last["token_logprobs"] == pytest.approx(scores["token_logprobs"], abs=1e-4)
    before, written_ = -scores["text_offset"][0], "".join(scores["tokens"])
    assert prompt.endswith(written_[:before]) and (before > 0) == (suffix is None)
    sure = written_[before:].partition("\ufffd")[0]  # A part of a character is no text yet.
    assert whole["text"].startswith(sure) and (sure or suffix)
    for own, top in zip(scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert max(top.values()) >= own - 1e-6


def test_markers_in_the_text_are_the_gap_and_other_families_are_told(served: Running, model: Decoder) -> None:
    before, after, middle = MARKERS[0]
    text = f"{before}{PROMPT}{after}{SUFFIX}{middle}"
    assert marked_prompt_ids(STARCODER, text) == fim_prompt_ids(STARCODER, PROMPT, SUFFIX)
    assert marked_prompt_ids(STARCODER, f"{middle}{before}") is None
    found = served.client().completions.create(model="tiny", prompt=text, max_tokens=20, temperature=0)
    assert found.choices[0].text == written(model, PROMPT, suffix=SUFFIX, max_new_tokens=20)[0]
    for theirs in (MARKERS[2], *FOREIGN):
        other = post(served, {"prompt": "a".join(theirs)})
        assert other.status_code == 400 and f"send {' '.join(MARKERS[0])}" in other.json()["error"]["message"]
    assert marked_prompt_ids(STARCODER, "a[SUFFIX] = [PREFIX]") is None


def test_a_gap_is_read_as_generate_reads_it_with_either_text_first(model: Decoder) -> None:
    """A prompt that has the suffix first ends in plain text, whose end is healed."""
    other = copy.copy(STARCODER)
    other.suffix_first = True
    before, after, middle = MARKERS[0]
    as_others = f"{before}{PROMPT}{after}{SUFFIX}{middle}"
    for tokenizer, written_out in (
        (STARCODER, as_others),
        (other, f"{before}{after}{SUFFIX}{middle}{PROMPT}"),
    ):
        expected = requested_prompt(tokenizer, PROMPT, SUFFIX, None)
        for prompt, suffix in ((PROMPT, SUFFIX), (written_out, None), (as_others, None)):
            asked = Asked((prompt,), GenerationConfig(), suffix)
            found = fit(model, tokenizer, asked, prompt)
            assert found.is_gap and found.prompt.ids == expected.ids
            assert found.prompt.dropped == expected.dropped
    assert expected.dropped


def test_a_long_prompt_keeps_what_is_near(served: Running, model: Decoder) -> None:
    long = "x = 1\n" * 500 + PROMPT
    for more in ({}, {"suffix": SUFFIX * 40}):
        found = post(served, {"prompt": long, "max_tokens": 4, "temperature": 0} | more).json()
        assert 200 < found["usage"]["prompt_tokens"] < 256


@pytest.mark.parametrize("suffix", [None, SUFFIX * 20])
def test_prompt_and_text_fit_the_positions(model: Decoder, suffix: str | None) -> None:
    size = model.config.block_size
    for n_new, n in itertools.product((0, 4, 100, 10_000), (1, 20, 2000)):
        prompt = "x = 1\n" * n
        found = fit(model, STARCODER, Asked((prompt,), GenerationConfig(), suffix, n_new=n_new), prompt)
        kept = len(found.prompt.whole)
        assert kept + found.n_new + SLACK <= size
        assert found.n_new == n_new or kept + found.n_new + SLACK == size
        assert kept >= (size - SLACK) // 2 or not found.trimmed


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "the body is no JSON: .* at character 1"),
        (b'{"prompt": "\xff"}', 400, "the body is not UTF-8: byte 12"),
        (b"[1]", 400, "no object"),
        (b'{"a":' * 4000 + b"1" + b"}" * 4000, 413, "larger than 20,000 bytes"),
        (b"[" * 19_000, 400, "a number or its nesting|Expecting value"),  # The latter from Python 3.14 on
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "not read"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "not read"),
        ({}, 400, "prompt must be a text"),
        ({"prompt": []}, 400, "prompt must be"),
        ({"prompt": [1, "a"]}, 400, "prompt must be"),
        ({"prompt": [10**9]}, 400, "holds id 1000000000, outside the model's vocabulary"),
        ({"prompt": [-1]}, 400, "holds id -1"),
        ({"prompt": [5] * 900}, 400, "has 900 tokens and asks for 16 more"),
        ({"prompt": "a", "n": 10**9}, 400, "n must be from 1 to 32"),
        ({"prompt": ["a"] * 20, "n": 2}, 400, "asks for 40 texts, and a request may have 32"),
        ({"prompt": "a", "logprobs": 10**6}, 400, "logprobs must be from 0 to 5"),
        ({"prompt": "a", "max_tokens": 10**9}, 400, "max_tokens must be from 0 to 200"),
        ({"prompt": "a", "max_tokens": "7"}, 400, "max_tokens must be a whole number"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature must be from 0"),
        ({"prompt": "a", "temperature": True}, 400, "temperature must be a number"),
        ({"prompt": "a", "top_p": 2}, 400, "top_p must be from 0 to 1"),
        ({"prompt": "a", "stop": [""]}, 400, "stop must be"),
        ({"prompt": "a", "stop": ["a"] * 99}, 400, "stop must be at most"),
        ({"prompt": "a", "stop": "a" * 257}, 400, "stop must be at most"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias is not built"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty is not built"),
        ({"prompt": "a", "suffix": "b", "echo": True}, 400, "echo does not go with suffix"),
        ({"prompt": "a", "stream": True, "echo": True}, 400, "stream does not go with echo"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({"prompt": "a", "model": "../../etc/passwd"}, 404, "no model of that name here; ask for tiny"),
        ({"prompt": "a" * 30_000}, 413, "larger than 20,000 bytes"),
    ],
)
def test_what_is_wrong_is_one_sentence_in_the_protocols_own_body(
    served: Running, body: Any, status: int, words: str
) -> None:
    answered = post(served, body)
    error = answered.json()["error"]
    assert answered.status_code == status and re.search(words, error["message"]), error
    assert "\n" not in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert answered.content == compact(answered.json())
    assert served.client().completions.create(model="tiny", prompt="a", max_tokens=1).choices


def test_nothing_runs_for_a_request_of_which_a_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as served:
        engine, going = served.service.loop.engine, threading.Event()
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: going.wait(20) and step())
        assert post(served, {"prompt": [[5, 6], [10**9]], "max_tokens": 100}).status_code == 400
        waiting = list(engine.queue.waiting)
        assert len(waiting) == 1 and waiting[0]._reason == "cancelled"
        going.set()
        until(lambda: not served.texts())


def test_a_prompt_is_in_no_error_and_no_line(served: Running, capfd: pytest.CaptureFixture[str]) -> None:
    secret = "hunter22"
    for more in ({"n": "x"}, {"stop": secret * 99}, {"model": secret}, {"max_tokens": 1}, {secret: 1}):
        assert secret not in post(served, {"prompt": secret, "max_tokens": 0} | more).text
    said = capfd.readouterr()
    assert "POST /v1/completions 200" in said.out and secret not in said.out + said.err


def test_paths_and_chat(served: Running) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    (listed,) = served.client().models.list().data
    assert listed.id == "tiny"
    chat = "/v1/chat/completions"
    for messages, sentence in (
        ([], "cannot be read"),
        ([{"role": "user", "content": "a"}], "no chat template"),
    ):
        assert sentence in post(served, {"messages": messages}, chat).json()["error"]["message"]
    assert "not built" in post(served, {}, "/api/chat").json()["error"]["message"]
    assert post(served, {}, "/v1/../../etc/passwd").status_code == 404
    wrong = httpx.get(f"{served.url}/v1/completions")
    assert wrong.status_code == 405 and "POST" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:99"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_a_page_of_another_site_is_refused(served: Running, headers: dict[str, str], status: int) -> None:
    assert post(served, {"prompt": "a", "max_tokens": 1}, headers=headers).status_code == status


def test_the_token_is_required_everywhere_but_at_health() -> None:
    with running(token="s3cret") as served:
        for given in (None, "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "s3cret"):
            headers = {"Authorization": given} if given else {}
            for path in ("/v1/models", "/nothing"):
                assert httpx.get(served.url + path, headers=headers).status_code == 401
            answered = post(served, {"prompt": "a"}, headers=headers)
            assert answered.status_code == 401 and answered.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{served.url}/health").status_code == 200
        right = {"Authorization": "Bearer s3cret"}
        assert post(served, {"prompt": "a", "max_tokens": 1}, headers=right).status_code == 200


# --- clients that go away, and floods --------------------------------------------------------------------


def raw(served: Running, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A connection that has sent a request."""
    connection = socket.create_connection(("127.0.0.1", served.port), 20)
    send(connection, body, path)
    return connection


def send(connection: socket.socket, body: dict[str, Any], path: str = "/v1/completions") -> None:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine_within_a_step(
    served: Running, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, steps = served.service.loop.engine, [0]
    step, gone = engine.step, threading.Event()

    def slow() -> bool:
        goes_on = step()
        steps[0] += gone.is_set()
        time.sleep(0.01)
        return goes_on

    monkeypatch.setattr(engine, "step", slow)
    body = {
        "prompt": [PROMPT, "b"],
        "n": 3,
        "max_tokens": 200,
        "stream": stream,
        "temperature": 1.0,
        "seed": 1,
    }
    connection = raw(served, body)
    until(lambda: len(engine.under_way) == 2 and any(len(text.ids) > 2 for text in engine.texts.values()))
    handles = list(engine.under_way)
    connection.close()
    until(lambda: any(handle._reason for handle in handles))
    gone.set()
    until(lambda: all(handle.done for handle in handles))
    reasons = [one.finish_reason for handle in handles for one in handle.result()]
    assert (
        not engine.texts and steps[0] <= 2 and "cancelled" in reasons and {*reasons} <= {"cancelled", "eos"}
    )
    until(lambda: served.texts() == 0)


def test_a_full_queue_is_429_with_retry_after_and_what_waits_is_answered() -> None:
    with running(replace(SETTINGS, most_rows=1, most_choices=1, most_waiting=1)) as served:
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 1.0}
        connections = [raw(served, body) for _ in range(12)]
        answers = [connection.recv(200) for connection in connections]
        full = [one for one in answers if one.startswith(b"HTTP/1.1 429")]
        assert full and all(b"retry-after: 1" in one.lower() for one in full)
        assert len(full) + sum(one.startswith(b"HTTP/1.1 200") for one in answers) == 12 > len(full)
        for connection in connections:
            connection.close()


def test_slow_heads_and_bodies_are_ended() -> None:
    with running(replace(SETTINGS, most_seconds=0.5)) as served:
        slow = [socket.create_connection(("127.0.0.1", served.port), 20) for _ in range(3)]
        slow[0].sendall(b"POST /v1/completions HTT")
        slow[1].sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        for silent in (slow[0], slow[2]):
            with contextlib.suppress(ConnectionResetError):
                assert silent.recv(100) == b""
        assert slow[1].recv(100).startswith(b"HTTP/1.1 408")


def test_half_a_head_after_an_answer_is_ended() -> None:
    with running(replace(SETTINGS, most_seconds=0.5)) as served:
        connection, answer = raw(served, {"prompt": "a", "max_tokens": 0}), b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(1000)
        connection.sendall(b"POST /v1/completions HTT")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_a_body_without_end_is_413_and_its_connection_closed(served: Running) -> None:
    head = b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port), 20) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()


def test_a_flood_of_connections_keeps_out_no_honest_client() -> None:
    with running(replace(SETTINGS, most_connections=20)) as served:
        flood = [socket.create_connection(("127.0.0.1", served.port), 20) for _ in range(200)]
        found = post(served, {"prompt": PROMPT, "max_tokens": 3})
        assert found.status_code == 200
        until(lambda: len(served.server.server_state.connections) <= 20)
        for connection in flood:
            connection.close()


def test_a_connection_among_many_has_the_time_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were closed as they came, the one that was about to ask among them."""
    monkeypatch.setattr(BoundedConnection, "grace", 3.0)
    with running(replace(SETTINGS, most_connections=20)) as served:
        honest = socket.create_connection(("127.0.0.1", served.port), 20)
        flood = [socket.create_connection(("127.0.0.1", served.port), 20) for _ in range(100)]
        until(lambda: len(served.server.server_state.connections) > 100)
        send(honest, {"prompt": PROMPT, "max_tokens": 3})
        assert honest.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: len(served.server.server_state.connections) <= 20)
        for connection in (honest, *flood):
            connection.close()


def test_a_flood_of_mistakes_waits_and_honest_requests_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = list[bool]()

    async def wait(patience: Patience) -> None:
        paused.append(True)

    monkeypatch.setattr(Patience, "wait", wait)
    with running() as served:
        for _ in range(3):
            assert post(served, {}).status_code == 400
        assert not paused
        served.server.config.loaded_app.patience.times.extend([time.monotonic() + 99] * Patience.most)
        assert post(served, {"prompt": "a", "max_tokens": 1}).status_code == 200 and not paused
        assert post(served, {}).status_code == 400 and paused == [True]
        served.server.config.loaded_app.patience.times.extend([0.0] * Patience.most)
        assert post(served, {}).status_code == 400 and paused == [True]


def test_raw_nonsense_ends_its_own_connection_only(served: Running) -> None:
    for sent in (
        b"\x00\xff\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\nB: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", served.port), 20) as connection:
            connection.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                assert b" 400 " in connection.recv(100) or True
    assert post(served, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_server_that_ends_takes_no_more() -> None:
    with running() as served:
        served.service.close()
        answered = post(served, {"prompt": "a"})
        assert answered.status_code == 503 and answered.headers["retry-after"] == "5"
        assert httpx.get(f"{served.url}/health").status_code == 503


def test_the_end_finishes_what_runs_and_refuses_the_rest() -> None:
    with running(replace(SETTINGS, most_rows=1, most_choices=1)) as served:
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 1.0, "seed": 1}
        first = raw(served, body)
        until(lambda: served.service.loop.engine.texts)
        second = raw(served, body)
        until(lambda: served.service.loop.engine.queue.waiting)
    assert first.recv(10_000).startswith(b"HTTP/1.1 200") and second.recv(100).startswith(b"HTTP/1.1 503")

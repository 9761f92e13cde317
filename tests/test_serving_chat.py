"""Chat over HTTP: an answer is what `generate` writes after the template's prompt, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_chat import folder_of, opened
from test_serving import SETTINGS, Running, post, running

from generation.settings import GenerationConfig
from generation.text import end_ids, generate
from tokenization.chat import asked_ids, messages_of
from tokenization.healing import Prompt

PATH = "/v1/chat/completions"
ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Add."}]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokenizer = opened(folder_of(tmp_path_factory.mktemp("chat"), "qwen"))
    with running(replace(SETTINGS, end="line"), tokenizer=tokenizer) as found:
        yield found


@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}])
def test_an_answer_is_that_of_generate(chatting: Running, sampled: dict[str, Any]) -> None:
    service = chatting.service
    tokenizer = service.variants[service.name].tokenizer
    prompt = Prompt(asked_ids(tokenizer, messages_of(ASKED)))
    settings = GenerationConfig(max_new_tokens=24, **sampled)
    (expected,) = generate(service.model, tokenizer, [prompt], settings)
    client, parts = chatting.client(), [{"type": "text", "text": "Add"}, {"type": "text", "text": "."}]
    for messages in (ASKED, [ASKED[0] | {"role": "developer"}, {"role": "user", "content": parts}]):
        asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 24} | sampled
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected.text and expected.text
        assert whole.usage is not None and whole.usage.prompt_tokens == len(prompt.ids)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == expected.text
        assert [delta.role for delta in deltas if delta.role] == ["assistant"]
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"messages": [{"role": "robot", "content": "a"}]}, "role of message 1"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "spells the special token"),
        ({"tools": [{"type": "function"}]}, "tools is not built"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "the model has room for"),
    ],
)
def test_what_is_not_answered_is_told(chatting: Running, more: dict[str, Any], sentence: str) -> None:
    answer = post(chatting, {"messages": ASKED} | more, PATH)
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


def test_a_served_answer_ends_with_its_turn(tmp_path: Path) -> None:
    tokenizer = opened(folder_of(tmp_path, "phi3"))
    assert tokenizer.eos_ids == ()
    with running(replace(SETTINGS, end="line"), tokenizer=tokenizer) as found:
        own = found.service.variants[found.service.name].tokenizer
        assert end_ids(own, None) == {own.eos_id, own.token_id("<|end|>")}

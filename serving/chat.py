"""OpenAI's chat completions: conversations, of which the template of the model's tokenizer makes prompts."""

from __future__ import annotations

from typing import Any

from generation.settings import GenerationConfig
from serving.asking import Answer, Asked
from serving.fields import Body, sampling, wrong
from serving.openai import OpenAI, finish_reason, seed_of, usage
from serving.settings import ServeConfig
from tokenization.chat import messages_of
from tokenizer import Tokenizer

NOT_BUILT = {
    "tools": None,
    "functions": None,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
}


def plain_message(value: Any) -> Any:
    """Return a message whose parts of text are put together, and whose role has its older name."""
    if not isinstance(value, dict):
        return value
    content, role = value.get("content"), value.get("role")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            content = "".join(map(str, texts))
    kept = {key: one for key, one in value.items() if key != "name"}
    return kept | {"content": content, "role": "system" if role == "developer" else role}


class Chat(OpenAI):
    """`/v1/chat/completions`."""

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request; what is absent is as OpenAI means it."""
        given = body.get("messages")
        try:
            messages = messages_of(
                [plain_message(one) for one in given] if isinstance(given, list) else given
            )
        except ValueError as error:
            wrong("messages", f"cannot be read: {error}")
        body.refuse_given(**NOT_BUILT)
        name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
        n_new = body.whole(name, limits.most_tokens, 1, limits.most_tokens)
        chosen = sampling(body.number("temperature", 1.0, 0.0, 100.0), body.number("top_p", 1.0, 0.0, 1.0))
        settings = GenerationConfig(max_new_tokens=n_new, stop=body.stops(), seed=seed_of(body), **chosen)
        return Asked(
            (messages,),
            settings,
            n=body.whole("n", 1, 1, limits.most_choices),
            n_new=n_new,
            stream=body.switch("stream"),
            usage=body.inner("stream_options").switch("include_usage"),
        )

    def whole(self, answer: Answer, tokenizer: Tokenizer) -> Any:
        """Return the object of all answers."""
        choices = [
            {
                "index": number_,
                "message": {"role": "assistant", "content": made.text},
                "logprobs": None,
                "finish_reason": finish_reason(made.finish_reason),
            }
            for number_, made in enumerate(answer.done)
        ]
        return self._object(answer, choices) | {"object": "chat.completion", "usage": usage(answer)}

    def piece(self, answer: Answer, number: int, text: str) -> Any:
        role = {} if number in answer.introduced else {"role": "assistant"}
        answer.introduced.add(number)
        return self._object(answer, [delta(number, {**role, "content": text}, None)])

    def ended(self, answer: Answer, number: int, tokenizer: Tokenizer) -> Any:
        made = answer.completions[number]
        assert made is not None, "the text has ended"
        return self._object(answer, [delta(number, {}, finish_reason(made.finish_reason))])

    def _object(self, answer: Answer, choices: list[Any]) -> dict[str, Any]:
        more = {"id": f"chatcmpl-{answer.id}", "object": "chat.completion.chunk"}
        return super()._object(answer, choices) | more


def delta(number: int, change: dict[str, str], reason: str | None) -> dict[str, Any]:
    """Return a part of one answer."""
    return {"index": number, "delta": change, "logprobs": None, "finish_reason": reason}

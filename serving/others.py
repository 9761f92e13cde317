"""The protocols of Mistral's fill-in-the-middle, Ollama, Text Generation Inference (TGI) and Tabby."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from generation.settings import GenerationConfig
from serving.asking import Answer, Asked
from serving.fields import Body, Refused, sampling, wrong
from serving.openai import OpenAI, finish_reason, seed_of, usage
from serving.protocol import Protocol, compact
from serving.settings import ServeConfig
from tokenizer import Tokenizer

SNIPPETS = (
    "declarations",
    "relevant_snippets_from_changed_files",
    "relevant_snippets_from_recently_opened_files",
)


def one_text(body: Body, field: str) -> str:
    """Return a text that has to be there."""
    value = body.text(field)
    return value if value is not None else wrong(field, "is missing; it must be a text")


class Mistral(Protocol):
    """`/v1/fim/completions`, which answers in the form of a chat."""

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request. What is absent: temperature 0.3 as of Codestral, and all tokens that may be."""
        body.refuse_given(min_tokens=0)
        n_new = body.whole("max_tokens", limits.most_tokens, 0, limits.most_tokens)
        chosen = sampling(body.number("temperature", 0.3, 0.0, 100.0), body.number("top_p", 1.0, 0.0, 1.0))
        seed = seed_of(Body(seed=body.get("random_seed")))
        settings = GenerationConfig(max_new_tokens=max(n_new, 1), stop=body.stops(), seed=seed, **chosen)
        suffix, stream = body.text("suffix"), body.switch("stream")
        return Asked((one_text(body, "prompt"),), settings, suffix, n_new=n_new, stream=stream, usage=True)

    def whole(self, answer: Answer, tokenizer: Tokenizer) -> Any:
        """Return the object of the text."""
        (made,) = answer.done
        message = {"role": "assistant", "content": made.text, "tool_calls": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(made.finish_reason)}
        return self._object(answer, "chat.completion", choice) | {"usage": usage(answer)}

    def piece(self, answer: Answer, number: int, text: str) -> Any:
        choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
        return self._object(answer, "chat.completion.chunk", choice)

    def last(self, answer: Answer) -> list[Any]:
        (made,) = answer.done
        reason = finish_reason(made.finish_reason)
        choice = {"index": 0, "delta": {"content": ""}, "finish_reason": reason}
        return [self._object(answer, "chat.completion.chunk", choice) | {"usage": usage(answer)}, "[DONE]"]

    def error(self, refused: Refused) -> Any:
        kind = "server_error" if refused.status >= 500 else "invalid_request_error"
        about = {"type": kind, "param": refused.field, "code": None}
        return {"object": "error", "message": refused.sentence} | about

    def _object(self, answer: Answer, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        about = {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}
        return about | {"choices": [choice]}


class Ollama(Protocol):
    """`/api/generate`: a stream, unless the request says otherwise, of a line of JSON each."""

    media = "application/x-ndjson"

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request; what is absent is as Ollama means it, but for its repeat_penalty, which is none."""
        body.refuse_given(system="", template="", context=None, images=None, format="")
        own = body.inner("options")
        n_new = own.whole("num_predict", -1, -2, 2**31)
        n_new = limits.most_tokens if n_new < 0 else min(n_new, limits.most_tokens)
        prompt, suffix = body.text("prompt") or "", body.text("suffix") or None
        chosen = sampling(
            own.number("temperature", 0.8, 0.0, 100.0),
            own.number("top_p", 0.9, 0.0, 1.0),
            own.whole("top_k", 40, -1, 2**31),
            own.number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=own.number("repeat_penalty", 1.0, 0.01, 100.0),
        )
        if not prompt and suffix is None:
            n_new = 0  # By such a request a client has the model opened.
        settings = GenerationConfig(
            max_new_tokens=max(n_new, 1), stop=own.stops(), seed=seed_of(own), **chosen
        )
        return Asked((prompt,), settings, suffix, n_new=n_new, stream=body.switch("stream", True))

    def whole(self, answer: Answer, tokenizer: Tokenizer) -> Any:
        """Return the object of the text."""
        (made,) = answer.done
        return self._object(answer, made.text) | self._counts(answer)

    def piece(self, answer: Answer, number: int, text: str) -> Any:
        return self._object(answer, text) | {"done": False}

    def last(self, answer: Answer) -> list[Any]:
        return [self._object(answer, "") | self._counts(answer)]

    def line(self, value: Any) -> bytes:
        return compact(value) + b"\n"

    def error(self, refused: Refused) -> Any:
        return {"error": refused.sentence}

    def _object(self, answer: Answer, text: str) -> dict[str, Any]:
        return {"model": answer.model, "created_at": stamp(time.time()), "response": text}

    def _counts(self, answer: Answer) -> dict[str, Any]:
        (made,), now = answer.done, time.monotonic()
        first = answer.first or now
        return {
            "done": True,
            "done_reason": finish_reason(made.finish_reason),
            "total_duration": int(1e9 * (now - answer.begun)),
            "prompt_eval_count": answer.n_prompt,
            "prompt_eval_duration": int(1e9 * (first - answer.begun)),
            "eval_count": len(made.ids),
            "eval_duration": int(1e9 * (now - first)),
        }


def stamp(seconds: float) -> str:
    """Return a time as Ollama writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def tags(names: Sequence[str], created: int, n_parameters: int) -> dict[str, Any]:
    """Return Ollama's list of models."""
    details = {"format": "plumb", "family": "plumb", "parameter_size": f"{n_parameters / 1e6:.1f}M"}
    about = {"modified_at": stamp(created), "size": n_parameters, "digest": "", "details": details}
    return {"models": [{"name": f"{one}:latest", "model": f"{one}:latest"} | about for one in names]}


class TGI(Protocol):
    """`/generate`, whole only."""

    def model(self, body: Body) -> None:
        """Return None: such a server has one model."""
        return

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request. It samples where do_sample or another temperature, top_p or top_k says so."""
        own = body.inner("parameters")
        own.refuse_given(best_of=1, typical_p=1, frequency_penalty=0, grammar=None, watermark=False)
        n_new = own.whole("max_new_tokens", 100, 0, limits.most_tokens)
        temperature, top_p = own.number("temperature", 1.0, 0.0, 100.0), own.number("top_p", 1.0, 0.0, 1.0)
        top_k = own.whole("top_k", 0, 0, 2**31)
        sampled = own.switch("do_sample") or temperature != 1 or top_p < 1 or top_k > 0
        chosen = sampling(
            temperature if sampled else 0.0,
            top_p,
            top_k,
            repetition_penalty=own.number("repetition_penalty", 1.0, 0.01, 100.0),
        )
        settings = GenerationConfig(
            max_new_tokens=max(n_new, 1), stop=own.stops(), seed=seed_of(own), **chosen
        )
        full = own.switch("return_full_text")
        return Asked((one_text(body, "inputs"),), settings, n_new=n_new, echo=full)

    def whole(self, answer: Answer, tokenizer: Tokenizer) -> Any:
        """Return the object of the text."""
        (made,), asked = answer.done, answer.asked
        return {"generated_text": (str(asked.prompts[0]) if asked.echo else "") + made.text}

    def error(self, refused: Refused) -> Any:
        kind = "validation" if refused.status < 500 else "generation"
        return {"error": refused.sentence, "error_type": kind}


class Tabby(OpenAI):
    """`/v1/completions` with `segments`, the texts around the cursor."""

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request. What is absent: temperature 0.1 and 64 tokens, as Tabby has them."""
        own = body.inner("segments")
        chosen = sampling(body.number("temperature", 0.1, 0.0, 100.0))
        settings = GenerationConfig(max_new_tokens=min(64, limits.most_tokens), seed=seed_of(body), **chosen)
        suffix = own.text("suffix") or None
        # Snippets are those of Tabby's clients; the best come first there.
        pieces = [piece for field in SNIPPETS for piece in own.pieces(field, "filepath", "body")]
        return Asked(
            (one_text(own, "prefix"),),
            settings,
            suffix,
            n_new=settings.max_new_tokens,
            editor=body.text("user") or "",
            pieces=tuple(reversed(pieces)),
            path=own.text("filepath") or "",
        )

    def whole(self, answer: Answer, tokenizer: Tokenizer) -> Any:
        """Return the object of the text."""
        (made,) = answer.done
        return {"id": f"cmpl-{answer.id}", "choices": [{"index": 0, "text": made.text}]}

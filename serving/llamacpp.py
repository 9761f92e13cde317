"""llama.cpp's `/completion` and `/infill`, as llama.vim and llama.vscode send them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from generation.settings import GenerationConfig
from serving.asking import Answer, Asked
from serving.fields import Body, Refused, sampling, wrong
from serving.openai import prompts_of, seed_of
from serving.protocol import Protocol
from serving.settings import ServeConfig

STOP_TYPES = {"eos": "eos", "stop": "word"}  # All others are `limit`.


def choosing(body: Body) -> dict[str, Any]:
    """Return how tokens are chosen; what is absent is as llama.cpp means it.

    Its sampler `infill` takes the likeliest token nearly always; here it always does.
    """
    samplers = body.get("samplers")
    greedy = isinstance(samplers, list) and "infill" in samplers
    return sampling(
        0.0 if greedy else body.number("temperature", 0.8, -1.0, 100.0),
        body.number("top_p", 0.95, 0.0, 1.0),
        body.whole("top_k", 40, -1, 2**31),
        body.number("min_p", 0.05, 0.0, 1.0),
        repetition_penalty=body.number("repeat_penalty", 1.0, 0.01, 100.0),
    )


class Completion(Protocol):
    """`/completion`."""

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request."""
        return self._asked(body, limits, prompts_of(body), None)

    def _asked(
        self, body: Body, limits: ServeConfig, prompts: tuple[str | list[int], ...], suffix: str | None
    ) -> Asked:
        if len(prompts) > 1:
            wrong("prompt", "must be one text here; send several to /v1/completions")
        body.refuse_given(n_probs=0, n_cmpl=1, grammar="", json_schema=None, lora=None, logit_bias=None)
        body.refuse_given(presence_penalty=0, frequency_penalty=0, mirostat=0)
        n_new = body.whole("n_predict", -1, -2, 2**31)
        n_new = limits.most_tokens if n_new < 0 else min(n_new, limits.most_tokens)
        seed = seed_of(body) if body.get("seed") not in (None, -1, 2**32 - 1) else seed_of(Body())
        settings = GenerationConfig(
            max_new_tokens=max(n_new, 1), stop=body.stops(), seed=seed, **choosing(body)
        )
        wanted = body.get("response_fields") or []
        if not isinstance(wanted, list) or not all(isinstance(one, str) for one in wanted):
            wrong("response_fields", "must be a list of names")
        slot = body.whole("id_slot", -1, -1, 2**31)
        milliseconds = body.number("t_max_predict_ms", 0.0, -1.0, 1e9)
        return Asked(
            prompts,
            settings,
            suffix,
            n_new=n_new,
            stream=body.switch("stream"),
            seconds=milliseconds / 1000 if milliseconds > 0 else None,
            editor="" if slot < 0 else f"slot {slot}",
            fields=tuple(wanted),
        )

    def whole(self, answer: Answer, tokenizer: Any) -> Any:
        """Return the object of the text."""
        (made,) = answer.done
        return chosen_fields(self._object(answer, made.text), answer.asked.fields)

    def piece(self, answer: Answer, number: int, text: str) -> Any:
        return {"content": text, "stop": False}

    def last(self, answer: Answer) -> list[Any]:
        return [self._object(answer, "")]

    def error(self, refused: Refused) -> Any:
        kinds = {401: "authentication_error", 404: "not_found_error", 503: "unavailable_error"}
        kind = kinds.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
        return {"error": {"code": refused.status, "message": refused.sentence, "type": kind}}

    def _object(self, answer: Answer, text: str) -> dict[str, Any]:
        (made,), (handle,), (fitted,) = answer.done, answer.handles, answer.fitted
        n, new = answer.n_prompt - handle.known, len(made.ids)
        first = answer.first or time.monotonic()
        read, wrote = (max(1000 * span, 1e-3) for span in (first - answer.begun, time.monotonic() - first))
        return {
            "content": text,
            "stop": True,
            "model": answer.model,
            "tokens_predicted": new,
            "tokens_evaluated": answer.n_prompt,
            "tokens_cached": handle.known,
            "truncated": fitted.trimmed > 0,
            "stop_type": STOP_TYPES.get(made.finish_reason, "limit"),
            "timings": {
                "prompt_n": n,
                "prompt_ms": read,
                "prompt_per_token_ms": read / max(n, 1),
                "prompt_per_second": 1000 * n / read,
                "predicted_n": new,
                "predicted_ms": wrote,
                "predicted_per_token_ms": wrote / max(new, 1),
                "predicted_per_second": 1000 * new / wrote,
            },
        }


class Infill(Completion):
    """`/infill`: the gap between `input_prefix` with `prompt`, and `input_suffix`."""

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request; pieces of other files stand before the prefix as comments."""
        prefix = (body.text("input_prefix") or "") + (body.text("prompt") or "")
        suffix = body.text("input_suffix") or ""
        pieces = body.pieces("input_extra", "filename", "text")
        return replace(self._asked(body, limits, (prefix,), suffix), pieces=pieces)


def chosen_fields(whole: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of these names, `timings/prompt_n` by that very key; all where none is named."""
    found: dict[str, Any] = {}
    for name in names:
        value: Any = whole
        for key in name.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found if names else whole

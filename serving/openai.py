"""OpenAI's completions, their errors, and the list of models."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from generation.settings import GenerationConfig
from generation.text import CONTEXT, added_text
from serving.asking import Answer, Asked, token_pieces
from serving.fields import Body, Refused, sampling, wrong
from serving.protocol import Protocol
from serving.settings import ServeConfig
from tokenizer import Tokenizer

MOST_LOGPROBS = 5
REASONS = {"eos": "stop", "stop": "stop"}  # All others are `length`.


def finish_reason(reason: str) -> str:
    """Return OpenAI's word for how a text ended."""
    return REASONS.get(reason, "length")


def seed_of(body: Body) -> int:
    """Return the seed of a request, or one that nobody knows."""
    return body.whole("seed", secrets.randbelow(2**31), -(2**63), 2**63 - 1) % 2**63


def prompts_of(body: Body) -> tuple[str | list[int], ...]:
    """Return the prompts: a text, a list of texts, ids, or a list of ids."""
    given = body.get("prompt")
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given:
        if all(isinstance(one, str) for one in given):
            return tuple(given)
        if all(type(one) is int for one in given):
            return (given,)
        if all(isinstance(one, list) and one and all(type(id) is int for id in one) for one in given):
            return tuple(given)
    return wrong("prompt", "must be a text, a list of texts, a list of ids, or a list of such lists")


class OpenAI(Protocol):
    """`/v1/completions`."""

    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request; what is absent is as OpenAI means it."""
        prompts, n = prompts_of(body), body.whole("n", 1, 1, limits.most_choices)
        if len(prompts) * n > limits.most_choices:
            wrong("n", f"asks for {len(prompts) * n} texts, and a request may have {limits.most_choices}")
        body.refuse_given(logit_bias=None, presence_penalty=0, frequency_penalty=0)
        if body.whole("best_of", n, 1, limits.most_choices) != n:
            wrong("best_of", "must equal n: the server does not rank texts")
        stream, echo = body.switch("stream"), body.switch("echo")
        logprobs = (
            None if body.get("logprobs") in (None, False) else body.whole("logprobs", 0, 0, MOST_LOGPROBS)
        )
        n_new = body.whole("max_tokens", 16, 0, limits.most_tokens)
        suffix = body.text("suffix")
        if suffix is not None and echo:
            wrong("echo", "does not go with suffix; leave one of them out")
        if stream and echo:
            wrong("stream", "does not go with echo; set one of them to false")
        if not n_new and n > 1:
            wrong("n", "must be 1 where max_tokens is 0: nothing is written")
        chosen = sampling(body.number("temperature", 1.0, 0.0, 100.0), body.number("top_p", 1.0, 0.0, 1.0))
        settings = GenerationConfig(
            max_new_tokens=max(n_new, 1), stop=body.stops(), seed=seed_of(body), **chosen
        )
        usage = body.inner("stream_options").switch("include_usage")
        editor = body.text("user") or ""
        return Asked(prompts, settings, suffix, n, n_new, logprobs, echo, stream, usage, editor=editor)

    def whole(self, answer: Answer, tokenizer: Tokenizer) -> Any:
        """Return the object of all texts."""
        asked, choices = answer.asked, []
        for number_, made in enumerate(answer.done):
            place, sample = divmod(number_, asked.n)
            prompt = asked.prompts[place]
            before = ""
            if asked.echo:
                assert not isinstance(prompt, tuple), "no request has echo and a conversation"
                before = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            one = choice(number_, before + made.text, finish_reason(made.finish_reason))
            choices.append(one | {"logprobs": log_probs(answer, tokenizer, place, sample)})
        return self._object(answer, choices) | {"usage": usage(answer)}

    def piece(self, answer: Answer, number: int, text: str) -> Any:
        return self._object(answer, [choice(number, text, None)])

    def ended(self, answer: Answer, number: int, tokenizer: Tokenizer) -> Any:
        """Return how a text ended, with the log-probabilities of all its tokens."""
        made = answer.completions[number]
        assert made is not None, "the text has ended"
        scores = log_probs(answer, tokenizer, *divmod(number, answer.asked.n))
        one = choice(number, "", finish_reason(made.finish_reason))
        return self._object(answer, [one | {"logprobs": scores}])

    def last(self, answer: Answer) -> list[Any]:
        counts = [self._object(answer, []) | {"usage": usage(answer)}] if answer.asked.usage else []
        return [*counts, "[DONE]"]

    def error(self, refused: Refused) -> Any:
        kind = "server_error" if refused.status >= 500 else "invalid_request_error"
        code = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}.get(refused.status)
        return {"error": {"message": refused.sentence, "type": kind, "param": refused.field, "code": code}}

    def _object(self, answer: Answer, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": f"cmpl-{answer.id}",
            "object": "text_completion",
            "created": answer.created,
            "model": answer.model,
            "choices": choices,
        }


def choice(number: int, text: str, reason: str | None) -> dict[str, Any]:
    """Return one text of an answer, or a part of one."""
    return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}


def usage(answer: Answer) -> dict[str, int]:
    """Return the counts of tokens."""
    n, new = answer.n_prompt, answer.n_new
    return {"prompt_tokens": n, "completion_tokens": new, "total_tokens": n + new}


def log_probs(answer: Answer, tokenizer: Tokenizer, place: int, sample: int) -> dict[str, Any] | None:
    """Return the tokens of a text with their log-probabilities, those of the prompt before it with `echo`.

    An offset is where a token begins in the text. The first tokens of a text whose prompt was healed begin
    with the end of the prompt, before 0, and those that were cut off begin behind the text.
    """
    if answer.asked.logprobs is None:
        return None
    handle, prompt = answer.handles[place], answer.fitted[place].prompt
    result = handle.results[sample]
    assert result is not None, "the text has ended"
    ids, scores, context = result.ids, list(result.scores), list(prompt.ids)
    known: list[Any] = [*scores]
    if answer.asked.echo:  # The start of a text is no part of it.
        own = len(tokenizer.before()) if isinstance(answer.asked.prompts[place], str) else 0
        context, known = context[:own], [*handle.prompt_scores[max(own - 1, 0) :], *scores]
        known = known if own else [None, *known]
        ids = [*prompt.ids[own:], *ids]
    pieces = token_pieces(tokenizer, context, ids)
    dropped = "" if answer.asked.echo else added_text(tokenizer, context[-CONTEXT:], [*prompt.dropped])
    offsets, at = [], -len(dropped)
    for piece in pieces:
        offsets.append(at)
        at += len(piece)
    top = []
    for score in known:
        # Of several tokens without a text of their own, such as parts of a character, the likeliest is named.
        likeliest = reversed(score.likeliest) if score else ()
        top.append(score and {token_pieces(tokenizer, context[-CONTEXT:], [id])[0]: p for id, p in likeliest})
        context.append(ids[len(top) - 1])
    return {
        "tokens": pieces,
        "token_logprobs": [None if score is None else score.log_prob for score in known],
        "top_logprobs": top if answer.asked.logprobs else None,
        "text_offset": offsets,
    }


def models(names: Sequence[str], size: int, created: int) -> dict[str, Any]:
    """Return the list of models, with the positions that they were trained with."""
    about = {"object": "model", "created": created, "owned_by": "plumb", "max_model_len": size}
    return {"object": "list", "data": [{"id": name} | about for name in names]}

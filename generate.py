"""Text from a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen. The default is greedy.

    Args:
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample only among the k most likely tokens; 0 means all.
        top_p: Sample only from the nucleus that holds this much probability; 1 means all.
        min_p: Sample only tokens at least this fraction as likely as the most likely one; 0 means all.
        repetition_penalty: Above 1 makes tokens of the prompt and of the text so far less likely.
        num_beams: Width of the beam search; 1 means none.
        length_penalty: Beams are ranked by log-probability / length ** length_penalty. 0 ranks by plain
            log-probability, which favours short texts; 1 by the mean of a token.
        stop: Strings that end the text; they are not part of it.
        seed: Of the sampling.

    Raises:
        ValueError: A setting is out of range, or would silently do nothing beside the others.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be finite and at least 0 (greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 (all tokens) and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be finite and above 0, 1 for none"
            )
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; it must be at least 1 (no beam search)")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be finite, 0 for none")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of strings that are not empty")
        if self.temperature == 0:
            for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"{name} is {getattr(self, name)} but temperature 0 samples nothing; "
                        f"set temperature above 0 or {name} to {off}"
                    )
        elif self.num_beams > 1:
            raise ValueError(
                f"num_beams is {self.num_beams} but temperature {self.temperature} samples; "
                "set temperature to 0 or num_beams to 1"
            )
        if self.num_beams == 1 and self.length_penalty != 0:
            raise ValueError(
                f"length_penalty is {self.length_penalty} but num_beams 1 ranks nothing; "
                "set num_beams above 1 or length_penalty to 0"
            )


from architecture import Decoder
from decoding import Stopped, generate_ids
from tokenizer import Tokenizer


class Completion(NamedTuple):
    """A `Generated` with its text: without the prompt, without eos, cut before the stop string."""

    text: str
    ids: list[int]
    log_prob: float
    finish_reason: str


# --- prompts --------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """[start] + encode(text), as every training document starts; see `Tokenizer.start_id`.

    The one way to build a prompt, in training, evaluation and serving.
    """
    before = [] if tokenizer.start_id is None else [tokenizer.start_id]
    return before + tokenizer.encode(text)


def trim_prompt(ids: list[int], length: int, bos_id: int | None) -> list[int]:
    """The last `length` tokens of a prompt; where it starts with bos, bos and the last `length` - 1.

    Raises:
        ValueError: `length` is below 1: `max_new_tokens` leaves no room for a prompt.
    """
    if length < 1:
        raise ValueError(f"a prompt cannot be trimmed to {length} tokens; lower max_new_tokens")
    if len(ids) <= length:
        return ids
    before = [bos_id] if bos_id is not None and ids[0] == bos_id else []
    return before + ids[len(ids) - length + len(before) :]


# --- text -----------------------------------------------------------------------------------------


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    first_row: int = 0,
) -> list[Completion]:
    """Continue each prompt, in one batch.

    Args:
        model: Its mode is left as it was found.
        tokenizer: The one the model was trained with.
        prompts: Texts, which the completions do not repeat.
        settings: How to choose tokens.
        first_row: The seed's row of the first prompt. Who calls for some prompts at a time counts on, and
            gets the same samples in batches of any size.

    Raises:
        ValueError: A prompt is empty and there is no bos, does not fit the model's positions, or the
            tokenizer has more words than the model.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocab_size} words do not fit the model's vocabulary of "
            f"{model.config.vocab_size}; use the tokenizer the model was trained with"
        )
    ids = [prompt_ids(tokenizer, text) for text in prompts]
    stopped = _stop_finder(tokenizer, ids, settings.stop) if settings.stop else None
    completions = []
    results = generate_ids(model, ids, settings, tokenizer.eos_id, tokenizer.vocab_size, stopped, first_row)
    for prompt, result in zip(ids, results, strict=True):
        new = result.ids[:-1] if result.finish_reason == "eos" else result.ids
        text = added_text(tokenizer, prompt, new)
        ends = [end for end in (text.find(string) for string in settings.stop) if end >= 0]
        reason = "stop" if ends else result.finish_reason
        completions.append(Completion(text[: min(ends, default=None)], result.ids, result.log_prob, reason))
    return completions


def added_text(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """The text that `ids` add after `before`: decoded alone they could lack a space that stands between."""
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def _stop_finder(tokenizer: Tokenizer, prompts: list[list[int]], stop: Sequence[str]) -> Stopped:
    """Whether a completion holds one of the strings, at a cost that does not grow with its length.

    Only the last tokens are decoded, after a few more that set their context. A character takes at most a
    token a byte, and CodeTokenizer's case markers, which have no text, stand singly; hence twice the bytes.
    """
    context = 16
    window = 2 * max(len(string.encode("utf-8", "surrogatepass")) for string in stop) + context

    def stopped(prompt: int, ids: list[int]) -> bool:
        if len(ids) <= window:
            tail = added_text(tokenizer, prompts[prompt][-context:], ids)
        else:
            tail = added_text(tokenizer, ids[-window - context : -window], ids[-window:])
        if not any(string in tail for string in stop):
            return False
        # The window may start inside a character or a name whose capitals were set before it.
        text = added_text(tokenizer, prompts[prompt], ids)
        return any(string in text for string in stop)

    return stopped

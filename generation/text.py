"""Text from a model.

    tokenizer.prompt_ids(prompt) -> healing.healed -> the engine -> text without the prompt, cut before a stop
    string

With a suffix the prompt is that of fill-in-the-middle (data/fim.py). `generate` continues prompts that are
all there; a `TextRequest` is one of many that an engine is given while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from architecture import Decoder
from data.fim import fim_end_ids, fim_prompt_ids
from generation.engine import generate_ids
from generation.requests import Generated, Request, Stopped
from generation.settings import GenerationConfig
from tokenization.healing import Prompt, healed
from tokenizer import Tokenizer


class Completion(NamedTuple):
    """A `Generated` with its text: without the prompt, without eos, cut before the stop string."""

    text: str
    ids: list[int]
    log_prob: float
    finish_reason: str
    speculation: str = ""

    @property
    def sureness(self) -> float:
        """The geometric mean of the tokens' probabilities, 0 to 1; 0 without a token."""
        return math.exp(self.log_prob / len(self.ids)) if self.ids else 0.0


# --- prompts --------------------------------------------------------------------------------------


def as_prompt(tokenizer: Tokenizer, ids: list[int], heal: bool | None = None) -> Prompt:
    """Return the Prompt of ids: all, or all but an end that is healed (tokenization/healing.py).

    Args:
        heal: `heal` of GenerationConfig; None is as the tokenizer's model was trained.
    """
    return healed(tokenizer, ids) if (tokenizer.heals if heal is None else heal) else Prompt(ids)


def trim_prompt(ids: list[int], length: int, bos_id: int | None) -> list[int]:
    """Return the last `length` tokens of a prompt; where it starts with bos, bos and the last `length` - 1.

    Raises:
        ValueError: `length` is below 1: `max_new_tokens` leaves no room for a prompt.
    """
    if length < 1:
        raise ValueError(f"a prompt cannot be trimmed to {length} tokens; lower max_new_tokens")
    if len(ids) <= length:
        return ids
    before = [bos_id] if bos_id is not None and ids[0] == bos_id else []
    return before + ids[len(ids) - length + len(before) :]


CONTEXT = 16  # tokens that are decoded before others, whose text depends on what they follow
SETTLED_EVERY = 32  # new tokens after which a stream looks for a place to decode from


# --- text -----------------------------------------------------------------------------------------


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Prompt],
    settings: GenerationConfig,
    first_row: int = 0,
    suffix: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continue each prompt, in one batch.

    Args:
        model: Its mode is left as it was found.
        tokenizer: The one the model was trained with.
        prompts: Texts, which the completions do not repeat; or Prompts, taken as they are.
        settings: How to choose tokens.
        first_row: The seed's row of the first prompt. A caller that gives some prompts at a time counts on,
            and gets the same samples in batches of any size.
        suffix: The text after the gap that each completion fills.
        on_text: Called with the parts of the completion of a single prompt while it is made, as soon as
            nothing that follows can change them; together they are its text. A beam search gives one part.

    Raises:
        ValueError: A prompt is empty and there is no bos, does not fit the model's positions, or the
            tokenizer has more words than the model or lacks what a suffix needs.
    """
    if on_text is not None and len(prompts) != 1:
        raise ValueError(f"{len(prompts)} completions cannot be streamed as one text; give one prompt")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocab_size} words do not fit the model's vocabulary of "
            f"{model.config.vocab_size}; use the tokenizer the model was trained with"
        )
    requested = [requested_prompt(tokenizer, text, suffix, settings.heal) for text in prompts]
    ends = end_ids(tokenizer, suffix)
    found = stop_finder(tokenizer, requested, settings.stop) if settings.stop else None
    stream = None if on_text is None else _Stream(tokenizer, requested[0], settings.stop, on_text)

    def stopped(prompt: int, new: list[int]) -> bool:
        if found is not None and found(prompt, new):
            return True
        if stream is not None and settings.num_beams == 1:
            stream.read(new)
        return False

    results = generate_ids(model, requested, settings, ends, tokenizer.vocab_size, stopped, first_row)
    pairs = zip(requested, results, strict=True)
    completions = [completion_of(tokenizer, prompt, result, settings.stop) for prompt, result in pairs]
    if stream is not None:
        stream.end(completions[0].text)
    return completions


def requested_prompt(
    tokenizer: Tokenizer, text: str | Prompt, suffix: str | None, heal: bool | None
) -> Prompt:
    """Return the Prompt of a text, or of the gap before a suffix; one that is a Prompt already as it is."""
    if isinstance(text, Prompt):
        return text
    ids = tokenizer.prompt_ids(text) if suffix is None else fim_prompt_ids(tokenizer, text, suffix)
    return as_prompt(tokenizer, ids, heal)


def end_ids(tokenizer: Tokenizer, suffix: str | None) -> frozenset[int]:
    """Return the ids that end a completion, or what fills a gap."""
    plain = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    return (plain if suffix is None else fim_end_ids(tokenizer)) | frozenset(tokenizer.eos_ids)


def completion_of(tokenizer: Tokenizer, prompt: Prompt, result: Generated, stop: Sequence[str]) -> Completion:
    """Return the text of what was generated, cut before the first of the stop strings."""
    new = result.ids[:-1] if result.finish_reason == "eos" else result.ids
    text, is_cut = cut_at_stop(completed_text(tokenizer, prompt, new), stop)
    reason = "stop" if is_cut else result.finish_reason
    return Completion(text, result.ids, result.log_prob, reason, result.speculation)


class TextRequest:
    """A text to continue by an engine, and the completions of its samples.

    Args:
        tokenizer: The one the model was trained with; its vocab_size is the engine's.
        text: The prompt, which the completions do not repeat; or a Prompt, taken as it is.
        settings: How to choose tokens, and the strings that end a text.
        suffix: The text after the gap that is filled; of a Prompt, whether it is that of a gap.
        on_text: Called with the number of a sample and the next part of its completion, as soon as nothing
            that follows can change it; together the parts are its text.
        more: Further arguments of `Request`; `on_done` is called with the Completion.

    Attributes:
        request: What `Engine.add` takes.
        completions: The completion of each sample, None while it is under way.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text: str | Prompt,
        settings: GenerationConfig,
        suffix: str | None = None,
        on_text: Callable[[int, str], None] | None = None,
        **more: Any,
    ):
        self.tokenizer, self.stop = tokenizer, settings.stop
        self.prompt = requested_prompt(tokenizer, text, suffix, settings.heal)
        self.told: Callable[[int, Completion], None] | None = more.pop("on_done", None)
        self.request = Request(
            self.prompt,
            settings,
            end_ids(tokenizer, suffix),
            stopped=self._stopped,
            on_done=self._ended,
            **more,
        )
        samples = range(self.request.n)
        self.completions: list[Completion | None] = [None for _ in samples]
        self.found = stop_finder(tokenizer, [self.prompt] * len(samples), self.stop) if self.stop else None
        self.streams: list[_Stream] = []
        if on_text is not None:
            parts = [partial(on_text, sample) for sample in samples]
            self.streams = [_Stream(tokenizer, self.prompt, self.stop, part) for part in parts]

    def _stopped(self, sample: int, ids: list[int]) -> bool:
        if self.found is not None and self.found(sample, ids):
            return True
        if self.streams:
            self.streams[sample].read(ids)
        return False

    def _ended(self, sample: int, result: Generated) -> None:
        made = completion_of(self.tokenizer, self.prompt, result, self.stop)
        self.completions[sample] = made
        if self.streams:
            self.streams[sample].end(made.text)
        if self.told is not None:
            self.told(sample, made)


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut a text where the first of the stop strings begins; return it, and whether there was one."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return text[: min(places, default=None)], bool(places)


def added_text(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """Return the text that `ids` add after `before`: decoded alone they could lack a space between."""
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def completed_text(tokenizer: Tokenizer, prompt: Prompt, ids: list[int], context: int | None = None) -> str:
    """Return the text that the tokens generated after a prompt add to it.

    Args:
        context: Tokens of the prompt that are decoded with them; None is all.
    """
    before = prompt.ids if context is None else prompt.ids[-context:]
    text = added_text(tokenizer, before, ids)
    if not prompt.dropped:
        return text
    # The text of the new tokens begins with the dropped end of the prompt.
    return text[len(tokenizer.decode([*before, *prompt.dropped])) - len(tokenizer.decode(before)) :]


def stop_finder(tokenizer: Tokenizer, prompts: list[Prompt], stop: Sequence[str]) -> Stopped:
    """Return a function that finds a stop string in a completion, at a cost that its length does not raise.

    Only the last tokens are decoded, after a few more that set their context. A character takes at most a
    token a byte, and CodeTokenizer's case markers, which have no text, stand singly; hence twice the bytes.
    """
    window = 2 * max(len(string.encode("utf-8", "surrogatepass")) for string in stop) + CONTEXT

    def stopped(prompt: int, ids: list[int]) -> bool:
        if len(ids) <= window:
            tail = completed_text(tokenizer, prompts[prompt], ids, CONTEXT)
        else:
            tail = added_text(tokenizer, ids[-window - CONTEXT : -window], ids[-window:])
        if not any(string in tail for string in stop):
            return False
        # The window may start inside a character or a name whose capitals were set before it.
        text = completed_text(tokenizer, prompts[prompt], ids)
        return any(string in text for string in stop)

    return stopped


class _Stream:
    """A stream that gives out a text as it grows by tokens, but no text that a later token may change.

    It keeps back a character whose bytes have not all come, which decodes to U+FFFD; the beginning of a stop
    string; and text that one more byte would change: some tokenizers decode a whole run of bytes to U+FFFD
    while its last character is not complete.

    Each token decodes only the text after a settled line break, after a few tokens that set its context.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str], on_text: Callable[[str], None]
    ):
        self.tokenizer, self.before, self.stop, self.on_text = tokenizer, prompt.ids, stop, on_text
        self.given = ""
        rare = tokenizer.encode("\U00013000")  # No vocabulary has this character, so its ids are bytes.
        self.byte = [id for id in rare if "\ufffd" in tokenizer.decode([id])][:1]
        self.start = 0  # the first of the ids that are decoded anew
        self.settled = ""  # text of the completion before `start`
        self.skipped = len(tokenizer.decode(prompt.whole))  # characters of the prompt from `start` on
        self._settle(prompt.ids)

    def read(self, ids: list[int]) -> None:
        """Give out all that is certain after these ids, which are all so far."""
        ids = self.before + ids
        text, changed = (self._since(self.start, ids + more)[self.skipped :] for more in ([], self.byte))
        same = (i for i, (a, b) in enumerate(zip(text, changed, strict=False)) if a != b)
        certain = text[: next(same, min(len(text), len(changed)))].rstrip("\ufffd")
        begun = [n for string in self.stop for n in range(1, len(string)) if certain.endswith(string[:n])]
        self._give(self.settled + certain[: len(certain) - max(begun, default=0)])
        if certain == text and not begun and len(ids) >= self.next_settled:
            self._settle(ids)

    def end(self, text: str) -> None:
        """Give out the rest of the finished text."""
        self._give(text)

    def _since(self, start: int, ids: list[int]) -> str:
        return added_text(self.tokenizer, ids[max(start - CONTEXT, 0) : start], ids[start:])

    def _settle(self, ids: list[int]) -> None:
        """Move `start` behind the last line break after which the text decodes alike without its past.

        A line break ends every name, whose capitals an earlier piece may have set. The last token is never
        taken: a run of bytes that a line break belongs to has ended when another token follows it.
        """
        self.next_settled = len(ids) + SETTLED_EVERY
        whole = self._since(self.start, ids)
        for start in range(len(ids) - 1, self.start, -1):
            piece = self.tokenizer.decode([ids[start - 1]])
            if "\n" not in piece or piece.strip():
                continue
            tail = self._since(start, ids)
            head = self._since(self.start, ids[:start])
            if head + tail == whole:
                self.settled += head[self.skipped :]
                self.skipped = max(self.skipped - len(head), 0)
                self.start = start
                return

    def _give(self, text: str) -> None:
        if text.startswith(self.given) and text != self.given:
            self.on_text(text[len(self.given) :])
            self.given = text

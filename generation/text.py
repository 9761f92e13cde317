"""Text from a model.

    tokenizer.prompt_ids(prompt) -> healing.healed -> engine.generate_ids -> text without the prompt, cut
    before a stop string

With a suffix the prompt is that of fill-in-the-middle (data/fim.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from architecture import Decoder
from data.fim import fim_end_ids, fim_prompt_ids
from generation.engine import Stopped, generate_ids
from generation.settings import GenerationConfig
from tokenization.healing import Prompt, healed
from tokenizer import Tokenizer


class Completion(NamedTuple):
    """A `Generated` with its text: without the prompt, without eos, cut before the stop string."""

    text: str
    ids: list[int]
    log_prob: float
    finish_reason: str


# --- prompts --------------------------------------------------------------------------------------


def as_prompt(tokenizer: Tokenizer, ids: list[int], heal: bool | None = None) -> Prompt:
    """What a model reads of a prompt's ids: all, or all but an end that is healed (tokenization/healing.py).

    Args:
        heal: As of GenerationConfig.
    """
    return healed(tokenizer, ids) if (tokenizer.heals if heal is None else heal) else Prompt(ids)


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


CONTEXT = 16  # tokens that are decoded before others whose text depends on what they follow
SETTLED_EVERY = 32  # tokens


# --- text -----------------------------------------------------------------------------------------


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    first_row: int = 0,
    suffix: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continue each prompt, in one batch.

    Args:
        model: Its mode is left as it was found.
        tokenizer: The one the model was trained with.
        prompts: Texts, which the completions do not repeat.
        settings: How to choose tokens.
        first_row: The seed's row of the first prompt. Who calls for some prompts at a time counts on, and
            gets the same samples in batches of any size.
        suffix: What follows the gap that each completion fills.
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
    if suffix is None:
        ids = [tokenizer.prompt_ids(text) for text in prompts]
        ends = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    else:
        ids = [fim_prompt_ids(tokenizer, text, suffix) for text in prompts]
        ends = fim_end_ids(tokenizer)
    ends |= frozenset(tokenizer.eos_ids)
    asked = [as_prompt(tokenizer, one, settings.heal) for one in ids]
    found = stop_finder(tokenizer, asked, settings.stop) if settings.stop else None
    stream = None if on_text is None else _Stream(tokenizer, asked[0], settings.stop, on_text)

    def stopped(prompt: int, new: list[int]) -> bool:
        if found is not None and found(prompt, new):
            return True
        if stream is not None and settings.num_beams == 1:
            stream.read(new)
        return False

    completions = []
    results = generate_ids(model, asked, settings, ends, tokenizer.vocab_size, stopped, first_row)
    for prompt, result in zip(asked, results, strict=True):
        new = result.ids[:-1] if result.finish_reason == "eos" else result.ids
        text = completed_text(tokenizer, prompt, new)
        cuts = [cut for cut in (text.find(string) for string in settings.stop) if cut >= 0]
        reason = "stop" if cuts else result.finish_reason
        completions.append(Completion(text[: min(cuts, default=None)], result.ids, result.log_prob, reason))
    if stream is not None:
        stream.end(completions[0].text)
    return completions


def added_text(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """The text that `ids` add after `before`: decoded alone they could lack a space that stands between."""
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def completed_text(tokenizer: Tokenizer, prompt: Prompt, ids: list[int], context: int | None = None) -> str:
    """The text that the tokens generated after a prompt add to it.

    Args:
        context: Tokens of the prompt that are decoded with them; all if None.
    """
    before = prompt.ids if context is None else prompt.ids[-context:]
    text = added_text(tokenizer, before, ids)
    if not prompt.dropped:
        return text
    # What was dropped comes first in the text of the new tokens.
    return text[len(tokenizer.decode([*before, *prompt.dropped])) - len(tokenizer.decode(before)) :]


def stop_finder(tokenizer: Tokenizer, prompts: list[Prompt], stop: Sequence[str]) -> Stopped:
    """Whether a completion holds one of the strings, at a cost that does not grow with its length.

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
    """Gives out a text that grows by tokens, never what a later token may change.

    Kept back are a character whose bytes have not all come, which decodes to U+FFFD; the beginning of a stop
    string; and text that one more byte would change: some tokenizers decode a run of bytes to U+FFFD
    altogether as long as its last character is not whole.

    Only what follows a settled line break is decoded at each token, after a few tokens that set its context.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str], on_text: Callable[[str], None]
    ):
        self.tokenizer, self.before, self.stop, self.on_text = tokenizer, prompt.ids, stop, on_text
        self.given = ""
        rare = tokenizer.encode("\U00013000")  # in no vocabulary, so that its ids are bytes
        self.byte = [id for id in rare if "\ufffd" in tokenizer.decode([id])][:1]
        self.start = 0  # of the ids that are decoded anew
        self.settled = ""  # of the completion, before them
        self.skipped = len(tokenizer.decode(prompt.whole))  # characters of the prompt after them
        self._settle(prompt.ids)

    def read(self, ids: list[int]) -> None:
        """Give out what is certain after these ids, all so far."""
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
        """Start after the last line break from which on the text is the same without what came before.

        Such a token ends every name, whose capitals an earlier piece may have set. It is never the last one,
        so that a run of bytes that it may belong to has ended, and the comparison sees where it began.
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

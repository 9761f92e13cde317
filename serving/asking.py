"""What is asked of the model, whatever protocol it came in, and how a prompt is fitted into the model."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from architecture import Decoder
from data.fim import fim_prompt_ids, known_markers, marked_prompt_ids, trim_fim_prompt
from generation.requests import Handle
from generation.settings import GenerationConfig
from generation.text import CONTEXT, Completion, added_text, as_prompt, trim_prompt
from serving.fields import Refused
from tokenization.chat import Conversation, asked_ids
from tokenization.healing import Prompt
from tokenizer import Tokenizer

SLACK = 16  # positions left free for the tokens in the place of a healed prompt's end


AskedPrompt = str | list[int] | Conversation


@dataclass(frozen=True)
class Asked:
    """A request in the terms of the engine.

    Args:
        prompts: Texts, ids that are taken as they are, or conversations that the model answers.
        settings: How to choose tokens; its max_new_tokens counts where `n_new` is above 0.
        suffix: The text after the gap.
        n: Texts for each prompt.
        n_new: Most new tokens; 0 reads the prompt only.
        logprobs: The likeliest tokens to name beside each.
        echo: Whether the answer begins with the prompt.
        stream: Whether to send the text while it is made.
        usage: Whether a stream ends with its counts.
        seconds: After which a text ends as it is.
        editor: Who asks, as the request says; empty where it says nothing.
        fields: Names of the fields that the answer is to have; none is all.
        pieces: (name, text) of other files, the newest or best last.
        path: The file that the prompt is from, as the editor calls it; empty where it does not say.
    """

    prompts: tuple[AskedPrompt, ...]
    settings: GenerationConfig
    suffix: str | None = None
    n: int = 1
    n_new: int = 16
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False
    seconds: float | None = None
    editor: str = ""
    fields: tuple[str, ...] = ()
    pieces: tuple[tuple[str, str], ...] = ()
    path: str = ""


@dataclass
class Fitted:
    """A prompt as the model reads it."""

    prompt: Prompt
    is_gap: bool
    n_new: int
    trimmed: int  # tokens that were left out, farthest from where the text goes on


@dataclass
class Answer:
    """A request under way: its texts are numbered by prompt, then by sample.

    Attributes:
        handles: The engine's, one a prompt.
        completions: One a text, None while it is under way.
        first: The time of the first token, by time.monotonic().
        introduced: Texts of which a part was sent.
    """

    asked: Asked
    model: str
    tokenizer: Tokenizer
    fitted: list[Fitted]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    begun: float = field(default_factory=time.monotonic)
    first: float = 0.0
    handles: list[Handle] = field(default_factory=list)
    completions: list[Completion | None] = field(default_factory=list)
    introduced: set[int] = field(default_factory=set)

    @property
    def done(self) -> list[Completion]:
        """The texts, all of which have ended."""
        found = [one for one in self.completions if one is not None]
        assert len(found) == len(self.completions), "a text is under way"
        return found

    @property
    def n_prompt(self) -> int:
        """The tokens of the prompts, each counted once."""
        return sum(len(one.prompt.whole) for one in self.fitted)

    @property
    def n_new(self) -> int:
        """The new tokens."""
        return sum(len(one.ids) for one in self.completions if one is not None)


def fit(model: Decoder, tokenizer: Tokenizer, asked: Asked, prompt: AskedPrompt) -> Fitted:
    """Read a prompt, and leave out what is farthest from the new text where the model has no room for it.

    At least half of the model's positions stay with the prompt, and the rest bounds the new text.

    Raises:
        ValueError: The prompt cannot be read, or is too long and may not be shortened.
    """
    is_text = isinstance(prompt, str)
    marked = marked_prompt_ids(tokenizer, prompt) if is_text and asked.suffix is None else None
    is_gap = asked.suffix is not None or marked is not None
    if isinstance(prompt, tuple):
        ids = asked_ids(tokenizer, prompt)
    elif not is_text:
        ids = list(prompt)
    elif asked.suffix is not None:
        ids = fim_prompt_ids(tokenizer, prompt, asked.suffix)
    else:
        ids = tokenizer.prompt_ids(prompt) if marked is None else marked
    size = model.config.block_size
    slack = min(SLACK, size // 8)
    room = size - slack - min(asked.n_new, (size - slack) // 2)
    whole = len(ids)
    if whole > room and (asked.echo or not is_text):
        raise Refused(
            400,
            f"the prompt has {whole} tokens and asks for {asked.n_new} more, and the model has room for "
            f"{size - slack} in all; shorten the prompt",
            "prompt",
        )
    if whole > room and is_gap:
        ids = trim_fim_prompt(tokenizer, ids, room)
    elif whole > room:
        ids = trim_prompt(ids, room, tokenizer.start_id)
    heal = None if is_text and not asked.echo else False
    n_new = min(asked.n_new, size - slack - len(ids))
    return Fitted(as_prompt(tokenizer, ids, heal), is_gap, n_new, whole - len(ids))


def refuse_gap_without_markers(tokenizer: Tokenizer, suffix: str | None) -> str | None:
    """Return the suffix; None where it is empty and the model cannot fill gaps.

    Raises:
        Refused: There is text after the gap, and the model cannot read it.
    """
    if suffix is None or known_markers(tokenizer) is not None:
        return suffix
    if not suffix:
        return None
    raise Refused(
        400,
        "the model knows no fill-in-the-middle tokens, so it cannot use a suffix; leave it out, or serve "
        "a model that was trained with them",
        "suffix",
    )


def token_pieces(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return the text that each id adds after those before it."""
    every, first = [*before, *ids], len(before)
    places = range(first, len(every))
    return [added_text(tokenizer, every[max(i - CONTEXT, 0) : i], every[i : i + 1]) for i in places]

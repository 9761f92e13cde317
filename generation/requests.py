"""What the engine is asked for: a request, the texts that it becomes, and the handle on both.

Request -> Engine.add -> Handle: a Text for each of its n samples -> a Generated each
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from architecture import Decoder
from generation.rows import Seat
from generation.sampling import Score
from generation.settings import GenerationConfig
from generation.speculation import Speculation
from modules.positions import ABSOLUTE_POSITIONS, longest_generated
from tokenization.healing import Prompt

Stopped = Callable[[int, list[int]], bool]  # (number of the text, ids so far) -> the text has ended


class Generated(NamedTuple):
    """The continuation of one prompt.

    ids: The generated tokens, with the closing eos and with those for a dropped end of the prompt.
    log_prob: Sum of their natural-log probabilities under the model itself, before any setting changes them,
        given that the text begins with the prompt.
    finish_reason: `eos`, `stop` (a stop string) or `length` (max_new_tokens); of a request to an engine also
        `time` (its deadline), `cancelled`, or `replaced` by a newer one of its slot.
    scores: Of a request with `logprobs`, each token's own log-probability beside the likeliest others.
    speculation: How many proposed tokens were taken, in words; empty where none were proposed.
    """

    ids: list[int]
    log_prob: float
    finish_reason: str
    scores: tuple[Score, ...] = ()
    speculation: str = ""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue, with settings of its own.

    Args:
        prompt: Ids, bos included, or what `tokenization.healing.healed` makes of them.
        settings: How to choose tokens. `settings.stop` is text: here `stopped` takes its place.
        ends: The tokens that end a text.
        n: Samples; the prompt is read once for all.
        first_row: The seed's row of the first sample, from which the others count on.
        logprobs: The likeliest tokens to name beside each; None computes no scores.
        echo: Whether the prompt's own tokens are scored too, those that a healed prompt keeps.
        read_only: Whether to read the prompt, which then is in the prefix cache, and generate nothing.
        interactive: Whether somebody waits for the text as it is written: such requests come before others.
        editor: A name of who asks: of the requests of one that wait, the newest begins first, since it shows
            what is typed now. None begins before one of somebody else by that.
        slot: A name, say of an editor's window. A request replaces the older ones of its slot, but none of an
            equal prompt.
        seconds: Most seconds from the end of reading, after which a text ends as it is.
        should_stop: Asked once a step, while the request waits and while it is read too; True cancels it.
        stopped: Called after each token with the number of the sample and its ids so far; True ends the text.
        on_done: Called with the number of a sample and its continuation, as soon as it has ended.
    """

    prompt: Prompt | list[int]
    settings: GenerationConfig = field(default_factory=GenerationConfig)
    ends: frozenset[int] = frozenset()
    n: int = 1
    first_row: int = 0
    logprobs: int | None = None
    echo: bool = False
    read_only: bool = False
    interactive: bool = True
    editor: str | None = None
    slot: str | None = None
    seconds: float | None = None
    should_stop: Callable[[], bool] | None = None
    stopped: Stopped | None = None
    on_done: Callable[[int, Generated], None] | None = None

    @property
    def seat(self) -> Seat:
        """The prompt and settings as rows take them."""
        prompt = self.prompt if isinstance(self.prompt, Prompt) else Prompt(self.prompt)
        return Seat(prompt, self.settings)


class Text:
    """One sample of a request under way."""

    def __init__(self, handle: Handle, sample: int, number: int):
        self.handle, self.sample, self.number, self.seat = handle, sample, number, handle.seat
        self.generator: torch.Generator | None = None
        self.ids: list[int] = []
        self.speculation: Speculation | None = None
        self.told = 0  # new tokens that `speculation` knows
        self.log_prob = 0.0
        self.scores: list[Score] = []

    def end(self, reason: str) -> None:
        """End the text, and tell the request's caller."""
        handle = self.handle
        found = Generated(self.ids, self.log_prob, reason, tuple(self.scores), str(self.speculation or ""))
        handle.results[self.sample] = found
        if handle.request.on_done is not None:
            handle.called(handle.request.on_done, self.sample, found)


class Handle:
    """A request that the engine has taken.

    Attributes:
        results: The continuation of each sample, None while it is under way.
        error: What ended the request, if not its texts: NaN, or an exception of one of its own callbacks.
        prompt_scores: The scores of the prompt's tokens after the first, where the request asks for them.
        known: The prompt's tokens that were in the prefix cache.
        deadline: The time.monotonic() at which its texts end as they are; it may be set while they run.
    """

    def __init__(self, request: Request, seat: Seat, numbers: Iterator[int]):
        self.request, self.seat = request, seat
        self.texts = [Text(self, sample, next(numbers)) for sample in range(request.n)]
        self.number = self.texts[0].number
        self.results: list[Generated | None] = [None] * request.n
        self.error: Exception | None = None
        self.prompt_scores: list[Score] = []
        self.known = 0
        self.deadline = float("inf")
        self._reason = ""

    @property
    def order(self) -> tuple[bool, int]:
        """The key by which requests are sorted: interactive ones come first, then the older."""
        return not self.request.interactive, self.number

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or None not in self.results

    @property
    def rows(self) -> int:
        """The most rows that the request takes at a time."""
        return self.request.n * max(1, len(self.seat.prompt.branches))

    def cancel(self, reason: str = "cancelled") -> None:
        """End the request within one step, from any thread."""
        self._reason = self._reason or reason

    def result(self) -> list[Generated]:
        """Return the continuations.

        Raises:
            ValueError: The request ended with an error, NaN; or what one of its callbacks raised.
        """
        if self.error is not None:
            raise self.error
        found = [result for result in self.results if result is not None]
        assert len(found) == len(self.results), "the request is under way"
        return found

    def leaves(self) -> str:
        """Return why the request is to end before its texts do, or an empty string."""
        if not self._reason and time.monotonic() >= self.deadline:
            self._reason = "time"
        if not self._reason and self.request.should_stop is not None:
            self._reason = "cancelled" if self.called(self.request.should_stop) else ""
        return "error" if self.error is not None else self._reason

    def called(self, callback: Callable[..., object], *args: object) -> object:
        """Call back; an exception ends this request, and no other."""
        try:
            return callback(*args)
        except Exception as error:  # The caller's own, who gets it from `result`.
            self.error = self.error or error
            return True


def refuse_wrong(model: Decoder, request: Request, name: str = "the prompt") -> None:
    """Refuse a request that could not run, whatever else does.

    Raises:
        ValueError: The prompt is empty, holds an id outside the vocabulary or does not fit the model's
            positions; or two settings contradict each other.
    """
    refuse_prompts(model, [request.seat], name)
    if request.settings.num_beams > 1:
        raise ValueError(
            f"num_beams is {request.settings.num_beams}, but an engine takes no beams; call generate_ids"
        )
    if request.n < 1:
        raise ValueError(f"n is {request.n}; it must be at least 1")
    if request.logprobs is not None and request.logprobs < 0:
        raise ValueError(f"logprobs is {request.logprobs}; it must be at least 0 likeliest tokens")
    if request.echo and request.logprobs is None:
        raise ValueError("echo scores the prompt, and logprobs is None; set logprobs to 0 or more")
    if request.read_only and request.n > 1:
        raise ValueError(f"read_only generates nothing, and n is {request.n}; set n to 1")


def refuse_prompts(model: Decoder, seats: Sequence[Seat], name: str = "prompt {}") -> None:
    """Refuse prompts that the model cannot continue; `name` is theirs, by number."""
    V, block_size = model.config.vocab_size, model.config.block_size
    for i, seat in enumerate(seats):
        ids, own = seat.prompt.whole, name.format(i)
        if not ids:
            raise ValueError(f"{own} holds no token and there is no bos; give at least one character")
        if not 0 <= min(ids) <= max(ids) < V:
            wrong = next(id for id in ids if not 0 <= id < V)
            raise ValueError(
                f"{own} holds id {wrong}, outside the model's vocabulary of {V}; "
                "use the tokenizer the model was trained with"
            )
        if not seat.prompt.ids:
            raise ValueError(f"{own} holds no token that healing leaves, and there is no bos; give more text")
        most = block_size if model.config.position in ABSOLUTE_POSITIONS else 0
        most = most or longest_generated(model.config, seat.longest)
        if seat.longest > most:
            raise ValueError(
                f"{own} of {len(ids)} tokens and max_new_tokens {seat.settings.max_new_tokens} make "
                f"{seat.longest}, more than the model's {most} positions; "
                "lower max_new_tokens or shorten the prompt"
            )

"""Completions of every example of a suite, by a model and by the n-gram model.

Prompts are built and trimmed by the functions that training uses, and the prompt is never in the prediction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from architecture import Decoder
from config import memory_is_full
from data.fim import fewest_gap_ids, fim_end_ids, fim_prompt_ids, trim_fim_prompt
from data.ngram import NGramModel
from generation.engine import Generated, generate_ids
from generation.settings import GenerationConfig
from generation.text import CONTEXT, as_prompt, completed_text, cut_at_stop, stop_finder, trim_prompt
from modules.precision import Precision
from suites.kept import Draw, Kept, Made
from suites.scoring import Example, Predictions
from tokenization.healing import Prompt
from tokenizer import Tokenizer
from training.distributed import ALONE, World

GREEDY = GenerationConfig()
# Rows at a time beyond which the time of a step is proportional to its rows.
MOST_ROWS = {"cpu": 32, "cuda": 256}

Cut = Callable[[Example, str], str]  # Returns the part of a completion's text that is the prediction.


def uncut(example: Example, text: str) -> str:
    """Return the whole text, up to eos."""
    return text


class CompletionRequest(NamedTuple):
    """A prompt, how many tokens the model may add, the tokens that end them, and whether it was trimmed."""

    prompt: Prompt
    limit: int
    ends: frozenset[int]
    trimmed: bool


def completion_request(
    tokenizer: Tokenizer, example: Example, max_new_tokens: int, length: int, heal: bool | None = None
) -> CompletionRequest:
    """Build the prompt of an example as training does, in a row of `length` tokens, and the room behind it.

    A completion has `max_new_tokens`, or what a long prompt leaves of the row, but never less than half of
    the row: beyond that the prompt loses what is far from its end, or from its gap. The reference plays no
    part in this; in training it does, where the whole completion is known.

    Args:
        max_new_tokens: Most tokens of a completion.
        length: Tokens of a row.
        heal: Whether the prompt's end is healed; None for as the tokenizer says.
    """
    room = max(1, length - min(max_new_tokens, length // 2))
    own_ends = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    if example.ids:
        ids = trim_prompt([*example.ids], room, example.ids[0])
        limit = max(1, min(max_new_tokens, length - len(ids)))
        return CompletionRequest(
            Prompt(ids), limit, own_ends | frozenset(tokenizer.eos_ids), len(ids) < len(example.ids)
        )
    if example.suffix is None:
        whole = tokenizer.prompt_ids(example.prompt)
        ids = trim_prompt(whole, room, tokenizer.start_id)
        ends = own_ends
    else:
        whole = fim_prompt_ids(tokenizer, example.prompt, example.suffix)
        ids = trim_fim_prompt(tokenizer, whole, max(fewest_gap_ids(tokenizer), room))
        ends = fim_end_ids(tokenizer)
    limit = max(1, min(max_new_tokens, length - len(ids)))
    prompt = as_prompt(tokenizer, ids, heal)
    return CompletionRequest(prompt, limit, ends | frozenset(tokenizer.eos_ids), len(ids) < len(whole))


def draw_number(example: Example, draw: int) -> int:
    """Return the number that a draw's random numbers are seeded with, besides the seed.

    It is made of the draw and its example alone: a draw does not depend on which others are requested.
    """
    digest = hashlib.sha256(f"{draw} {example.id}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class CompletionSettings:
    """How a model completes the examples of a suite.

    Args:
        max_new_tokens: Most tokens of a completion.
        length: Tokens of a row: of a prompt and its completion together.
        precision: The device and the number format that the model computes in.
        batch_size: Texts under way at a time; None for as many as memory is reckoned to have room for. It is
            halved for as long as memory is full, and does not change what is predicted.
        generation: Greedy, or how to sample; its stop strings. Its own limit on new tokens is not read.
        draws: Texts of each example. A draw's random numbers are its own, whatever is beside it.
        world: The processes that share the texts; all get the predictions.
    """

    max_new_tokens: int
    length: int
    precision: Precision
    batch_size: int | None = None
    generation: GenerationConfig = GREEDY
    draws: int = 1
    world: World = ALONE


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    cut: Cut,
    settings: CompletionSettings,
    kept: Kept | None = None,
    on_done: Callable[[int], Any] = lambda n: None,
) -> Predictions:
    """Complete every example, without its prompt, until `cut` leaves something off, a stop string, or an end.

    Args:
        cut: What of a text is the prediction; once it leaves something off, the text has ended.
        kept: Predictions that an interrupted evaluation made, to which the others are added as they are made.
        on_done: Called with the number of texts that are done now and were not before.

    Raises:
        ValueError: The tokenizer has ids that the model lacks, or the model's logits are NaN.
        RuntimeError: Memory is full with one row at a time.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocab_size} words do not fit the model's vocabulary of "
            f"{model.config.vocab_size}; use the tokenizer the model was trained with"
        )
    requests = [
        completion_request(
            tokenizer, example, settings.max_new_tokens, settings.length, settings.generation.heal
        )
        for example in examples
    ]
    world = settings.world
    done = {} if kept is None or not world.is_first else kept.read(len(examples), settings.draws)
    done = _made(world.told(_listed(done)))
    on_done(len(done))
    work = _Work(model, tokenizer, examples, cut, settings, requests, done, kept, on_done)
    for (limit, ends), draws in work.missing():
        work.complete_alike(draws, limit, ends)
    for others in world.collect(_listed(done)):
        done |= _made(others)
    texts = [[done[i, draw][0] for i in range(len(examples))] for draw in range(settings.draws)]
    ran_long = sum(reason == "length" for _, reason in done.values())
    return Predictions(texts[0], ran_long, texts[1:], sum(request.trimmed for request in requests))


def _listed(made: Made) -> list[Any]:
    return [[*draw, *found] for draw, found in made.items()]


def _made(listed: list[Any]) -> Made:
    return {(example, draw): (text, ended) for example, draw, text, ended in listed}


@dataclass
class _Work:
    """The completions of a suite under way: `done` fills up, and `most_rows` shrinks where memory is full."""

    model: Decoder
    tokenizer: Tokenizer
    examples: Sequence[Example]
    cut: Cut
    settings: CompletionSettings
    requests: list[CompletionRequest]
    done: Made
    kept: Kept | None
    on_done: Callable[[int], Any]
    most_rows: int = 0

    def __post_init__(self) -> None:
        self.most_rows = self.settings.batch_size or max(MOST_ROWS.values())

    def missing(self) -> Iterator[tuple[tuple[int, frozenset[int]], list[Draw]]]:
        """Yield the draws that this process has to make, those with one limit and the same ends together.

        Long prompts come first: those that follow fit the columns that are there.
        """

        def order(i: int) -> tuple[int, int, int]:
            request = self.requests[i]
            return request.limit, len(request.ends), -len(request.prompt.whole)

        def shared(draw: Draw) -> tuple[int, frozenset[int]]:
            request = self.requests[draw[0]]
            return request.limit, request.ends

        missing = [
            (i, draw)
            for i in sorted(range(len(self.examples)), key=order)
            for draw in range(self.settings.draws)
            if (i, draw) not in self.done
        ]
        world = self.settings.world
        for limit_and_ends, draws in groupby(missing[world.rank :: world.size], key=shared):
            yield limit_and_ends, list(draws)

    def complete_alike(self, draws: list[Draw], limit: int, ends: frozenset[int]) -> None:
        """Complete draws that share their limit and ends, in halves for as long as memory is full."""
        settings = self.settings
        longest = max(len(self.requests[i].prompt.whole) for i, _ in draws) + limit
        size = min(self.most_rows, settings.batch_size or rows_at_a_time(self.model, longest))
        while draws:
            rows = _Rows(self, draws)
            try:
                with settings.precision.autocast():
                    generate_ids(
                        self.model,
                        rows.prompts,
                        replace(settings.generation, max_new_tokens=limit),
                        ends,
                        self.tokenizer.vocab_size,
                        rows.stopped,
                        [draw_number(self.examples[i], draw) for i, draw in draws],
                        size,
                        rows.ended,
                    )
            except (RuntimeError, MemoryError) as error:
                if not memory_is_full(error) or min(size, len(draws)) == 1:
                    raise
            left = [draw for draw in draws if draw not in self.done]
            # This stands outside of the handler, whose traceback holds the tensors.
            if left:
                self.most_rows = size = min(size, len(draws)) // 2
                if settings.precision.device.type == "cuda":
                    torch.cuda.empty_cache()
            draws = left


class _Rows:
    """The draws of one call of `generate_ids`, which names each by its row: when it stops, and what it is."""

    def __init__(self, work: _Work, draws: list[Draw]) -> None:
        self.work, self.draws = work, draws
        self.prompts = [work.requests[i].prompt for i, _ in draws]
        stop = work.settings.generation.stop
        self.holds_stop = stop_finder(work.tokenizer, self.prompts, stop) if stop else None

    def text(self, row: int, ids: list[int]) -> str:
        return completed_text(self.work.tokenizer, self.prompts[row], ids)

    def stopped(self, row: int, ids: list[int]) -> bool:
        """Return whether a text has ended, by a stop string or because `cut` leaves something of it off."""
        if self.holds_stop is not None and self.holds_stop(row, ids):
            return True
        cut = self.work.cut
        if cut is uncut:
            return False
        example = self.work.examples[self.draws[row][0]]
        # The prompt's end is decoded for its last tokens only, until it looks as if it mattered.
        text = completed_text(self.work.tokenizer, self.prompts[row], ids, CONTEXT)
        return cut(example, text) != text and cut(example, whole := self.text(row, ids)) != whole

    def ended(self, row: int, result: Generated) -> None:
        """Note a prediction as done, and keep it."""
        work, draw = self.work, self.draws[row]
        text = self.text(row, result.ids[:-1] if result.finish_reason == "eos" else result.ids)
        stop = work.settings.generation.stop
        text, is_cut = cut_at_stop(text, stop)
        text = work.cut(work.examples[draw[0]], text)
        work.done[draw] = text, "stop" if is_cut else result.finish_reason
        if work.kept is not None:
            work.kept.add({draw: work.done[draw]})
        work.on_done(1)


def rows_at_a_time(model: Decoder, longest: int) -> int:
    """Estimate how many rows of `longest` tokens fit into memory.

    They may take half of a GPU's free memory, or a quarter of this machine's. Each row has keys and values,
    twice while others join; the prompt's widest activations; and a few copies of its logits. Where the
    estimate is too high, `complete` halves it.
    """
    config, weight = model.config, model.embed.weight
    head_dim = config.head_dim or config.n_embd // config.n_head
    cache = 2 * config.n_layer * (config.n_kv_head or config.n_head) * head_dim
    width = 8 * config.n_embd + 2 * config.n_inner
    size = weight.element_size()
    a_row = longest * (2 * cache + width) * size + 32 * config.vocab_size
    if weight.device.type == "cuda":
        return max(1, min(MOST_ROWS["cuda"], torch.cuda.mem_get_info(weight.device)[0] // 2 // a_row))
    return max(1, min(MOST_ROWS["cpu"], free_memory() // 4 // a_row))


def free_memory() -> int:
    """Return the free bytes of this machine, or of this container if it has fewer; 2 GiB if unknown."""
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 2**31
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text("ascii") for name in ("memory.max", "memory.current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # There is no such group, or its limit is `max`.
        return free


def likeliest_start(baseline: NGramModel, prompt: Prompt) -> list[int]:
    """Return the first new tokens of a healed prompt to which the n-gram model gives the most probability."""
    if not prompt.branches or not prompt.ids:
        return [*prompt.dropped]
    context = prompt.ids[-max(baseline.order - 1, 1) :]
    starts = [[*branch.ids, last] for branch in prompt.branches for last in branch.allowed.tolist()]
    scores = baseline.log_probs(np.array([*context, *start]) for start in starts)
    ends = np.cumsum([len(context) + len(start) - 1 for start in starts])  # The first token has no score.
    own = [scores[end - len(start) : end].sum() for start, end in zip(starts, ends, strict=True)]
    return starts[int(np.argmax(own))]


def ngram_complete(
    baseline: NGramModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    cut: Cut,
    max_new_tokens: int,
    length: int,
    stop: tuple[str, ...] = (),
) -> Predictions:
    """Complete every example by the n-gram model, token by token by the likeliest, with prompts healed alike.

    Arguments are those of `complete` and `CompletionSettings`; `stop` holds strings that end a text.
    """
    prompts = [completion_request(tokenizer, example, max_new_tokens, length) for example in examples]
    starts = [likeliest_start(baseline, prompt.prompt) for prompt in prompts]
    contexts = [np.array([*p.prompt.ids, *start]) for p, start in zip(prompts, starts, strict=True)]
    texts, ran_long = [], 0
    continued = baseline.complete(contexts, max(prompt.limit for prompt in prompts)).tolist()
    for example, prompt, start, found in zip(examples, prompts, starts, continued, strict=True):
        ids = [*start, *found[: prompt.limit]]
        end = next((at for at, id in enumerate(ids) if id in prompt.ends), len(ids))
        text = completed_text(tokenizer, prompt.prompt, ids[:end])
        texts.append(cut(example, cut_at_stop(text, stop)[0]))
        ran_long += end == len(ids) and texts[-1] == text
    return Predictions(texts, ran_long)

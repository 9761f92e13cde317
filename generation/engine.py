"""The engine: requests come and go while others run, and all texts under way share each pass.

    Engine.add(request) -> Handle;  Engine.step(): end what leaves, begin, read a piece, choose a token a row

A prompt is read in pieces (generation/reading.py), so that a long one holds up neither the texts under way
nor a cancellation. A row that has ended leaves the batch at once (generation/rows.py). Whatever else runs,
comes or goes, a text is in fp32 the one that its request gets alone: rows see nothing of each other, and each
has random numbers of its own.

A model with a learned or sinusoidal position table refuses to run past it. Rotary positions have no such end,
but the model was trained on `block_size` of them only. Nothing is trimmed here: a caller who wants to stay
inside calls `generation.text.trim_prompt` first.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from architecture import Decoder
from generation.beams import beam_search
from generation.prefixes import PrefixCache, shared
from generation.reading import A_PASS, Asked, Part, Reading, passes_of
from generation.requests import Generated, Handle, Request, Stopped, Text, refuse_prompts, refuse_wrong
from generation.rows import LiveRows, nan_sentence, rows_of
from generation.sampling import row_generator, sample
from generation.scheduling import UNBOUNDED, EngineLimits, Queue
from generation.settings import GenerationConfig
from generation.speculation import PROPOSERS, Costs, Proposer, Speculation
from tokenization.healing import Prompt

PIECE = 256  # tokens of prompts that a step reads while somebody waits for a text
LARGE_PIECE = 2048  # the same where nobody does


class Engine:
    """Requests under way, and those that wait.

    `add` and `Handle.cancel` may be called from any thread, `step` by one at a time. An error that no request
    has caused, such as full memory, leaves `step`, and the engine is of no further use.

    Args:
        model: The decoder, in evaluation mode; its weights stay as they are while the engine is used.
        vocab_size: Ids from here on are never chosen; an embedding may be padded with rows no text has.
        limits: The bounds of rows, queue and memory.
        proposer: Makes what proposes tokens of a text (generation/speculation.py), such as `Lookup`; None is
            without speculation, which changes no text.
    """

    def __init__(
        self,
        model: Decoder,
        vocab_size: int | None = None,
        limits: EngineLimits | None = None,
        proposer: Callable[[], Proposer] | None = None,
    ):
        if any(module.training for module in model.modules()):
            raise ValueError("the model is in training mode, where dropout would act; call model.eval()")
        self.model, self.limits, self.proposer = model, limits or EngineLimits(), proposer
        self.queue = Queue(model, self.limits)
        self.prefixes = PrefixCache(self.limits.prefix_bytes)
        self.live = LiveRows(model, vocab_size)
        self.under_way: list[Handle] = []
        self.readings: list[Reading] = []
        self.ready: list[Part] = []  # read, and without a row among the others yet
        self.texts: dict[int, Text] = {}  # under way, by number
        self.numbers = itertools.count()
        self.costs, self.started = Costs(), 0.0  # when the pass over the rows began, 0 if it was not alone

    def add(self, request: Request) -> Handle:
        """Take a request, which begins in a later step.

        Raises:
            QueueFull: As many wait as may.
            ValueError: The request could not run, or it would not fit if nothing else ran.
        """
        refuse_wrong(self.model, request)
        return self._take(request)

    def step(self) -> bool:
        """Go on with all that is under way; returns whether anything is left to do."""
        with torch.inference_mode():
            self._leave()
            self._start()
            self._read()
            waited_for = any(handle.request.interactive for handle in self.under_way)
            if self.live.prompts and (waited_for or not self.readings):
                self._choose()
        self.under_way = [handle for handle in self.under_way if not handle.done]
        return bool(self.under_way or self.queue.waiting)

    @property
    def bytes(self) -> int:
        """The memory of keys and values of all that is under way."""
        caches = [self.live.cache, *(x.cache for x in self.readings), *(part.cache for part in self.ready)]
        return sum(cache.bytes for cache in {id(cache): cache for cache in caches}.values())

    def _take(self, request: Request) -> Handle:
        handle = Handle(request, request.seat, self.numbers)
        self.queue.add(handle)
        if request.slot is not None:
            for other in [*self.under_way, *self.queue.waiting]:
                same = other.seat.prompt.whole == handle.seat.prompt.whole
                if other.request.slot == request.slot and other.number < handle.number and not same:
                    other.cancel("replaced")
        return handle

    # --- the parts of a step ------------------------------------------------------------------------------

    def _leave(self) -> None:
        """End the requests that were cancelled, replaced, or that have no time left."""
        leaving = {
            handle: reason
            for handle in [*self.under_way, *self.queue.waiting]
            if not handle.done or handle.error is not None
            if (reason := handle.leaves())
        }
        if not leaving:
            return
        self.queue.drop(leaving)
        ended = {number for number, text in self.texts.items() if text.handle in leaving}
        self._drop(ended)
        for handle, reason in leaving.items():
            for text in handle.texts:
                if handle.results[text.sample] is None and reason != "error":
                    text.end(reason)

    def _drop(self, numbers: Collection[int]) -> None:
        """Free all that is held for the texts of these numbers."""
        for number in numbers:
            self.texts.pop(number, None)
        self.readings = [reading for reading in self.readings if reading.drop(numbers)]
        if any(number in numbers for part in self.ready for number in part.prompts):
            self._seat()
        rows = [row for row, number in enumerate(self.live.prompts) if number not in numbers]
        self.live.keep(close_gaps(rows) if not self.live.branches else rows)

    def _start(self) -> None:
        """Begin the requests for which there is room."""
        started = self.queue.start(self.under_way, self._delayed()) if self.queue.waiting else []
        asked = list[Asked]()
        for handle in started:
            self.under_way.append(handle)
            request, ids = handle.request, handle.seat.prompt.ids
            for text in handle.texts:
                if request.settings.temperature:  # A generator takes 2.5 kB; a greedy choice needs none.
                    text.generator = row_generator(request.settings.seed, request.first_row + text.sample)
                self.texts[text.number] = text
            own = [Asked(text.number, handle.seat.prompt) for text in handle.texts]
            known = self.prefixes.known(ids) if self.limits.prefix_bytes else 0
            if request.echo:
                own[0] = own[0]._replace(scored=request.logprobs)
            elif known >= min(A_PASS, len(ids) // 2) and known:
                handle.known = known
                self.readings.append(Reading(self.model, own, 0, self.prefixes.find(ids)))
                continue
            asked += own
        if asked:
            passes = passes_of(asked, self.live.device)
            alone = len(passes) == 1 and not self.readings and not self.live.prompts and not self.ready
            columns = max(self.texts[one.number].seat.longest for one in asked) if alone else 0
            self.readings += [Reading(self.model, group, columns) for group in passes]
        if started:
            self.readings.sort(key=lambda one: min(self.texts[x.number].handle.order for x in one.asked))

    def _delayed(self) -> set[Handle]:
        """Return the requests that wait for another to be read, since their prompts begin alike."""
        if not self.limits.prefix_bytes or not self.readings:
            return set()
        texts = [text for reading in self.readings for text in reading.texts]
        waiting = [(handle, handle.seat.prompt.ids) for handle in list(self.queue.waiting)]
        return {
            handle
            for handle, ids in waiting
            if not handle.request.echo
            if max(shared(ids, text) for text in texts) >= self.prefixes.known(ids) + A_PASS
        }

    def _read(self) -> None:
        """Read a piece of the prompts that come first, and give those that were read their rows."""
        waited_for = any(one.request.interactive for one in [*self.under_way, *self.queue.waiting])
        self.started = 0.0 if self.readings else self.started
        left = PIECE if waited_for else LARGE_PIECE
        while self.readings and left > 0:
            reading = self.readings[0]
            n = min(reading.tokens, left)
            if reading.read(left):
                del self.readings[0]
                self._was_read(reading)
            left -= n + A_PASS
        ready = (self.texts[number].handle for part in self.ready for number in part.prompts)
        if self.ready and (not self.readings or any(handle.request.interactive for handle in ready)):
            self._seat()

    def _was_read(self, reading: Reading) -> None:
        """Keep what a pass has read for later requests; end those that only read."""
        if self.limits.prefix_bytes:
            for row, ids in enumerate(reading.texts):
                self.prefixes.keep(ids, partial(reading.cache.held, row))
        if reading.scores:
            self.texts[reading.asked[0].number].handle.prompt_scores = reading.scores
        now, over = time.monotonic(), set[int]()
        for one in reading.asked:
            handle = self.texts[one.number].handle
            if handle.request.seconds is not None:
                handle.deadline = min(handle.deadline, now + handle.request.seconds)
            if handle.request.read_only:
                self.texts.pop(one.number).end("length")
                over.add(one.number)
        if reading.drop(over):
            self.ready += reading.parts()

    def _seat(self) -> None:
        numbers = {number for part in self.ready for number in part.prompts}
        self.live.seat(
            self.ready, {number: self.texts[number].seat for number in numbers if number in self.texts}
        )
        self.ready = []

    def _choose(self) -> None:
        """Choose tokens for each text, end those that have come to one, and read the others'."""
        live = self.live
        broken, (logits, firsts) = live.look(), live.choices()
        rows = self._chosen(logits, firsts, firsts, {live.prompts[row] for row in broken})
        n, length = len(live.prompts), 1 + max(map(len, live.proposed))
        if self.started and self.proposer is not None:
            self.costs.note(n, length, time.perf_counter() - self.started)
        taken = dict.fromkeys(rows, 0)
        live.branches = {}
        # What was proposed is taken for as long as it is what would have been chosen.
        while rows := [row for row in rows if self._was_proposed(row, taken[row])]:
            place = taken[rows[0]] + 1
            taken.update(dict.fromkeys(rows, place))
            broken = live.look_on(rows, place)
            numbers = {live.prompts[rows[i]] for i in broken}
            rows = self._chosen(live.logits, rows, list(range(len(rows))), numbers)
        going = [row for row in taken if live.prompts[row] in self.texts and not self._failed(row)]
        kept = close_gaps(going)
        counts = [taken[row] for row in kept]
        live.keep(kept)
        if length > 1 and kept:
            cost = self.costs.of(n, length) * n / max(1, sum(map(bool, live.proposed)))
            for number, proposed, n_taken in zip(live.prompts, live.proposed, counts, strict=True):
                if (speculation := self.texts[number].speculation) is not None and proposed:
                    speculation.learn(len(proposed), n_taken, cost)
            live.took(counts)
        texts = [self.texts[number] for number in live.prompts]
        known = self._measured
        self.started = time.perf_counter()
        live.read([text.ids[-1] for text in texts], self._proposals(texts))
        if self._measured != known:  # Most of the time went into choosing the products of so many rows.
            self.started = 0.0

    @property
    def _measured(self) -> int:
        """How many numbers of rows the model's products were measured for."""
        return 0 if self.model.products is None else len(self.model.products.done)

    def _was_proposed(self, row: int, place: int) -> bool:
        """Return whether the last token of a row's text is the proposed one."""
        text, proposed = self.texts[self.live.prompts[row]], self.live.proposed[row]
        return place < len(proposed) and text.ids[-1] == proposed[place]

    def _failed(self, row: int) -> bool:
        return self.texts[self.live.prompts[row]].handle.error is not None

    def _proposals(self, texts: Sequence[Text]) -> list[list[int]]:
        """Return what is proposed after each text; none where it would not fit or does not pay."""
        # A sliding window counts columns, and rows that take unequal numbers of tokens have some without one.
        if self.proposer is None or (self.model.config.sliding_window and len(texts) > 1):
            return []
        found = []
        for text in texts:
            if text.speculation is None:
                text.speculation = Speculation(self.proposer, text.seat.prompt.ids)
            new = text.ids[text.told :]
            text.told = len(text.ids)
            proposed = text.speculation.propose(new, text.seat.limit - len(text.ids) - 1)
            first = next((i for i, id in enumerate(proposed) if not 0 <= id < self.live.vocab_size), None)
            found.append(proposed[:first])
        return found

    def _chosen(
        self, logits: Tensor, rows: Sequence[int], places: Sequence[int], broken: Collection[int]
    ) -> list[int]:
        """Choose a token for each of some texts, whose rows stand at `places` in what was looked at.

        Returns the rows whose texts go on.
        """
        live = self.live
        texts = [self.texts[live.prompts[row]] for row in rows]
        chosen = logits.argmax(dim=-1)
        drawn = [place for place, text in enumerate(texts) if text.generator is not None]
        generators = [text.generator for text in texts if text.generator is not None]
        if len(drawn) == len(texts):
            chosen = sample(logits, generators)
        elif drawn:
            chosen[drawn] = sample(logits[drawn], generators)
        branch = chosen // live.logits.size(1)
        index = torch.tensor(places, device=live.device) + branch
        chosen = chosen % live.logits.size(1)
        gained, going = live.log_probs(index, chosen), []
        offsets = (index - torch.tensor(places, device=live.device)).tolist()
        found = zip(texts, rows, offsets, index.tolist(), chosen.tolist(), gained, strict=True)
        for text, row, offset, place, id, log_p in found:
            if live.prompts[row] in broken:
                where = f" after {len(text.seat.prompt.ids) + len(text.ids)} tokens of the text"
                text.handle.error = text.handle.error or ValueError(nan_sentence(where))
            elif self._goes_on(text, (row + offset, place), id, log_p):
                going.append(row + offset)
        return going

    def _goes_on(self, text: Text, at: tuple[int, int], id: int, log_prob: float) -> bool:
        """Give a text its next token; returns whether others follow.

        Args:
            at: Its row, and the row's place in what was looked at.
        """
        live, request = self.live, text.handle.request
        row, place = at
        if request.logprobs is not None:
            text.scores += live.scores(place, id, request.logprobs)
        text.ids += [*live.branches[row].ids, id] if row in live.branches else [id]
        text.log_prob += log_prob
        reason = ""
        if id in request.ends:
            reason = "eos"
        elif request.stopped is not None and text.handle.called(request.stopped, text.sample, text.ids):
            reason = "stop"
        elif len(text.ids) >= text.seat.limit:
            reason = "length"
        if not reason:
            return True
        if text.handle.error is None:
            if self.limits.prefix_bytes:
                whole = [*text.seat.prompt.ids, *text.ids][:-1]  # The last token was never read.
                self.prefixes.keep(whole, partial(live.cache.held, row))
            text.end(reason)
        del self.texts[text.number]
        return False


def close_gaps(rows: list[int]) -> list[int]:
    """Order rows so that as many as possible keep their place, for `KVCache.select`."""
    behind = [row for row in rows if row >= len(rows)]
    staying = set(rows)
    return [place if place in staying else behind.pop() for place in range(len(rows))]


def generate_ids(
    model: Decoder,
    prompts: Sequence[list[int] | Prompt],
    settings: GenerationConfig,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    stopped: Stopped | None = None,
    first_row: int | Sequence[int] = 0,
    most_rows: int | None = None,
    on_done: Callable[[int, Generated], None] | None = None,
) -> list[Generated]:
    """Continue each list of ids. `settings.stop` is text: here `stopped` takes its place.

    There are nine parameters, because each caller sets others of the six optional ones.

    Args:
        model: The decoder; its mode is left as it was found.
        prompts: Ids, bos included; or the Prompts that `tokenization.healing.healed` makes of them.
        settings: How to choose tokens.
        eos_id: The token that ends a text, or several.
        vocab_size: Ids from here on are never chosen; an embedding may be padded with rows no text has.
        stopped: Called after each token; True ends the text.
        first_row: The seed's row of the first prompt, from which the others count on; or each prompt's own.
        most_rows: Prompts under way at a time; further ones wait, in their order, until places are free. None
            is all, as a beam search needs. It does not change what is generated.
        on_done: Called with the index of a prompt and its continuation, as soon as it has ended.

    Raises:
        ValueError: A prompt is empty, holds an id outside the vocabulary or does not fit the model's
            positions, or the model's logits are NaN.
    """
    if not prompts:
        return []
    requested = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]

    def of_prompt(
        callback: Callable[[int, Any], Any] | None, number: int
    ) -> Callable[[int, Any], Any] | None:
        """Return a request's callback, which is given the number of a sample, for one of prompts."""
        return None if callback is None else lambda _, found: callback(number, found)

    ends = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
    rows = range(first_row, first_row + len(prompts)) if isinstance(first_row, int) else first_row
    with evaluating(model):
        requests = [
            Request(
                prompt,
                settings,
                ends,
                first_row=row,
                interactive=False,
                stopped=of_prompt(stopped, i),
                on_done=of_prompt(on_done, i),
            )
            for i, (prompt, row) in enumerate(zip(requested, rows, strict=True))
        ]
        refuse_prompts(model, [request.seat for request in requests])
        if settings.num_beams > 1:
            assert most_rows is None and on_done is None, "beams of all prompts are under way together"
            with torch.inference_mode():
                return beam_search(rows_of(model, requested, settings, vocab_size), settings, ends, stopped)
        limits = EngineLimits(most_rows or len(prompts), **UNBOUNDED)
        engine = Engine(model, vocab_size, limits, PROPOSERS[settings.speculate])
        handles = [engine._take(request) for request in requests]
        while engine.step():
            for handle in engine.under_way:
                if handle.error is not None:
                    raise handle.error
        return [found for handle in handles for found in handle.result()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate, then restore each module's own mode: `model.train()` would also switch frozen parts."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

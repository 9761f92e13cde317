"""The model that is served: requests in the terms of the engine go in, and what happens to them comes out."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from architecture import Decoder
from config.console import one_line
from data.context import commented
from data.fim import marked_prompt_ids
from generation.requests import Request
from generation.scheduling import EngineLimits, QueueFull
from generation.text import Completion, TextRequest
from lora import use_adapters
from serving.adapters import Adapters, Variant
from serving.asking import Answer, Asked, AskedPrompt, Fitted, fit, refuse_gap_without_markers
from serving.ending import Ending
from serving.fields import Refused
from serving.loop import EngineLoop
from serving.repository import LearnedRepository
from serving.settings import ALIAS, ServeConfig
from tokenization.turn_end import end_turns
from tokenizer import Tokenizer


class Event(NamedTuple):
    """What happened to a request: a part of a text, the end of one, or of all (`number` is -1)."""

    number: int
    text: str | None = None
    error: Exception | None = None


class Service:
    """A model and its engines.

    Args:
        name: The model's name for clients.
        adapters: Those on the model, which have names of their own.
        repository: The repository that one of them has learned, which is then what clients get that name
            nothing.

    Attributes:
        variants: What each name stands for.
        scores: What is known of how good each is, in Markdown.

    Raises:
        ValueError: The tokenizer is another model's, or an adapter cannot be opened.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        name: str,
        settings: ServeConfig,
        adapters: Adapters | None = None,
        repository: LearnedRepository | None = None,
    ):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer's {tokenizer.vocab_size} words do not fit the model's vocabulary of "
                f"{model.config.vocab_size}; serve a model with the tokenizer that it was trained with"
            )
        end_turns(tokenizer)  # Before those of adapters are made of it.
        self.model, self.name, self.settings, self.adapters = model.eval(), name, settings, adapters
        self.repository = repository
        self.variants, self.scores = {name: Variant(tokenizer)}, dict[str, str]()
        if adapters is not None:
            if name in adapters.folders:
                raise ValueError(f"model and adapter are both called {name}; give --name, or another name")
            self.variants |= {own: adapters.read(own) for own in adapters.folders}
            use_adapters(model, {})
        self.created = int(time.time())
        limits = EngineLimits(
            settings.most_rows, settings.most_waiting, settings.most_cache, settings.prefix_cache
        )
        self.loop = EngineLoop(self.model, tokenizer.vocab_size, limits, settings.speculate)
        for own, variant in self.variants.items():
            if variant.adapter:
                self.loop.serve(own, variant.tokenizer.vocab_size, variant.adapter)
        # One thread reads prompts: a long one holds up neither the engine nor the answers.
        self.reader = ThreadPoolExecutor(1, "reader")
        self.waiting = 0  # requests that the reader has not read yet

    @property
    def is_closing(self) -> bool:
        """Whether no more requests are taken."""
        return self.loop.ending

    def close(self) -> None:
        """Take no more requests, and end those that have not begun."""
        self.loop.close()

    def end(self) -> None:
        """End everything, once nobody is there to answer."""
        if self.repository is not None:
            self.repository.end()
        self.loop.end()

    def known_model(self, name: object) -> str:
        """Return the name of the model that a request asks for.

        Raises:
            Refused: There is no such model here.
        """
        asked = name.removesuffix(":latest") if isinstance(name, str) else name
        if asked in (None, "", ALIAS):
            return self.repository.name if self.repository else self.name
        if isinstance(asked, str) and asked in self.variants:
            return asked
        known = ", ".join(self.variants)
        raise Refused(404, f"there is no model of that name here; ask for {known} or {ALIAS}", "model")

    async def read_adapters(self) -> dict[str, str]:
        """Read all adapters again; returns why, by name, where the one before stays."""
        found = asyncio.get_running_loop().create_future()

        def work() -> None:
            failed = self._read_adapters()
            running.call_soon_threadsafe(lambda: found.cancelled() or found.set_result(failed))

        running = asyncio.get_running_loop()
        self.loop.between(work)
        return await found

    def read_adapters_later(self) -> None:
        """Let the engines' thread read all adapters again, and say what came of it."""
        self.loop.between(self._read_adapters)

    def _read_adapters(self) -> dict[str, str]:
        failed = dict[str, str]()
        if self.repository is not None and self.adapters is not None:
            try:
                self.repository.read()
            except ValueError as error:
                print(f"the repository stays as it was: {one_line(str(error))}", file=sys.stderr)
            self.adapters.folders[self.repository.name] = str(self.repository.adapter)
        for name in self.adapters.folders if self.adapters else ():
            assert self.adapters is not None
            try:
                variant = self.adapters.read(name)
            except (OSError, ValueError) as error:
                failed[name] = str(error)
                print(f"adapter {name} stays as it was: {one_line(str(error))}", file=sys.stderr)
            else:
                self.loop.serve(name, variant.tokenizer.vocab_size, variant.adapter)
                self.variants[name] = variant
                print(f"adapter {name} was read again", flush=True)
        return failed

    async def begin(self, asked: Asked, model: str, told: Callable[[Event], None]) -> Answer:
        """Read the prompts and give them to the engine.

        Args:
            told: Called in this thread with what happens; the last event is of all.

        Raises:
            Refused: The request cannot be run, or too many wait.
        """
        if self.is_closing:
            raise Refused(503, "the server ends; ask another one, or later")
        if self.waiting >= self.settings.most_waiting:
            raise Refused(429, f"{self.waiting} requests wait, as many as may; send it again later")
        running = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            if not running.is_closed():
                running.call_soon_threadsafe(told, event)

        self.waiting += 1
        try:
            return await running.run_in_executor(self.reader, self._begin, asked, model, tell)
        except QueueFull as error:
            raise Refused(429, str(error)) from None
        except ValueError as error:
            raise Refused(400, str(error)) from None
        finally:
            self.waiting -= 1

    def _begin(self, asked: Asked, model: str, tell: Callable[[Event], None]) -> Answer:
        tokenizer = self.variants[model].tokenizer
        asked = replace(asked, suffix=refuse_gap_without_markers(tokenizer, asked.suffix))
        fitted = [self._fit(tokenizer, asked, prompt, model) for prompt in asked.prompts]
        answer = Answer(asked, model, tokenizer, fitted)
        answer.completions = [None] * (len(fitted) * asked.n)
        requests = [self._request(answer, place, one, tell) for place, one in enumerate(fitted)]
        place = "" if model == self.name else model
        answer.handles = self.loop.add(requests, lambda error: tell(Event(-1, None, error)), place)
        return answer

    def _fit(self, tokenizer: Tokenizer, asked: Asked, prompt: AskedPrompt, model: str) -> Fitted:
        """Put other files before a prompt, and fit both into the model."""
        if isinstance(prompt, str) and not asked.echo:
            if self._learned(model) and marked_prompt_ids(tokenizer, prompt) is None:
                assert self.repository is not None, "it has been learned"
                prompt, suffix = self.repository.prompt(tokenizer, asked, prompt)
                asked = replace(asked, suffix=suffix)
            elif asked.pieces:
                prompt = commented(asked.pieces) + prompt
        return fit(self.model, tokenizer, asked, prompt)

    def _learned(self, model: str) -> bool:
        return self.repository is not None and model == self.repository.name

    def _request(self, answer: Answer, place: int, fitted: Fitted, tell: Callable[[Event], None]) -> Request:
        asked, first = answer.asked, place * answer.asked.n
        prompt, end = asked.prompts[place], self.settings.end
        before = prompt if isinstance(prompt, str) else ""
        cuts = asked.n_new > 0 and (end != "free" or bool(asked.suffix))
        cuts = cuts and not isinstance(prompt, tuple)  # An answer ends where the model ends it.
        endings = [Ending(end, before, asked.suffix) for _ in range(asked.n)] if cuts else []
        # What is shown only if the whole of it is sure enough waits until it has ended.
        least = self.repository.threshold if self.repository and self._learned(answer.model) else 0.0
        waits = least > 0 and fitted.is_gap

        def part(sample: int, text: str) -> None:
            text = endings[sample].feed(text) if endings else text
            if text and asked.stream and not waits:
                tell(Event(first + sample, text))

        def ended(sample: int, made: Completion) -> None:
            if endings:
                ending = endings[sample]
                rest = ending.finish()
                if rest and asked.stream and not waits:
                    tell(Event(first + sample, rest))
                made = made._replace(
                    text=ending.text, finish_reason="stop" if ending.is_over else made.finish_reason
                )
            if waits and made.sureness < least:
                made = made._replace(text="")
            elif waits and made.text and asked.stream:
                tell(Event(first + sample, made.text))
            answer.completions[first + sample] = made
            answer.first = answer.first or time.monotonic()
            tell(Event(first + sample))

        settings = replace(asked.settings, max_new_tokens=max(fitted.n_new, 1))
        seconds = min(asked.seconds or self.settings.most_seconds, self.settings.most_seconds)
        request = TextRequest(
            answer.tokenizer,
            fitted.prompt,
            settings,
            "" if fitted.is_gap else None,
            part if asked.stream or endings else None,
            on_done=ended,
            n=asked.n,
            first_row=first,
            logprobs=asked.logprobs,
            echo=asked.echo and asked.logprobs is not None,
            read_only=fitted.n_new == 0,
            seconds=seconds,
        ).request
        # Nobody waits for the answer to a warm-up.
        request = replace(request, editor=asked.editor or None, interactive=fitted.n_new > 0 or request.echo)
        read = request.stopped
        assert read is not None, "a TextRequest has one"

        def stopped(sample: int, ids: list[int]) -> bool:
            answer.first = answer.first or time.monotonic()
            return read(sample, ids) or bool(endings and endings[sample].is_over)

        return replace(request, stopped=stopped)

"""The application: paths, the reading of bodies, answers whole and streamed, and clients that go away."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from config.console import one_line
from serving.asking import Answer
from serving.chat import Chat
from serving.fields import Body, Refused, parse_body
from serving.gate import Gate
from serving.llamacpp import Completion, Infill
from serving.metrics import Metrics
from serving.openai import OpenAI, models
from serving.others import TGI, Mistral, Ollama, Tabby, tags
from serving.page import page_routes
from serving.protocol import Protocol, compact
from serving.service import Event, Service

OPENAI, TABBY = OpenAI(), Tabby()
PROTOCOLS: dict[str, Protocol] = {
    "/v1/completions": OPENAI,
    "/completions": OPENAI,
    "/v1/chat/completions": Chat(),
    "/chat/completions": Chat(),
    "/v1/fim/completions": Mistral(),
    "/fim/completions": Mistral(),
    "/completion": Completion(),
    "/infill": Infill(),
    "/api/generate": Ollama(),
    "/api/tags": Ollama(),
    "/generate": TGI(),
}
EVENTS = ("view", "select", "dismiss")
TAGS = "/api/tags"
OLLAMA_CHAT = "/api/chat"
MORE_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
}


def protocol_of(path: str) -> Protocol:
    """Return the protocol in which a path is answered; an unknown one, in OpenAI's."""
    return PROTOCOLS.get(path, OPENAI)


class Patience:
    """A pause before an answer that refuses, where many were refused within a second.

    Who floods the server with mistakes waits for each answer, and an honest client does not.
    """

    most, pause = 20, 0.5  # refusals in a second, and the seconds that each more waits

    def __init__(self) -> None:
        self.times: deque[float] = deque(maxlen=self.most)

    async def __call__(self) -> None:
        """Count a refusal, and wait where it is one of many."""
        now = time.monotonic()
        is_flood = len(self.times) == self.most and now - self.times[0] < 1
        self.times.append(now)
        if is_flood:
            await self.wait()

    async def wait(self) -> None:
        """Wait the pause."""
        await asyncio.sleep(self.pause)


class Json(Response):
    """A JSON answer without blanks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return compact(content)


def refusal(protocol: Protocol, refused: Refused) -> Response:
    """Return an error in the protocol's own body."""
    more = dict(MORE_HEADERS.get(refused.status, {}))
    if refused.status in (408, 413):
        more["Connection"] = "close"  # The rest of the body is not read.
    return Json(protocol.error(refused), refused.status, more)


async def read_body(receive: Receive, length: str | None, most: int, seconds: float) -> bytes:
    """Return the body of a request.

    Raises:
        Refused: It is too large (413), too slow (408), or its sender went away (499).
    """
    sentence = f"the body is larger than {most:,} bytes; send less, or serve with a larger --most_body"
    if length is not None and length.isdigit() and (len(length) > 18 or int(length) > most):
        raise Refused(413, sentence)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(499, "the client went away")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise Refused(413, sentence)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {seconds:g} seconds; send it again") from None


class Exchange:
    """One request and its answer; whoever asked is watched, and when they go away nothing runs for them."""

    def __init__(self, service: Service, protocol: Protocol, address: str):
        self.service, self.protocol, self.address = service, protocol, address
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.answer: Answer | None = None

    async def run(self, body: Body, receive: Receive) -> Response | AsyncIterator[bytes]:
        """Begin; returns the whole answer, or the parts of a stream."""
        model = self.service.known_model(self.protocol.model(body))
        try:
            asked = self.protocol.asked(body, self.service.settings)
        except ValueError as error:  # Of GenerationConfig: two settings contradict each other.
            raise Refused(400, str(error)) from None
        if asked.editor:  # Two machines may have one name for theirs.
            asked = replace(asked, editor=f"{self.address} {asked.editor}")
        self.watch = asyncio.ensure_future(self._watch(receive))
        self.answer = await self.service.begin(asked, model, self.events.put_nowait)
        if asked.stream:
            return self._stream(self.answer)
        while (event := await self.events.get()) is not None and event.number >= 0:
            pass
        self._refuse_failed(event, self.answer)
        return Json(self.protocol.whole(self.answer, self.answer.tokenizer))

    async def _stream(self, answer: Answer) -> AsyncIterator[bytes]:
        protocol = self.protocol
        while (event := await self.events.get()) is not None and event.number >= 0:
            if event.text is not None:
                yield protocol.line(protocol.piece(answer, event.number, event.text))
            elif (end := protocol.ended(answer, event.number, answer.tokenizer)) is not None:
                yield protocol.line(end)
        if event is None:
            return  # The client has gone.
        try:
            self._refuse_failed(event, answer)
            for value in protocol.last(answer):
                yield protocol.line(value)
        except Refused as refused:
            yield protocol.line(protocol.error(refused))

    def _refuse_failed(self, event: Event | None, answer: Answer) -> None:
        if event is None:
            raise Refused(499, "the client went away")
        if event.error is not None:
            print(f"a request failed: {type(event.error).__name__}", file=sys.stderr)
            raise Refused(500, "the model could not go on with this text; the server's terminal says why")
        if any(one is not None and one.finish_reason == "shutdown" for one in answer.completions):
            raise Refused(503, "the server ends; ask another one, or later")

    async def _watch(self, receive: Receive) -> None:
        """Wait until the client goes away, and say so; the work ends with the answer."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.events.put_nowait(None)

    def cancel(self) -> None:
        """End what runs for the request, within one step of the engine."""
        for handle in self.answer.handles if self.answer else ():
            handle.cancel()

    async def end(self) -> None:
        """Stop watching. What still runs, since the answer was cut short, is cancelled."""
        self.cancel()
        if hasattr(self, "watch"):
            self.watch.cancel()


class Server:
    """The ASGI application.

    Args:
        gate: The rules for every path.
    """

    def __init__(self, service: Service, gate: Gate):
        self.service, self.gate, self.metrics = service, gate, Metrics(service)
        self.patience = Patience()
        post = [Route(path, self._complete, methods=["POST"]) for path in PROTOCOLS if path != TAGS]
        self.routes = Starlette(
            routes=[
                *post,
                *[Route(path, self._models, methods=["GET"]) for path in ("/v1/models", "/models")],
                Route(OLLAMA_CHAT, self._chat, methods=["POST"]),
                Route(TAGS, self._tags, methods=["GET"]),
                Route("/v1/events", self._events, methods=["POST"]),
                Route("/v1/adapters", self._adapters, methods=["POST"]),
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                *page_routes(service),
            ],
            exception_handlers={HTTPException: self._unknown, Refused: self._refused},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and print a line about it."""
        assert scope["type"] == "http", "neither lifespan nor websockets are served"
        begun, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.start" and 400 <= status < 500:
                await self.patience()
            await send(message)

        request = Request(scope)
        try:
            self.gate.check(scope["method"], scope["path"], request.headers)
        except Refused as refused:
            await refusal(protocol_of(scope["path"]), refused)(scope, receive, noted)
        else:
            await self.routes(scope, receive, noted)
        answer: Answer | None = scope.get("plumb.answer")
        tokens = f", {answer.n_prompt} + {answer.n_new} tokens" if answer else ""
        if answer and any(one.trimmed for one in answer.fitted):
            tokens += f" ({sum(one.trimmed for one in answer.fitted)} left out)"
        first = (
            f", first after {1000 * (answer.first - answer.begun):.0f} ms" if answer and answer.first else ""
        )
        path = scope["path"] if scope["path"] in PROTOCOLS else "other"
        self.metrics.count(path, status or 499, answer)
        line = f"{scope['method']} {scope['path'][:80]} {status or 499}{tokens}{first}"
        # It is held: print's own look-up does not, and crashes where another thread puts a new one there
        # (CPython's issue 130163).
        out, took = sys.stdout, 1000 * (time.monotonic() - begun)
        print(f"{time.strftime('%H:%M:%S')} {one_line(line)}, {took:.0f} ms", file=out)
        if answer and self.service.settings.log_prompts:
            print(f"  asked {answer.asked.prompts!r}, suffix {answer.asked.suffix!r}")
            print(f"  answered {[one.text for one in answer.completions if one]!r}")

    # --- the paths ----------------------------------------------------------------------------------------

    async def _complete(self, request: Request) -> Response:
        settings, body = self.service.settings, parse_body(await self._body(request))
        protocol = protocol_of(request.url.path)
        if protocol is OPENAI and "segments" in body:  # Tabby asks on the same path.
            protocol = TABBY
        exchange = Exchange(self.service, protocol, request.client.host if request.client else "")
        try:
            found = await exchange.run(body, request.receive)
        except Refused:
            await exchange.end()
            raise
        except Exception as error:
            await exchange.end()
            print(f"a request failed: {type(error).__name__}", file=sys.stderr)
            if settings.log_prompts:
                traceback.print_exception(error)
            raise Refused(500, "the server failed at this request; its terminal says why") from None
        except BaseException:  # The task was cancelled.
            await exchange.end()
            raise
        finally:
            request.scope["plumb.answer"] = exchange.answer
        if isinstance(found, Response):
            await exchange.end()
            return found
        return Streamed(found, exchange)

    async def _body(self, request: Request) -> bytes:
        most, seconds = self.service.settings.most_body, self.service.settings.most_seconds
        return await read_body(request.receive, request.headers.get("content-length"), most, seconds)

    async def _tags(self, request: Request) -> Response:
        n = sum(p.numel() for p in self.service.model.parameters())
        return Json(tags([*self.service.variants], self.service.created, n))

    async def _events(self, request: Request) -> Response:
        """Count what became of a completion, which Tabby's clients tell."""
        kind = parse_body(await self._body(request)).text("type")
        if kind in EVENTS:
            self.metrics.events.labels(kind).inc()
        return Json({})

    async def _adapters(self, request: Request) -> Response:
        """Read the adapters again, for whoever has the token."""
        await self._body(request)
        if not self.gate.token:
            raise Refused(403, "adapters are read again for who has the token, and none is set; send SIGHUP")
        if failed := await self.service.read_adapters():
            told = "; ".join(f"{name} stays as it was: {one_line(why)}" for name, why in failed.items())
            raise Refused(409, told)
        return Json({"read": [*self.service.settings.adapters]})

    async def _models(self, request: Request) -> Response:
        size = self.service.model.config.block_size
        return Json(models([*self.service.variants], size, self.service.created))

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        closing = self.service.is_closing
        return Json({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    async def _chat(self, request: Request) -> Response:
        raise Refused(400, "chat is not built at this path; send conversations to /v1/chat/completions")

    async def _unknown(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "it is registered for these"
        sentence = {
            404: "there is nothing at this path; completions are at /v1/completions",
            405: "this path does not take the method; completions are asked for by POST",
        }.get(error.status_code, error.detail)
        return refusal(protocol_of(request.url.path), Refused(error.status_code, sentence))

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused), "it is registered for these"
        return refusal(protocol_of(request.url.path), error)


class Streamed(Response):
    """Parts of an answer, sent as they come."""

    def __init__(self, parts: AsyncIterator[bytes], exchange: Exchange):
        super().__init__(media_type=exchange.protocol.media, headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.parts, self.exchange = parts, exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts; whatever cuts this short ends the work too."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self.exchange.end()

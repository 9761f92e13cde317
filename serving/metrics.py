"""What the server counts, in the form of Prometheus: `/metrics`."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.asking import Answer
from serving.service import Service

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The counts of one server.

    Args:
        service: Whose queue and engine are looked at when somebody asks.
    """

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("plumb_requests", "Requests", ["path", "status"], **more)
        self.tokens = Counter(
            "plumb_tokens", "Tokens: read, known from earlier prompts, written", ["kind"], **more
        )
        self.first = Histogram("plumb_first_token_seconds", "To the first text", buckets=SECONDS, **more)
        self.each = Histogram("plumb_token_seconds", "For each token after it", buckets=SECONDS, **more)
        self.events = Counter("plumb_events", "What became of completions", ["kind"], **more)
        waiting = Gauge("plumb_waiting", "Requests that wait", **more)
        waiting.set_function(lambda: service.loop.waiting + service.waiting)
        Gauge("plumb_texts", "Texts under way", **more).set_function(
            lambda: service.loop.texts - service.loop.waiting
        )

    def count(self, path: str, status: int, answer: Answer | None) -> None:
        """Count a request that was answered."""
        self.requests.labels(path, str(status)).inc()
        if answer is None:
            return
        known = sum(handle.known for handle in answer.handles)
        for kind, n in {"read": answer.n_prompt - known, "known": known, "written": answer.n_new}.items():
            self.tokens.labels(kind).inc(n)
        if answer.first:
            self.first.observe(answer.first - answer.begun)
            if answer.n_new > 1:
                self.each.observe((time.monotonic() - answer.first) / (answer.n_new - 1))

    def page(self) -> bytes:
        """Return all counts."""
        return generate_latest(self.registry)

"""What a protocol of clients is: how it asks, and how it is answered."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

from serving.asking import Answer, Asked
from serving.fields import Body, Refused
from serving.settings import ServeConfig


def compact(value: Any) -> bytes:
    """Return JSON without blanks, in ASCII: llama.vim looks for `"content":"`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


class Protocol(ABC):
    """How clients of one kind ask and are answered; a stream is one of server-sent events.

    Attributes:
        media: The content type of a stream.
    """

    media = "text/event-stream"

    @abstractmethod
    def asked(self, body: Body, limits: ServeConfig) -> Asked:
        """Read a request.

        Raises:
            Refused: A field is wrong.
        """

    def model(self, body: Body) -> Any:
        """Return the name of the model that is asked for; None for whatever there is."""
        return body.get("model")

    @abstractmethod
    def whole(self, answer: Answer, tokenizer: Any) -> Any:
        """Return the answer of a request that is not streamed."""

    def piece(self, answer: Answer, number: int, text: str) -> Any:
        """Return what tells a part of a text, in a protocol that streams."""
        raise AssertionError(f"{type(self).__name__} is not streamed")

    def ended(self, answer: Answer, number: int, tokenizer: Any) -> Any:
        """Return what tells that a text has ended, None for nothing."""
        return None

    def last(self, answer: Answer) -> list[Any]:
        """Return what a stream ends with; a text is sent as it is."""
        return []

    def line(self, value: Any) -> bytes:
        """Return the bytes of a part of a stream."""
        return b"data: " + (value.encode() if isinstance(value, str) else compact(value)) + b"\n\n"

    @abstractmethod
    def error(self, refused: Refused) -> Any:
        """Return the body of an error."""

"""The fields of a request, read one by one; what is wrong is told in a sentence that holds no text of it."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, Self

MOST_STOPS, LONGEST_STOP = 32, 256
MOST_PIECES = 256  # of other files
GREEDY_BELOW = 1e-3  # A lower temperature takes the likeliest token, as clients that send it mean.


class Refused(Exception):
    """A request that is not answered as it wishes.

    Args:
        status: The status of HTTP.
        sentence: The fact, its cause and the remedy, without any text of the request.
        field: The field that is wrong, where it is one.
    """

    def __init__(self, status: int, sentence: str, field: str | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.field = status, sentence, field


def wrong(field: str, sentence: str) -> NoReturn:
    """Refuse a field."""
    raise Refused(400, f"{field} {sentence}", field)


def parse_body(data: bytes) -> Body:
    """Return the JSON object of a request.

    Raises:
        Refused: It is no UTF-8, no JSON, nested too deeply, or no object.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is no JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):
        told = "the body is not read: it holds NaN or Infinity, or a number or its nesting is too large"
        raise Refused(400, told) from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is JSON, but no object")
    return Body(body)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


class Body(dict[str, Any]):
    """The object of a request, or one inside of it; a field that is absent or null has its default."""

    def number(self, field: str, default: float, least: float, most: float = math.inf) -> float:
        """Return a number between two others."""
        value = self.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            wrong(field, "must be a number")
        if not least <= value <= most:
            known = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
            wrong(field, f"must be {known}")
        return float(value)

    def whole(self, field: str, default: int, least: int, most: int) -> int:
        """Return a whole number between two others."""
        value = self.get(field)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            wrong(field, "must be a whole number")
        if not least <= value <= most:
            wrong(field, f"must be from {least} to {most}")
        return value

    def switch(self, field: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            wrong(field, "must be true or false")
        return value

    def text(self, field: str) -> str | None:
        """Return a text, or None."""
        value = self.get(field)
        if value is not None and not isinstance(value, str):
            wrong(field, "must be a text")
        return value

    def inner(self, field: str) -> Self:
        """Return an object inside of the body, an empty one where there is none."""
        value = self.get(field)
        if value is not None and not isinstance(value, dict):
            wrong(field, "must be an object")
        return type(self)(value or {})

    def pieces(self, field: str, name: str, text: str) -> tuple[tuple[str, str], ...]:
        """Return pieces of other files, (name of the file, text): a list of objects with two fields."""
        given = self.get(field) or []
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            wrong(field, f"must be a list of objects with {name} and {text}")
        if len(given) > MOST_PIECES:
            wrong(field, f"has {len(given)} pieces, and a request may have {MOST_PIECES}")
        return tuple((one.text(name) or "", one.text(text) or "") for one in map(type(self), given))

    def stops(self) -> tuple[str, ...]:
        """Return the strings that end a text: one, or a list."""
        value = self.get("stop")
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            wrong("stop", "must be a text, or a list of texts, none of them empty")
        if len(found) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in found):
            wrong("stop", f"must be at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters")
        return tuple(found)

    def refuse_given(self, **off: Any) -> None:
        """Refuse fields that are not built, unless they have the value by which they do nothing."""
        for field, value in off.items():
            if self.get(field) not in (None, value, [], {}):
                wrong(field, "is not built; leave it out")


def sampling(
    temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, **more: Any
) -> dict[str, Any]:
    """Return the settings of a choice. At temperature 0 the others mean nothing, and clients send them."""
    if temperature < GREEDY_BELOW or top_p == 0 or top_k == 1:
        return {"temperature": 0.0, **more}
    return {"temperature": temperature, "top_p": top_p, "top_k": max(top_k, 0), "min_p": min_p, **more}

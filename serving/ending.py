"""Where a completion ends besides the model's own end: at the end of a line or block, and before the suffix.

A text is looked at character by character while it is made, and what was sent is never taken back: what may
turn out to repeat the suffix waits until it is certain.
"""

from __future__ import annotations

from typing import Literal

End = Literal["line", "block", "free"]
OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'`"
SHORTEST_REST = 2  # A rest of the cursor's line that is no bracket, and shorter, may well be written twice.


class Ending:
    """One completion on its way.

    `line` ends it with the first line that has text and leaves no bracket open. `block` ends it before a line
    that is indented less than its first line; where the cursor's line opens a block, before one that is not
    indented more than that line. For all, `free` too, it ends before it repeats the first line of the suffix:
    the whole line with its indentation, or what stands behind the cursor.

    Args:
        before: The text before the cursor.
        suffix: The text after it.

    Attributes:
        text: The completion so far, cut where it ended.
        is_over: Whether it has ended.
    """

    def __init__(self, end: End, before: str, suffix: str | None):
        self.end, self.text, self.is_over = end, "", False
        self.cursor_line = before.rpartition("\n")[2]
        rest, _, others = (suffix or "").partition("\n")
        self.rest = rest.rstrip()
        lines = [] if self.rest else [line.rstrip() for line in others.split("\n") if line.strip()]
        self.repeated = lines[0] if lines else ""
        self.given = self.line_start = self.text_end = 0  # places in the text
        self.depth, self.quote, self.is_first = 0, "", True
        # Brackets that the cursor's line leaves open, and the rest of that line does not close.
        self.outer = max(0, opened(self.cursor_line + self.rest))
        self.least: int | None = None  # indentation of the block's lines

    def feed(self, part: str) -> str:
        """Take a part of the completion; returns what is certain and was not returned before."""
        for character in part:
            if not self.is_over:
                self._take(character)
        return self._given_up_to(len(self.text) if self.is_over else self._certain())

    def finish(self) -> str:
        """Return the rest of the text, after the model has ended it."""
        if not self.is_over:
            self._end_line()
        return self._given_up_to(len(self.text))

    def _given_up_to(self, place: int) -> str:
        start, self.given = self.given, max(place, self.given)
        return self.text[start : self.given]

    @property
    def _line(self) -> str:
        return self.text[self.line_start :]

    def _take(self, character: str) -> None:
        if character == "\n":
            self._end_line()
            if self.is_over or (self.end == "line" and self.text_end and self.depth + self.outer <= 0):
                self.is_over = True
                return
            self.text += character
            self.line_start, self.is_first = len(self.text), False
            if self.quote != "`":
                self.quote = ""
            return
        if self.end == "block" and not character.isspace() and self.text_end <= self.line_start:
            self._begin_line(character)
            if self.is_over:
                return
        self.text += character
        if not character.isspace():
            self.text_end = len(self.text)
        if self.quote:
            self.quote = "" if character == self.quote else self.quote
        elif character in QUOTES:
            self.quote = character
        else:
            self.depth += opened(character)

    def _begin_line(self, character: str) -> None:
        """See the first character of a line that is no space, and whether the block goes on with it."""
        here = self._line if not self.is_first else self.cursor_line
        indentation = len(here) - len(here.lstrip())
        if self.is_first and self.cursor_line.strip():
            return  # The rest of the cursor's own line.
        if self.least is None and self.cursor_line.strip():
            first = (self.cursor_line + self.text.partition("\n")[0]).rstrip()
            own = len(self.cursor_line) - len(self.cursor_line.lstrip())
            self.least = own + first.endswith((":", "{"))
        elif self.least is None:
            self.least = indentation + (len(self._line) if self.is_first else 0)
        closes = character in CLOSING and indentation == self.least - 1
        if indentation < self.least and self.depth + self.outer <= 0 and not closes and not self.is_first:
            self.text, self.is_over = self.text[: self.text_end], True

    def _end_line(self) -> None:
        """See a line that is complete, and whether it is the suffix's."""
        line = self._line.rstrip()
        if self.repeated and not self.is_first and line == self.repeated:
            self.text, self.is_over = self.text[: self.line_start - 1], True
        elif self.is_first and self.rest and line.endswith(self.rest):
            closes = self.rest[0] in CLOSING
            if self.depth < 0 if closes else len(self.rest) >= SHORTEST_REST:
                self.text, self.is_over = line[: -len(self.rest)], True

    def _certain(self) -> int:
        """Return the place up to which nothing that follows can take text away."""
        place = len(self.text)
        if self.end == "block" and self.text_end <= self.line_start:
            place = self.text_end
        if self.is_first and self.rest:
            line = self.text.rstrip()
            begun = (n for n in range(min(len(self.rest), len(line)), 0, -1) if line.endswith(self.rest[:n]))
            place = min(place, len(line) - next(begun, 0))
        elif (
            self.repeated
            and not self.is_first
            and self.repeated.startswith(self._line.rstrip() or self._line)
        ):
            place = min(place, self.line_start - 1)
        return place


def opened(text: str) -> int:
    """Return how many more brackets a text opens than it closes."""
    return sum((character in OPENING) - (character in CLOSING) for character in text)

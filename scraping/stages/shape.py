"""Drop texts by their shape: too short, lines that no human writes, data and escapes instead of code.

The measures of long lines and of letters are those of The Stack and StarCoder (arXiv:2211.15533, 2305.06161),
the runs of encoded data are after StarCoder2's (arXiv:2402.19173).
"""

from __future__ import annotations

import re

from scraping.documents import Drop, ScrapedDocument
from scraping.stages import Stage

VERSION = 2

ALNUM = bytes(b for b in range(256) if b >= 128 or chr(b).isalnum())  # letters beyond ASCII count as letters
SPACE = b" \t\n\r\f"
# In this translation a table of numbers is a run of 0 and encoded data a run of b, which are fast to find.
BETWEEN_NUMBERS = SPACE + b",;(){}[].+-_xXabcdefABCDEFuUlL"
NUMBERS = bytes(ord("0") if chr(b).isdigit() and b < 128 else ord("a") for b in range(256))
BETWEEN_CODES = SPACE + b"\"'+\\"
CODES = bytes(ord("b") if b < 128 and (chr(b).isalnum() or b in b"/=") else ord(" ") for b in range(256))
CODE_LINE, CODE_LINES = 56, 26  # Characters, and lines in a row: StarCoder2's bound is 1,024 characters.
CODE = re.compile(rf"[\s\"'+(]*+[brBR]?[\"']?[A-Za-z0-9+/=]{{{CODE_LINE},}}+(?:\\n|[\s\"'+,;)\\])*+")


def build(
    min_lines: int, max_line: int, max_mean_line: int, min_alnum: float, max_escapes: int, max_numbers: int
) -> Stage:
    """Build the stage.

    Args:
        min_lines: Fewest lines that are not blank.
        max_line: Greatest length of a line, in characters.
        max_mean_line: Greatest mean length of the lines, in characters.
        min_alnum: Least share of letters and digits among the characters that are not space.
        max_escapes: Most escapes in a line, such as `\\u00e9`, with next to nothing between; 0 sets no bound.
        max_numbers: Most numbers, or escapes, with nothing but separators between, over all lines; 0 sets no
            bound.
    """
    # Possessive quantifiers, so that no text takes more than one pass.
    escape = r"\\(?:u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]++\}|x[0-9a-fA-F]{2}|[0-7]{3})"
    escapes = re.compile(rf"(?:{escape}[^\\\n]{{0,3}}+){{{max_escapes + 1},}}+")
    # Whole runs are found and then measured: a pattern with a least length reads shorter runs repeatedly.
    table = re.compile(rf"(?:{escape}(?:[^\\\n]{{0,3}}+(?=\\)|[\s\"',;+.(){{}}\[\]bBrRuU-]*+))++")
    numbers = re.compile(
        rf"(?:[-+]?(?<![\w.])(?:0[xX][0-9a-fA-F]++|\d[\d_]*+(?:\.\d*+)?(?:[eE][-+]?\d++)?)[uUlLfF]{{0,2}}+"
        rf"[\s,;(){{}}\[\]]++){{{max_numbers + 1},}}+"
    )

    def shape(document: ScrapedDocument) -> ScrapedDocument | Drop:
        text = document.text
        lines = text.split("\n")
        written = 0
        for line in lines:
            written += bool(line) and not line.isspace()
            if written >= min_lines:
                break
        if written < min_lines:
            return Drop("too short", f"{written} lines, of at least {min_lines}")
        longest = max(map(len, lines))
        if longest > max_line:
            return Drop("absurd line", f"a line of {longest} characters, of at most {max_line}")
        mean = len(text) / len(lines)
        if mean > max_mean_line:
            return Drop("minified", f"{mean:.0f} characters a line, of at most {max_mean_line}")
        data = text.encode()
        marks = len(data.translate(None, ALNUM + SPACE))
        solid = len(data.translate(None, SPACE))
        if solid - marks < min_alnum * solid:
            share = (solid - marks) / solid
            return Drop("few letters", f"{share:.2f} of it letters or digits, of at least {min_alnum}")
        if max_escapes and data.count(b"\\") > max_escapes and (match := escapes.search(text)):
            return Drop("absurd literal", f"a run of escapes, {len(match[0])} characters long")
        if max_numbers and data.count(b"\\") > max_numbers:
            run = max((match[0] for match in table.finditer(text)), key=_escapes, default="")
            if _escapes(run) > max_numbers:
                return Drop("absurd literal", f"a table of {_escapes(run)} escapes")
        digits = max_numbers and data.translate(NUMBERS, BETWEEN_NUMBERS)
        if digits and b"0" * (max_numbers + 1) in digits and (match := numbers.search(text)):
            return Drop("absurd literal", f"a run of numbers, {len(match[0])} characters long")
        codes = longest >= CODE_LINE and data.translate(CODES, BETWEEN_CODES)
        if codes and b"b" * (CODE_LINE * CODE_LINES) in codes and (run := _code_run(lines)) >= CODE_LINES:
            return Drop("encoded data", f"{run} lines of base64 or hex")
        return document

    return shape


def _escapes(run: str) -> int:
    return run.count("\\")


def _code_run(lines: list[str]) -> int:
    """Return the most lines in a row of nothing but base64 or hexadecimal digits, in quotes or not."""
    most = run = 0
    for line in lines:
        run = run + 1 if CODE.fullmatch(line) else 0
        most = max(most, run)
    return most

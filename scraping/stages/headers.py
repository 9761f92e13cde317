"""Remove comments of copyright and licence at the top of a file, and leave the other comments there.

A `#!` line, a coding line and notes to tools stay, and so does a description between licence texts. Only
whole comments or lines of them are removed, so that the syntax tree is the same but for line numbers.
"""

from __future__ import annotations

import dataclasses
import re

from scraping.documents import ScrapedDocument
from scraping.stages import Note, Stage, suffix

VERSION = 1

_HASH = """
    py pyi rb sh bash r pl pm yaml yml toml jl ex exs nim tcl
"""
HASH = frozenset(_HASH.split())
_SLASH = """
    kt kts java scala groovy gradle js jsx ts tsx mjs c h cc cpp cxx hpp cs go rs swift dart
"""
SLASH = frozenset(_SLASH.split())
HEAD_LINES = 150  # Comments are looked at in these first lines of a file.
# One of these words makes a comment at the top a licence header; the words below then mark its parts.
STRONG = re.compile(
    r"copyright|\(c\)\s*\d{4}|©|spdx-|licen[sc]ed?\s+(?:under|to)\b|hereby\s+granted|permission\s+to\s+use"
    r"|all\s+rights\s+reserved|public\s+domain|is\s+free\s+software|terms\s+of\s+the|licen[sc]e\s*:",
    re.IGNORECASE,
)
WEAK = re.compile(
    r"copyright|licen[sc]e|warrant|redistribut|as[\s-]is\b|\bliab(?:le|ility)\b|permission|disclaim|no\s+event"
    r"|all\s+rights|provided\s+that|without\s+restriction",
    re.IGNORECASE,
)
TOOLS = re.compile(  # notes to interpreters, editors and checkers
    r"#!|#.*?coding[:=]|\W+(?:-\*-|vi(?:m)?:|ex:|type:|pylint:|flake8:|mypy:|ruff:|pyright:|cython:|distutils:|fmt:"
    r"|isort:|noqa|eslint|jshint|@ts-|noinspection|go:|\+build)"
)
COOKIE = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*[-\w.]+")  # PEP 263
RULER = re.compile(r"[\W_]*")


@dataclasses.dataclass
class _Comment:
    """The lines [start, stop) of one `/* */`, or of a run of line comments."""

    start: int
    stop: int
    block: bool


def _top_comments(lines: list[str], kind: str) -> list[_Comment]:
    """Return the comments before anything else; one that `HEAD_LINES` lines do not close is left out."""
    marker = "#" if kind in HASH else "//" if kind in SLASH else ""
    found: list[_Comment] = []
    at = 0
    while marker and at < len(lines):
        line = lines[at].strip()
        if not line:
            at += 1
        elif line.startswith(marker):
            stop = at + 1
            while stop < len(lines) and lines[stop].strip().startswith(marker):
                stop += 1
            found.append(_Comment(at, stop, block=False))
            at = stop
        elif marker == "//" and line.startswith("/*"):
            stop = at
            while stop < len(lines) and "*/" not in (lines[stop][2:] if stop == at else lines[stop]):
                stop += 1
            if stop == len(lines) or not lines[stop].rstrip().endswith("*/"):
                break
            found.append(_Comment(at, stop + 1, block=True))
            at = stop + 1
        else:
            break
    return found


def head(document: ScrapedDocument) -> list[str]:
    """Return the text of a file's first comments, line by line, without the comments' marks.

    In Python it has the module's docstring and the comments after it too; in languages like Java the comments
    between package and imports.
    """
    kind = suffix(document.path)
    lines = document.text[:20_000].split("\n")[:HEAD_LINES]
    kept: list[str] = []
    inside = ""  # the end mark of the comment or docstring that is open
    docstring = False
    for line in lines:
        plain = line.strip()
        if inside:
            kept.append(plain)
            inside = "" if inside in plain else inside
        elif (
            not plain
            or (kind in HASH and plain.startswith("#"))
            or (kind in SLASH and plain.startswith("//"))
        ):
            kept.append(plain)
        elif kind in SLASH and plain.startswith("/*"):
            kept.append(plain)
            inside = "" if "*/" in plain[2:] else "*/"
        elif kind in SLASH and re.match(r"(?:package|import|using|namespace|@file:)\b|#|['\"]use ", plain):
            continue
        elif (
            kind in ("py", "pyi") and not docstring and (match := re.match(r"[rR]?(\"\"\"|'''|\"|')", plain))
        ):
            kept.append(plain)
            docstring = True
            inside = match[1] if len(match[1]) == 3 and match[1] not in plain[match.end() :] else ""
        else:
            break
    return [line.strip("#*/ \t\"'") for line in kept]


def sentences(lines: list[str]) -> str:
    """Return the lines as running text, in lower case with single spaces."""
    return " ".join(" ".join(lines).lower().split())


def build(note: Note) -> Stage:
    """Build the stage; `note` counts the files that lost a header."""

    def headers(document: ScrapedDocument) -> ScrapedDocument:
        stripped = without_header(document.text, document.path)
        if stripped == document.text:
            return document
        note("header removed")
        return dataclasses.replace(document, text=stripped)

    return headers


def without_header(text: str, path: str) -> str:
    """Return the text without comments of copyright and licence at its top."""
    kind = suffix(path)
    top = text.split("\n", HEAD_LINES)
    lines, rest = top[:HEAD_LINES], top[HEAD_LINES:]
    comments = _top_comments(lines, kind)
    if not any(STRONG.search(" ".join(lines[c.start : c.stop])) for c in comments):
        return text
    kept: list[str] = []
    at = 0
    for comment in comments:
        kept += lines[at : comment.start]
        kept += _without_licence(lines[comment.start : comment.stop], comment.block)
        at = comment.stop
    body = lines[at:]
    while kept and not kept[-1].strip():
        kept.pop()
    while kept and not kept[0].strip():
        kept.pop(0)
    if len(kept) + len(body) == len(lines):
        return text
    while body and not body[0].strip() and not kept:
        body.pop(0)
    result = "\n".join([*kept, *body, *rest])
    # A comment that moved up to the first two lines must not become a coding line.
    if kind in ("py", "pyi") and _coding(result) != _coding(text) and _coding(result):
        return text
    return result


def _coding(text: str) -> str:
    return next((m[0] for line in text.split("\n", 2)[:2] if (m := COOKIE.match(line))), "")


def _without_licence(lines: list[str], block: bool) -> list[str]:
    """Return a comment's lines without paragraphs of copyright or licence; none if nothing is left."""
    if block:
        opening = re.match(r"\s*/\*+", lines[0])
        assert opening
        inner = [lines[0][opening.end() :], *lines[1:]]
        inner[-1] = inner[-1].rstrip().removesuffix("*/").rstrip("*")
        keep = _paragraphs_kept(inner)
        if all(keep):
            return lines
        left = [line for line, stays in zip(inner, keep, strict=True) if stays]
        if not any(not RULER.fullmatch(line) for line in left):
            return []
        return [opening[0], *_without_rulers([line for line in left if line.strip()]), " */"]
    keep = [
        stays or bool(TOOLS.match(line.strip()))
        for line, stays in zip(lines, _paragraphs_kept(lines), strict=True)
    ]
    if all(keep):
        return lines
    return _without_rulers([line for line, stays in zip(lines, keep, strict=True) if stays])


def _paragraphs_kept(lines: list[str]) -> list[bool]:
    """Return for each line whether its paragraph stays; lines without a word separate paragraphs."""
    keep = [True] * len(lines)
    start = 0
    for at in range(len(lines) + 1):
        if at == len(lines) or (RULER.fullmatch(lines[at]) and not TOOLS.match(lines[at].strip())):
            paragraph = "\n".join(line for line in lines[start:at] if not TOOLS.match(line.strip()))
            if WEAK.search(paragraph) or STRONG.search(paragraph):
                keep[start:at] = [False] * (at - start)
            start = at + 1
    return keep


def _without_rulers(lines: list[str]) -> list[str]:
    """Remove the lines at both ends that hold no word, such as empty comments and rows of dashes."""
    words = [at for at, line in enumerate(lines) if not RULER.fullmatch(line) or TOOLS.match(line.strip())]
    return lines[words[0] : words[-1] + 1] if words else []

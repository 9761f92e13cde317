"""Decode bytes as UTF-8, or as a byte order mark or a Python coding line says; no encoding is guessed."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

from scraping.documents import Drop, RawFile, ScrapedDocument
from scraping.stages import Note

VERSION = 1

# A mark of UTF-32 begins with one of UTF-16 and so comes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
COOKIE = re.compile(rb"[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")  # PEP 263
# Codecs that a coding line may name. Python takes others too (utf-7, unicode_escape), by which the decoded
# text differs from the one that a reader sees.
COOKIE_CODECS = re.compile(
    r"ascii|iso8859-\d+|cp\d+|koi8-[rut]|mac-\w+|gb\w+|big5\w*|shift_jis\w*|euc_\w+|iso2022_\w+|johab|tis-620|hz"
)
CONTROL = bytes({*range(32), 127} - {9, 10, 12, 13})  # all but tab, line feed, form feed, carriage return
CONTROL_SHARE = 0.01  # share of control bytes above which a file is no text; a stray escape is allowed


def build(latin1: bool, line_ends: str, note: Note) -> Callable[[RawFile], ScrapedDocument | Drop]:
    """Build the stage.

    Args:
        latin1: Read a file that is not UTF-8 and names no encoding as latin-1; each is counted.
        line_ends: `lf` turns CRLF and lone CR into LF, as Python does when it reads source; `keep` does not.
        note: Counts the changes.
    """

    def encoding(file: RawFile) -> ScrapedDocument | Drop:
        data = file.data
        codec = next((codec for mark, codec in MARKS if data.startswith(mark)), "")
        if codec:
            data = data[len(next(mark for mark, _ in MARKS if data.startswith(mark))) :]
            note("byte order mark removed" if codec == "utf-8" else f"was {codec[:6].upper()}")
        elif len(data.translate(None, CONTROL)) < len(data) * (1 - CONTROL_SHARE) or b"\0" in data:
            return Drop("binary")
        elif file.path.endswith((".py", ".pyi")):
            found = _cookie(data)
            if isinstance(found, Drop):
                return found
            codec = found
            if codec not in ("", "utf-8") and not data.isascii():
                note("read as its coding line says")
        try:
            text = data.decode(codec or "utf-8")
        except UnicodeDecodeError as error:
            if codec or not latin1:
                return Drop("undecodable", f"not {(codec or 'utf-8').upper()} at byte {error.start}")
            text = data.decode("latin-1")
            note("read as latin-1")
        if "\0" in text:
            return Drop("binary")
        if line_ends == "lf" and "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            note("line ends made LF")
        return ScrapedDocument(text, file.repository, file.path, file.commit, file.licence)

    return encoding


def _cookie(data: bytes) -> str | Drop:
    """Return the codec of a PEP 263 line, "" where there is none."""
    for line in data.splitlines()[:2] if len(data) < 1000 else data[:1000].splitlines()[:2]:
        if match := COOKIE.match(line):
            name = match[1].decode("ascii", "replace")
            try:
                codec = codecs.lookup(name).name
            except (LookupError, ValueError):
                codec = ""
            if codec in ("utf-8", "utf-8-sig"):
                return "utf-8"
            if not COOKIE_CODECS.fullmatch(codec):
                return Drop("unknown coding line")
            return codec
        if not re.match(rb"[ \t\f]*(?:#|$)", line):  # Only comments may precede a coding line.
            break
    return ""

"""The code examples of an HTML page: the text of each `<pre>`, with its language.

The page is a stranger's. It is read once from left to right, in time linear in its length: a tag or comment
that is never closed ends the reading. (`html.parser` takes quadratic time on some of these.)
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

# What the highlighters of documentation tools write into `class` -> the file extension of that language.
EXTENSIONS = {
    **dict.fromkeys(("python", "python3", "py", "py3", "pycon", "pycon3", "ipython", "ipython3"), ".py"),
    **dict.fromkeys(("kotlin", "kt", "kts"), ".kt"),
    **dict.fromkeys(("javascript", "js", "jsx"), ".js"),
    **dict.fromkeys(("typescript", "ts", "tsx"), ".ts"),
    **dict.fromkeys(("bash", "sh", "shell", "zsh"), ".sh"),
    **dict.fromkeys(("c++", "cpp", "cxx"), ".cpp"),
    **dict.fromkeys(("csharp", "cs", "c#"), ".cs"),
    **dict.fromkeys(("ruby", "rb"), ".rb"),
    **dict.fromkeys(("rust", "rs"), ".rs"),
    **dict.fromkeys(("yaml", "yml"), ".yaml"),
    **dict.fromkeys(("golang", "go"), ".go"),
    **{
        name: f".{name}"
        for name in ("c", "java", "json", "toml", "html", "css", "sql", "xml", "php", "swift")
    },
    "scala": ".scala",
}
UNKNOWN_EXTENSION = ".txt"
PREFIXES = ("language-", "lang-", "highlight-source-", "highlight-", "brush:", "code-")
NUMBERS = {"linenos", "lineno", "linenodiv", "line-numbers", "line-number", "gutter", "ln", "rouge-gutter"}
RAW = (
    "script",
    "style",
    "textarea",
    "title",
    "template",
    "noscript",
)  # elements whose content is no text of the page
VOID = ("br", "img", "wbr", "input", "hr", "link", "meta")
BOXES = ("div", "figure", "td", "th", "tr", "table", "section")
DEPTH = 50  # enclosing elements of a <pre> that are searched for its language

_NAME = re.compile(r"[A-Za-z][^\s/>]*")
_STOP = re.compile(r"[>\"']")
_ATTRIBUTE = re.compile(r"""([^\s=>"'/]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>"']+)))?""")
_PROMPT = re.compile(r"(?:>>>|\.\.\.)(?: |$)|In \[\d+\]: ?| +\.\.\.: ?")


@dataclass(frozen=True)
class CodeExample:
    """A piece of code on a page: the file extension of its language, and its text in whole lines."""

    extension: str
    text: str


def examples(page: str) -> list[CodeExample]:
    """Return the code of each `<pre>` of a page that is not empty, in order, without line numbers."""
    found = []
    boxes: list[tuple[str, frozenset[str]]] = []
    pre: frozenset[str] | None = None  # the classes of the <pre> that is open
    inner: frozenset[str] = frozenset()
    parts: list[str] = []
    hidden: list[str] = []  # open elements, from one whose content is no code

    def finish() -> None:
        assert pre is not None
        around = [classes for _, classes in boxes[-DEPTH:]]
        if not any(NUMBERS & classes for classes in (pre, *around[-2:])):
            extension = _extension([inner, pre, *reversed(around[-3:])])
            example = _tidy(extension, "".join(parts))
            if example.text.strip():
                found.append(example)

    for kind, name, said in _tokens(page):
        if kind == "text":
            if pre is not None and not hidden:
                parts.append(said)
            continue
        if pre is None:
            if kind == "open" and name == "pre":
                pre, inner, parts, hidden = _classes(said), frozenset(), [], []
            elif name in BOXES:
                if kind == "open":
                    boxes.append((name, _classes(said)))
                else:
                    _close(boxes, name)
            continue
        if name == "pre":
            if kind == "close":
                finish()
                pre = None
        elif hidden:
            if kind == "open" and name not in VOID:
                hidden.append(name)
            elif kind == "close" and name in hidden[-DEPTH:]:
                while hidden.pop() != name:
                    pass
        elif kind == "open":
            classes = _classes(said)
            if name == "code":
                inner |= classes
            if name == "br":
                parts.append("\n")
            elif name == "button" or (NUMBERS & classes and name != "code"):
                hidden = [name]
        elif name in ("div", "li", "p") and parts and not parts[-1].endswith("\n"):
            parts.append("\n")  # some highlighters put each line into an element of its own
    if pre is not None:
        finish()
    return found


def _close(boxes: list[tuple[str, frozenset[str]]], name: str) -> None:
    for back, (open_name, _) in enumerate(reversed(boxes[-DEPTH:]), 1):
        if open_name == name:
            del boxes[-back:]
            return


def _tokens(page: str) -> Iterator[tuple[str, str, str]]:
    """Yield ("text", "", text), ("open", name, attributes) and ("close", name, "") in the page's order."""
    at = 0
    while at < len(page):
        start = page.find("<", at)
        if start < 0:
            start = len(page)
        if start > at:
            yield "text", "", _unescape(page[at:start])
        if page.startswith("<!--", start):
            end = page.find("-->", start + 4)
            if end < 0:
                return
            at = end + 3
            continue
        close = page.startswith("</", start)
        name = _NAME.match(page, start + 1 + close)
        if name is None:
            if page.startswith(("<!", "<?", "</"), start):
                end = page.find(">", start)
                if end < 0:
                    return
                at = end + 1
            else:
                if start < len(page):
                    yield "text", "", "<"
                at = start + 1
            continue
        end = _tag_end(page, name.end())
        if end < 0:
            return
        tag = name.group().lower()
        yield "close" if close else "open", tag, "" if close else page[name.end() : end]
        at = end + 1
        if tag in RAW and not close:
            found = re.compile(rf"</{tag}", re.IGNORECASE).search(page, at)
            if found is None:
                return
            at = found.start()


def _tag_end(page: str, at: int) -> int:
    """Return the place of a tag's `>`, outside of quotes that follow a `=`; -1 if there is none."""
    while stop := _STOP.search(page, at):
        if stop.group() == ">":
            return stop.start()
        at = stop.end()
        if page[max(stop.start() - 20, 0) : stop.start()].rstrip().endswith("="):
            at = page.find(stop.group(), at) + 1
            if at == 0:
                return -1
    return -1


def _classes(attributes: str) -> frozenset[str]:
    for name, *values in _ATTRIBUTE.findall(attributes[:10_000]):
        if name.lower() == "class":
            return frozenset(_unescape("".join(values)).lower().split())
    return frozenset()


def _unescape(text: str) -> str:
    # html.unescape raises for a number of more than 4,300 digits.
    return html.unescape(re.sub(r"&#[0-9]{8,};?", "\ufffd", text)) if "&" in text else text


def _extension(places: list[frozenset[str]]) -> str:
    """Return the extension of the innermost element that names a language."""
    for classes in places:
        for word in sorted(classes):
            names = [word.removeprefix(prefix) for prefix in PREFIXES if word.startswith(prefix)] or [word]
            for name in names:
                if name in EXTENSIONS:
                    return EXTENSIONS[name]
    return UNKNOWN_EXTENSION


def _tidy(extension: str, text: str) -> CodeExample:
    """Return the example as a file would hold it; of an interpreter's session, only what was typed."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ").split("\n")
    filled = [number for number, line in enumerate(lines) if line.strip()]
    lines = lines[filled[0] : filled[-1] + 1] if filled else []
    if lines and re.match(r">>> |In \[\d+\]: ", lines[0]) and extension in (".py", UNKNOWN_EXTENSION):
        typed = [(match, line) for line in lines if (match := _PROMPT.match(line))]
        lines = [line[match.end() :] for match, line in typed]
        extension = ".py"
    return CodeExample(extension, "".join(f"{line}\n" for line in lines))

"""Other files beside the one that is written: what is shown of them, and how it stands before the prefix.

    files = RepositoryFiles()
    files.put("shop/fail.py", text)                      # and again whenever it changes; None takes it out
    context = context_of(files, "shop/a.py", prefix, suffix, tokenizer, 160)
    prefix, suffix = beside(tokenizer, context, prefix, suffix, 448)
    fim_prompt_ids(tokenizer, prefix, suffix)

The recipe `repository` builds its training rows and its test by these functions, and the server what it asks
the model. Shown are the signatures of files that are imported or were often changed together with this one,
those that have the words around the cursor, and the pieces of other files that are nearest by BM25. They
stand as comments under the names of their files, the best next to the prefix.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from data.fim import fim_kept
from data.nearby import Nearby, words_of
from metrics.trees import signatures
from tokenizer import Tokenizer

# The sign of a comment by the end of a file's name; Python's where it is not known.
SIGNS = {
    "//": (
        *(".c", ".cc", ".cpp", ".cs", ".dart", ".go", ".h", ".hpp", ".java", ".js", ".jsx", ".kt", ".kts"),
        *(
            ".m",
            ".mjs",
            ".php",
            ".proto",
            ".rs",
            ".scala",
            ".svelte",
            ".swift",
            ".ts",
            ".tsx",
            ".vue",
            ".zig",
        ),
    ),
    "--": (".hs", ".lua", ".sql"),
    ";": (".clj", ".el", ".lisp"),
}
MOST_CHARACTERS = 8192
PIECE = 8  # lines of a piece that is found by its words
BEFORE, AFTER = 600, 300  # characters around the cursor whose words are looked for
QUERY_WORDS = 24  # the rarest of them
SHOWN_SIGNATURES = 6  # of one file
NEAREST = 4  # pieces
OFTEN = 2  # Commits that changed two files, from which on they belong together.
GRAMMARS = {".py": "python", ".pyi": "python", ".kt": "kotlin", ".kts": "kotlin", ".java": "java"}
# What looks like a declaration in languages whose grammar is not here.
DECLARATION = re.compile(
    r"^\s*(?:(?:export|default|public|private|protected|internal|static|abstract|async|pub(?:\(\w+\))?|final)\s+)*"
    r"(?:def|class|func|fn|function|interface|struct|enum|trait|impl|type|module|object|sub|defmodule)\b.*"
)
# What names another file: Python, the JVM and Rust; a path in quotes of JavaScript, Go and C.
IMPORTS = (
    re.compile(r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]+\(?([\w, \t]*)", re.MULTILINE),
    re.compile(r"^[ \t]*(?:import|(?:pub[ \t]+)?use)[ \t]+(?:static[ \t]+)?([\w.:]+)()", re.MULTILINE),
    re.compile(r"(?:\bfrom|\brequire\(|\bimport|#include)[ \t]*['\"<]([@./\w-]+)['\">]()"),
)
WHOLE = ("__init__", "index", "mod")  # A file of this name stands for its folder.


def commented(pieces: Sequence[tuple[str, str]], most: int = MOST_CHARACTERS, own: str = "") -> str:
    """Return pieces of other files as lines of comments, each under the name of its file.

    Args:
        pieces: (name of the file, text); the last are the newest, or the best.
        most: Characters; older pieces that go beyond are left out.
        own: The name of the file that they stand in, whose sign of a comment is taken; "" takes each its own.
    """
    found: list[str] = []
    left = most
    for name, text in reversed(pieces):
        sign = next((sign for sign, ends in SIGNS.items() if (own or name).endswith(ends)), "#")
        lines = [" ".join(name.split()), *text.splitlines()]
        shown = "".join(f"{sign} {line}".rstrip() + "\n" for line in lines)
        if len(shown) > left:
            break
        left -= len(shown)
        found.insert(0, shown)
    return "".join(found)


def outline(path: str, text: str) -> list[str]:
    """Return the declarations of a file as lines: by its grammar, or else the lines that look like one."""
    language = GRAMMARS.get(_ending(path))
    found = signatures(text, language) if language else None
    if found is None:
        found = [line.rstrip(" {\t")[:200] for line in text.split("\n") if DECLARATION.match(line)]
    return found


def imported(text: str) -> list[tuple[str, ...]]:
    """Return what a file imports, as parts of names: `from a.b import c, d` gives (a, b, c) and (a, b, d)."""
    found: dict[tuple[str, ...], None] = {}
    for pattern in IMPORTS:
        for match in pattern.finditer(text):
            parts = tuple(part for part in re.split(r"[./:\\]+", match[1]) if part)
            names = [name.split()[0] for name in match[2].split(",") if name.strip()]
            found |= dict.fromkeys([(*parts, name) for name in names] or [parts])
    return [*found]


def _ending(path: str) -> str:
    return "." + path.rpartition(".")[2] if "." in path.rpartition("/")[2] else ""


def _module(path: str) -> tuple[str, ...]:
    """Return the parts of the name that a file is imported by."""
    parts = path.removesuffix(_ending(path)).split("/")
    return tuple(parts[:-1] if parts[-1] in WHOLE else parts)


class RepositoryFiles:
    """The files of a repository as they are at a moment, and what there is of them to show.

    Args:
        together: By path how often each other file was changed together with it.
    """

    def __init__(self, together: Mapping[str, Counter[str]] | None = None) -> None:
        self.texts: dict[str, str] = {}
        self.together = together or {}
        self._nearby = Nearby[tuple[str, int]]()
        self._modules: dict[str, set[str]] = defaultdict(set)  # last part of a module's name -> paths
        self._outlines: dict[str, list[str]] = {}

    def put(self, path: str, text: str | None) -> None:
        """Put a file in, or in the place of what it was before; take it out where `text` is None."""
        if (before := self.texts.pop(path, None)) is not None:
            for start in range(0, before.count("\n") + 1, PIECE):
                self._nearby.drop((path, start))
            self._modules[(_module(path) or ("",))[-1]].discard(path)
            self._outlines.pop(path, None)
        if text is not None:
            self.texts[path] = text
            lines = text.split("\n")
            for start in range(0, len(lines), PIECE):
                self._nearby.put((path, start), "\n".join(lines[start : start + PIECE]))
            self._modules[(_module(path) or ("",))[-1]].add(path)

    def imports_of(self, path: str, text: str) -> list[str]:
        """Return the paths of the files that a text at `path` imports, of several the nearest."""
        found: dict[str, None] = {}
        for parts in imported(text):
            for name in (parts, parts[:-1]):
                fits = [other for other in self._modules.get(name[-1] if name else "", ()) if other != path]
                fits = [other for other in fits if name and _module(other)[-len(name) :] == name]
                if fits:
                    found[min(fits, key=lambda other: (-_shared(path, other), len(other), other))] = None
                    break
        return [*found]

    def together_with(self, path: str) -> list[str]:
        """Return the files that were often changed together with one, those most often first."""
        known = self.together.get(path, Counter()).most_common()
        return [other for other, n in known if n >= OFTEN and other in self.texts]

    def signatures_of(self, path: str, words: set[str]) -> str:
        """Return those signatures of a file that have a word of these, the most first, in their own order."""
        if path not in self._outlines:
            self._outlines[path] = outline(path, self.texts[path])
        lines = self._outlines[path]
        shared = [len(words & {*words_of(line)}) for line in lines]
        best = sorted(range(len(lines)), key=lambda i: (-shared[i], i))[:SHOWN_SIGNATURES]
        return "\n".join(lines[i] for i in sorted(best) if shared[i])

    def places(self, query: str, most: int, but: str = "") -> list[tuple[str, int]]:
        """Return (path, number of its first line) of pieces that share the query's words, the best first.

        Args:
            most: The number of pieces.
            but: A file whose pieces are left out.
        """
        scores = self._nearby.scores(query, QUERY_WORDS)
        return sorted((key for key in scores if key[0] != but), key=lambda key: (-scores[key], key))[:most]

    def nearest(self, path: str, query: str) -> list[tuple[str, str]]:
        """Return pieces of other files that share the query's words, the best first."""
        return [
            (name, "\n".join(self.texts[name].split("\n")[start : start + PIECE]).strip("\n"))
            for name, start in self.places(query, NEAREST, path)
        ]

    def path_of(self, prefix: str, suffix: str) -> str:
        """Return the file that a place is in, as most of the lines around it tell; "" where none has most."""
        around = prefix[-4 * BEFORE :] + "\n" + suffix[: 4 * AFTER]
        lines = {line.strip() for line in around.split("\n")} - {""}
        near = dict.fromkeys(path for path, _ in self.places(around, QUERY_WORDS))
        shares = {
            path: len(lines & {line.strip() for line in self.texts[path].split("\n")}) / max(1, len(lines))
            for path in near
        }
        best = max(shares, key=lambda path: (shares[path], path), default="")
        return best if shares.get(best, 0.0) > 0.5 else ""

    def pieces(self, path: str, prefix: str, suffix: str) -> list[tuple[str, str]]:
        """Return (path, text) of what is to be shown beside a place in a file, the best first."""
        query = prefix[-BEFORE:] + "\n" + suffix[:AFTER]
        words = {*words_of(query)}
        related = [*self.imports_of(path, prefix + suffix)[:8], *self.together_with(path)[:4]]
        signed = [(other, self.signatures_of(other, words)) for other in dict.fromkeys(related)]
        signed = [(other, text) for other, text in signed if text]
        near = self.nearest(path, query)
        # The nearest piece comes first, then signatures, as each repository shows in what is left.
        return [*near[:1], *signed[:3], *near[1:], *signed[3:]]


def _shared(path: str, other: str) -> int:
    """Return how many folders two paths share from the top."""
    pairs = zip(path.split("/")[:-1], other.split("/")[:-1], strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(path.count("/"), other.count("/")))


def context_of(
    files: RepositoryFiles,
    path: str,
    prefix: str,
    suffix: str,
    tokenizer: Tokenizer,
    budget: int,
    more: Sequence[tuple[str, str]] = (),
) -> str:
    """Return what stands before the prefix of a place: pieces of other files as comments, of `budget` tokens.

    Args:
        path: The file of the place; "" where it is not known.
        prefix: All of the file before the place.
        suffix: All of it after the place.
        budget: The most tokens; 0 shows nothing.
        more: Pieces (name, text) that an editor sends, the best last; they get what room is left.
    """
    if not budget:
        return ""
    pieces = [*files.pieces(path, prefix, suffix), *reversed(more)]
    return fitted_pieces(dict.fromkeys(pieces), path, tokenizer, budget)


def fitted_pieces(pieces: Iterable[tuple[str, str]], path: str, tokenizer: Tokenizer, budget: int) -> str:
    """Return the pieces that a budget of tokens has room for, as comments, the best of them last.

    A piece that is too long loses its last lines, and is left out where none fits.
    """
    shown: list[str] = []
    left = budget
    for name, text in pieces:
        lines = text.split("\n")
        while lines:
            one = commented([(name, "\n".join(lines))], own=path)
            if (n := len(tokenizer.encode(one))) <= left:
                shown.append(one)
                left -= n
                break
            lines = lines[: min(len(lines) - 1, len(lines) * left // n + 1)]
        if left < 8:
            break
    return "".join(reversed(shown))


def beside(tokenizer: Tokenizer, context: str, prefix: str, suffix: str, room: int) -> tuple[str, str]:
    """Return the prefix with the context before it, and the suffix, in `room` tokens together.

    The context stays whole. Prefix and suffix lose what is far from the gap, by `fim_kept`, and a line that
    is cut in two goes.
    """
    own = room - len(tokenizer.encode(context))
    before = tokenizer.encode(prefix[-8 * room :])
    after = tokenizer.encode(suffix[: 8 * room])
    n_before, n_after = (int(n) for n in fim_kept(len(before), len(after), max(0, own)))
    if n_before < len(before):
        kept = tokenizer.decode(before[len(before) - n_before :])
        prefix = kept.partition("\n")[2] or kept
    if n_after < len(after):
        kept = tokenizer.decode(after[:n_after])
        suffix = kept.rpartition("\n")[0] or kept
    return context + prefix, suffix

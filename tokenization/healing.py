"""Where a prompt ends inside of what the tokenizer would write as one token: the boundary healed.

    ids of a prompt -> healed(tokenizer, ids) -> Prompt: ids that stay, what was dropped, and branches

A prompt that ends with a line break is written with a token that ends there. In training a line break before
an indented line is another token, "\\n    ", so that a model asked to go on after the first one is asked for
what it never saw. Hence the prompt's last tokens are dropped as far as a longer one could begin in them, and
the first new tokens are those whose text begins with what was dropped (token healing, as guidance has it).

What is exact
-------------
A *cover* of a prompt is a sequence of tokens whose text begins with the prompt's, and without its last token
does not. Given that a text begins with the prompt, its tokens begin with one of the covers, each as likely as
the model says: p(cover) / (the sum over all covers), the lemma of arXiv:2410.09303. A `Branch` holds the
covers that share all tokens but the last, and generation weighs every branch by the model's own probability
of its tokens. Masking one step after the other instead, as token healing is usually done, would take a branch
as likely as its first token, however unlikely what has to follow.

Covers that are known: every one that the tokenizer itself writes, for some text (where more than 2,000 tokens
could follow, as far as a few of those that begin alike stand for the others); and every one that is the
prompt's own ids with another last token. They end inside of a character only where the prompt's own ids are
cut. All others, such as "sel" + "f" where the tokenizer writes "self", never stood in training and are as
if they had probability 0.

Where the prompt's last token is the only one that could stand there, nothing is dropped and nothing changes.
The prompt of a gap (`data/fim.py`) ends with a marker, behind which training begins to write anew, wherever
the text was cut: that is exact as it is.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary, proxy

import numpy as np

from tokenizer import Tokenizer

VERSION = 2  # part of the key of the stores whose prompts are healed: raise it when a prompt's covers change
CONTEXT = 16  # tokens whose text is written again in the place of the whole prompt's, at least
MOST_CONTEXT = 64
REACH = 128  # bytes from a prompt's end in which a cover's last token may begin, at most
NEAR = 4  # tokens before one that show whether it follows them, at least
MOST_ASKED, SOME = 2000, 16  # tokens after which only some of a kind are judged, and how many
MOST_KEPT = 4096  # Ends of prompts whose branches are remembered.
AFTER_SPACE = " \naz0(\x01\u00e9\u4e00\U00013000"
LOWER, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


class Branch(NamedTuple):
    """The covers that share all of their tokens but the last: `ids` after those that stay, then one of
    `allowed`, (n,) int64, ascending.
    """

    ids: tuple[int, ...]
    allowed: np.ndarray


class Prompt(NamedTuple):
    """A prompt's ids for a model, and the first new tokens that are allowed.

    ids: The tokens that stay.
    dropped: The prompt's own tokens after these.
    branches: The allowed tokens in the place of the dropped ones; empty where nothing is dropped.
    """

    ids: list[int]
    dropped: tuple[int, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def whole(self) -> list[int]:
        """The prompt's own ids."""
        return [*self.ids, *self.dropped]


def healed(tokenizer: Tokenizer, ids: list[int]) -> Prompt:
    """Drop the end of a prompt's ids, as far back as a longer token could begin.

    The prompt's own tokens are always one of the covers, so whatever could be generated still can.

    Args:
        ids: The ids of the whole prompt, special tokens included.
    """
    boundary = _BOUNDARIES.get(tokenizer)
    if boundary is None:
        boundary = _BOUNDARIES[tokenizer] = _Boundary(tokenizer)
    branches, n_dropped = boundary.of(ids)
    if not n_dropped:
        return Prompt(ids)
    return Prompt(ids[:-n_dropped], tuple(ids[-n_dropped:]), branches)


class _Texts:
    """The texts of a vocabulary, sorted, so that those with a common beginning are side by side."""

    def __init__(self, by_id: list[bytes | None]):
        self.by_id = by_id
        found = sorted((text, id) for id, text in enumerate(by_id) if text)
        self.texts = [text for text, _ in found]
        self.ids = np.array([id for _, id in found], np.int64)

    def beginning_with(self, start: bytes) -> np.ndarray:
        """Return the ids (n,) of the texts that begin with `start`, which is not empty."""
        first, cut = bisect_left(self.texts, start), start.rstrip(b"\xff")
        end = bisect_left(self.texts, cut[:-1] + bytes((cut[-1] + 1,)), first) if cut else len(self.texts)
        return self.ids[first:end]


class _Boundary:
    """The vocabularies of one tokenizer, and the branches of prompts' ends that were requested."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = proxy(tokenizer)  # A reference would keep the tokenizer alive.
        longest = max(len(tokenizer.bytes_of((id,)) or b"") for id in range(tokenizer.vocab_size))
        self.reach = min(REACH, longest + 1)  # The 1 is for the space that `code` implies.
        self.vocabularies: dict[Hashable, _Texts] = {}
        # What a token can begin with in any state, in lower case, and without the space that one may imply.
        alone, inside = (self._vocabulary(tuple(tokenizer.encode(text))).by_id for text in ("", "a"))
        lower = {text.lower() for text in [*alone, *inside] if text}
        self.beginnings = _Texts([*lower, *(text.removeprefix(b" ") for text in lower)])
        # The letters and digits that have a token as a byte alone, and none as a piece of a word.
        n_tokens = Counter(inside)
        self.without_piece = [c for c in LOWER + DIGITS if n_tokens[c.encode()] == 1]
        self.written: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}
        self.known: dict[tuple[int, ...], tuple[tuple[Branch, ...], int]] = {}

    def of(self, ids: list[int]) -> tuple[tuple[Branch, ...], int]:
        """Return the branches of a prompt's end, and how many of its last tokens they replace."""
        tail = self._tail(ids)
        found = self.known.get(tail)
        if found is None:
            if len(self.known) >= MOST_KEPT:
                self.known.clear()
            found = self.known[tail] = self._branches(tail) if tail else ((), 0)
        return found

    def _tail(self, ids: list[int]) -> tuple[int, ...]:
        """Last tokens that the tokenizer writes for their own text; () where there are none.

        A tail that lacks the marker before it is another text: `pool` where the whole has `POOL`.
        """
        first, least = len(ids), max(0, len(ids) - MOST_CONTEXT)
        while first > least and self.tokenizer.bytes_of(ids[first - 1 : first]) is not None:
            first -= 1
        starts = [*range(len(ids) - CONTEXT, first, -1), first]
        tails = (tuple(ids[start:]) for start in starts if start >= 0)
        text = self.tokenizer.decode(ids)
        own = (tail for tail in tails if text.endswith(self.tokenizer.decode(tail)) and self._writes(tail))
        return next((tail for tail in own if tail), ())

    def _writes(self, ids: tuple[int, ...]) -> bool:
        return self._encoded([self.tokenizer.decode(ids)]) == [list(ids)]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        try:
            return self.tokenizer.encode_many(texts)
        except ValueError:  # one of them spells a special token
            return [[]] * len(texts)

    def _vocabulary(self, before: tuple[int, ...]) -> _Texts:
        state = self.tokenizer.state_after(before)
        if state not in self.vocabularies:
            self.vocabularies[state] = _Texts(self.tokenizer.token_texts(state) or [])
        return self.vocabularies[state]

    def _branches(self, tail: tuple[int, ...]) -> tuple[tuple[Branch, ...], int]:
        markers = self.tokenizer.markers
        last = max((n for n, id in enumerate(tail) if id not in markers), default=0)
        found: dict[tuple[int, ...], np.ndarray] = {}
        for before, rest in self._cuts(tail):
            found[before] = (
                self._vocabulary(before).beginning_with(rest)
                if before == tail[:last]
                else self._own(before, rest)
            )
            for marker in markers:
                if not before or before[-1] not in markers:
                    marked = (*before, marker)
                    found[marked] = self._vocabulary(marked).beginning_with(rest)
        found = {before: following for before, following in found.items() if len(following)}
        if not found or ([*found] == [tail[:last]] and len(found[tail[:last]]) == 1):
            return (), 0
        shortest = min(found, key=len)
        kept = next((n for n, id in enumerate(shortest) if any(b[n] != id for b in found)), len(shortest))
        branches = (Branch(before[kept:], np.sort(following)) for before, following in found.items())
        return tuple(sorted(branches, key=lambda branch: branch.ids)), len(tail) - kept

    def _cuts(self, tail: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], bytes]]:
        """Tokens of a beginning of the tail's text, and the bytes after it: the tail's own, then others."""
        text = self.tokenizer.decode(tail)
        whole, seen = _utf8(text), set()
        for n in range(len(tail) - 1, -1, -1):
            before = self.tokenizer.bytes_of(tail[:n]) or b""
            if len(whole) - len(before) > self.reach:
                break
            if whole.startswith(before) and before != whole:
                seen.add(tail[:n])
                yield tail[:n], whole[len(before) :]
        for end in range(len(text) - 1, -1, -1):
            rest = _utf8(text[end:])
            if len(rest) > self.reach:
                break
            if not len(self.beginnings.beginning_with(rest.lower())):
                continue  # No token begins so in any case.
            for before in self._begun(text[:end]):
                if before not in seen:
                    seen.add(before)
                    yield before, rest

    def _own(self, before: tuple[int, ...], rest: bytes) -> np.ndarray:
        """Return the tokens (n,) that begin with `rest` and that the tokenizer itself writes after `before`.

        Asking takes 5 us a token, so of thousands, as there are with a space, those that go on with the same
        byte are judged by a few of them where these agree.
        """
        near = self._near(before)
        if (near, rest) in self.written:
            return self.written[near, rest]
        vocabulary = self._vocabulary(near)
        following = vocabulary.beginning_with(rest)
        groups: dict[bytes, list[int]] = {b"": following.tolist()}
        if len(following) > MOST_ASKED:
            groups = defaultdict(list)
            for id in following.tolist():
                groups[(vocabulary.by_id[id] or b"")[: len(rest) + 1]].append(id)
        own: list[int] = []
        for ids in groups.values():
            some = ids[:: max(1, len(ids) // SOME)] if len(groups) > 1 else ids
            written = self._written(near, some)
            if some is not ids and 0 < len(written) < len(some):
                written = self._written(near, ids)
            elif len(written) == len(some):
                written = ids
            own += written
        if len(self.written) >= MOST_KEPT:
            self.written.clear()
        self.written[near, rest] = np.array(own, np.int64)
        return self.written[near, rest]

    def _near(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Return the last of these tokens, which alone decide what may follow.

        They begin where a word, a number or what stands between them does, so that the tokenizer writes them
        alike whatever stands before.
        """
        whole = self.tokenizer.bytes_of(before) or b""
        for start in range(len(before) - NEAR, 0, -1):
            near = before[start:]
            text = self.tokenizer.bytes_of(near) or b""
            if not whole.endswith(text) or not 0 < len(text) < len(whole):
                continue
            left, right = whole[-len(text) - 1 :][:1], text[:1]
            starts = left.isalnum() != right.isalnum() and left != b"_" and max(left + right) < 128
            if starts and near in self._begun(self.tokenizer.decode(near)):
                return near
        return before

    def _written(self, before: tuple[int, ...], following: list[int]) -> list[int]:
        """Those of `following` that the tokenizer writes after `before`.

        What is written may hang on the next character, as whether a word is in capitals does, and where a run
        of spaces is cut: where that could be, a few are tried.
        """
        start, texts = self.tokenizer.bytes_of(before) or b"", self._vocabulary(before).by_id
        whole: dict[int, str] = {}
        for id in following:
            with contextlib.suppress(UnicodeDecodeError):  # It ends inside of a character.
                whole[id] = (start + (texts[id] or b"")).decode("utf-8", "surrogatepass")
        own = []
        for (id, text), ids in zip(whole.items(), self._encoded(list(whole.values())), strict=True):
            wanted = [*before, id]
            longer = [] if ids == wanted else self._longer(text)
            if ids == wanted or any(ids[: len(wanted)] == wanted for ids in self._encoded(longer)):
                own.append(id)
        return own

    def _begun(self, text: str) -> Iterator[tuple[int, ...]]:
        """Yield the tokens that the tokenizer writes for a text, alone or with more behind; some repeat."""
        whole = _utf8(text)
        for ids in self._encoded([text, *self._longer(text)]):
            for n in range(len(ids), -1, -1):
                begun = self.tokenizer.bytes_of(ids[:n]) or b""
                if begun == whole and (n == 0 or ids[n - 1] not in self.tokenizer.markers):
                    yield tuple(ids[:n])
                    break
                if len(begun) < len(whole):
                    break

    def _longer(self, text: str) -> list[str]:
        """Return the text with one character more, for each character that may change how its end is written.

        On it may hang where a run of spaces is cut and, of a tokenizer with markers, whether a word is in
        capitals, and whether it is written as bytes, for a character in it that no piece has.
        """
        last = text[-1:]
        if last.isspace():
            return [text + character for character in AFTER_SPACE]
        if not self.tokenizer.markers or not last.isalnum():
            return []
        more = [*(LOWER if last.isupper() else ""), *self.without_piece]
        return [text + character for character in more] + [text + c.upper() for c in self.without_piece]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


_BOUNDARIES: WeakKeyDictionary[Tokenizer, _Boundary] = WeakKeyDictionary()

"""Code as the pieces of a vocabulary, and back: all of the `code` tokenizer that no training needs.

An exported folder has a copy of this file, for transformers (tokenization/code_transformers.py), so that it
imports nothing but Python's own library. tokenization/code.py says what the tokenizer is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

CODE_FILE = "code_tokenizer.json"
CODE_FORMAT = "plumb code tokenizer"
CODE_VERSION = 1
MAX_PIECE = 24  # characters of a piece

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD, BOS, EOS = range(len(SPECIALS))
GAPS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")  # the tokens around the texts of a gap (data/fim.py)
BYTE = len(SPECIALS)  # id of byte 0
LOW, CAP, UP, JLOW, JCAP, JUP, SNAKE = range(BYTE + 256, BYTE + 263)
FIRST_PIECE = SNAKE + 1
JOIN = JLOW - LOW  # the distance from a case's marker to the marker of the same case, joined
USUAL, JOINED = 0, -1  # expectations of a word, beside UP: see words_of

_PUNCTUATION = r"[!-/:-@\[-`{-~]"
# Each repeated group looks ahead before it takes a character: on Python 3.11.2 (not on 3.11.7) a possessive
# one that fails half way keeps what it took, and `x_:` had other ids there.
_IDENTIFIER = r"[A-Za-z0-9]++(?:(?=_[A-Za-z0-9])_[A-Za-z0-9]++)*+"
# The quantifiers are possessive: a line of a million characters is passed once. No unit both follows a letter
# or digit and starts with one, so the character before it tells a decoder whether a space is implied.
UNIT = re.compile(
    rf"(?<=[A-Za-z0-9]) {_IDENTIFIER}"
    rf"|{_IDENTIFIER}"
    rf"| *+{_PUNCTUATION}++(?:(?= {_PUNCTUATION}) {_PUNCTUATION}++)*+(?: (?! ))?"
    r"|(?:(?=\r?\n)\r?\n)++[ \t]*+"
    r"| ++|[^\x00-\x7f]++|[\x00-\x1f\x7f]"
)
CHUNK = 64  # characters that are segmented together, which bounds the work on runs of a million
WORD = re.compile(rf"[A-Z]{{1,{CHUNK}}}(?![a-z])|[A-Z]?[a-z]{{1,{CHUNK}}}|[0-9]{{1,{CHUNK}}}|_")
MAX_CACHE = 1 << 18  # Entries; 10 MB of source has 67,000 different units.

LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
DIGITS = frozenset("0123456789")
ALNUM = LETTERS | DIGITS

Trie = dict[str, Any]  # a dict for each character; "" holds the id of the piece that ends there


def case_of(word: str) -> int:
    """Return LOW, CAP or UP. One capital alone is UP, so that both words of `T_MAX` are."""
    return LOW if word[-1] not in LETTERS or word.islower() else UP if word.isupper() else CAP


def in_case(lower: str, case: int) -> str:
    return lower.upper() if case == UP else lower.capitalize() if case == CAP else lower


def is_identifier(unit: str) -> bool:
    return unit[0] in ALNUM or (unit[0] == " " and unit[1:2] in ALNUM)


def words_of(unit: str) -> Iterator[tuple[int, str]]:
    """Yield (expectation, word) of an identifier: USUAL case, UP, or JOINED to the word before.

    The word after an underscore comes as UP or USUAL; the underscore itself comes as the word "_".
    """
    expected, last = USUAL, ""
    for word in WORD.findall(unit):
        yield expected, word
        expected = JOINED if word != "_" else UP if last.isupper() else USUAL
        last = word[-1]


def chunks_of(unit: str) -> Iterator[str]:
    return (unit[i : i + CHUNK] for i in range(0, len(unit), CHUNK))


class _Memo(dict[Any, Iterable[int]]):
    """A cache of a function's results, cleared when it is full; results for long keys are not kept."""

    def __init__(self, function: Callable[[Any], Iterable[int]]) -> None:
        self.function = function

    def __missing__(self, key: Any) -> Iterable[int]:
        value = self.function(key)
        if len(key) <= CHUNK:
            if len(self) >= MAX_CACHE:
                self.clear()
            self[key] = value
        return value


class CodeState(dict[int, tuple[bytes, "CodeState"]]):
    """What the text of the next id depends on, with the text and the state after of each id met here so far.

    There are some dozens of states, so that a decoder looks nearly all ids up.

    Attributes:
        key: The kind of the character before (`a`, `A` or `0` for letters and digits, else ""), the case of
            the word, the marker before (0 for none), and whether SNAKE after a capital is before.
    """

    def __init__(self, tokenizer: CodePieces, key: tuple[str, int, int, bool]) -> None:
        self.tokenizer, self.key = tokenizer, key

    def __missing__(self, id: int) -> tuple[bytes, CodeState]:
        if type(id) is not int:  # An element of an array may be no key.
            return self[int(id)]
        value = self[id] = self.tokenizer._step(self, id)
        return value


class CodePieces:
    """The pieces of a `code` tokenizer, and texts written in them.

    Args:
        heads: Pieces that start a word or number, letters written in their usual case.
        tails: Pieces that continue one, lower case.
        plain: Pieces of everything else: punctuation, line breaks, spaces, non-ASCII text.
        gaps: Whether there are tokens for gaps, GAPS; older tokenizers have none.

    Ids are: 3 specials, 256 bytes, 7 markers, heads, tails, plain, 3 for gaps.

    Raises:
        ValueError: A piece is empty, too long, given twice, or not of its list's kind.
    """

    def __init__(
        self, heads: Iterable[str], tails: Iterable[str], plain: Iterable[str], gaps: bool = False
    ) -> None:
        self.heads, self.tails, self.plain = tuple(heads), tuple(tails), tuple(plain)
        _check_pieces("heads", self.heads, _is_head)
        _check_pieces("tails", self.tails, _is_tail)
        _check_pieces("plain", self.plain, _is_plain)
        _check_pieces("heads, in lower case,", [head.lower() for head in self.heads], bool)
        self._first_tail = FIRST_PIECE + len(self.heads)
        self._first_plain = self._first_tail + len(self.tails)
        self._first_gap = self._first_plain + len(self.plain)
        self.gaps = GAPS if gaps else ()
        self.vocab_size = self._first_gap + len(self.gaps)

        self._head_trie = _trie((head.lower() for head in self.heads), FIRST_PIECE)
        self._tail_trie = _trie(self.tails, self._first_tail)
        self._plain_trie = _trie(self.plain, self._first_plain)
        for ascii_char in map(chr, range(128)):
            self._plain_trie.setdefault(ascii_char, {})[""] = BYTE + ord(ascii_char)
        # An id's usual case (numbers have none), and its bytes as LOW, CAP and UP.
        self._usual = {id: case_of(head) for id, head in enumerate(self.heads, FIRST_PIECE) if head.isalpha()}
        self._forms = [_forms(head.lower(), head=True) for head in self.heads]
        self._forms += [_forms(tail, head=False) for tail in self.tails]
        self._forms += [(piece.encode(),) * 3 for piece in self.plain]
        self._unit_ids = _Memo(self._encode_unit)
        self._word_ids: dict[tuple[int, str], tuple[int, ...]] = {}
        self._plain_ids = _Memo(self._encode_plain)
        self._states: dict[tuple[str, int, int, bool], CodeState] = {}
        self._start = self._state("", LOW)

    def names(self) -> list[str]:
        """Return the ids' names, no two alike: `^get`, `-ing`, `= == `, `<0xE2>`, `<JUP>`, `<|eos|>`."""
        names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
        names += [f"<{marker}>" for marker in ("LOW", "CAP", "UP", "JLOW", "JCAP", "JUP", "SNAKE")]
        kinds = ("^", self.heads), ("-", self.tails), ("=", self.plain)
        return [*names, *(kind + piece for kind, pieces in kinds for piece in pieces), *self.gaps]

    def encode(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._unit_ids.__getitem__, UNIT.findall(text))))

    def _encode_unit(self, unit: str) -> tuple[int, ...]:
        if not is_identifier(unit):
            return tuple(chain.from_iterable(map(self._plain_ids.__getitem__, chunks_of(unit))))
        ids: list[int] = []
        known = self._word_ids
        for key in words_of(unit):
            piece_ids = known.get(key)
            if piece_ids is None:
                if len(known) >= MAX_CACHE:
                    known.clear()
                piece_ids = known[key] = self._encode_word(*key)
            if not ids and unit[0] == " " and piece_ids[0] < LOW:
                ids.append(BYTE + ord(" "))  # Bytes imply no space.
            ids += piece_ids
        return tuple(ids)

    def _encode_word(self, expected: int, word: str) -> tuple[int, ...]:
        if word == "_":
            return (SNAKE,)
        joined, letters = expected == JOINED, word[0] in LETTERS
        first = self._tail_trie if joined and not letters else self._head_trie
        case = case_of(word)
        usual = self._usual if letters and expected == USUAL else {}
        ids = _fewest(word.lower(), first, self._tail_trie, byte_cost=2 * CHUNK, usual=usual, case=case)
        if min(ids) < FIRST_PIECE:  # Bytes have no case: the whole word becomes bytes.
            return tuple(BYTE + byte for byte in word.encode())
        if not letters:
            return tuple(ids)
        if joined:
            return (case + JOIN, *ids)
        return tuple(ids) if case == (expected or usual[ids[0]]) else (case, *ids)

    def _encode_plain(self, chunk: str) -> list[int]:
        return _fewest(chunk, self._plain_trie, self._plain_trie, byte_cost=1, usual={}, case=0)

    def decode(self, ids: Iterable[int]) -> str:
        parts: list[bytes] = []
        self._walk(ids, parts)
        return decode_utf8(b"".join(parts))

    def _walk(self, ids: Iterable[int], parts: list[bytes]) -> CodeState:
        """Append the bytes of each id to `parts`; return the state after them."""
        state = self._start
        for id in ids:
            text, state = state[id]
            parts.append(text)
        return state

    def _state(self, kind: str, case: int, marker: int = 0, capitals: bool = False) -> CodeState:
        """Return the one state of these values."""
        key = kind, case, marker, capitals
        return self._states.setdefault(key, CodeState(self, key))

    def _step(self, state: CodeState, id: int) -> tuple[bytes, CodeState]:
        """Return the bytes that an id adds in a state, and the state after it."""
        kind, case, marker, capitals = state.key
        if id < BYTE or id >= self._first_gap:
            return b"", self._state("", case)  # Across a special token no space is implied.
        if id >= FIRST_PIECE:
            space = b""
            if id < self._first_tail:
                if kind and marker < JLOW:
                    space = b" "
                if marker:
                    case = marker if marker < JLOW else marker - JOIN
                else:
                    case = UP if capitals else self._usual.get(id, LOW)
            piece = self._forms[id - FIRST_PIECE][case - LOW]
            return space + piece, self._state(_kind_of(piece[-1]), case)
        if id == SNAKE:
            return b"_", self._state("", case, capitals=kind == "A")
        if id >= LOW:
            return b"", self._state(kind, case, id, capitals)
        return bytes((id - BYTE,)), self._state(_kind_of(id - BYTE), case)


def _is_head(piece: str) -> bool:
    return _is_tail(piece.lower()) and piece == in_case(piece.lower(), case_of(piece))


def _is_tail(piece: str) -> bool:
    return re.fullmatch(r"[a-z]+|[0-9]+", piece) is not None


def _is_plain(piece: str) -> bool:
    lone_surrogate = any("\ud800" <= char <= "\udfff" for char in piece)
    return not (ALNUM & set(piece) or lone_surrogate or (len(piece) == 1 and piece < "\x80"))


def _check_pieces(name: str, pieces: Iterable[str], is_valid: Callable[[str], bool]) -> None:
    seen: set[str] = set()
    for piece in pieces:
        if not 0 < len(piece) <= MAX_PIECE:
            raise ValueError(f"a piece of {name} has {len(piece)} characters; 1 to {MAX_PIECE} are allowed")
        if not is_valid(piece):
            raise ValueError(f"{piece!r} cannot be a piece of {name}")
        if piece in seen:
            raise ValueError(f"{piece!r} is twice among the pieces of {name}")
        seen.add(piece)


def _trie(pieces: Iterable[str], first_id: int) -> Trie:
    root: Trie = {}
    for id, piece in enumerate(pieces, first_id):
        node = root
        for char in piece:
            node = node.setdefault(char, {})
        node[""] = id
    return root


def _forms(lower: str, head: bool) -> tuple[bytes, bytes, bytes]:
    """Return a piece's bytes as LOW, CAP and UP; of a capitalised word only the head has the capital."""
    capitalised = lower.capitalize() if head else lower
    return lower.encode(), capitalised.encode(), lower.upper().encode()


def _fewest(
    text: str, first: Trie, rest: Trie, byte_cost: int, usual: dict[int, int], case: int
) -> list[int]:
    """Write `text` in the fewest tokens, one from `first` and then from `rest`; at a tie, longer ones first.

    A character without a piece costs `byte_cost` for each of its bytes, and a first piece whose `usual` case
    is not `case` costs one more, the marker's. Work is len(text) * MAX_PIECE at most.
    """
    size = len(text)
    costs = [0] * (size + 1)
    steps: list[tuple[int, int]] = [(0, 0)] * size  # (end, id or -1) of the best piece that begins here
    for start in range(size - 1, -1, -1):
        n_bytes = 1 if text[start] < "\x80" else len(text[start].encode("utf-8", "surrogatepass"))
        best, step = costs[start + 1] + byte_cost * n_bytes, (start + 1, -1)
        node, end = rest if start else first, start
        for char in text[start:]:
            node = node.get(char)
            if node is None:
                break
            end += 1
            id = node.get("")
            if id is not None:
                cost = costs[end] + 1
                if not start and usual.get(id, case) != case:
                    cost += 1
                if cost <= best:
                    best, step = cost, (end, id)
        costs[start], steps[start] = best, step
    ids: list[int] = []
    at = 0
    while at < size:
        end, id = steps[at]
        if id < 0:
            ids += [BYTE + byte for byte in text[at].encode("utf-8", "surrogatepass")]
        else:
            ids.append(id)
        at = end
    return ids


def _kind_of(byte: int) -> str:
    """Return `a`, `A` or `0` for an ASCII letter or digit, and "" for any other byte."""
    char = chr(byte)
    return "" if char not in ALNUM else "a" if char.islower() else "A" if char.isupper() else "0"


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8; lone surrogates stay, as with `surrogatepass`, and broken bytes give U+FFFD."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        # 0xED never continues a character, so the cuts are at character boundaries.
        parts = re.split(rb"(\xed[\xa0-\xbf][\x80-\xbf])", data)
        modes = ("replace", "surrogatepass")
        return "".join(part.decode("utf-8", modes[number % 2]) for number, part in enumerate(parts))

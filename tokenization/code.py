"""CodeTokenizer: a tokenizer for source code, written by hand.

One regular expression cuts text into units: an identifier (with the single space before it, where that
space follows a letter or digit), punctuation with the spaces beside it, line breaks with the indentation
after them, spaces, non-ASCII text. The ids of a unit depend on the unit alone, so they are looked up in a
dictionary.

Identifiers are cut at case changes, digits and underscores, and lower-cased. A *head* is a piece that
starts a word, a *tail* is one that continues it. Marker tokens restore what was factored out:

    LOW CAP UP      the next head is written so (`get`, `Get`, `GET`) and not in its usual case
    JLOW JCAP JUP   the same, and it is joined to the letter or digit before it
    SNAKE           an underscore inside an identifier

Three rules save most markers. A head after a letter or digit has one space before it, unless it is joined.
Each head has a usual case, learned from the corpus and shown by how it is stored (`None`). After SNAKE, a
head is in capitals if the letter before the underscore is a capital.

    return getHTTPResponse    return get JUP http JCAP response
    get_http_response = None  get SNAKE http SNAKE response " = " None
    MAX_SIZE                  UP max SNAKE size

What has no piece becomes UTF-8 bytes, which have tokens of their own, so there is no unknown token and
`decode(encode(s)) == s` for every string, lone surrogates included. Pieces are learned by byte-pair merges
(Sennrich et al. 2016, arXiv:1508.07909), the least used are dropped again, and a word is written with the
fewest pieces that make it.

A trap: because spaces are implied, `decode(a) + decode(b)` may lack a space that `decode(a + b)` has.
Decode a completion together with its prompt and cut the prompt's text off. For the same reason
`encode(a) + encode(b)` decodes to `a + b` only where the cut is not between two letters or digits; after a
line break it always does.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self, cast

from tokenization.base import BOS, EOS, PAD, SPECIALS, Tokenizer, check_training, content_hash
from tokenization.files import read_json, write_file
from tokenization.merges import HEAD, MAX_PIECE, PLAIN, TAIL, learn_pieces

CODE_FILE = "code_tokenizer.json"
_CODE_FORMAT = "plumb code tokenizer"
_CODE_VERSION = 1

_BYTE = len(SPECIALS)  # id of byte 0
LOW, CAP, UP, JLOW, JCAP, JUP, SNAKE = range(_BYTE + 256, _BYTE + 263)
_FIRST_PIECE = SNAKE + 1
_JOIN = JLOW - LOW  # the distance from a case's marker to the marker of the same case, joined
_USUAL, _JOINED = 0, -1  # expectations of a word, beside UP: see _words_of

_PUNCTUATION = r"[!-/:-@\[-`{-~]"
# Each repeated group looks ahead before it takes a character: on Python 3.11.2 (not on 3.11.7) a possessive
# one that fails half way keeps what it took, and `x_:` had other ids there.
_IDENTIFIER = r"[A-Za-z0-9]++(?:(?=_[A-Za-z0-9])_[A-Za-z0-9]++)*+"
# The quantifiers are possessive: a line of a million characters is passed once. No unit both follows a letter
# or digit and starts with one, so the character before it tells a decoder whether a space is implied.
_UNIT = re.compile(
    rf"(?<=[A-Za-z0-9]) {_IDENTIFIER}"
    rf"|{_IDENTIFIER}"
    rf"| *+{_PUNCTUATION}++(?:(?= {_PUNCTUATION}) {_PUNCTUATION}++)*+(?: (?! ))?"
    r"|(?:(?=\r?\n)\r?\n)++[ \t]*+"
    r"| ++|[^\x00-\x7f]++|[\x00-\x1f\x7f]"
)
_CHUNK = 64  # characters that are segmented together, which bounds the work on runs of a million
_WORD = re.compile(rf"[A-Z]{{1,{_CHUNK}}}(?![a-z])|[A-Z]?[a-z]{{1,{_CHUNK}}}|[0-9]{{1,{_CHUNK}}}|_")
_MAX_CACHE = 1 << 18  # Entries; 10 MB of source has 67,000 different units.
_ROUNDS = 3  # rounds in which uses are counted and a part of the surplus pieces is dropped

_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_DIGITS = frozenset("0123456789")
_ALNUM = _LETTERS | _DIGITS

Trie = dict[str, Any]  # a dict for each character; "" holds the id of the piece that ends there


def _case_of(word: str) -> int:
    """Return LOW, CAP or UP. One capital alone is UP, so that both words of `T_MAX` are."""
    return LOW if word[-1] not in _LETTERS or word.islower() else UP if word.isupper() else CAP


def _in_case(lower: str, case: int) -> str:
    return lower.upper() if case == UP else lower.capitalize() if case == CAP else lower


def _is_identifier(unit: str) -> bool:
    return unit[0] in _ALNUM or (unit[0] == " " and unit[1:2] in _ALNUM)


def _words_of(unit: str) -> Iterator[tuple[int, str]]:
    """Yield (expectation, word) of an identifier: _USUAL case, UP, or _JOINED to the word before.

    The word after an underscore comes as UP or _USUAL; the underscore itself comes as the word "_".
    """
    expected, last = _USUAL, ""
    for word in _WORD.findall(unit):
        yield expected, word
        expected = _JOINED if word != "_" else UP if last.isupper() else _USUAL
        last = word[-1]


def _chunks(unit: str) -> Iterator[str]:
    return (unit[i : i + _CHUNK] for i in range(0, len(unit), _CHUNK))


class _Memo(dict[Any, Iterable[int]]):
    """A cache of a function's results, cleared when it is full; results for long keys are not kept."""

    def __init__(self, function: Callable[[Any], Iterable[int]]) -> None:
        self.function = function

    def __missing__(self, key: Any) -> Iterable[int]:
        value = self.function(key)
        if len(key) <= _CHUNK:
            if len(self) >= _MAX_CACHE:
                self.clear()
            self[key] = value
        return value


class _State(dict[int, tuple[bytes, "_State"]]):
    """What the text of the next id depends on, with the text and the state after of each id met here so far.

    There are some dozens of states, so that a decoder looks nearly all ids up.

    Attributes:
        key: The kind of the character before (`a`, `A` or `0` for letters and digits, else ""), the case of
            the word, the marker before (0 for none), and whether SNAKE after a capital is before.
    """

    def __init__(self, tokenizer: CodeTokenizer, key: tuple[str, int, int, bool]) -> None:
        self.tokenizer, self.key = tokenizer, key

    def __missing__(self, id: int) -> tuple[bytes, _State]:
        if type(id) is not int:  # An element of an array may be no key.
            return self[int(id)]
        value = self[id] = self.tokenizer._step(self, id)
        return value


class CodeTokenizer(Tokenizer):
    """The tokenizer for source code that the module's docstring describes.

    Args:
        heads: Pieces that start a word or number, letters written in their usual case.
        tails: Pieces that continue one, lower case.
        plain: Pieces of everything else: punctuation, line breaks, spaces, non-ASCII text.

    Ids are: 3 specials, 256 bytes, 7 markers, heads, tails, plain.

    Raises:
        ValueError: A piece is empty, too long, given twice, or not of its list's kind.
    """

    kind = "code"
    markers = (LOW, CAP, UP, JLOW, JCAP, JUP)

    def __init__(self, heads: Iterable[str], tails: Iterable[str], plain: Iterable[str]) -> None:
        self.heads, self.tails, self.plain = tuple(heads), tuple(tails), tuple(plain)
        _check_pieces("heads", self.heads, _is_head)
        _check_pieces("tails", self.tails, _is_tail)
        _check_pieces("plain", self.plain, _is_plain)
        _check_pieces("heads, in lower case,", [head.lower() for head in self.heads], bool)
        self._first_tail = _FIRST_PIECE + len(self.heads)
        self._first_plain = self._first_tail + len(self.tails)
        self.vocab_size = self._first_plain + len(self.plain)
        self.pad_id, self.bos_id, self.eos_id = PAD, BOS, EOS
        self.fingerprint = content_hash(self.kind, [_CODE_VERSION, self.heads, self.tails, self.plain])

        self._head_trie = _trie((head.lower() for head in self.heads), _FIRST_PIECE)
        self._tail_trie = _trie(self.tails, self._first_tail)
        self._plain_trie = _trie(self.plain, self._first_plain)
        for ascii_char in map(chr, range(128)):
            self._plain_trie.setdefault(ascii_char, {})[""] = _BYTE + ord(ascii_char)
        # An id's usual case (numbers have none), and its bytes as LOW, CAP and UP.
        self._usual = {
            id: _case_of(head) for id, head in enumerate(self.heads, _FIRST_PIECE) if head.isalpha()
        }
        self._forms = [_forms(head.lower(), head=True) for head in self.heads]
        self._forms += [_forms(tail, head=False) for tail in self.tails]
        self._forms += [(piece.encode(),) * 3 for piece in self.plain]
        self._unit_ids = _Memo(self._encode_unit)
        self._word_ids: dict[tuple[int, str], tuple[int, ...]] = {}
        self._plain_ids = _Memo(self._encode_plain)
        self._states: dict[tuple[str, int, int, bool], _State] = {}
        self._start = self._state("", LOW)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.heads, self.tails, self.plain), {"heals": self.heals}

    def encode(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._unit_ids.__getitem__, _UNIT.findall(text))))

    def _encode_unit(self, unit: str) -> tuple[int, ...]:
        if not _is_identifier(unit):
            return tuple(chain.from_iterable(map(self._plain_ids.__getitem__, _chunks(unit))))
        ids: list[int] = []
        known = self._word_ids
        for key in _words_of(unit):
            piece_ids = known.get(key)
            if piece_ids is None:
                if len(known) >= _MAX_CACHE:
                    known.clear()
                piece_ids = known[key] = self._encode_word(*key)
            if not ids and unit[0] == " " and piece_ids[0] < LOW:
                ids.append(_BYTE + ord(" "))  # Bytes imply no space.
            ids += piece_ids
        return tuple(ids)

    def _encode_word(self, expected: int, word: str) -> tuple[int, ...]:
        if word == "_":
            return (SNAKE,)
        joined, letters = expected == _JOINED, word[0] in _LETTERS
        first = self._tail_trie if joined and not letters else self._head_trie
        case = _case_of(word)
        usual = self._usual if letters and expected == _USUAL else {}
        ids = _fewest(word.lower(), first, self._tail_trie, byte_cost=2 * _CHUNK, usual=usual, case=case)
        if min(ids) < _FIRST_PIECE:  # Bytes have no case: the whole word becomes bytes.
            return tuple(_BYTE + byte for byte in word.encode())
        if not letters:
            return tuple(ids)
        if joined:
            return (case + _JOIN, *ids)
        return tuple(ids) if case == (expected or usual[ids[0]]) else (case, *ids)

    def _encode_plain(self, chunk: str) -> list[int]:
        return _fewest(chunk, self._plain_trie, self._plain_trie, byte_cost=1, usual={}, case=0)

    def decode(self, ids: Iterable[int]) -> str:
        parts: list[bytes] = []
        self._walk(ids, parts)
        return _decode_utf8(b"".join(parts))

    def _walk(self, ids: Iterable[int], parts: list[bytes]) -> _State:
        """Append the bytes of each id to `parts`; return the state after them."""
        state = self._start
        for id in ids:
            text, state = state[id]
            parts.append(text)
        return state

    def _state(self, kind: str, case: int, marker: int = 0, capitals: bool = False) -> _State:
        """Return the one state of these values."""
        key = kind, case, marker, capitals
        return self._states.setdefault(key, _State(self, key))

    def _step(self, state: _State, id: int) -> tuple[bytes, _State]:
        """Return the bytes that an id adds in a state, and the state after it."""
        (id,) = self._checked([id])
        kind, case, marker, capitals = state.key
        if id >= _FIRST_PIECE:
            space = b""
            if id < self._first_tail:
                if kind and marker < JLOW:
                    space = b" "
                if marker:
                    case = marker if marker < JLOW else marker - _JOIN
                else:
                    case = UP if capitals else self._usual.get(id, LOW)
            piece = self._forms[id - _FIRST_PIECE][case - LOW]
            return space + piece, self._state(_kind_of(piece[-1]), case)
        if id == SNAKE:
            return b"_", self._state("", case, capitals=kind == "A")
        if id >= LOW:
            return b"", self._state(kind, case, id, capitals)
        if id >= _BYTE:
            return bytes((id - _BYTE,)), self._state(_kind_of(id - _BYTE), case)
        return b"", self._state("", case)  # Across a special token no space is implied.

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        ids, parts = list(ids), []
        self._walk(ids, parts)
        return None if min(ids, default=_BYTE) < _BYTE else b"".join(parts)

    def state_after(self, ids: Sequence[int]) -> Hashable:
        """Return (kind of the character before, case, marker, capitals), which `token_texts` takes."""
        return self._walk(ids, []).key

    def token_texts(self, state: Hashable) -> list[bytes | None]:
        """Return `Tokenizer.token_texts`; after a marker only the heads that `encode` writes there."""
        before, case, marker, capitals = cast(tuple[str, int, int, bool], state)
        texts: list[bytes | None] = [None] * self.vocab_size
        space = b" " if before and marker < JLOW else b""
        head_case = marker if marker < JLOW else marker - _JOIN
        # A word is joined to digits in any case, and to letters where the case shows that it begins.
        if marker >= JLOW and (not before or (marker, before) in ((JLOW, "a"), (JLOW, "A"), (JUP, "A"))):
            return texts
        for id, forms in enumerate(self._forms[: len(self.heads)], _FIRST_PIECE):
            usual = UP if capitals else self._usual.get(id, LOW)
            if not marker:
                texts[id] = space + forms[usual - LOW]
            elif id in self._usual and (marker >= JLOW or usual != head_case):
                texts[id] = space + forms[head_case - LOW]
        if marker:
            return texts
        for id, forms in enumerate(self._forms[len(self.heads) :], self._first_tail):
            texts[id] = forms[case - LOW] if before or id >= self._first_plain else None
        texts[_BYTE : _BYTE + 256] = [bytes((byte,)) for byte in range(256)]
        texts[SNAKE] = b"_" if before else None
        return texts

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Name each id for a reader: `JUP`, `http` as it is stored, ` = `, `(`, `<0xE2>`, `<|eos|>`."""
        names = [*SPECIALS, *map(chr, range(128)), *(f"<0x{byte:02X}>" for byte in range(128, 256))]
        names += ["LOW", "CAP", "UP", "JLOW", "JCAP", "JUP", "SNAKE", *self.heads, *self.tails, *self.plain]
        return [names[id] for id in self._checked(ids)]

    def _save(self, folder: Path) -> None:
        content: dict[str, Any] = {
            "format": _CODE_FORMAT,
            "version": _CODE_VERSION,
            "heads": self.heads,
            "tails": self.tails,
            "plain": self.plain,
        }
        if not self.heals:
            content["heals"] = False
        # Pieces hold no lone surrogates: UTF-8 cannot write them, and two of them as \u escapes would come
        # back as one character.
        write_file(Path(folder) / CODE_FILE, json.dumps(content, ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        path = Path(folder) / CODE_FILE
        content = read_json(path)
        expected = {"format", "version", "heads", "tails", "plain"}
        heals = content.pop("heals", True) is not False
        if set(content) != expected or content["format"] != _CODE_FORMAT:
            raise ValueError(f"{path} is not a {_CODE_FORMAT}: its keys are {sorted(content)[:9]}")
        if content["version"] != _CODE_VERSION:
            raise ValueError(f"{path} has version {content['version']!r}; this Plumb reads {_CODE_VERSION}")
        lists = [content[name] for name in ("heads", "tails", "plain")]
        for pieces in lists:
            if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
                raise ValueError(f"{path} must hold three lists of strings: heads, tails, plain")
        try:
            tokenizer = cls(*lists)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tokenizer.heals = heals
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_count: int = 10) -> CodeTokenizer:
        """Learn pieces from `texts`.

        Args:
            texts: The corpus; it is read once.
            vocab_size: Most ids the tokenizer may have, specials, bytes and markers included. It has fewer
                where the corpus has too few frequent pieces, and where the last choice of pieces leaves
                some of them idle.
            min_count: A piece is taken only if it occurs more than this many times in `texts`.

        Raises:
            ValueError: `vocab_size` leaves no room, `min_count` is negative, or there is no text.
        """
        check_training(texts, vocab_size, _FIRST_PIECE, "special tokens, bytes and markers")
        if min_count < 0:
            raise ValueError(f"min_count {min_count} is below 0")
        units: Counter[str] = Counter()
        for text in texts:
            units.update(_UNIT.findall(text))
        if not units:
            raise ValueError("there is no text to train a tokenizer on: every document is empty")

        words: Counter[tuple[int, str]] = Counter()
        chunks: Counter[str] = Counter()
        symbols: Counter[str] = Counter()  # words and chunks as learn_pieces takes them
        for unit, count in units.items():
            if not _is_identifier(unit):
                for chunk in _chunks(unit):
                    chunks[chunk] += count
                    symbols[PLAIN + chunk] += count
                continue
            for expected, word in _words_of(unit):
                if word != "_":
                    words[expected, word] += count
                    joined_digits = expected == _JOINED and word[0] in _DIGITS
                    symbols[(TAIL if joined_digits else HEAD) + word.lower()] += count

        room = vocab_size - _FIRST_PIECE
        single, merged = learn_pieces(symbols, room, min_count)
        usual: dict[str, int] = {}
        used: Counter[str] = Counter()
        for left in range(_ROUNDS, -1, -1):
            tokenizer = cls._of(single + merged, usual)
            used, usual = tokenizer._count(words, chunks)
            merged = sorted(
                (piece for piece in merged if used[piece] > min_count), key=lambda piece: -used[piece]
            )
            fit = room - len(single)
            merged = merged[: fit + (max(0, len(merged) - fit) * (left - 1) // _ROUNDS if left > 1 else 0)]
        return cls._of(sorted(single + merged, key=lambda piece: (-used[piece], piece)), usual)

    @classmethod
    def _of(cls, symbols: list[str], usual: dict[str, int]) -> CodeTokenizer:
        kinds = {kind: [piece[1:] for piece in symbols if piece[0] == kind] for kind in (HEAD, TAIL, PLAIN)}
        return cls([_in_case(head, usual.get(head, LOW)) for head in kinds[HEAD]], kinds[TAIL], kinds[PLAIN])

    def _count(
        self, words: Counter[tuple[int, str]], chunks: Counter[str]
    ) -> tuple[Counter[str], dict[str, int]]:
        """Return (uses of each piece by its symbol in learn_pieces, the commonest case of each head)."""
        by_id: Counter[int] = Counter()
        cases: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for (expected, word), count in words.items():
            ids = self._encode_word(expected, word)
            for id in ids:
                by_id[id] += count
            if expected == _USUAL and word[0] in _LETTERS and ids[-1] >= _FIRST_PIECE:
                head = next(id for id in ids if id >= _FIRST_PIECE)
                cases[self.heads[head - _FIRST_PIECE].lower()][_case_of(word)] += count
        for chunk, count in chunks.items():
            for id in self._encode_plain(chunk):
                by_id[id] += count
        pieces = [HEAD + head.lower() for head in self.heads]
        pieces += [TAIL + tail for tail in self.tails]
        pieces += [PLAIN + piece for piece in self.plain]
        used = Counter({piece: by_id[id] for id, piece in enumerate(pieces, _FIRST_PIECE)})
        return used, {
            head: max(counts, key=lambda case: (counts[case], -case)) for head, counts in cases.items()
        }


def _is_head(piece: str) -> bool:
    return _is_tail(piece.lower()) and piece == _in_case(piece.lower(), _case_of(piece))


def _is_tail(piece: str) -> bool:
    return re.fullmatch(r"[a-z]+|[0-9]+", piece) is not None


def _is_plain(piece: str) -> bool:
    lone_surrogate = any("\ud800" <= char <= "\udfff" for char in piece)
    return not (_ALNUM & set(piece) or lone_surrogate or (len(piece) == 1 and piece < "\x80"))


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
            ids += [_BYTE + byte for byte in text[at].encode("utf-8", "surrogatepass")]
        else:
            ids.append(id)
        at = end
    return ids


def _kind_of(byte: int) -> str:
    """Return `a`, `A` or `0` for an ASCII letter or digit, and "" for any other byte."""
    char = chr(byte)
    return "" if char not in _ALNUM else "a" if char.islower() else "A" if char.isupper() else "0"


def _decode_utf8(data: bytes) -> str:
    """Decode UTF-8; lone surrogates stay, as with `surrogatepass`, and broken bytes give U+FFFD."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        # 0xED never continues a character, so the cuts are at character boundaries.
        parts = re.split(rb"(\xed[\xa0-\xbf][\x80-\xbf])", data)
        modes = ("replace", "surrogatepass")
        return "".join(part.decode("utf-8", modes[number % 2]) for number, part in enumerate(parts))

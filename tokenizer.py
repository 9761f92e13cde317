"""Text to ids and back, byte for byte.

Three tokenizers share one small interface (`encode`, `decode`, `save`, `load`, `vocab_size`,
`fingerprint`): `CodeTokenizer` (hand-written, below), `BPETokenizer` (byte-level BPE trained by the
`tokenizers` library) and `PretrainedTokenizer` (any Hugging Face `tokenizer.json` folder).
`load_tokenizer` picks by what a folder holds.

    tokenizer = CodeTokenizer.train(texts, vocab_size=4096)
    tokenizer.save(Path("tok"))
    load_tokenizer(Path("tok")).decode(tokenizer.encode(text)) == text

How CodeTokenizer works
-----------------------
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

import hashlib
import heapq
import json
import os
import re
import reprlib
import stat
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenization.classes import AS_THE_FILE, BUILDERS, DEFAULT_TOKENS, built_anew, transformers_class
from tokenization.growth import LONGEST_PIECE, Growth, refuse_steep

GENERATION = "generation_config.json"
TRAINING_VERSION = 1  # part of the cache key: raise it when the same texts would train another tokenizer
_LONGEST = 2**26  # bytes of a file; those of large published vocabularies have up to 35 million

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")
PAD, BOS, EOS = range(len(SPECIALS))


class Tokenizer(ABC):
    """What every tokenizer offers.

    `encode` never adds bos or eos and never invents an id: all are below `vocab_size`, the number of rows a
    model needs. `fingerprint` is a sha256 of the content: equal where two tokenizers encode and decode alike.
    """

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str
    eos_ids: tuple[int, ...] = ()  # at which a published model ends too, as its configs name them
    bare_gaps: bool = False  # a run of before this was said, which trained prompts with a gap without start
    markers: tuple[int, ...] = ()  # ids without a text of their own, which change that of the next one
    heals: bool = True  # whether the ends of prompts are healed (tokenization/healing.py), as in training

    @property
    def start_id(self) -> int | None:
        """What every document and prompt starts with: bos, or eos where there is no bos (as in GPT-2)."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def before(self, gap: bool = False) -> list[int]:
        """What stands before a text in training, evaluation and generation; the one owner of it.

        Args:
            gap: Before the markers of a text with a gap to fill.
        """
        return [] if self.start_id is None or (gap and self.bare_gaps) else [self.start_id]

    def with_start(self) -> Tokenizer:
        """The same with a `start_id`, which training takes: a document's first token is predicted from it."""
        return self

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos and eos."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; pad, bos and eos give "", bytes that are not UTF-8 give U+FFFD.

        Raises:
            ValueError: An id is outside the vocabulary.
        """

    def prompt_ids(self, text: str) -> list[int]:
        """[start] + encode(text): what a model reads before it goes on, as training has a document's ids."""
        return self.before() + self.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        """The UTF-8 text of `ids`, which may end inside of a character; None where one of them is special, or
        texts are not known.
        """
        return None

    def state_after(self, ids: Sequence[int]) -> Hashable:
        """All that the text of one more token hangs on, after these."""
        return bool(ids)

    def token_texts(self, state: Hashable) -> list[bytes | None] | None:
        """The UTF-8 text that each id (vocab_size,) adds in a state, None for those that no text has there;
        None where texts are not known.
        """
        return None

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact spelling, such as `<fim_prefix>`; None if there is none."""
        return None

    def pieces_fingerprint(self, below: int) -> str:
        """SHA-256 of how text becomes ids and of what the ids under `below` spell.

        Equal for the tokenizer of a model and for one that has it with more tokens added, whatever either
        puts before a text.
        """
        return self.fingerprint

    def save(self, folder: Path) -> None:
        """Write readable files into `folder`, each under a temporary name first.

        Ends beside the tokenizer's own stand in generation_config.json, as those of a published model do.
        """
        if self.eos_ids not in ((), (self.eos_id,)):
            text = json.dumps({"eos_token_id": list(self.eos_ids)}, indent=2)
            _write(Path(folder) / GENERATION, text + "\n")
        self._save(Path(folder))

    @classmethod
    def load(cls, folder: Path, as_saved: bool = False) -> Self:
        """Read a folder.

        Args:
            as_saved: It was written here, by `save`, and says all itself; a published one is read as
                transformers reads it, whose class may go before its tokenizer.json.

        Raises:
            ValueError: A file is missing or not what it should be; the sentence names it.
        """
        tokenizer, path = cls._load(Path(folder), as_saved), Path(folder) / GENERATION
        if path.exists():
            # A model may have rows without a token, and end at one; such an id is never written.
            tokenizer.eos_ids = end_ids(_read_json(path), path, tokenizer.vocab_size)
        return tokenizer

    def _save(self, folder: Path) -> None:
        """`save` without the ends."""
        raise NotImplementedError

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        """`load` without the ends."""
        raise NotImplementedError

    def _checked(self, ids: Iterable[int]) -> Iterator[int]:
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(
                    f"token id {id} is outside this tokenizer's vocabulary of {self.vocab_size} rows: "
                    "decode with the tokenizer that the ids came from"
                )
            yield int(id)


def load_tokenizer(folder: Path, as_saved: bool = False) -> Tokenizer:
    """The tokenizer saved in `folder`, whichever kind it is.

    Args:
        as_saved: See `Tokenizer.load`.

    Raises:
        ValueError: The folder holds no tokenizer, or a broken one.
    """
    folder = Path(folder)
    if (folder / _CODE_FILE).exists():
        return CodeTokenizer.load(folder)
    if not any((folder / name).exists() for name in (_HF_FILE, _HF_VOCAB)):
        raise ValueError(f"{folder} holds no tokenizer: expected {_CODE_FILE} or {_HF_FILE} in it")
    config = folder / _HF_CONFIG
    if config.exists() and _read_json(config).get(_OUR_MARK) == BPETokenizer.kind:
        return BPETokenizer.load(folder)
    return PretrainedTokenizer.load(folder, as_saved)


def end_ids(values: dict[str, Any], path: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids below `vocab_size` that end a text by a config's eos_token_id, one or a list.

    Published configs name others too, such as -1 for none or the id of a larger relative, which none gives.

    Raises:
        ValueError: It is neither an id nor a list of ids.
    """
    given = values.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(id) is int for id in ids):
        raise ValueError(
            f"{path} has eos_token_id {reprlib.repr(given)}; it must be an id, or a list of such ids"
        )
    return tuple(dict.fromkeys(id for id in ids if 0 <= id < vocab_size))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"the tokenizer file {path} is no regular file; put the file itself there")
        if found.st_size > _LONGEST:
            raise ValueError(
                f"the tokenizer file {path} has {found.st_size} bytes; at most {_LONGEST} are read"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the tokenizer file {path}: {error}") from error


def _parse_json(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the tokenizer file {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"the tokenizer file {name} holds a {type(value).__name__} where an object is expected"
        )
    return value


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(_read(path), str(path))


def _hash(kind: str, content: Any) -> str:
    text = json.dumps([kind, content], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_training(texts: Iterable[str], vocab_size: int, smallest: int, why: str) -> None:
    if isinstance(texts, str):
        raise ValueError("train takes an iterable of texts, not one string: pass [text]")
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is below {smallest}, the room that {why} need: raise it")


# ------------------------------------------------------------------------------------------------------------
# CodeTokenizer

_CODE_FILE = "code_tokenizer.json"
_CODE_FORMAT = "plumb code tokenizer"
_CODE_VERSION = 1

_BYTE = len(SPECIALS)  # id of byte 0
LOW, CAP, UP, JLOW, JCAP, JUP, SNAKE = range(_BYTE + 256, _BYTE + 263)
_FIRST_PIECE = SNAKE + 1
_JOIN = JLOW - LOW  # from the marker of a case to that of the same case, joined
_USUAL, _JOINED = 0, -1  # what a word is expected to be, beside UP: see _words_of

_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_IDENTIFIER = r"[A-Za-z0-9]++(?:_[A-Za-z0-9]++)*+"
# The quantifiers are possessive: a line of a million characters is passed once. No unit both follows a letter
# or digit and starts with one, so the character before is all a decoder needs to place the implied spaces.
_UNIT = re.compile(
    rf"(?<=[A-Za-z0-9]) {_IDENTIFIER}"
    rf"|{_IDENTIFIER}"
    rf"| *+{_PUNCTUATION}++(?: {_PUNCTUATION}++)*+(?: (?! ))?"
    r"|(?:\r?\n)++[ \t]*+"
    r"| ++|[^\x00-\x7f]++|[\x00-\x1f\x7f]"
)
_CHUNK = 64  # characters that are segmented together: bounds the work on runs of a million
_WORD = re.compile(rf"[A-Z]{{1,{_CHUNK}}}(?![a-z])|[A-Z]?[a-z]{{1,{_CHUNK}}}|[0-9]{{1,{_CHUNK}}}|_")
_MAX_PIECE = 24  # characters
_MAX_CACHE = 1 << 18  # entries; 10 MB of source has 67,000 different units
_SPARE = 1.25  # pieces learned for each one kept: the ones that later merges made idle are dropped
_ROUNDS = 3

_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_DIGITS = frozenset("0123456789")
_ALNUM = _LETTERS | _DIGITS
_ALNUM_BYTES = frozenset(map(ord, _ALNUM))

_HEAD, _TAIL, _PLAIN = "^", "-", "="  # first character of a symbol while pieces are learned

Trie = dict[str, Any]  # nested by character; the id of a piece stands under "" at its end


def _case_of(word: str) -> int:
    """LOW, CAP or UP. One capital alone is UP, so that both words of `T_MAX` are."""
    return LOW if word[-1] not in _LETTERS or word.islower() else UP if word.isupper() else CAP


def _in_case(lower: str, case: int) -> str:
    return lower.upper() if case == UP else lower.capitalize() if case == CAP else lower


def _is_identifier(unit: str) -> bool:
    return unit[0] in _ALNUM or (unit[0] == " " and unit[1:2] in _ALNUM)


def _words_of(unit: str) -> Iterator[tuple[int, str]]:
    """The words of an identifier, each with what is expected of it: _USUAL case, UP, or to be _JOINED.

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
    """A function's answers; all forgotten when they are too many, and none kept for a long key."""

    def __init__(self, function: Callable[[Any], Iterable[int]]) -> None:
        self.function = function

    def __missing__(self, key: Any) -> Iterable[int]:
        value = self.function(key)
        if len(key) <= _CHUNK:
            if len(self) >= _MAX_CACHE:
                self.clear()
            self[key] = value
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
        self.fingerprint = _hash(self.kind, [_CODE_VERSION, self.heads, self.tails, self.plain])

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
                ids.append(_BYTE + ord(" "))  # bytes imply no space
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
        if min(ids) < _FIRST_PIECE:  # bytes know no case, so the whole word is bytes
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

    def _walk(self, ids: Iterable[int], parts: list[bytes]) -> tuple[int, int, int, bool]:
        """Append the bytes of ids to `parts`; returns last, case, marker and capitals after them."""
        last = 0  # the byte before; 0 also after a special token, which no space is implied across
        case, marker, capitals = LOW, 0, False  # capitals: SNAKE has just come after a capital
        for id in self._checked(ids):
            if id >= _FIRST_PIECE:
                if id < self._first_tail:
                    if last in _ALNUM_BYTES and marker < JLOW:
                        parts.append(b" ")
                    if marker:
                        case = marker if marker < JLOW else marker - _JOIN
                    else:
                        case = UP if capitals else self._usual.get(id, LOW)
                piece = self._forms[id - _FIRST_PIECE][case - LOW]
                parts.append(piece)
                last, marker, capitals = piece[-1], 0, False
            elif id == SNAKE:
                parts.append(b"_")
                last, marker, capitals = ord("_"), 0, 65 <= last <= 90
            elif id >= LOW:
                marker = id
            elif id >= _BYTE:
                parts.append(bytes((id - _BYTE,)))
                last, marker, capitals = id - _BYTE, 0, False
            else:
                last, marker, capitals = 0, 0, False
        return last, case, marker, capitals

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        ids, parts = list(ids), []
        self._walk(ids, parts)
        return None if min(ids, default=_BYTE) < _BYTE else b"".join(parts)

    def state_after(self, ids: Sequence[int]) -> Hashable:
        """What `token_texts` takes: the kind of the character before, case, marker and capitals."""
        last, case, marker, capitals = self._walk(ids, [])
        before = chr(last)
        kind = "a" if before.islower() else "A" if before.isupper() else "0" if before.isdigit() else ""
        return kind if last < 128 else "", case, marker, capitals

    def token_texts(self, state: Hashable) -> list[bytes | None]:
        """As of every tokenizer. After a marker there are the heads only that `encode` writes behind it."""
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
        """Each id for a reader: `JUP`, `http` as it is stored, ` = `, `(`, `<0xE2>`, `<|eos|>`."""
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
        # Pieces hold no lone surrogates: a file cannot be UTF-8 with them, and as \u escapes two of them
        # would come back as one character.
        _write(Path(folder) / _CODE_FILE, json.dumps(content, ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        path = Path(folder) / _CODE_FILE
        content = _read_json(path)
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
            vocab_size: Most ids the tokenizer may have, specials, bytes and markers included. There are fewer
                where the corpus has too few pieces that are frequent enough, and by the few pieces that the
                last choice leaves idle.
            min_count: A piece is taken only if it occurs more than this many times in `texts`.

        Raises:
            ValueError: `vocab_size` leaves no room, `min_count` is negative, or there is no text.
        """
        _check_training(texts, vocab_size, _FIRST_PIECE, "special tokens, bytes and markers")
        if min_count < 0:
            raise ValueError(f"min_count {min_count} is below 0")
        units: Counter[str] = Counter()
        for text in texts:
            units.update(_UNIT.findall(text))
        if not units:
            raise ValueError("there is no text to train a tokenizer on: every document is empty")

        words: Counter[tuple[int, str]] = Counter()
        chunks: Counter[str] = Counter()
        symbols: Counter[str] = Counter()  # the same, as _learn_pieces wants it
        for unit, count in units.items():
            if not _is_identifier(unit):
                for chunk in _chunks(unit):
                    chunks[chunk] += count
                    symbols[_PLAIN + chunk] += count
                continue
            for expected, word in _words_of(unit):
                if word != "_":
                    words[expected, word] += count
                    joined_digits = expected == _JOINED and word[0] in _DIGITS
                    symbols[(_TAIL if joined_digits else _HEAD) + word.lower()] += count

        room = vocab_size - _FIRST_PIECE
        single, merged = _learn_pieces(symbols, room, min_count)
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
        kinds = {
            kind: [piece[1:] for piece in symbols if piece[0] == kind] for kind in (_HEAD, _TAIL, _PLAIN)
        }
        return cls(
            [_in_case(head, usual.get(head, LOW)) for head in kinds[_HEAD]], kinds[_TAIL], kinds[_PLAIN]
        )

    def _count(
        self, words: Counter[tuple[int, str]], chunks: Counter[str]
    ) -> tuple[Counter[str], dict[str, int]]:
        """Uses of each piece (written as _learn_pieces does), and the commonest case of each head."""
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
        pieces = [_HEAD + head.lower() for head in self.heads]
        pieces += [_TAIL + tail for tail in self.tails]
        pieces += [_PLAIN + piece for piece in self.plain]
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
        if not 0 < len(piece) <= _MAX_PIECE:
            raise ValueError(f"a piece of {name} has {len(piece)} characters; 1 to {_MAX_PIECE} are allowed")
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
    """A piece's bytes as LOW, CAP and UP; of a capitalised word only the head has the capital."""
    capitalised = lower.capitalize() if head else lower
    return lower.encode(), capitalised.encode(), lower.upper().encode()


def _fewest(
    text: str, first: Trie, rest: Trie, byte_cost: int, usual: dict[int, int], case: int
) -> list[int]:
    """`text` as the fewest tokens, one from `first` and then from `rest`; at a tie, longer ones first.

    A character without a piece costs `byte_cost` for each of its bytes, and a first piece whose `usual` case
    is not `case` costs one more, the marker's. Work is len(text) * _MAX_PIECE at most.
    """
    size = len(text)
    costs = [0] * (size + 1)
    steps: list[tuple[int, int]] = [(0, 0)] * size  # where the best piece from here ends, and its id or -1
    for start in range(size - 1, -1, -1):
        best = costs[start + 1] + byte_cost * len(text[start].encode("utf-8", "surrogatepass"))
        step = (start + 1, -1)
        node = rest if start else first
        for end in range(start, size):
            node = node.get(text[end])
            if node is None:
                break
            id = node.get("")
            if id is not None:
                cost = costs[end + 1] + 1
                if not start and usual.get(id, case) != case:
                    cost += 1
                if cost <= best:
                    best, step = cost, (end + 1, id)
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


def _decode_utf8(data: bytes) -> str:
    """UTF-8 with lone surrogates as `surrogatepass` has them, and U+FFFD for what is no UTF-8."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        # 0xED never continues a character, so the cuts are at character boundaries.
        parts = re.split(rb"(\xed[\xa0-\xbf][\x80-\xbf])", data)
        modes = ("replace", "surrogatepass")
        return "".join(part.decode("utf-8", modes[number % 2]) for number, part in enumerate(parts))


def _learn_pieces(symbols: Counter[str], room: int, min_count: int) -> tuple[list[str], list[str]]:
    """Single characters, and what byte-pair merges make of them, all with their kind as first character.

    Args:
        symbols: How often each word or plain unit occurs, its kind before it.
        room: Pieces that the vocabulary has room for. Singles stay within it; there are more merges, by
            `_SPARE`, because those that end up unused are to be dropped.
    """
    single: Counter[str] = Counter()
    for symbol, count in symbols.items():
        for char in _characters(symbol):
            single[char] += count
    frequent = [
        char for char, count in sorted(single.items(), key=lambda x: (-x[1], x[0])) if count > min_count
    ]
    # ASCII characters of plain units need no piece: their bytes have tokens. Other single characters get an
    # eighth of the room, lest thousands of ideographs leave none for words.
    ascii_plain = {char for char in frequent if char[0] == _PLAIN and char[1] < "\x80"}
    wide = [c for c in frequent if c[1] >= "\x80" and not "\ud800" <= c[1] <= "\udfff"][: room // 8]
    kept = [char for char in frequent if char[0] != _PLAIN][: room - len(wide)] + wide
    known = ascii_plain.union(kept)

    sequences: list[list[str]] = []
    counts: list[int] = []
    for symbol, count in symbols.items():
        run: list[str] = []
        for char in [*_characters(symbol), ""]:
            if char in known:
                run.append(char)
                continue
            if len(run) > 1:
                sequences.append(run)
                counts.append(count)
            run = []
    return kept, _merge(sequences, counts, max(0, int(room * _SPARE) - len(kept)), min_count)


def _characters(symbol: str) -> list[str]:
    kind = symbol[0]
    rest = _TAIL if kind == _HEAD else kind
    return [kind + symbol[1], *(rest + char for char in symbol[2:])]


def _merge(sequences: list[list[str]], counts: list[int], room: int, min_count: int) -> list[str]:
    """The pieces made by joining the commonest adjacent pair, again and again; changes `sequences`.

    Counts are kept up to date from the sequences a merge touches, so the work follows the number of changes.
    The heap holds stale counts too: an entry is trusted only if it still agrees with the current count.
    """
    totals: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        for pair in pairwise(sequence):
            totals[pair] += count
            places[pair].add(index)
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    made: dict[str, None] = {}  # two pairs can make the same piece
    while heap and len(made) < room:
        negative, pair = heapq.heappop(heap)
        left, right = pair
        if -negative != totals[pair] or len(left) + len(right) - 2 > _MAX_PIECE:
            continue
        if -negative <= min_count:
            break
        piece = left + right[1:]
        made[piece] = None
        changed: set[tuple[str, str]] = set()
        for index in places.pop(pair):
            old, new, at = sequences[index], [], 0
            while at < len(old):
                if old[at] == left and old[at + 1 : at + 2] == [right]:
                    new.append(piece)
                    at += 2
                else:
                    new.append(old[at])
                    at += 1
            if len(new) == len(old):  # an earlier merge has taken the pair away from here
                continue
            for other in pairwise(old):
                totals[other] -= counts[index]
                changed.add(other)
            for other in pairwise(new):
                totals[other] += counts[index]
                places[other].add(index)
                changed.add(other)
            sequences[index] = new
        for other in changed:
            if totals[other] > min_count:
                heapq.heappush(heap, (-totals[other], other))
    return list(made)


# ------------------------------------------------------------------------------------------------------------
# The tokenizers library's

_HF_FILE = "tokenizer.json"
_HF_CONFIG = "tokenizer_config.json"
_HF_SPECIALS = "special_tokens_map.json"
_HF_ADDED = "added_tokens.json"
_HF_VOCAB, _HF_MERGES = "vocab.json", "merges.txt"
_END_OF_TEXT = "<|endoftext|>"
_OUR_MARK = "plumb_kind"
# Of tokenizer_config.json: whether a text with a gap was trained with what stands before every other. A base
# or run that was made here before this was written had nothing there; published models have, if any text has.
STARTS_GAPS = "plumb_starts_gaps"
# Of tokenizer_config.json: false where the model was trained on prompts whose ends were not healed.
HEALS = "plumb_heals"


def _no_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, which this "
            "tokenizer cannot hold: remove it, or use the `code` tokenizer"
        ) from error
    return text


def _backend(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        raise _library_error(error, f"{name} is not a tokenizer of the tokenizers library") from error
    refuse_steep(backend, name)
    return backend


def _refuse_long(backend: tokenizers.Tokenizer, growth: Growth, text: str) -> None:
    normalizer = backend.normalizer
    growth.refuse_long(text, (lambda part: part) if normalizer is None else normalizer.normalize_str)


def _refuse_long_pieces(vocabulary: dict[str, int], name: str) -> None:
    longest = max(map(len, vocabulary), default=0)
    if longest > LONGEST_PIECE:
        raise ValueError(
            f"{name} has a token of {longest:,} characters, and at most {LONGEST_PIECE:,} are known; "
            "take it out"
        )


def _put_before(token: str, id: int) -> dict[str, Any]:
    """The part of tokenizer.json that puts one token before a text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def _pieces_fingerprint(backend: tokenizers.Tokenizer, below: int) -> str:
    parts = json.loads(backend.to_str())
    added = {id: token.content for id, token in backend.get_added_tokens_decoder().items() if id < below}
    rules = _without_offsets([parts[name] for name in ("normalizer", "pre_tokenizer", "model", "decoder")])
    return _hash("pieces", [rules, sorted(added.items())])


def _without_offsets(part: Any) -> Any:
    """A part of tokenizer.json without what bears on the places of tokens in a text alone."""
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part


def _library_error(error: BaseException, what: str) -> BaseException:
    """What to raise: the library raises bare Exception, and a panic of Rust that is not even one."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return ValueError(f"{what}: {' '.join(str(error).split())[:300]}")


def _encoded_many(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    try:
        found = backend.encode_batch_fast([_no_surrogates(text) for text in texts], add_special_tokens=False)
    except BaseException as error:
        raise _library_error(error, "the rules of this tokenizer fail on a text") from error
    return [one.ids for one in found]


def _joined(texts: list[bytes | None] | None, ids: Iterable[int]) -> bytes | None:
    """The texts of some ids as one; None where one is not known."""
    found = [None if texts is None else texts[id] for id in ids]
    return None if None in found else b"".join(text for text in found if text is not None)


def _token_texts(
    backend: tokenizers.Tokenizer, vocab_size: int, plain: Container[int] = ()
) -> list[bytes | None] | None:
    """The bytes of each id (vocab_size,) of a byte-level vocabulary, or of one that writes a space as U+2581;
    None for special tokens. None where the decoder is of another kind.

    Args:
        plain: Pieces of text that the file calls special.
    """
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if not kinds <= {"ByteLevel"} and not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    texts: list[bytes | None] = [None] * vocab_size
    for piece, id in backend.get_vocab(with_added_tokens=False).items():
        if kinds == {"ByteLevel"}:
            known = all(char in _BYTE_OF for char in piece)
            texts[id] = bytes(_BYTE_OF[char] for char in piece) if known else None
        elif byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            texts[id] = bytes.fromhex(byte[1])
        else:
            texts[id] = piece.replace("\u2581", " ").encode()
    for id, token in backend.get_added_tokens_decoder().items():
        if id not in plain:
            texts[id] = None if token.special else token.content.encode()
    return texts


def _byte_characters() -> dict[str, int]:
    """The character of a byte-level vocabulary that stands for each byte: itself where it is printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


class BPETokenizer(Tokenizer):
    """Byte-level BPE, as of GPT-2, trained by the `tokenizers` library; its folder opens in transformers.

    The text of a special token inside a document is text: `encode("<|eos|>")` has no special id.
    """

    kind = "bpe"

    def __init__(self, tokenizer_json: str) -> None:
        backend = _backend(tokenizer_json, "the tokenizer")
        self._tokenizer, self._growth = backend, refuse_steep(backend, "the tokenizer")
        ids = [backend.token_to_id(token) for token in SPECIALS]
        if ids != [PAD, BOS, EOS]:
            raise ValueError(f"the special tokens {SPECIALS} have ids {ids}; {[PAD, BOS, EOS]} are expected")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.pad_id, self.bos_id, self.eos_id = PAD, BOS, EOS
        vocabulary = backend.get_vocab()
        _refuse_long_pieces(vocabulary, "the tokenizer")
        self.vocab_size = max(vocabulary.values()) + 1
        # What stands before a text is the same for all of this kind, and older files do not say it.
        state = json.loads(backend.to_str())
        self.fingerprint = _hash(self.kind, state | {"post_processor": None})
        self._json = json.dumps(
            state | {"post_processor": _put_before(SPECIALS[BOS], BOS)}, ensure_ascii=False, indent=2
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._json,), {"heals": self.heals}

    def pieces_fingerprint(self, below: int) -> str:
        return _pieces_fingerprint(self._tokenizer, below)

    def encode(self, text: str) -> list[int]:
        text = _no_surrogates(text)
        _refuse_long(self._tokenizer, self._growth, text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return _encoded_many(self._tokenizer, texts)

    @cached_property
    def _bytes(self) -> list[bytes | None] | None:
        return _token_texts(self._tokenizer, self.vocab_size)

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        return _joined(self._bytes, ids)

    def token_texts(self, state: Hashable) -> list[bytes | None] | None:
        return self._bytes

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(
            [id for id in self._checked(ids) if id > EOS], skip_special_tokens=False
        )

    def _save(self, folder: Path) -> None:
        pad, bos, eos = SPECIALS
        config = {_OUR_MARK: self.kind, "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
        config |= {"bos_token": bos, "eos_token": eos, "clean_up_tokenization_spaces": False}
        config |= {} if self.heals else {HEALS: False}
        # tokenizer.json comes last: a folder without it is refused, one without the mark would be misread.
        _write(Path(folder) / _HF_CONFIG, json.dumps(config, indent=2) + "\n")
        _write(Path(folder) / _HF_FILE, self._json + "\n")

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        path = Path(folder) / _HF_FILE
        text = _read(path)
        try:
            tokenizer = cls(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        config = Path(folder) / _HF_CONFIG
        tokenizer.heals = not config.exists() or _read_json(config).get(HEALS) is not False
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_count: int = 0) -> BPETokenizer:
        """Learn merges from `texts`; a merge is taken if its pair occurs more than `min_count` times.

        Raises:
            ValueError: `vocab_size` leaves no room, or a text holds a lone surrogate.
        """
        _check_training(texts, vocab_size, _BYTE + 256, "special tokens and bytes")
        if min_count < 0:
            raise ValueError(f"min_count {min_count} is below 0")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_count + 1,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(map(_no_surrogates, texts), trainer)
        return cls(backend.to_str())


class PretrainedTokenizer(Tokenizer):
    """A Hugging Face tokenizer folder; ids are those of transformers with `add_special_tokens=False`.

    There is one exception, since a corpus may hold anything: the text of a special token inside a document is
    text, as with `split_special_tokens=True` in transformers. So `encode("<|endoftext|>")` is several ids and
    decodes to what it was; `encode("<|endoftext|>", specials=True)` is the one id, and `token_id` gives the
    ids that a prompt's layout is made of. The markers of fill-in-the-middle count as special, whatever their
    file says; other added tokens that are not special, such as runs of spaces, are recognised either way.

    `bos_id`, `eos_id` and `pad_id` are None where the folder names none. Only these three decode to "".
    `decode(encode(s)) == s` where the tokenizer loses nothing: byte-level BPE without a normaliser, as of
    StarCoder, CodeGen, Phi and Llama 3.

    Args:
        files: The text of `tokenizer.json` and, where there are, `tokenizer_config.json`,
            `special_tokens_map.json` and `added_tokens.json`.
    """

    kind = "pretrained"

    def __init__(self, files: dict[str, str]) -> None:
        self._files = dict(files)
        backend = self._tokenizer = _backend(files[_HF_FILE], _HF_FILE)
        # Files saved after a training run carry its truncation and padding; transformers resets both.
        backend.no_truncation()
        backend.no_padding()
        config, special_map, added = (
            _parse_json(files[name], name) if name in files else {}
            for name in (_HF_CONFIG, _HF_SPECIALS, _HF_ADDED)
        )
        if "added_tokens_decoder" in config:  # it holds all that the two older files would say
            special_map, added = {}, {}
        named = {**config, **special_map}
        self._set_prefix_space(config.get("add_prefix_space"))
        self._add_tokens(config.get("added_tokens_decoder") or {}, added, set(_named_specials(named)))
        self._add_named_specials(named)
        self.bos_id, self.eos_id, self.pad_id = (
            self._special_id(named, f"{name}_token") for name in ("bos", "eos", "pad")
        )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        _refuse_long_pieces(vocabulary, _HF_FILE)
        self.vocab_size = max(vocabulary.values()) + 1
        self._growth = refuse_steep(self._tokenizer, _HF_FILE)
        self._start_id = self._first_of_a_text()
        state = json.loads(self._tokenizer.to_str())
        ids = [self._start_id, self.bos_id, self.eos_id, self.pad_id]
        self.fingerprint = _hash(self.kind, [state, *ids, "specials are text"])
        unknown = state["model"].get("unk_token")  # which any text may give
        # A folder may fill up with a piece of plain text, such as "!", that every text may hold.
        plain = {self.pad_id} - {self.bos_id, self.eos_id, None}
        plain = {id for id in plain if id is not None and _is_plain_piece(state["model"], id)}
        self._plain = frozenset(plain)
        silent = {self.bos_id, self.eos_id, self.pad_id} - plain
        self._silent = frozenset(id for id in silent if id is not None)
        self._controls = frozenset(
            id
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content != unknown and id not in plain
        )
        self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"eos_ids": self.eos_ids, "bare_gaps": self.bare_gaps, "heals": self.heals}
        return type(self), (self._files,), state

    def _set_prefix_space(self, wanted: Any) -> None:
        state = json.loads(self._tokenizer.to_str())
        before = state.get("pre_tokenizer") or {}
        if isinstance(wanted, bool) and before.get("add_prefix_space", wanted) != wanted:
            before["add_prefix_space"] = wanted
            self._tokenizer = _backend(json.dumps(state), _HF_FILE)

    def _add_tokens(self, decoder: Any, added: dict[str, Any], specials: set[str]) -> None:
        """Take in the tokens that tokenizer.json lacks or gives other rules, at the ids of the other files.

        What `tokenizer_config.json` says of a token goes before what `tokenizer.json` says, and that before
        `added_tokens.json`.
        """
        present = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        declared: dict[int, tuple[tokenizers.AddedToken, str]] = {}
        try:
            for content, id in added.items():
                token = _added_token(content, special=content in specials)
                declared[int(id)] = (present.get(content, token), _HF_ADDED)
            for id, token in decoder.items():
                declared[int(id)] = (_added_token(token, special=bool(token.get("special"))), _HF_CONFIG)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{_HF_CONFIG} or {_HF_ADDED} has a broken added token: {error}") from error
        for id, (token, file) in sorted(declared.items()):
            before = present.get(token.content)
            if before is None or before.__getstate__() != token.__getstate__():
                self._tokenizer.add_tokens([token])
            actual = self._tokenizer.token_to_id(token.content)
            if actual != id:
                raise ValueError(
                    f"{file} gives the token {token.content!r} id {id}, {_HF_FILE} gives it {actual}"
                )

    def _add_named_specials(self, named: dict[str, Any]) -> None:
        present = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        for content, value in _named_specials(named).items():
            token = present.get(content) or _added_token(value, special=True)
            token.special = True  # a file may name a token as the end and not say that it is special
            self._tokenizer.add_special_tokens([token])
        for content, token in present.items():
            if not token.special and _MARKER.fullmatch(content):
                token.special = True
                self._tokenizer.add_special_tokens([token])

    def _first_of_a_text(self) -> int | None:
        """The id that tokenizer.json puts before a text; transformers reads no other file for it."""
        try:
            plain, whole = (
                self._tokenizer.encode("a", add_special_tokens=more).ids for more in (False, True)
            )
        except BaseException as error:
            raise _library_error(error, f"the rules of {_HF_FILE} fail on a text") from error
        n = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        if n > 1:
            raise ValueError(f"{_HF_FILE} puts {n} tokens before a text, and at most one is known")
        return whole[0] if n else None

    @property
    def start_id(self) -> int | None:
        """What `transformers.AutoTokenizer` puts before a text, as bos of Llama; None where that is nothing.

        Published models without it (StarCoder, CodeGen, Phi, Qwen) are run and scored on prompts that start
        with their text; in their training a document follows the end of another.
        """
        return self._start_id

    def with_start(self) -> PretrainedTokenizer:
        """The same, where its files put nothing before a text, with files that put bos there, or else eos.

        So whoever opens the files of what was trained with it gets the prompts that were trained.
        """
        start = self.eos_id if self.bos_id is None else self.bos_id
        if self._start_id is not None or start is None:
            return self
        token, state = self._tokenizer.id_to_token(start), json.loads(self._files[_HF_FILE])
        assert token is not None, "its id was found by its text"
        state["post_processor"] = _put_before(token, start)
        return self._with(self._files | {_HF_FILE: json.dumps(state, ensure_ascii=False)})

    def _with(self, files: dict[str, str]) -> PretrainedTokenizer:
        """The same with other files."""
        other = PretrainedTokenizer(files)
        other.eos_ids, other.bare_gaps, other.heals = self.eos_ids, self.bare_gaps, self.heals
        return other

    def _special_id(self, named: dict[str, Any], key: str) -> int | None:
        value = named.get(key)
        return None if value is None else self._tokenizer.token_to_id(_content(value))

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def pieces_fingerprint(self, below: int) -> str:
        return _pieces_fingerprint(self._tokenizer, below)

    def with_tokens(self, tokens: Iterable[str]) -> PretrainedTokenizer:
        """The same with these tokens added, at the next free ids; text that spells one becomes that token.

        Raises:
            ValueError: One of them is empty, given twice or a token already.
        """
        backend, decoder = _backend(self._tokenizer.to_str(), _HF_FILE), {}
        for number, token in enumerate(tokens, self.vocab_size):
            if not token:
                raise ValueError("a new token is empty; leave it out")
            if (old := backend.token_to_id(token)) is not None:
                twice = str(old) in decoder
                raise ValueError(
                    f"the new token {token!r} is "
                    + ("given twice" if twice else f"in the vocabulary already, as id {old}")
                    + "; leave it out"
                )
            backend.add_tokens([tokenizers.AddedToken(token, normalized=False)])
            if backend.token_to_id(token) != number:  # an id in between was free
                raise ValueError(f"the new token {token!r} would get id {backend.token_to_id(token)}")
            decoder[str(number)] = {"content": token, "normalized": False, "special": False}
        files = self._files | {_HF_FILE: backend.to_str()}
        config = _parse_json(files.get(_HF_CONFIG, "{}"), _HF_CONFIG)
        config.pop(_OUR_MARK, None)  # with tokens of its own it is no plain byte-level BPE any more
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= decoder
        files[_HF_CONFIG] = json.dumps(config, indent=2)
        return self._with(files)

    def within(self, size: int) -> PretrainedTokenizer:
        """The same without the added tokens whose ids are `size` or above, for a model of `size` rows.

        Fine-tunes add a pad token and leave the model as it is, which then has no row for it.

        Raises:
            ValueError: More than added tokens lie there, so that it is the tokenizer of another model.
        """
        beyond = {
            token.content: id
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            if id >= size
        }
        left = self._with({name: _without(text, name, beyond) for name, text in self._files.items()})
        if left.vocab_size > size or (left.start_id or 0) >= size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} ids and the model has {size}, and pieces of text lie "
                "beyond; one of the two belongs to another model"
            )
        left.eos_ids = tuple(id for id in self.eos_ids if id < size)
        return left

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The ids of `text`, without bos and eos.

        Args:
            specials: The spelling of a special token is that token, as is usual in transformers; only for
                text from whoever may command the model.

        Raises:
            ValueError: A lone surrogate, or a special token's spelling that has no other pieces.
        """
        backend = self._with_specials if specials else self._tokenizer
        text = _no_surrogates(text)
        _refuse_long(backend, self._growth, text)
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise _library_error(
                error, "the rules of this tokenizer's added tokens fail on the text"
            ) from error
        if not specials and not self._controls.isdisjoint(ids):
            token = self._tokenizer.id_to_token(next(id for id in ids if id in self._controls))
            raise ValueError(
                f"the text spells the special token {token!r}, which this tokenizer cannot write as text: "
                "take it out of the text"
            )
        return ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        found = _encoded_many(self._tokenizer, texts)
        return [
            ids if self._controls.isdisjoint(ids) else self.encode(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    @cached_property
    def _bytes(self) -> list[bytes | None] | None:
        """Of each id, None for special tokens; None where the decoder is of a kind that is not known."""
        silent = self._silent | self._controls
        texts = _token_texts(self._tokenizer, self.vocab_size, self._plain)
        return texts and [None if id in silent else text for id, text in enumerate(texts)]

    @cached_property
    def _adds_space(self) -> bool:
        """Whether it writes a text as if a space stood before it, which `decode` takes off again."""
        return _joined(self._bytes, self.encode("a")) == b" a"

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        text = _joined(self._bytes, ids)
        return text[1:] if text and self._adds_space and text.startswith(b" ") else text

    def token_texts(self, state: Hashable) -> list[bytes | None] | None:
        if state or not self._bytes or not self._adds_space:
            return self._bytes
        return [text[1:] if text and text.startswith(b" ") else text for text in self._bytes]

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """A second one, since what counts as text is a state of the whole."""
        return _backend(self._tokenizer.to_str(), _HF_FILE)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [id for id in self._checked(ids) if id not in self._silent]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _save(self, folder: Path) -> None:
        """Write the files as they were loaded; vocab.json and merges.txt have become tokenizer.json."""
        config = _parse_json(self._files.get(_HF_CONFIG, "{}"), _HF_CONFIG)
        marked = {key: value for key, value in config.items() if key != HEALS}
        marked |= {} if self.heals else {HEALS: False}
        marked |= {} if self.start_id is None else {STARTS_GAPS: not self.bare_gaps}
        files = self._files if marked == config else self._files | {_HF_CONFIG: json.dumps(marked, indent=2)}
        for name, text in sorted(files.items(), key=lambda item: item[0] == _HF_FILE):
            _write(Path(folder) / name, text)

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        folder = Path(folder)
        files = _read_files(folder)
        if _HF_FILE not in files and not all((folder / name).exists() for name in (_HF_VOCAB, _HF_MERGES)):
            raise ValueError(
                f"{folder / _HF_FILE} is missing: a pretrained tokenizer is a folder with that file, "
                f"or with {_HF_VOCAB} and {_HF_MERGES}"
            )
        try:
            if _HF_FILE not in files:
                files |= _from_merges(_read(folder / _HF_VOCAB), _read(folder / _HF_MERGES), files)
            elif not as_saved:
                files = _as_opened(files, folder, ("LlamaTokenizer", "CodeLlamaTokenizer"))
            tokenizer = cls(files)
        except ValueError as error:
            raise ValueError(f"in {folder}: {error}") from error
        config = _parse_json(files.get(_HF_CONFIG, "{}"), _HF_CONFIG)
        said, tokenizer.heals = config.get(STARTS_GAPS), config.get(HEALS) is not False
        made_here = as_saved or [tokenizer.token_id(token) for token in SPECIALS] == [PAD, BOS, EOS]
        tokenizer.bare_gaps = made_here if said is None else said is False
        return tokenizer


def opened_by_transformers(folder: Path) -> PretrainedTokenizer:
    """The tokenizer that AutoTokenizer makes of a folder with tokenizer.json, foretold by its rules.

    `load_tokenizer` follows those of Llama's classes alone: the other classes build what the published files
    say already, or forget a part that the model was trained with, such as StarCoder2's digits.
    """
    return PretrainedTokenizer(_as_opened(_read_files(folder), folder, tuple(BUILDERS)))


def _read_files(folder: Path) -> dict[str, str]:
    names = (_HF_FILE, _HF_CONFIG, _HF_SPECIALS, _HF_ADDED)
    return {name: _read(folder / name) for name in names if (folder / name).exists()}


def _as_opened(files: dict[str, str], folder: Path, classes: Container[str]) -> dict[str, str]:
    """The files with what the class that transformers takes says otherwise, if it is one of `classes`."""
    config = _parse_json(files.get(_HF_CONFIG, "{}"), _HF_CONFIG)
    model = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not isinstance(named, str | None) or not isinstance(model.get("model_type"), str | None):
        raise ValueError(f"tokenizer_class {named!r} or model_type {model.get('model_type')!r} is no text")
    name = transformers_class(named, model.get("model_type"), files[_HF_FILE])
    if name == AS_THE_FILE and "add_prefix_space" in config:
        del config["add_prefix_space"]  # which it keeps and never heeds
        return files | {_HF_CONFIG: json.dumps(config, indent=2)}
    before = _parse_json(files[_HF_FILE], _HF_FILE)
    if name in BUILDERS and isinstance(before.get("model"), dict) and before["model"].get("dropout"):
        before["model"]["dropout"] = None  # which these classes leave out
        files = files | {_HF_FILE: json.dumps(before, ensure_ascii=False)}
    if name not in classes:
        adds = isinstance(before.get("pre_tokenizer"), dict) and before["pre_tokenizer"].get(
            "add_prefix_space"
        )
        if name in BUILDERS and adds and config.get("add_prefix_space") is None:
            return files | {_HF_CONFIG: json.dumps(config | {"add_prefix_space": False}, indent=2)}
        return files
    state = built_anew(before, name, config)
    ids = _backend(files[_HF_FILE], _HF_FILE).get_vocab(with_added_tokens=True)
    tokens = {key: token for key, token in DEFAULT_TOKENS.get(name, {}).items() if token in ids}
    named_tokens = tokens | config
    bos = named_tokens.get("bos_token")
    if name == "CodeLlamaTokenizer" and bos is not None and _content(bos) in ids:
        state = state | {"post_processor": _put_before(_content(bos), ids[_content(bos)])}
    if state is not before:
        files = files | {_HF_FILE: json.dumps(state, ensure_ascii=False)}
    return files if named_tokens == config else files | {_HF_CONFIG: json.dumps(named_tokens, indent=2)}


# Markers of layout, which the files of Qwen2.5-Coder and DeepSeek-Coder do not call special.
_MARKER = re.compile(
    r"<\|?(fim[-_](prefix|suffix|middle|pad)|repo_name|file_sep|filename)\|?>|<｜fim▁(begin|hole|end)｜>"
)

# Classes whose vocab.json and merges.txt are byte-level BPE as of GPT-2; None where no class is named. Others
# cut text by rules that only their code or a tokenizer.json holds.
_MERGES_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")


def _from_merges(vocab: str, merges: str, files: dict[str, str]) -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json` of a folder that has vocab.json and merges.txt instead."""
    config = _parse_json(files.get(_HF_CONFIG, "{}"), _HF_CONFIG)
    name = config.get("tokenizer_class")
    if name not in _MERGES_CLASSES:
        raise ValueError(
            f"tokenizer_class is {name!r}, whose {_HF_VOCAB} and {_HF_MERGES} are not read; "
            f"save it with transformers' fast tokenizer, which writes {_HF_FILE}"
        )
    ids = _parse_json(vocab, _HF_VOCAB)
    lines = [line.split(" ") for line in merges.split("\n") if line and not line.startswith("#version")]
    try:
        backend = tokenizers.Tokenizer(models.BPE(ids, [(left, right) for left, right in lines]))
    except BaseException as error:
        raise _library_error(error, f"{_HF_VOCAB} and {_HF_MERGES} do not belong together") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    defaults = {key: _END_OF_TEXT for key in ("bos_token", "eos_token", "unk_token") if _END_OF_TEXT in ids}
    config, state = defaults | config, json.loads(backend.to_str())
    bos = config.get("bos_token")
    if config.get("add_bos_token") and bos is not None and _content(bos) in ids:
        state["post_processor"] = _put_before(_content(bos), ids[_content(bos)])
    text = json.dumps(state, ensure_ascii=False, indent=2)
    return {_HF_FILE: text + "\n", _HF_CONFIG: json.dumps(config, indent=2)}


def _without(text: str, name: str, tokens: Container[str]) -> str:
    """A file of a tokenizer's folder without all that it says of some added tokens."""

    def is_kept(value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return not (isinstance(content, str) and content in tokens)

    values = _parse_json(text, name)
    if name == _HF_FILE:
        values["added_tokens"] = [token for token in values.get("added_tokens") or [] if is_kept(token)]
    elif name == _HF_ADDED:
        values = {content: id for content, id in values.items() if is_kept(content)}
    else:
        values = {key: value for key, value in values.items() if not key.endswith("_token") or is_kept(value)}
        for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            if isinstance(values.get(key), dict):
                values[key] = {k: value for k, value in values[key].items() if is_kept(value)}
            elif isinstance(values.get(key), list):
                values[key] = [value for value in values[key] if is_kept(value)]
    return json.dumps(values, ensure_ascii=False, indent=2)


def _is_plain_piece(model: dict[str, Any], id: int) -> bool:
    """Whether a BPE model makes this id of text: a character, or what a merge gives."""
    if model.get("type") != "BPE":
        return False
    piece = next((piece for piece, own in model["vocab"].items() if own == id), "")
    made = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]}
    return len(piece) == 1 or piece in made


def _named_specials(named: dict[str, Any]) -> dict[str, Any]:
    """The special tokens that a folder names, by their text: `eos_token` and its like, and the lists."""
    values = [value for key, value in named.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = named.get(key) or []
        if not isinstance(extra, (dict, list)):
            raise ValueError(f"{key} in {_HF_CONFIG} or {_HF_SPECIALS} is {extra!r}, which is no list")
        values += list(extra.values() if isinstance(extra, dict) else extra)
    return {_content(value): value for value in reversed(values) if isinstance(value, (str, dict))}


def _content(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise ValueError(f"a special token in {_HF_CONFIG} or {_HF_SPECIALS} is {value!r}, which is no text")
    return text


def _added_token(value: str | dict[str, Any], special: bool) -> tokenizers.AddedToken:
    flags = value if isinstance(value, dict) else {}
    return tokenizers.AddedToken(
        _content(value),
        single_word=bool(flags.get("single_word", False)),
        lstrip=bool(flags.get("lstrip", False)),
        rstrip=bool(flags.get("rstrip", False)),
        normalized=bool(flags.get("normalized", not special)),
        special=special,
    )

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
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, cast

from tokenization.base import Tokenizer, content_hash, refuse_no_room, refuse_one_string
from tokenization.code_pieces import (
    BOS,
    BYTE,
    CAP,
    CODE_FILE,
    CODE_FORMAT,
    CODE_VERSION,
    DIGITS,
    EOS,
    FIRST_PIECE,
    GAPS,
    JCAP,
    JLOW,
    JOIN,
    JOINED,
    JUP,
    LETTERS,
    LOW,
    PAD,
    SNAKE,
    SPECIALS,
    UNIT,
    UP,
    USUAL,
    CodePieces,
    CodeState,
    case_of,
    chunks_of,
    in_case,
    is_identifier,
    words_of,
)
from tokenization.files import read_json, write_file
from tokenization.merges import HEAD, PLAIN, TAIL, learn_pieces

_ROUNDS = 3  # rounds in which uses are counted and a part of the surplus pieces is dropped


class CodeTokenizer(CodePieces, Tokenizer):
    """The tokenizer for source code that the module's docstring describes.

    Args:
        heads: Pieces that start a word or number, letters written in their usual case.
        tails: Pieces that continue one, lower case.
        plain: Pieces of everything else: punctuation, line breaks, spaces, non-ASCII text.
        gaps: Whether there are tokens for gaps, GAPS; older tokenizers have none.

    Ids are: 3 specials, 256 bytes, 7 markers, heads, tails, plain, 3 for gaps.

    Raises:
        ValueError: A piece is empty, too long, given twice, or not of its list's kind.
    """

    kind = "code"
    markers = (LOW, CAP, UP, JLOW, JCAP, JUP)

    def __init__(
        self, heads: Iterable[str], tails: Iterable[str], plain: Iterable[str], gaps: bool = False
    ) -> None:
        super().__init__(heads, tails, plain, gaps)
        self.pad_id, self.bos_id, self.eos_id = PAD, BOS, EOS
        content = [CODE_VERSION, self.heads, self.tails, self.plain]
        self.fingerprint = content_hash(self.kind, [*content, self.gaps] if gaps else content)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.heads, self.tails, self.plain, bool(self.gaps)), {"heals": self.heals}

    def token_id(self, token: str) -> int | None:
        return self._first_gap + self.gaps.index(token) if token in self.gaps else None

    def _step(self, state: CodeState, id: int) -> tuple[bytes, CodeState]:
        (id,) = self._checked([id])
        return super()._step(state, id)

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        ids, parts = list(ids), []
        self._walk(ids, parts)
        is_text = all(BYTE <= id < self._first_gap for id in ids)
        return b"".join(parts) if is_text else None

    def state_after(self, ids: Sequence[int]) -> Hashable:
        """Return (kind of the character before, case, marker, capitals), which `token_texts` takes."""
        return self._walk(ids, []).key

    def token_texts(self, state: Hashable) -> list[bytes | None]:
        """Return `Tokenizer.token_texts`; after a marker only the heads that `encode` writes there."""
        before, case, marker, capitals = cast(tuple[str, int, int, bool], state)
        texts: list[bytes | None] = [None] * self.vocab_size
        space = b" " if before and marker < JLOW else b""
        head_case = marker if marker < JLOW else marker - JOIN
        # A word is joined to digits in any case, and to letters where the case shows that it begins.
        if marker >= JLOW and (not before or (marker, before) in ((JLOW, "a"), (JLOW, "A"), (JUP, "A"))):
            return texts
        for id, forms in enumerate(self._forms[: len(self.heads)], FIRST_PIECE):
            usual = UP if capitals else self._usual.get(id, LOW)
            if not marker:
                texts[id] = space + forms[usual - LOW]
            elif id in self._usual and (marker >= JLOW or usual != head_case):
                texts[id] = space + forms[head_case - LOW]
        if marker:
            return texts
        for id, forms in enumerate(self._forms[len(self.heads) :], self._first_tail):
            texts[id] = forms[case - LOW] if before or id >= self._first_plain else None
        texts[BYTE : BYTE + 256] = [bytes((byte,)) for byte in range(256)]
        texts[SNAKE] = b"_" if before else None
        return texts

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Name each id for a reader: `JUP`, `http` as it is stored, ` = `, `(`, `<0xE2>`, `<|eos|>`."""
        names = [*SPECIALS, *map(chr, range(128)), *(f"<0x{byte:02X}>" for byte in range(128, 256))]
        names += ["LOW", "CAP", "UP", "JLOW", "JCAP", "JUP", "SNAKE", *self.heads, *self.tails, *self.plain]
        names += self.gaps
        return [names[id] for id in self._checked(ids)]

    def _save(self, folder: Path) -> None:
        content: dict[str, Any] = {
            "format": CODE_FORMAT,
            "version": CODE_VERSION,
            "heads": self.heads,
            "tails": self.tails,
            "plain": self.plain,
        }
        if self.gaps:
            content["gaps"] = True
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
        gaps = content.pop("gaps", False) is True
        if set(content) != expected or content["format"] != CODE_FORMAT:
            raise ValueError(f"{path} is not a {CODE_FORMAT}: its keys are {sorted(content)[:9]}")
        if content["version"] != CODE_VERSION:
            raise ValueError(f"{path} has version {content['version']!r}; this Plumb reads {CODE_VERSION}")
        lists = [content[name] for name in ("heads", "tails", "plain")]
        for pieces in lists:
            if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
                raise ValueError(f"{path} must hold three lists of strings: heads, tails, plain")
        try:
            tokenizer = cls(*lists, gaps=gaps)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tokenizer.heals = heals
        return tokenizer

    @staticmethod
    def refuse_small(vocab_size: int) -> None:
        """Raise ValueError for a vocabulary that cannot hold every byte, the special tokens and markers."""
        refuse_no_room(vocab_size, FIRST_PIECE + len(GAPS), "special tokens, bytes and markers")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_count: int = 10) -> CodeTokenizer:
        """Learn pieces from `texts`.

        Args:
            texts: The corpus; it is read once.
            vocab_size: Most ids the tokenizer may have, all but the pieces included. It has fewer
                where the corpus has too few frequent pieces, and where the last choice of pieces leaves
                some of them idle.
            min_count: A piece is taken only if it occurs more than this many times in `texts`.

        Raises:
            ValueError: `vocab_size` leaves no room, `min_count` is negative, or there is no text.
        """
        refuse_one_string(texts)
        cls.refuse_small(vocab_size)
        if min_count < 0:
            raise ValueError(f"min_count {min_count} is below 0")
        units: Counter[str] = Counter()
        for text in texts:
            units.update(UNIT.findall(text))
        if not units:
            raise ValueError("there is no text to train a tokenizer on: every document is empty")

        words: Counter[tuple[int, str]] = Counter()
        chunks: Counter[str] = Counter()
        symbols: Counter[str] = Counter()  # words and chunks as learn_pieces takes them
        for unit, count in units.items():
            if not is_identifier(unit):
                for chunk in chunks_of(unit):
                    chunks[chunk] += count
                    symbols[PLAIN + chunk] += count
                continue
            for expected, word in words_of(unit):
                if word != "_":
                    words[expected, word] += count
                    joined_digits = expected == JOINED and word[0] in DIGITS
                    symbols[(TAIL if joined_digits else HEAD) + word.lower()] += count

        room = vocab_size - (FIRST_PIECE + len(GAPS))
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
        heads = [in_case(head, usual.get(head, LOW)) for head in kinds[HEAD]]
        return cls(heads, kinds[TAIL], kinds[PLAIN], gaps=True)

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
            if expected == USUAL and word[0] in LETTERS and ids[-1] >= FIRST_PIECE:
                head = next(id for id in ids if id >= FIRST_PIECE)
                cases[self.heads[head - FIRST_PIECE].lower()][case_of(word)] += count
        for chunk, count in chunks.items():
            for id in self._encode_plain(chunk):
                by_id[id] += count
        pieces = [HEAD + head.lower() for head in self.heads]
        pieces += [TAIL + tail for tail in self.tails]
        pieces += [PLAIN + piece for piece in self.plain]
        used = Counter({piece: by_id[id] for id, piece in enumerate(pieces, FIRST_PIECE)})
        return used, {
            head: max(counts, key=lambda case: (counts[case], -case)) for head, counts in cases.items()
        }

"""How the tokenizer for source code learns its pieces (tokenization/code.py says what they are).

Words and the texts between them are characters at first, of which the commonest pair is joined, again and
again (Sennrich et al. 2016, arXiv:1508.07909), until there are a quarter more pieces than there is room for.
Then all texts are written in these pieces, and those that serve at most `min_count` times are dropped; so are
the least used, a third of what is too much in each of three rounds. The ids follow use, the commonest first.

A piece bears its kind as its first character: ^ begins a word, - continues one, = stands between words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from reference.tokens import BETWEEN_WORDS, N_GAPS, N_SPECIAL, CodeTokens, case_of, chunks, units, words

HEAD, TAIL, OTHER = "^", "-", "="
N_MARKERS = 7
FIRST_PIECE = N_SPECIAL + 256 + N_MARKERS
LONGEST = 24  # Characters of a piece.
KEPT = (2, 1, 0, 0)  # By round how many thirds of what is too much are kept.
CASES = ("low", "cap", "up")  # Of equally common ones the first is the usual one.
Word = tuple[str, bool, bool]  # A word, whether it is joined, and whether it follows `A_`.


def learned(texts: Iterable[str], size: int, min_count: int) -> dict[str, list[str]]:
    """Return the heads, tails and plain pieces, each in the order of their ids.

    Args:
        size: Ids, with the special tokens, bytes, markers and gaps.
        min_count: A piece occurs more often.
    """
    found, others = _counted(texts)
    starts: Counter[tuple[str, ...]] = Counter()
    for (word, joined, _), count in found.items():
        kind = TAIL if joined and word[0].isdigit() else HEAD
        starts[_characters(kind, word.lower())] += count
    for chunk, count in others.items():
        starts[_characters(OTHER, chunk)] += count

    room = size - FIRST_PIECE - N_GAPS
    single, known = _single(starts, room, min_count)
    runs: Counter[tuple[str, ...]] = Counter()
    for characters, count in starts.items():
        for run in _runs(characters, known):
            runs[run] += count
    made = _joined(runs, max(0, room + room // 4 - len(single)), min_count)

    usual: dict[str, str] = {}
    used: Counter[str] = Counter()
    fit = room - len(single)
    for thirds in KEPT:
        used, usual = _uses([*single, *made], usual, found, others)
        made = sorted((piece for piece in made if used[piece] > min_count), key=lambda piece: -used[piece])
        made = made[: fit + max(0, len(made) - fit) * thirds // 3]
    return _lists(sorted([*single, *made], key=lambda piece: (-used[piece], piece)), usual)


def _counted(texts: Iterable[str]) -> tuple[Counter[Word], Counter[str]]:
    """Return how often each word occurs, and each text between words."""
    identifiers: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for text in texts:
        for unit, what in units(text):
            if what == BETWEEN_WORDS:
                others.update(chunks(unit))
            else:
                identifiers[unit] += 1
    found: Counter[Word] = Counter()
    for identifier, count in identifiers.items():
        for word in words(identifier):
            if word[0] != "_":
                found[word] += count
    return found, others


def _characters(kind: str, text: str) -> tuple[str, ...]:
    following = TAIL if kind == HEAD else kind
    return kind + text[0], *(following + character for character in text[1:])


def _single(starts: Counter[tuple[str, ...]], room: int, min_count: int) -> tuple[list[str], set[str]]:
    """Return the single characters that are pieces, and those that may be joined.

    ASCII between words has its bytes, and needs no piece. What is not ASCII gets an eighth of the room.
    """
    counts: Counter[str] = Counter()
    for characters, count in starts.items():
        for character in characters:
            counts[character] += count
    order = sorted((c for c in counts if counts[c] > min_count), key=lambda c: (-counts[c], c))
    wide = [c for c in order if ord(c[1]) > 127 and not 0xD800 <= ord(c[1]) < 0xE000][: room // 8]
    pieces = [*[c for c in order if c[0] != OTHER][: room - len(wide)], *wide]
    return pieces, {*pieces, *(c for c in order if c[0] == OTHER and ord(c[1]) < 128)}


def _runs(characters: tuple[str, ...], known: set[str]) -> list[tuple[str, ...]]:
    """Return the runs of known characters, of two and more."""
    runs: list[list[str]] = [[]]
    for character in characters:
        if character in known:
            runs[-1].append(character)
        else:
            runs.append([])
    return [tuple(run) for run in runs if len(run) > 1]


def _joined(runs: Counter[tuple[str, ...]], room: int, min_count: int) -> list[str]:
    """Return the pieces that are made, in order: of pairs that are as common the smaller one is joined."""
    written = {run: [*run] for run in runs}
    counts: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)

    def count(run: tuple[str, ...], sign: int) -> None:
        for pair in pairwise(written[run]):
            if len(pair[0]) + len(pair[1]) - 2 <= LONGEST:
                counts[pair] += sign * runs[run]
                places[pair].add(run)

    for run in runs:
        count(run, 1)
    made: dict[str, None] = {}
    while len(made) < room and counts:
        most = max(counts.values())
        if most <= min_count:
            break
        left, right = best = min(pair for pair, number in counts.items() if number == most)
        piece = left + right[1:]
        made[piece] = None
        for run in places.pop(best):
            count(run, -1)
            old, new = written[run], list[str]()
            for symbol in old:
                if new and (new[-1], symbol) == best:
                    new[-1] = piece
                else:
                    new.append(symbol)
            written[run] = new
            count(run, 1)
        del counts[best]
    return [*made]


def _uses(
    pieces: list[str], usual: dict[str, str], found: Counter[Word], others: Counter[str]
) -> tuple[Counter[str], dict[str, str]]:
    """Write all texts in pieces; return how often each serves, and the commonest case of each head.

    The case counts where it is free: of words that are neither joined nor after `A_`.
    """
    state = _lists(pieces, usual)
    tokens, used, cases = CodeTokens(state), Counter[str](), defaultdict[str, Counter[str]](Counter)
    kinds = ((HEAD, state["heads"]), (TAIL, state["tails"]), (OTHER, state["plain"]))
    names = [kind + piece.lower() if kind == HEAD else kind + piece for kind, own in kinds for piece in own]
    for (word, joined, capitals), count in found.items():
        written = [names[id - FIRST_PIECE] for id in tokens.word(word, joined, capitals) if id >= FIRST_PIECE]
        for piece in written:
            used[piece] += count
        if written and word.isalpha() and not joined and not capitals:
            cases[written[0][1:]][case_of(word)] += count
    for chunk, count in others.items():
        for id in tokens.other(chunk):
            if id >= FIRST_PIECE:
                used[names[id - FIRST_PIECE]] += count
    return used, {head: max(CASES, key=own.__getitem__) for head, own in cases.items()}


def _lists(pieces: list[str], usual: dict[str, str]) -> dict[str, list[str]]:
    """Return pieces as the tokenizer's file has them, with heads in their usual case."""
    write = {"low": str.lower, "cap": str.capitalize, "up": str.upper}
    kinds = {kind: [piece[1:] for piece in pieces if piece[0] == kind] for kind in (HEAD, TAIL, OTHER)}
    heads = [write[usual.get(head, "low")](head) for head in kinds[HEAD]]
    return {"heads": heads, "tails": kinds[TAIL], "plain": kinds[OTHER]}

"""The interface of every tokenizer, and the parts that all of them share."""

from __future__ import annotations

import hashlib
import json
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tokenization.files import read_json, write_file

GENERATION = "generation_config.json"


class Tokenizer(ABC):
    """The interface of every tokenizer.

    `encode` never adds bos or eos and never invents an id: all are below `vocab_size`, the number of rows a
    model needs. `fingerprint` is a sha256 of the content: equal where two tokenizers encode and decode alike.
    """

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str
    eos_ids: tuple[int, ...] = ()  # all ids that end a text, as the configs of a published model name them
    bare_gaps: bool = False  # Prompts with a gap have no start token, as old runs trained them.
    markers: tuple[int, ...] = ()  # ids without a text of their own, which change the text of the next id
    suffix_first: bool = False  # Whether prompts with a gap have the suffix first, as in training.
    heals: bool = True  # Whether the ends of prompts are healed (tokenization/healing.py), as in training.

    @property
    def start_id(self) -> int | None:
        """The first id of every document and prompt: bos, or eos where there is no bos (as in GPT-2)."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def before(self, gap: bool = False) -> list[int]:
        """Return the ids before a text in training, evaluation and generation. Nothing else decides them.

        Args:
            gap: The text has a gap to fill, and the ids stand before its markers.
        """
        return [] if self.start_id is None or (gap and self.bare_gaps) else [self.start_id]

    def with_start(self) -> Tokenizer:
        """Return this tokenizer with a `start_id`, from which training predicts a document's first token."""
        return self

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without bos and eos."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; pad, bos and eos give "", bytes that are not UTF-8 give U+FFFD.

        Raises:
            ValueError: An id is outside the vocabulary.
        """

    def prompt_ids(self, text: str) -> list[int]:
        """Return [start] + encode(text), the ids that a model continues; training writes documents alike."""
        return self.before() + self.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        """Return the UTF-8 text of `ids`, which may end inside a character.

        None where one of them is special, or texts are not known.
        """
        return None

    def state_after(self, ids: Sequence[int]) -> Hashable:
        """Return all that the text of one more token after `ids` depends on."""
        return bool(ids)

    def token_texts(self, state: Hashable) -> list[bytes | None] | None:
        """Return the UTF-8 text that each id (vocab_size,) adds in a state.

        An id that no text has there has None; the whole is None where texts are not known.
        """
        return None

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its exact spelling, such as `<fim_prefix>`; None if there is none."""
        return None

    def rules(self) -> dict[str, Any] | None:
        """Return the tokenizer.json that gives these ids, as the `tokenizers` library writes it.

        None where that library does not know the tokenizer.
        """
        return None

    def pieces_fingerprint(self, below: int) -> str:
        """Return a SHA-256 of how text becomes ids and of what the ids under `below` spell.

        It is equal for a model's tokenizer and for the same one with more tokens added, whatever either puts
        before a text.
        """
        return self.fingerprint

    def save(self, folder: Path) -> None:
        """Write readable files into `folder`, each under a temporary name first.

        Further `eos_ids` stand in generation_config.json, as those of published models do.
        """
        if self.eos_ids not in ((), (self.eos_id,)):
            text = json.dumps({"eos_token_id": list(self.eos_ids)}, indent=2)
            write_file(Path(folder) / GENERATION, text + "\n")
        self._save(Path(folder))

    @classmethod
    def load(cls, folder: Path, as_saved: bool = False) -> Self:
        """Read a folder.

        Args:
            as_saved: The folder was written by `save` and is complete. A published one is read as
                transformers reads it, where the named class may override parts of tokenizer.json.

        Raises:
            ValueError: A file is missing or broken; the sentence names it.
        """
        tokenizer, path = cls._load(Path(folder), as_saved), Path(folder) / GENERATION
        if path.exists():
            # A published model may end at an id that has a row and no token; such an id is left out.
            tokenizer.eos_ids = end_ids(read_json(path), path, tokenizer.vocab_size)
        return tokenizer

    def _save(self, folder: Path) -> None:
        """Write all files but generation_config.json."""
        raise NotImplementedError

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        """Read all files but generation_config.json."""
        raise NotImplementedError

    def _checked(self, ids: Iterable[int]) -> Iterator[int]:
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(
                    f"token id {id} is outside this tokenizer's vocabulary of {self.vocab_size} rows: "
                    "decode with the tokenizer that the ids came from"
                )
            yield int(id)


def end_ids(values: dict[str, Any], path: Path, vocab_size: int) -> tuple[int, ...]:
    """Return the ids below `vocab_size` that end a text by a config's eos_token_id, one or a list.

    Other ids are left out: published configs may hold -1 for none, or the id of a larger relative.

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


def content_hash(kind: str, content: Any) -> str:
    """Return the fingerprint, a SHA-256, of a tokenizer's kind and its content as JSON."""
    text = json.dumps([kind, content], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_one_string(texts: Iterable[str]) -> None:
    """Raise ValueError for one string in place of texts."""
    if isinstance(texts, str):
        raise ValueError("train takes an iterable of texts, not one string: pass [text]")


def refuse_no_room(vocab_size: int, smallest: int, why: str) -> None:
    """Raise ValueError for a `vocab_size` below `smallest`."""
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is below {smallest}, the room that {why} need: raise it")

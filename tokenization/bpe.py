"""BPETokenizer: byte-level BPE, trained by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenization.base import Tokenizer, content_hash, refuse_no_room, refuse_one_string
from tokenization.code_pieces import BOS, EOS, GAPS, PAD, SPECIALS
from tokenization.files import read_file, read_json, write_file
from tokenization.growth import refuse_steep
from tokenization.library import (
    CONFIG_FILE,
    HEALS,
    KIND_KEY,
    SUFFIX_FIRST,
    TOKENIZER_FILE,
    bytes_by_id,
    encode_batch,
    joined_bytes,
    open_backend,
    refuse_long,
    refuse_long_pieces,
    refuse_surrogates,
    rules_fingerprint,
    start_template,
)


class BPETokenizer(Tokenizer):
    """Byte-level BPE, as in GPT-2, trained by the `tokenizers` library; its folder opens in transformers.

    The text of a special token inside a document is text: `encode("<|eos|>")` has no special id.
    """

    kind = "bpe"

    def __init__(self, tokenizer_json: str) -> None:
        backend = open_backend(tokenizer_json, "the tokenizer")
        self._tokenizer, self._growth = backend, refuse_steep(backend, "the tokenizer")
        ids = [backend.token_to_id(token) for token in SPECIALS]
        if ids != [PAD, BOS, EOS]:
            raise ValueError(f"the special tokens {SPECIALS} have ids {ids}; {[PAD, BOS, EOS]} are expected")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.pad_id, self.bos_id, self.eos_id = PAD, BOS, EOS
        self._silent = frozenset(backend.get_added_tokens_decoder())
        vocabulary = backend.get_vocab()
        refuse_long_pieces(vocabulary, "the tokenizer")
        self.vocab_size = max(vocabulary.values()) + 1
        # All of this kind put bos before a text, and older files do not say so: no part of the fingerprint.
        state = json.loads(backend.to_str())
        self.fingerprint = content_hash(self.kind, state | {"post_processor": None})
        self._json = json.dumps(
            state | {"post_processor": start_template(SPECIALS[BOS], BOS)}, ensure_ascii=False, indent=2
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._json,), {"heals": self.heals, "suffix_first": self.suffix_first}

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def rules(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    def pieces_fingerprint(self, below: int) -> str:
        return rules_fingerprint(self._tokenizer, below)

    def encode(self, text: str) -> list[int]:
        text = refuse_surrogates(text)
        refuse_long(self._tokenizer, self._growth, text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return encode_batch(self._tokenizer, texts)

    @cached_property
    def _bytes(self) -> list[bytes | None] | None:
        return bytes_by_id(self._tokenizer, self.vocab_size)

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        return joined_bytes(self._bytes, ids)

    def token_texts(self, state: Hashable) -> list[bytes | None] | None:
        return self._bytes

    def decode(self, ids: Iterable[int]) -> str:
        kept = [id for id in self._checked(ids) if id not in self._silent]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _save(self, folder: Path) -> None:
        pad, bos, eos = SPECIALS
        config = {KIND_KEY: self.kind, "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
        config |= {"bos_token": bos, "eos_token": eos, "clean_up_tokenization_spaces": False}
        config |= {} if self.heals else {HEALS: False}
        config |= {SUFFIX_FIRST: True} if self.suffix_first else {}
        # tokenizer.json comes last: a folder without it is refused, one without the mark would be misread.
        write_file(Path(folder) / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        write_file(Path(folder) / TOKENIZER_FILE, self._json + "\n")

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        path = Path(folder) / TOKENIZER_FILE
        text = read_file(path)
        try:
            tokenizer = cls(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        path = Path(folder) / CONFIG_FILE
        config = read_json(path) if path.exists() else {}
        tokenizer.heals = config.get(HEALS) is not False
        tokenizer.suffix_first = config.get(SUFFIX_FIRST) is True
        return tokenizer

    @staticmethod
    def refuse_small(vocab_size: int) -> None:
        """Raise ValueError for a vocabulary that cannot hold every byte and the special tokens."""
        refuse_no_room(vocab_size, len(SPECIALS) + len(GAPS) + 256, "special tokens and bytes")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_count: int = 0) -> BPETokenizer:
        """Learn merges from `texts`; a merge is taken if its pair occurs more than `min_count` times.

        Raises:
            ValueError: `vocab_size` leaves no room, or a text holds a lone surrogate.
        """
        specials = [*SPECIALS, *GAPS]
        refuse_one_string(texts)
        cls.refuse_small(vocab_size)
        if min_count < 0:
            raise ValueError(f"min_count {min_count} is below 0")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_count + 1,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(map(refuse_surrogates, texts), trainer)
        return cls(backend.to_str())

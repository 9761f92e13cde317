"""PretrainedTokenizer: any folder with a tokenizer.json of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from tokenization.base import Tokenizer, content_hash
from tokenization.classes import BUILDERS, JUDGED
from tokenization.code_pieces import BOS, EOS, PAD, SPECIALS
from tokenization.files import parse_json, read_bytes, read_file, write_file
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
    library_error,
    open_backend,
    refuse_long,
    refuse_long_pieces,
    refuse_surrogates,
    rules_fingerprint,
    start_template,
)
from tokenization.published import (
    ADDED_FILE,
    LAYOUT_MARKER,
    MERGES_FILE,
    SPECIALS_FILE,
    VOCAB_FILE,
    added_token,
    as_opened,
    chat_template_of,
    from_merges,
    is_plain_piece,
    named_specials,
    read_folder,
    token_text,
    without_tokens,
)
from tokenization.sentencepieces import SENTENCEPIECE_FILE, from_sentencepiece

# A key of tokenizer_config.json: whether texts with a gap were trained with the start token of all others.
# Where it is absent, a base or run made here had none; a published model has one if its other texts do.
STARTS_GAPS = "plumb_starts_gaps"
FOLLOWED = ("LlamaTokenizer", "CodeLlamaTokenizer")  # The classes whose rules count, whatever the file says.


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
            `special_tokens_map.json`, `added_tokens.json` and `chat_template.jinja`.

    Attributes:
        special_texts: The text of each special token that the folder names, by its key, such as `eos_token`.
    """

    kind = "pretrained"

    def __init__(self, files: dict[str, str]) -> None:
        self._files = dict(files)
        backend = self._tokenizer = open_backend(files[TOKENIZER_FILE], TOKENIZER_FILE)
        # Files saved after a training run carry its truncation and padding; transformers resets both.
        backend.no_truncation()
        backend.no_padding()
        config, special_map, added = (
            parse_json(files[name], name) if name in files else {}
            for name in (CONFIG_FILE, SPECIALS_FILE, ADDED_FILE)
        )
        if "added_tokens_decoder" in config:  # The two older files would say nothing else.
            special_map, added = {}, {}
        named = {**config, **special_map}
        self._set_prefix_space(config.get("add_prefix_space"))
        self._add_tokens(config.get("added_tokens_decoder") or {}, added, set(named_specials(named)))
        self._add_named_specials(named)
        self.bos_id, self.eos_id, self.pad_id = (
            self._special_id(named, f"{name}_token") for name in ("bos", "eos", "pad")
        )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        refuse_long_pieces(vocabulary, TOKENIZER_FILE)
        self.vocab_size = max(vocabulary.values()) + 1
        keys = (f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
        self.special_texts = {
            key: token_text(named[key]) for key in keys if isinstance(named.get(key), str | dict)
        }
        self._growth = refuse_steep(self._tokenizer, TOKENIZER_FILE)
        self._start_id = self._first_of_a_text()
        state = json.loads(self._tokenizer.to_str())
        ids = [self._start_id, self.bos_id, self.eos_id, self.pad_id]
        self.fingerprint = content_hash(self.kind, [state, *ids, "specials are text"])
        unknown = state["model"].get("unk_token")  # Any text may hold it.
        # A folder may name a piece of plain text as its pad token, such as "!", and every text may hold that.
        plain = {self.pad_id} - {self.bos_id, self.eos_id, None}
        plain = {id for id in plain if id is not None and is_plain_piece(state["model"], id)}
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
        names = "eos_ids", "bare_gaps", "suffix_first", "heals"
        state = {name: getattr(self, name) for name in names}
        return type(self), (self._files,), state

    def _set_prefix_space(self, wanted: Any) -> None:
        state = json.loads(self._tokenizer.to_str())
        before = state.get("pre_tokenizer") or {}
        if isinstance(wanted, bool) and before.get("add_prefix_space", wanted) != wanted:
            before["add_prefix_space"] = wanted
            self._tokenizer = open_backend(json.dumps(state), TOKENIZER_FILE)

    def _add_tokens(self, decoder: Any, added: dict[str, Any], specials: set[str]) -> None:
        """Take in the tokens that tokenizer.json lacks or gives other rules, at the ids of the other files.

        `tokenizer_config.json` overrides `tokenizer.json`, which overrides `added_tokens.json`.
        """
        present = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        declared: dict[int, tuple[tokenizers.AddedToken, str]] = {}
        try:
            for content, id in added.items():
                token = added_token(content, special=content in specials)
                declared[int(id)] = (present.get(content, token), ADDED_FILE)
            for id, token in decoder.items():
                declared[int(id)] = (added_token(token, special=bool(token.get("special"))), CONFIG_FILE)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{CONFIG_FILE} or {ADDED_FILE} has a broken added token: {error}") from error
        for id, (token, file) in sorted(declared.items()):
            before = present.get(token.content)
            if before is None or before.__getstate__() != token.__getstate__():
                self._tokenizer.add_tokens([token])
            actual = self._tokenizer.token_to_id(token.content)
            if actual != id:
                raise ValueError(
                    f"{file} gives the token {token.content!r} id {id}, {TOKENIZER_FILE} gives it {actual}"
                )

    def _add_named_specials(self, named: dict[str, Any]) -> None:
        present = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        for content, value in named_specials(named).items():
            token = present.get(content) or added_token(value, special=True)
            token.special = True  # A file may name the end token and not say that it is special.
            self._tokenizer.add_special_tokens([token])
        for content, token in present.items():
            if not token.special and LAYOUT_MARKER.fullmatch(content):
                token.special = True
                self._tokenizer.add_special_tokens([token])

    def _first_of_a_text(self) -> int | None:
        """Return the id that tokenizer.json puts before a text; transformers reads no other file for it."""
        try:
            plain, whole = (
                self._tokenizer.encode("a", add_special_tokens=more).ids for more in (False, True)
            )
        except BaseException as error:
            raise library_error(error, f"the rules of {TOKENIZER_FILE} fail on a text") from error
        n = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        if n > 1:
            raise ValueError(f"{TOKENIZER_FILE} puts {n} tokens before a text, and at most one is known")
        return whole[0] if n else None

    @property
    def start_id(self) -> int | None:
        """The id that `transformers.AutoTokenizer` puts before a text, such as Llama's bos; None without one.

        Published models without it (StarCoder, CodeGen, Phi, Qwen) are run and scored on prompts that start
        with their text; in their training a document follows the end of another.
        """
        return self._start_id

    def with_start(self) -> PretrainedTokenizer:
        """Return a tokenizer whose files put bos before a text, or else eos, where its own put nothing there.

        So everyone who opens the files of a trained model gets prompts as they were trained.
        """
        start = self.eos_id if self.bos_id is None else self.bos_id
        if self._start_id is not None or start is None:
            return self
        token, state = self._tokenizer.id_to_token(start), json.loads(self._files[TOKENIZER_FILE])
        assert token is not None, "its id was found by its text"
        state["post_processor"] = start_template(token, start)
        return self._with(self._files | {TOKENIZER_FILE: json.dumps(state, ensure_ascii=False)})

    def _with(self, files: dict[str, str]) -> PretrainedTokenizer:
        """Return this tokenizer with other files."""
        other = PretrainedTokenizer(files)
        other.eos_ids, other.bare_gaps, other.heals = self.eos_ids, self.bare_gaps, self.heals
        other.suffix_first = self.suffix_first
        return other

    def _special_id(self, named: dict[str, Any], key: str) -> int | None:
        value = named.get(key)
        return None if value is None else self._tokenizer.token_to_id(token_text(value))

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def rules(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    def pieces_fingerprint(self, below: int) -> str:
        return rules_fingerprint(self._tokenizer, below)

    def with_tokens(self, tokens: Iterable[str]) -> PretrainedTokenizer:
        """Return this tokenizer with more tokens, at the next free ids; text that spells one becomes it.

        Raises:
            ValueError: One of them is empty, given twice or a token already.
        """
        backend, decoder = open_backend(self._tokenizer.to_str(), TOKENIZER_FILE), {}
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
            if backend.token_to_id(token) != number:  # An id in between was free.
                raise ValueError(f"the new token {token!r} would get id {backend.token_to_id(token)}")
            decoder[str(number)] = {"content": token, "normalized": False, "special": False}
        files = self._files | {TOKENIZER_FILE: backend.to_str()}
        config = parse_json(files.get(CONFIG_FILE, "{}"), CONFIG_FILE)
        config.pop(KIND_KEY, None)  # With added tokens it is no BPETokenizer any more.
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= decoder
        files[CONFIG_FILE] = json.dumps(config, indent=2)
        return self._with(files)

    def within(self, size: int) -> PretrainedTokenizer:
        """Return this tokenizer without added tokens of ids from `size` on, for a model of `size` rows.

        Fine-tunes add a pad token and leave the model as it is, which then has no row for it.

        Raises:
            ValueError: Pieces of text have such ids too: this is the tokenizer of another model.
        """
        beyond = {
            token.content: id
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            if id >= size
        }
        left = self._with({name: without_tokens(text, name, beyond) for name, text in self._files.items()})
        if left.vocab_size > size or (left.start_id or 0) >= size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} ids and the model has {size}, and pieces of text lie "
                "beyond; one of the two belongs to another model"
            )
        left.eos_ids = tuple(id for id in self.eos_ids if id < size)
        return left

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Return the ids of `text`, without bos and eos.

        Args:
            specials: The spelling of a special token is that token, as is usual in transformers. Only for
                trusted text, since such tokens command the model.

        Raises:
            ValueError: A lone surrogate, or a special token's spelling that has no other pieces.
        """
        backend = self._with_specials if specials else self._tokenizer
        text = refuse_surrogates(text)
        refuse_long(backend, self._growth, text)
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise library_error(
                error, "the rules of this tokenizer's added tokens fail on the text"
            ) from error
        if not specials and not self._controls.isdisjoint(ids):
            token = self._tokenizer.id_to_token(next(id for id in ids if id in self._controls))
            raise ValueError(
                f"the text spells the special token {token!r}, which this tokenizer cannot write as text: "
                "take it out of the text"
            )
        return ids

    @cached_property
    def chat_template(self) -> str | None:
        """The template of conversations, None without one; ValueError where two files disagree."""
        return chat_template_of(self._files)

    def spelled_special(self, text: str) -> str | None:
        """Return the special token that a text spells, None if it spells none."""
        ids = self.encode(text, specials=True)
        return next((self._tokenizer.id_to_token(id) for id in ids if id in self._controls), None)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        found = encode_batch(self._tokenizer, texts)
        return [
            ids if self._controls.isdisjoint(ids) else self.encode(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    @cached_property
    def _bytes(self) -> list[bytes | None] | None:
        """The bytes of each id, None for special tokens; None as a whole where the decoder is not known."""
        silent = self._silent | self._controls
        texts = bytes_by_id(self._tokenizer, self.vocab_size, self._plain)
        return texts and [None if id in silent else text for id, text in enumerate(texts)]

    @cached_property
    def _adds_space(self) -> bool:
        """Whether `encode` puts a space before a text, which `decode` takes off again."""
        return joined_bytes(self._bytes, self.encode("a")) == b" a"

    def bytes_of(self, ids: Iterable[int]) -> bytes | None:
        text = joined_bytes(self._bytes, ids)
        return text[1:] if text and self._adds_space and text.startswith(b" ") else text

    def token_texts(self, state: Hashable) -> list[bytes | None] | None:
        if state or not self._bytes or not self._adds_space:
            return self._bytes
        return [text[1:] if text and text.startswith(b" ") else text for text in self._bytes]

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """A second backend: whether special tokens count as text is a state of the whole backend."""
        return open_backend(self._tokenizer.to_str(), TOKENIZER_FILE)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [id for id in self._checked(ids) if id not in self._silent]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _save(self, folder: Path) -> None:
        """Write the files as they were loaded; vocab.json and merges.txt have become tokenizer.json."""
        config = parse_json(self._files.get(CONFIG_FILE, "{}"), CONFIG_FILE)
        marked = {key: value for key, value in config.items() if key not in (HEALS, SUFFIX_FIRST)}
        marked |= {} if self.heals else {HEALS: False}
        marked |= {SUFFIX_FIRST: True} if self.suffix_first else {}
        marked |= {} if self.start_id is None else {STARTS_GAPS: not self.bare_gaps}
        files = self._files if marked == config else self._files | {CONFIG_FILE: json.dumps(marked, indent=2)}
        for name, text in sorted(files.items(), key=lambda item: item[0] == TOKENIZER_FILE):
            write_file(Path(folder) / name, text)

    @classmethod
    def _load(cls, folder: Path, as_saved: bool) -> Self:
        folder = Path(folder)
        files = read_folder(folder)
        has_merges = all((folder / name).exists() for name in (VOCAB_FILE, MERGES_FILE))
        if TOKENIZER_FILE not in files and not has_merges and not (folder / SENTENCEPIECE_FILE).exists():
            raise ValueError(
                f"{folder / TOKENIZER_FILE} is missing: a pretrained tokenizer is a folder with that file, "
                f"with {VOCAB_FILE} and {MERGES_FILE}, or with {SENTENCEPIECE_FILE}"
            )
        try:
            if TOKENIZER_FILE not in files and has_merges:
                files |= from_merges(read_file(folder / VOCAB_FILE), read_file(folder / MERGES_FILE), files)
            elif TOKENIZER_FILE not in files:
                files |= from_sentencepiece(read_bytes(folder / SENTENCEPIECE_FILE), files)
                files = as_opened(files, folder, tuple(BUILDERS))
            elif not as_saved:
                files = as_opened(files, folder, FOLLOWED)
            tokenizer = cls(files)
        except ValueError as error:
            raise ValueError(f"in {folder}: {error}") from error
        config = parse_json(files.get(CONFIG_FILE, "{}"), CONFIG_FILE)
        said, tokenizer.heals = config.get(STARTS_GAPS), config.get(HEALS) is not False
        tokenizer.suffix_first = config.get(SUFFIX_FIRST) is True
        made_here = as_saved or [tokenizer.token_id(token) for token in SPECIALS] == [PAD, BOS, EOS]
        tokenizer.bare_gaps = made_here if said is None else said is False
        return tokenizer


def opened_by_transformers(folder: Path) -> PretrainedTokenizer:
    """Return the tokenizer that AutoTokenizer would make of a folder with tokenizer.json.

    `load_tokenizer` follows the rules of Llama's classes alone: the other classes build what the published
    files say already, or forget a part that the model was trained with, such as StarCoder2's digits.
    """
    return PretrainedTokenizer(as_opened(read_folder(folder), folder, tuple(BUILDERS)))


def otherwise_in_transformers(folder: Path, tokenizer: PretrainedTokenizer) -> str | None:
    """Return in one sentence where AutoTokenizer gives other ids than the tokenizer that was read here.

    Such a folder names a class that builds anew what its tokenizer.json says otherwise.
    """
    files = read_folder(folder)
    if TOKENIZER_FILE not in files or as_opened(files, folder, tuple(BUILDERS)) == as_opened(
        files, folder, FOLLOWED
    ):
        return None
    theirs = opened_by_transformers(folder)
    for text in JUDGED:
        ids, others = (found.encode(text) for found in (tokenizer, theirs))
        if ids != others:
            return (
                f"AutoTokenizer (transformers 5) builds parts of the tokenizer in {folder} anew, by the "
                f"class that its files name, and gives {len(others)} ids of {text!r} where {TOKENIZER_FILE} "
                f"gives {len(ids)}, or others; here {TOKENIZER_FILE} counts"
            )
    return None

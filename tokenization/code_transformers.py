"""The `code` tokenizer for transformers: an exported folder has a copy of this file beside code_pieces.py.

    AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

Without that argument transformers runs no code of a folder, and refuses the tokenizer. The class is read from
code_tokenizer.json alone and needs no Plumb. A special token inside a text is text, as it was in training.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer

from .code_pieces import BOS, CODE_FILE, CODE_FORMAT, CODE_VERSION, SPECIALS, CodePieces, decode_utf8


class PlumbCodeTokenizer(PreTrainedTokenizer):
    """The ids and texts of Plumb's tokenizer of the same name, on Python 3.11 and newer.

    Args:
        vocab_file: The path of code_tokenizer.json.
        more: What transformers' own class takes.
    """

    vocab_files_names = {"vocab_file": CODE_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **more: Any) -> None:
        with open(vocab_file, encoding="utf-8") as file:
            content = json.load(file)
        if content["format"] != CODE_FORMAT or content["version"] != CODE_VERSION:
            raise ValueError(f"{vocab_file} is no {CODE_FORMAT} of version {CODE_VERSION}")
        self.vocab_file = vocab_file
        lists = content["heads"], content["tails"], content["plain"]
        self.pieces = CodePieces(*lists, content.get("gaps", False))
        self.names = self.pieces.names()
        self.ids = {name: id for id, name in enumerate(self.names)}
        self.shown = {self.ids[name]: name for name in (*SPECIALS, *self.pieces.gaps)}
        pad, bos, eos = SPECIALS
        super().__init__(**({"pad_token": pad, "bos_token": bos, "eos_token": eos} | more))

    @property
    def vocab_size(self) -> int:
        return self.pieces.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self.names[id] for id in self.pieces.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text; special tokens are shown as their names."""
        ids = [self.ids[token] for token in tokens]
        parts: list[bytes] = []
        self.pieces._walk(ids, parts)
        named = self.shown
        shown = [named[id].encode() if id in named else part for id, part in zip(ids, parts, strict=True)]
        return decode_utf8(b"".join(shown))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [BOS, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        if already_has_special_tokens:
            return [int(id in self.shown) for id in token_ids_0]
        return [1] + [0] * (len(token_ids_0) + len(token_ids_1 or []))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = CODE_FILE if filename_prefix is None else f"{filename_prefix}-{CODE_FILE}"
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)

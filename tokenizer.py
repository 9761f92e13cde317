"""Text to ids and back, byte for byte.

Three tokenizers share one small interface (`encode`, `decode`, `save`, `load`, `vocab_size`,
`fingerprint`), which tokenization/base.py defines:

    CodeTokenizer        for source code, written by hand (tokenization/code.py)
    BPETokenizer         byte-level BPE, trained by the `tokenizers` library (tokenization/bpe.py)
    PretrainedTokenizer  a folder with a Hugging Face tokenizer.json (tokenization/pretrained.py)

`load_tokenizer` picks the class by the files of a folder.

    tokenizer = CodeTokenizer.train(texts, vocab_size=4096)
    tokenizer.save(Path("tok"))
    load_tokenizer(Path("tok")).decode(tokenizer.encode(text)) == text
"""

from __future__ import annotations

from pathlib import Path

from tokenization.base import GENERATION, Tokenizer, end_ids
from tokenization.bpe import BPETokenizer
from tokenization.code import CodeTokenizer
from tokenization.code_pieces import BOS, CODE_FILE, EOS, GAPS, PAD, SPECIALS
from tokenization.files import read_json
from tokenization.library import CONFIG_FILE, KIND_KEY, TOKENIZER_FILE
from tokenization.pretrained import (
    STARTS_GAPS,
    PretrainedTokenizer,
    opened_by_transformers,
    otherwise_in_transformers,
)
from tokenization.published import VOCAB_FILE
from tokenization.sentencepieces import SENTENCEPIECE_FILE, can_read_sentencepiece

__all__ = [
    "BOS",
    "EOS",
    "GAPS",
    "GENERATION",
    "PAD",
    "SENTENCEPIECE_FILE",
    "SPECIALS",
    "STARTS_GAPS",
    "TRAINING_VERSION",
    "BPETokenizer",
    "CodeTokenizer",
    "PretrainedTokenizer",
    "Tokenizer",
    "can_read_sentencepiece",
    "end_ids",
    "load_tokenizer",
    "opened_by_transformers",
    "otherwise_in_transformers",
]

# A part of the key of cached tokenizers: raise it when the same texts would train another one.
TRAINING_VERSION = 2


def load_tokenizer(folder: Path, as_saved: bool = False) -> Tokenizer:
    """Open the tokenizer saved in `folder`, whichever kind it is.

    Args:
        as_saved: See `Tokenizer.load`.

    Raises:
        ValueError: The folder holds no tokenizer, or a broken one.
    """
    folder = Path(folder)
    if (folder / CODE_FILE).exists():
        return CodeTokenizer.load(folder)
    if not any((folder / name).exists() for name in (TOKENIZER_FILE, VOCAB_FILE, SENTENCEPIECE_FILE)):
        raise ValueError(f"{folder} holds no tokenizer: expected {CODE_FILE} or {TOKENIZER_FILE} in it")
    config = folder / CONFIG_FILE
    if config.exists() and read_json(config).get(KIND_KEY) == BPETokenizer.kind:
        return BPETokenizer.load(folder)
    return PretrainedTokenizer.load(folder, as_saved)

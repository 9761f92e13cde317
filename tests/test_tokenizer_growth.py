"""Rules of a tokenizer.json that make a text longer and longer, or other at each call."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from tokenization import growth
from tokenization.growth import GENTLE, Growth, refuse_steep
from tokenizer import BPETokenizer, load_tokenizer

transformers.logging.set_verbosity_error()

MAP = base64.b64encode((0).to_bytes(4, "little") + b"x" * 70_000 + b"\0").decode()
LONG = {"type": "Prepend", "prepend": "a" * 70_000}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BETWEEN = {"type": "Replace", "pattern": {"Regex": ""}, "content": "bb"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
SPACED = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def chain(part: str, kind: str, rules: list[Any]) -> dict[str, Any]:
    return {part: {"type": "Sequence", kind: rules}}


STEEP: dict[str, dict[str, Any]] = {
    "one that prepends": {"normalizer": LONG},
    "many that prepend": chain("normalizer", "normalizers", [{"type": "Prepend", "prepend": "a" * 9}] * 8),
    "doubled 32 times": chain("normalizer", "normalizers", [DOUBLE] * 32),
    "inserted everywhere": chain("normalizer", "normalizers", [BETWEEN] * 9),
    "nested": chain("normalizer", "normalizers", [chain("x", "normalizers", [DOUBLE] * 9)["x"]] * 3),
    "a map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": MAP}},
    "bytes of bytes": chain("pre_tokenizer", "pretokenizers", [BYTES] * 32),
    "spaces of spaces": chain("pre_tokenizer", "pretokenizers", [SPACED] * 32),
    "both": chain("normalizer", "normalizers", [DOUBLE] * 12)
    | chain("pre_tokenizer", "pretokenizers", [BYTES] * 4),
    "a decoder": chain("decoder", "decoders", [DOUBLE] * 7),
}  # fmt: skip


@pytest.fixture(scope="module")
def state() -> Any:
    tokenizer = BPETokenizer.train(["def f(x):\n    return aaa(x, y) # x  y\n"] * 9, 290)
    return json.loads(tokenizer._json)


def write(folder: Path, state: dict[str, Any], mark: bool, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    names |= {"plumb_kind": "bpe"} if mark else {}
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config), "utf-8")
    return folder


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("name", STEEP)
def test_a_chain_of_rules_without_bound_is_refused_at_once(
    state: Any, tmp_path: Path, name: str, mark: bool
) -> None:
    """One of these made 4 GB of a letter, and the library ended the process."""
    start = time.process_time()
    with pytest.raises(ValueError, match=r"may make .* bytes of one, and at most") as error:
        load_tokenizer(write(tmp_path / "steep", state | STEEP[name], mark))
    assert "\n" not in str(error.value) and time.process_time() - start < 5


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_text_that_may_grow_too_long_is_measured(
    state: Any, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "LONGEST", 2**16)
    if part == "normalizer":
        more = chain(part, "normalizers", [DOUBLE] * 10)
    else:
        more = chain(part, "pretokenizers", [BYTES] * 6)
    tokenizer = load_tokenizer(write(tmp_path, state | more, True))
    assert tokenizer.encode("a" * 8)
    with pytest.raises(ValueError, match=r"rules of this tokenizer make more than .* bytes of a text of 900"):
        tokenizer.encode("a" * 900)
    if part == "normalizer":  # A text that could grow and does not is let through.
        assert tokenizer.encode("b" * 9000) == load_tokenizer(write(tmp_path, state, True)).encode("b" * 9000)


def test_the_bound_is_a_bound(state: Any) -> None:
    """Each rule makes no more of a byte than is reckoned, on texts that it makes the most of."""
    alone: list[Any] = [{"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")]
    alone += [DOUBLE, BETWEEN, {"type": "Prepend", "prepend": "▁"}]
    alone += [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "ByteLevel"}]
    characters = [chr(n) for n in range(0x30000) if not 0xD800 <= n < 0xE000]
    for rule in alone:
        backend = Tokenizer.from_str(json.dumps(state | {"normalizer": rule}))
        growth = refuse_steep(backend, "x").normalizer
        sizes = [
            (len(backend.normalizer.normalize_str(c).encode()), len(c.encode())) for c in characters[::7]
        ]
        assert all(grown <= growth * size for grown, size in sizes), rule
        assert growth * Growth(1, 3).pre_tokenizer <= GENTLE or rule["type"].startswith("NFK")


def test_ordinary_tokenizers_are_not_measured(state: Any) -> None:
    llama = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    for more in ({}, {"normalizer": {"type": "NFC"}}, {"normalizer": None, "pre_tokenizer": SPACED},
                 chain("normalizer", "normalizers", llama) | {"pre_tokenizer": None}):  # fmt: skip
        growth = refuse_steep(Tokenizer.from_str(json.dumps(state | more)), "x")
        assert growth.normalizer * growth.pre_tokenizer <= GENTLE


def test_a_token_of_a_megabyte_is_refused(state: Any, tmp_path: Path) -> None:
    """A text of a thousand such would be a gigabyte."""
    token = {"content": "x" * 2**20, "special": False, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    more = {"added_tokens": [*state["added_tokens"], {"id": len(state["model"]["vocab"])} | token]}
    for mark in (True, False):
        with pytest.raises(ValueError, match="has a token of 1,048,576 characters, and at most"):
            load_tokenizer(write(tmp_path, state | more, mark))


def test_bpe_dropout_is_refused_where_transformers_would_draw_by_it(state: Any, tmp_path: Path) -> None:
    """Classes of transformers that build the model anew leave it out; others give new ids at each call."""
    text, plain = (
        "def f(x):\n    return aaa(x, y)" * 5,
        load_tokenizer(write(tmp_path / "plain", state, False)),
    )
    drawn = state | {"model": state["model"] | {"dropout": 0.5}}
    folder = write(tmp_path / "drawn", drawn, False)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len({tuple(theirs.encode(text)) for _ in range(9)}) > 1
    for mark in (False, True):
        with pytest.raises(ValueError, match=r"has a BPE dropout of 0.5, with which .*set .dropout. to null"):
            load_tokenizer(write(tmp_path / "drawn", drawn, mark))
    built = write(tmp_path / "drawn", drawn, False, tokenizer_class="GPT2Tokenizer", unk_token="<|eos|>")
    theirs = transformers.AutoTokenizer.from_pretrained(built)
    ours = load_tokenizer(built)
    assert ours.encode(text) == plain.encode(text) == theirs.encode(text, add_special_tokens=False)
    none = state | {"model": state["model"] | {"dropout": 0.0}}
    assert load_tokenizer(write(tmp_path / "none", none, False)).encode(text) == plain.encode(text)

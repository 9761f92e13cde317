"""A tokenizer.model of SentencePiece gives the ids of SentencePiece itself, and those of transformers."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import sentencepiece
import transformers
from pretrained_folders import llama_folder
from sentencepiece import sentencepiece_model_pb2
from test_tokenizer_classes import SOURCE, TEXTS

import pretrained.load
from pretrained import load_pretrained
from tokenizer import PretrainedTokenizer, load_tokenizer

Make = Callable[..., Path]

PLAIN: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "as Llama's": {},
    "as Gemma's": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<mask>", "\n\n", "\t"],
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
    },
    "pieces of the user": {"user_defined_symbols": ["<fim>", "return", "<fim>x"]},
    "normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "without bytes": {"byte_fallback": False},
    "unigram": {"model_type": "unigram"},
    "unigram, normalised": {"model_type": "unigram", "normalization_rule_name": "nfkc"},
}
MORE = ["<fim>x return<fim>", "<mask>\n\n\n\tx\t", " return", "ﬁ Ⅷ  x  ", "<s>x</s>", "<0x41>"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a folder with a trained tokenizer.model and a tokenizer_config.json."""
    made: dict[str, bytes] = {}

    def folder(shape: str, **config: Any) -> Path:
        if shape not in made:
            written = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
                sentence_iterator=iter(SOURCE.split("\n")),
                model_writer=written,
                vocab_size=420,
                minloglevel=2,
                hard_vocab_limit=False,
                **PLAIN | SHAPES[shape],
            )
            made[shape] = written.getvalue()
        at = tmp_path_factory.mktemp("model")
        (at / "tokenizer.model").write_bytes(made[shape])
        if config:
            (at / "tokenizer_config.json").write_text(json.dumps(config))
        return at

    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_sentencepiece(make: Make, shape: str) -> None:
    folder = make(shape)
    ours = load_tokenizer(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert ours.vocab_size == theirs.get_piece_size()
    draw = random.Random(0)
    drawn = [
        "".join(draw.choices([*"aeinrst  _(\n\t1▁é🙂", *MORE], k=draw.randint(1, 12))) for _ in range(300)
    ]
    for text in (*TEXTS, *MORE, *drawn):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids) or theirs.unk_id() in ids, text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("as Llama's", "LlamaTokenizer"),
        ("as Llama's", "CodeLlamaTokenizerFast"),
        ("as Gemma's", "GemmaTokenizer"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"add_bos_token": False}, {"add_bos_token": True, "legacy": True}])
def test_ids_are_those_of_transformers(make: Make, shape: str, name: str, more: dict[str, Any]) -> None:
    folder = make(shape, tokenizer_class=name, **more)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.prompt_ids(text) == theirs(text)["input_ids"], text


def test_a_text_that_is_a_piece_of_the_user_alone_has_no_space_before_it(make: Make) -> None:
    """SentencePiece puts one there; nothing in a tokenizer.json tells this text from the token itself."""
    folder = make("pieces of the user")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert theirs.encode("return") == [theirs.piece_to_id("▁"), *load_tokenizer(folder).encode("return")]


def test_what_is_saved_is_a_tokenizer_json(make: Make, tmp_path: Path) -> None:
    ours = load_tokenizer(make("as Llama's", tokenizer_class="LlamaTokenizer"))
    assert isinstance(ours, PretrainedTokenizer)
    ours.save(tmp_path)
    again, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == ours.fingerprint and not (tmp_path / "tokenizer.model").exists()
    assert all(theirs.encode(text, add_special_tokens=False) == ours.encode(text) for text in TEXTS)


def test_a_model_beside_it_has_the_tokenizer(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = llama_folder(tmp_path / "model"), (make("as Llama's") / "tokenizer.model").read_bytes()
    assert load_pretrained(folder).tokenizer is None and not capsys.readouterr().err
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="and the model has"):  # A small model, and so it was read.
        load_pretrained(folder)
    monkeypatch.setattr(pretrained.load, "can_read_sentencepiece", lambda: False)
    assert load_pretrained(folder).tokenizer is None
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and "pip install sentencepiece" in said and said.count("\n") == 1


def changed(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    def write(data: bytes) -> bytes:
        model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        model.ParseFromString(data)
        change(model)
        return model.SerializeToString()

    return write


def own_piece(model: Any) -> None:
    model.pieces[-1].piece, model.pieces[-1].type = "two words", 4


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut": ("is damaged.*fetch it again", lambda data: data[:-100]),
    "of another program": ("is damaged|of which 0 differ", lambda data: b"#version: 0.2\n" * 9),
    "twice one piece": ("pieces, of which", changed(lambda model: model.pieces.append(model.pieces[-1]))),
    "words": ("has model_type 3", changed(lambda model: setattr(model.trainer_spec, "model_type", 3))),
    "unused": ("1 pieces that are marked", changed(lambda model: setattr(model.pieces[-1], "type", 5))),
    "a piece of the user with a space": ("has the piece 'two words' of its user", changed(own_piece)),
    "a piece without end": (
        "has a token of 2,000,000",
        changed(lambda model: setattr(model.pieces[-1], "piece", "x" * 2_000_000)),
    ),
    "no unknown piece": (
        "unk_id is 100000",
        changed(lambda model: setattr(model.trainer_spec, "unk_id", 100_000)),
    ),
    "spaces behind": (
        "writes spaces otherwise",
        changed(lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True)),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_refused_in_a_sentence(make: Make, case: str) -> None:
    sentence, breaks = BROKEN[case]
    path = make("as Llama's") / "tokenizer.model"
    path.write_bytes(breaks(path.read_bytes()))
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(path.parent)

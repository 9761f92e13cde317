"""Tokenizers of every class that transformers opens by rules of its own: the same ids, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from architecture import Decoder
from pretrained import FAMILIES, load_pretrained, save_pretrained
from pretrained.family import to_model
from pretrained.save import JUDGED
from tokenizer import (
    BPETokenizer,
    PretrainedTokenizer,
    load_tokenizer,
    opened_by_transformers,
    otherwise_in_transformers,
)

transformers.logging.set_verbosity_error()

SOURCE = Path(json.__file__).read_text("utf-8")
SPELLED = ["▁", "▁▁", "▁x", " ▁x", "▁ x", "x▁", " x", "  x", "   x y", "\t x", " \n", "\n x", "é▁ü", "日本 x"]
TEXTS = [
    *JUDGED,
    *SPELLED,
    "",
    "x",
    "x ",
    "def f(x):\n    return x\n",
    "don't 12345",
    "🙂 a\x00b",
    SOURCE[:300],
]


def spread(scheme: str, first: str | None) -> Tokenizer:
    """A byte-fallback BPE as SentencePiece's, in the words that published files have for it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", split=True)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = sorted({"▁", *SOURCE.replace(" ", "▁")})
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([SOURCE.replace(" ", " ")], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(state))
    if scheme == "prepend":  # The files of Llama 2 and Code Llama have this.
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(parts)  # type: ignore[arg-type]
        backend.pre_tokenizer = None  # type: ignore[assignment]
    else:
        backend.normalizer = None  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)])
    if first:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(f"{first} $A", None, [(first, 1)])
    return backend


@pytest.fixture(scope="module")
def spaced() -> Callable[[str, str | None], Tokenizer]:
    made: dict[tuple[str, str | None], str] = {}

    def get(scheme: str, first: str | None) -> Tokenizer:
        if (scheme, first) not in made:
            made[scheme, first] = spread(scheme, first).to_str()
        return Tokenizer.from_str(made[scheme, first])

    return get


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([SOURCE], 500)


def same_as_transformers(folder: Path, ours: Any, model_type: str | None = None) -> None:
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.bos_id, ours.eos_id) == ids or None in ids
    for text in TEXTS:
        assert ours.prompt_ids(text) == theirs(text)["input_ids"], text
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        if ours.decode(ours.encode(text)) != text:  # a text may lose a space as it does there
            assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text)), text


MORE: list[dict[str, Any]] = [
    {},
    {"add_prefix_space": False},
    {"legacy": True},
    {"add_prefix_space": True},
]
NAMES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "PreTrainedTokenizerFast", None)


@pytest.mark.parametrize("scheme", ["prepend", "first", "never"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "more", [{}, {"add_prefix_space": False}, {"legacy": True}, {"add_prefix_space": True}]
)
def test_the_classes_of_llama(
    spaced: Any, tmp_path: Path, name: str | None, scheme: str, more: dict[str, Any]
) -> None:
    """Texts that begin with a space or "▁" differed in 10 of 59."""
    spaced(scheme, "<s>" if scheme != "never" else None).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
    for model_type in (None, "llama"):
        if name is not None or model_type is not None:
            same_as_transformers(tmp_path, load_tokenizer(tmp_path), model_type)
    ours = load_tokenizer(tmp_path)
    ours.save(tmp_path / "again")
    for as_saved in (False, True):
        again = load_tokenizer(tmp_path / "again", as_saved)
        assert again.fingerprint == ours.fingerprint
    same_as_transformers(tmp_path / "again", ours, "llama")


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "CodeGenTokenizerFast"])
def test_a_space_before_the_first_word(
    bpe: BPETokenizer, tmp_path: Path, name: str, inside: bool, prefix: bool | None
) -> None:
    """`add_prefix_space` under PreTrainedTokenizerFast is heeded by nobody; 51 of 59 texts differed."""
    bpe.save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["pre_tokenizer"]["add_prefix_space"] = inside
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    config = {"tokenizer_class": name, "bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<|eos|>"}
    config |= {} if prefix is None else {"add_prefix_space": prefix}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    same_as_transformers(tmp_path, ours)
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", as_saved=True).fingerprint == ours.fingerprint


@pytest.mark.parametrize("model_type", [*FAMILIES, None])
@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast", None]
)
@pytest.mark.parametrize("pieces", ["bytes", "words"])
def test_the_class_of_a_folder_is_foretold(
    bpe: BPETokenizer, spaced: Any, tmp_path: Path, pieces: str, name: str | None, model_type: str | None
) -> None:
    """An export is judged by this where transformers is not installed."""
    if pieces == "bytes":
        bpe.save(tmp_path)
        tokens = {
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "unk_token": "<|eos|>",
            "pad_token": "<|pad|>",
        }
    else:
        spaced("prepend", "<s>").save(str(tmp_path / "tokenizer.json"))
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = tokens | ({} if name is None else {"tokenizer_class": name})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = opened_by_transformers(tmp_path)
    for text in TEXTS:
        assert ours.prompt_ids(text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("scheme", ["prepend", "first", "never"])
@pytest.mark.parametrize("model_type", ["llama", "gemma", "qwen3"])
@pytest.mark.parametrize(
    "name",
    ["GemmaTokenizer", "GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "LlamaTokenizer", None],
)
def test_a_class_that_builds_another_tokenizer_than_the_file_is_named(
    spaced: Any, tmp_path: Path, name: str | None, model_type: str, scheme: str
) -> None:
    """The file counts, and whoever opens the folder elsewhere gets other ids."""
    spaced(scheme, "<s>").save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {} if name is None else {"tokenizer_class": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert isinstance(ours, PretrainedTokenizer)
    differ = any(ours.encode(text) != theirs.encode(text, add_special_tokens=False) for text in JUDGED)
    said = otherwise_in_transformers(tmp_path, ours)
    assert (said is not None) == differ
    if said is not None:
        assert f"builds parts of the tokenizer in {tmp_path} anew" in said


def small(family: str, vocab_size: int) -> Decoder:
    heads = 8 if family == "codegen2" else 4
    sizes = {
        "vocab_size": vocab_size,
        "n_layer": 1,
        "n_head": heads,
        "n_embd": 4 * heads,
        "block_size": 32,
    }
    found = FAMILIES[family]
    values = {key: sizes[field] for field, key in found.names.items() if field in sizes}
    more = {"rotary_dim": 4, "intermediate_size": 16, "num_key_value_heads": 4}
    more |= {"partial_rotary_factor": 0.5, "rotary_pct": 0.5}
    values |= {key: value for key, value in more.items() if key in found.defaults}
    return Decoder(to_model(found, values))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_export_gives_our_ids_or_is_refused(bpe: BPETokenizer, tmp_path: Path, family: str) -> None:
    """Beside a qwen2 config.json a `bpe` tokenizer opens as Qwen2Tokenizer whatever its files name."""
    bpe.save(tmp_path / "bpe")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    state = json.loads((tmp_path / "bpe" / "tokenizer.json").read_text())
    digits = {
        "type": "Digits",
        "individual_digits": True,
    }  # StarCoder's, which GPT2Tokenizer forgets
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "digits" / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<|eos|>"}))
    for tokenizer in (bpe, load_tokenizer(tmp_path / "digits")):
        model, out = small(family, tokenizer.vocab_size), tmp_path / f"{tokenizer.kind} out"
        if family == "qwen2":
            with pytest.raises(ValueError, match="opens every tokenizer beside a qwen2 model as qwen2's own"):
                save_pretrained(model, tokenizer, out, family)
            assert not out.exists()
            continue
        save_pretrained(model, tokenizer, out, family)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        for text in TEXTS:
            assert tokenizer.prompt_ids(text) == theirs(text)["input_ids"], text
        found = load_pretrained(out).tokenizer
        assert found is not None and found.encode(SOURCE) == tokenizer.encode(SOURCE)


def test_the_tokenizer_of_qwen2_is_exported_beside_qwen2(bpe: BPETokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "bytes")
    tokens = {"eos_token": "<|eos|>", "pad_token": "<|pad|>", "unk_token": "<|eos|>"}
    config = tokens | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "bytes" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bytes")
    theirs.save_pretrained(str(tmp_path / "qwen"))
    tokenizer = load_tokenizer(tmp_path / "qwen")
    save_pretrained(small("qwen2", tokenizer.vocab_size), tokenizer, tmp_path / "out", "qwen2")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer.prompt_ids(text) == opened(text)["input_ids"], text

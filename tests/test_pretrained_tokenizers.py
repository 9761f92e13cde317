"""Tokenizers in folders of published models, and the model that each belongs to."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from pretrained_folders import LLAMA, change_json, refused
from test_tokenizer import ANY_TEXT

from architecture import Decoder
from generation.settings import GenerationConfig
from generation.text import generate
from pretrained import FAMILIES, load_pretrained, save_pretrained
from pretrained.family import to_model
from pretrained.load import TOKENIZER
from tokenization.published import FILES, MERGES_FILE, VOCAB_FILE
from tokenizer import GAPS, BPETokenizer, CodeTokenizer, PretrainedTokenizer, load_tokenizer

transformers.logging.set_verbosity_error()

TEXTS = [
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "  \t\r\n\n  x = 'é — 日本語 🙂'",
    "<|endoftext|>", "a<|endoftext|>b <|fim_prefix|> c", "", " ", "\x00\x7f",
    "don't we'll HTTPServer2 0xFF00AA",
    "\n" * 30 + " " * 30, "ﬁ Å Å",
]  # fmt: skip


def published_tokenizer(folder: Path) -> Path:
    """A byte-level BPE folder as published ones are: specials in the config, added tokens of many spaces."""
    ours = BPETokenizer.train([text * 20 for text in TEXTS], vocab_size=300)
    ours.save(folder)
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    n = ours.vocab_size
    specials = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "  ", "        "]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    state["added_tokens"] += [
        {"id": n + i, "content": text, "special": text.strip() != ""} | flags
        for i, text in enumerate(specials)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save(folder)
    return folder


def same_ids(ours: Any, theirs: Any, text: str) -> None:
    """Special tokens as text, which is how a corpus is read, and as commands."""
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
    assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False), text


def test_tokenizer_ids_are_those_of_transformers(tmp_path):
    folder = published_tokenizer(tmp_path / "tokenizer")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, PretrainedTokenizer) and (ours.eos_id, ours.bos_id) == (theirs.eos_token_id,) * 2
    for text in TEXTS:
        same_ids(ours, theirs, text)
    assert ours.vocab_size == len(theirs)


POOL = ["<|end|>", "<|x|>", "  ", "    ", "tab", "<fim>", "RET", "\t\t", "日"]


def random_folder(draw: random.Random, base: dict[str, Any], n: int, folder: Path) -> None:
    """Added tokens with rules drawn at random, spread over the files that may hold them."""

    def rules(token: str) -> dict[str, Any]:
        likely = {"single_word": 0.2, "lstrip": 0.3, "rstrip": 0.3, "normalized": 0.4}
        return {"content": token, "special": token in specials} | {
            name: draw.random() < chance for name, chance in likely.items()
        }

    tokens = ["<end>", *draw.sample(POOL, draw.randrange(1, 7))]
    draw.shuffle(tokens)
    specials = {token for token in tokens if token.startswith("<")}
    ids = {token: n + i for i, token in enumerate(tokens)}
    kept = draw.randrange(len(tokens) + 1)  # So many are in tokenizer.json.
    state = base | {"added_tokens": [{"id": ids[token]} | rules(token) for token in tokens[:kept]]}
    own_class = draw.random() < 0.4  # one that takes only vocabulary and merges from tokenizer.json
    if not own_class and draw.random() < 0.5:
        state["normalizer"] = draw.choice([{"type": "Lowercase"}, {"type": "NFKC"}])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    if own_class:
        config = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<end>")
        config["tokenizer_class"] = draw.choice(["CodeGenTokenizer", "GPT2Tokenizer"])
    rest = {t for i, t in enumerate(tokens) if i >= kept or own_class or draw.random() < 0.5}
    files = {"tokenizer.json": state, "tokenizer_config.json": config}
    if draw.random() < 0.5:
        config["added_tokens_decoder"] = {str(ids[t]): rules(t) for t in tokens if t in rest}
    else:
        files["added_tokens.json"] = {t: ids[t] for t in tokens if t in rest}
        files["special_tokens_map.json"] = {
            "pad_token": "<end>",
            "extra_special_tokens": sorted(specials),
        }
    folder.mkdir()
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), "utf-8")


def test_rules_of_added_tokens_are_those_of_transformers(tmp_path):
    base = BPETokenizer.train(TEXTS * 20, vocab_size=290)
    base.save(tmp_path / "base")
    state = json.loads((tmp_path / "base" / "tokenizer.json").read_text("utf-8"))
    compared = panics = 0
    for seed in range(60):
        draw = random.Random(seed)
        random_folder(draw, state, base.vocab_size, tmp_path / str(seed))
        ours = PretrainedTokenizer.load(tmp_path / str(seed))
        theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / str(seed))
        assert (ours.eos_id, ours.bos_id, ours.pad_id) == (
            theirs.eos_token_id,
            theirs.bos_token_id,
            theirs.pad_token_id,
        )
        words = [*POOL, *POOL, " ", "  ", "\n", "a", "Tab", "return", "def f", "HTTP", "x"]
        for _ in range(15):
            text = "".join(draw.choices(words, k=draw.randrange(1, 14)))
            try:
                ours.encode(text, specials=True)
            except ValueError as error:  # a fault of the library, which it reports as a panic
                assert "added tokens fail on the text" in str(error)
                panics += 1
                continue
            same_ids(ours, theirs, text)
            compared += 1
    assert compared > 800 and panics < 50


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory):
    """A folder of its own for the modules that transformers copies before it runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
        )
        yield


@pytest.fixture(scope="module")
def code_folder(tmp_path_factory):
    """A folder with a `code` tokenizer that knows some of everything, and a small Llama."""
    tokenizer = CodeTokenizer.train([*TEXTS, Path(__file__).read_text("utf-8")], vocab_size=700, min_count=1)
    folder = tmp_path_factory.mktemp("code") / "saved"
    save_pretrained(Decoder(replace(LLAMA, vocab_size=tokenizer.vocab_size)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def both(code_folder, own_modules):
    """The tokenizer, and what AutoTokenizer makes of its folder."""
    theirs = transformers.AutoTokenizer.from_pretrained(code_folder, trust_remote_code=True)
    return load_tokenizer(code_folder), theirs


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
@example(text="<|eos|>get<|bos|>")
@example(text="T_MAX\r\n\tgetHTTPResponse2  x_ _y \ud800\udc00")
def test_the_module_of_an_exported_folder_gives_the_ids_of_the_code_tokenizer(both, text):
    ours, theirs = both
    ids = theirs(text)["input_ids"]
    assert ids == ours.prompt_ids(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids[1:]
    assert theirs.decode(ids, skip_special_tokens=True) == text == theirs.decode(ids)[len("<|bos|>") :]


def test_that_module_decodes_any_ids_and_saves_what_it_opened(both, tmp_path):
    ours, theirs = both
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(3, ours.vocab_size - len(GAPS), (20,), generator=generator).tolist()
        assert theirs.decode(ids) == ours.decode(ids)
        ids = [id for id in ids if id > 258]  # Bytes on both sides of a special token may be one character.
        for token in ("<|eos|>", *GAPS):
            ids = [*ids[:9], theirs.convert_tokens_to_ids(token), *ids[9:]]
            assert token in theirs.decode(ids)
            assert re.sub(r"<\|eos\|>|<fim_\w+>", "", theirs.decode(ids)) == ours.decode(ids)
    assert theirs.convert_tokens_to_ids(list(GAPS)) == [ours.token_id(token) for token in GAPS]
    assert len(theirs.get_vocab()) == theirs.vocab_size == len(theirs) == ours.vocab_size
    assert theirs(["a b", "c"], padding=True)["attention_mask"] == [[1, 1, 1], [1, 1, 0]]
    theirs.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again(TEXTS[0])["input_ids"] == ours.prompt_ids(TEXTS[0])


def test_the_modules_of_an_exported_folder_need_no_plumb(code_folder, tmp_path):
    """A process that has transformers and the folder, and nothing of the repository on its path."""
    program = (
        "import sys, transformers; "
        f"t = transformers.AutoTokenizer.from_pretrained({str(code_folder)!r}, trust_remote_code=True); "
        "assert not {'tokenization', 'tokenizer', 'config'} & {name.split('.')[0] for name in sys.modules}; "
        "print(t('def getHTTP(x): pass')['input_ids'])"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{load_tokenizer(code_folder).prompt_ids('def getHTTP(x): pass')}\n", done.stderr


# Of codegen2 transformers has no model.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "codegen2"])
def test_transformers_opens_the_code_tokenizer_by_its_module_alone(family, own_modules, tmp_path):
    """Without a tokenizer.json it would make one for itself that gives no ids for any text."""
    tokenizer = CodeTokenizer.train([TEXTS[0]] * 20, vocab_size=300)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 32}
    values = {key: sizes[field] for field, key in FAMILIES[family].names.items() if field in sizes}
    more = {"rotary_dim": 4, "intermediate_size": 16, "num_key_value_heads": 4}
    values |= {key: value for key, value in more.items() if key in FAMILIES[family].defaults}
    model = Decoder(to_model(FAMILIES[family], values)).eval()
    save_pretrained(model, tokenizer, tmp_path / "saved", family)
    # Of a model_type without a tokenizer class of its own, transformers asks before it reads tokenizer.json.
    with pytest.raises(
        Exception, match=r"open it with trust_remote_code=True|argument `trust_remote_code=True`"
    ):
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert opened(TEXTS[0])["input_ids"] == tokenizer.prompt_ids(TEXTS[0])
    ids = torch.tensor([tokenizer.encode(TEXTS[0])[:16]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)
    found = load_pretrained(tmp_path / "saved")
    assert found.tokenizer is not None and found.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_goes_with_its_model(tmp_path):
    tokenizer = load_tokenizer(published_tokenizer(tmp_path / "tokenizer"))
    model = Decoder(replace(LLAMA, vocab_size=tokenizer.vocab_size))
    save_pretrained(model, tokenizer, tmp_path / "model")
    found = load_pretrained(tmp_path / "model")
    assert found.tokenizer is not None and found.tokenizer.fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.eos_token_id == theirs.eos_token_id == tokenizer.eos_id
    for text in TEXTS:
        same_ids(tokenizer, theirs, text)


def test_every_end_of_a_text_goes_with_its_model(tmp_path):
    """Texts of Llama 3 Instruct end at one of three ids, and not at its tokenizer's eos alone."""
    tokenizer = load_tokenizer(published_tokenizer(tmp_path / "tokenizer"))
    one, other = tokenizer.encode("a") + tokenizer.encode("b")
    save_pretrained(Decoder(replace(LLAMA, vocab_size=tokenizer.vocab_size)), tokenizer, tmp_path / "model")
    config, generation = (tmp_path / "model" / name for name in ("config.json", "generation_config.json"))
    assert load_pretrained(tmp_path / "model").eos_ids == (tokenizer.eos_id,)
    change_json(config, eos_token_id=[7, 8])
    change_json(generation, eos_token_id=[one, other])
    found = load_pretrained(tmp_path / "model")
    assert found.eos_ids == (one, other) and found.tokenizer is not None
    with torch.no_grad():  # whatever the last token was, `other` comes next
        found.model.embed.weight.fill_(1)
        found.model.head.weight.fill_(0)
        found.model.head.weight[other] = 1
        for name, parameter in found.model.named_parameters():
            if "blocks" in name:
                parameter.fill_(0)
    copied = pickle.loads(pickle.dumps(found.tokenizer))
    for ends in (found.tokenizer, copied, copied.with_tokens([])):
        (text,) = generate(found.model, ends, ["x"], GenerationConfig(max_new_tokens=4))
        assert (text.text, text.ids, text.finish_reason) == ("", [other], "eos")
    save_pretrained(found.model, found.tokenizer, tmp_path / "again")
    assert load_pretrained(tmp_path / "again").eos_ids == (one, other)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [
        one,
        other,
    ]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [one, other]
    generation.unlink()
    assert load_pretrained(tmp_path / "model").eos_ids == (7, 8)
    for beyond in (306, -1, [306, -1]):  # opened by transformers with a warning, and given by no model
        change_json(config, eos_token_id=beyond)
        assert load_pretrained(tmp_path / "model").eos_ids == ()
        change_json(config, eos_token_id=[beyond, 7] if isinstance(beyond, int) else [*beyond, 7])
        found = load_pretrained(tmp_path / "model")
        assert found.tokenizer is not None and found.eos_ids == found.tokenizer.eos_ids == (7,)
    shutil.copy(config, generation)
    assert load_tokenizer(tmp_path / "model").eos_ids == (7,)
    for wrong in ("x", [1, True], [[1]], {"a": 1}, 1.0):
        change_json(config, eos_token_id=wrong)
        change_json(generation, eos_token_id=wrong)
        refused(tmp_path / "model", "has eos_token_id .*; it must be an id, or a list of such ids")


@pytest.mark.parametrize("where", ["extra_special_tokens", "pad_token", "added", "decoder", "json"])
def test_tokens_that_were_added_beyond_the_model_are_left_out(where, tmp_path, capsys):
    """Fine-tunes that added a pad token and left the model as it was have such tokens."""
    folder = published_tokenizer(tmp_path / "tokenizer")
    size = load_tokenizer(folder).vocab_size
    token = {"content": "<|new|>", "special": where != "added"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config, state = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if where == "added":
        (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": size}))
    elif where == "json":
        added = json.loads(state.read_text("utf-8"))["added_tokens"]
        change_json(state, added_tokens=[*added, {"id": size} | token | flags])
    elif where == "decoder":
        change_json(config, added_tokens_decoder={str(size): token | flags}, pad_token="<|new|>")
    else:
        change_json(config, **{where: ["<|new|>"] if where.startswith("extra") else "<|new|>"})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert load_tokenizer(folder).vocab_size == len(theirs) == size + 1
    model = Decoder(replace(LLAMA, vocab_size=size))
    save_pretrained(model, None, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
    tokenizer = load_pretrained(tmp_path / "model").tokenizer
    assert f"has {size + 1} ids and the model {size} rows" in capsys.readouterr().err
    assert tokenizer is not None and tokenizer.vocab_size == size and tokenizer.token_id("<|new|>") is None
    assert tokenizer.pad_id is None and max(tokenizer.encode("a <|new|> b")) < size
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
    generate(model, tokenizer, ["x"], GenerationConfig(max_new_tokens=2))
    assert load_tokenizer(saved(tokenizer, tmp_path / "again")).fingerprint == tokenizer.fingerprint


def test_every_file_of_a_tokenizer_that_is_read_is_fetched_too() -> None:
    assert {*FILES, VOCAB_FILE, MERGES_FILE} <= {*TOKENIZER}


def test_a_tokenizer_of_another_model_is_refused(tmp_path, monkeypatch):
    """Where pieces of text lie beyond the model's rows, and not tokens that were added."""
    for make in (published_tokenizer, lambda at: saved(BPETokenizer.train(TEXTS * 20, vocab_size=300), at)):
        folder = make(tmp_path / make.__name__.strip("<>"))
        save_pretrained(Decoder(replace(LLAMA, vocab_size=290)), None, tmp_path / f"{folder.name} model")
        shutil.copytree(folder, tmp_path / f"{folder.name} model", dirs_exist_ok=True)
        refused(tmp_path / f"{folder.name} model", "and the model has 290.*belongs to another model")

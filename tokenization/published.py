"""The files of a published tokenizer's folder: read, brought to one form, and what their entries mean."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tokenization.classes import AS_THE_FILE, BUILDERS, DEFAULT_TOKENS, built_anew, transformers_class
from tokenization.files import parse_json, read_file, read_json
from tokenization.library import CONFIG_FILE, TOKENIZER_FILE, library_error, open_backend, start_template

SPECIALS_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
CHAT_FILE = "chat_template.jinja"
FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIALS_FILE, ADDED_FILE, CHAT_FILE)
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
_END_OF_TEXT = "<|endoftext|>"

# Markers of a prompt's layout. The files of Qwen2.5-Coder and DeepSeek-Coder do not call them special.
LAYOUT_MARKER = re.compile(
    r"<\|?(fim[-_](prefix|suffix|middle|pad)|repo_name|file_sep|filename)\|?>|<｜fim▁(begin|hole|end)｜>"
)

# Classes whose vocab.json and merges.txt are byte-level BPE as in GPT-2; None stands for no class. Others cut
# text by rules that only their code or a tokenizer.json holds.
_MERGES_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")


def read_folder(folder: Path) -> dict[str, str]:
    """Return the text of each file that there is in a tokenizer's folder, by name."""
    return {name: read_file(folder / name) for name in FILES if (folder / name).exists()}


def as_opened(files: dict[str, str], folder: Path, classes: Container[str]) -> dict[str, str]:
    """Return the files with the changes of the class that transformers opens, if it is one of `classes`."""
    config = parse_json(files.get(CONFIG_FILE, "{}"), CONFIG_FILE)
    model = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not isinstance(named, str | None) or not isinstance(model.get("model_type"), str | None):
        raise ValueError(f"tokenizer_class {named!r} or model_type {model.get('model_type')!r} is no text")
    name = transformers_class(named, model.get("model_type"), files[TOKENIZER_FILE])
    if name == AS_THE_FILE and "add_prefix_space" in config:
        del config["add_prefix_space"]  # Transformers keeps this key and ignores it.
        return files | {CONFIG_FILE: json.dumps(config, indent=2)}
    before = parse_json(files[TOKENIZER_FILE], TOKENIZER_FILE)
    if name in BUILDERS and isinstance(before.get("model"), dict) and before["model"].get("dropout"):
        before["model"]["dropout"] = None  # These classes build a model without dropout.
        files = files | {TOKENIZER_FILE: json.dumps(before, ensure_ascii=False)}
    if name not in classes:
        adds = isinstance(before.get("pre_tokenizer"), dict) and before["pre_tokenizer"].get(
            "add_prefix_space"
        )
        if name in BUILDERS and adds and config.get("add_prefix_space") is None:
            return files | {CONFIG_FILE: json.dumps(config | {"add_prefix_space": False}, indent=2)}
        return files
    state = built_anew(before, name, config)
    ids = open_backend(files[TOKENIZER_FILE], TOKENIZER_FILE).get_vocab(with_added_tokens=True)
    tokens = {key: token for key, token in DEFAULT_TOKENS.get(name, {}).items() if token in ids}
    named_tokens = tokens | config
    bos = named_tokens.get("bos_token")
    starts = (folder / TOKENIZER_FILE).exists() or config.get("add_bos_token", True)
    if name == "CodeLlamaTokenizer" and starts and bos is not None and token_text(bos) in ids:
        state = state | {"post_processor": start_template(token_text(bos), ids[token_text(bos)])}
    if name == "GPTNeoXTokenizer" and state.get("post_processor") is not None:
        state = state | {"post_processor": None}  # The class makes one that adds nothing.
    if state is not before:
        files = files | {TOKENIZER_FILE: json.dumps(state, ensure_ascii=False)}
    return files if named_tokens == config else files | {CONFIG_FILE: json.dumps(named_tokens, indent=2)}


def from_merges(vocab: str, merges: str, files: dict[str, str]) -> dict[str, str]:
    """Return the `tokenizer.json` and `tokenizer_config.json` of a folder with vocab.json and merges.txt."""
    config = parse_json(files.get(CONFIG_FILE, "{}"), CONFIG_FILE)
    name = config.get("tokenizer_class")
    if name not in _MERGES_CLASSES:
        raise ValueError(
            f"tokenizer_class is {name!r}, whose {VOCAB_FILE} and {MERGES_FILE} are not read; "
            f"save it with transformers' fast tokenizer, which writes {TOKENIZER_FILE}"
        )
    ids = parse_json(vocab, VOCAB_FILE)
    lines = [line.split(" ") for line in merges.split("\n") if line and not line.startswith("#version")]
    try:
        backend = tokenizers.Tokenizer(models.BPE(ids, [(left, right) for left, right in lines]))
    except BaseException as error:
        raise library_error(error, f"{VOCAB_FILE} and {MERGES_FILE} do not belong together") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    defaults = {key: _END_OF_TEXT for key in ("bos_token", "eos_token", "unk_token") if _END_OF_TEXT in ids}
    config, state = defaults | config, json.loads(backend.to_str())
    bos = config.get("bos_token")
    if config.get("add_bos_token") and bos is not None and token_text(bos) in ids:
        state["post_processor"] = start_template(token_text(bos), ids[token_text(bos)])
    text = json.dumps(state, ensure_ascii=False, indent=2)
    return {TOKENIZER_FILE: text + "\n", CONFIG_FILE: json.dumps(config, indent=2)}


def without_tokens(text: str, name: str, tokens: Container[str]) -> str:
    """Return a file's text without its entries of some added tokens."""

    def is_kept(value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return not (isinstance(content, str) and content in tokens)

    if name == CHAT_FILE:
        return text
    values = parse_json(text, name)
    if name == TOKENIZER_FILE:
        values["added_tokens"] = [token for token in values.get("added_tokens") or [] if is_kept(token)]
    elif name == ADDED_FILE:
        values = {content: id for content, id in values.items() if is_kept(content)}
    else:
        values = {key: value for key, value in values.items() if not key.endswith("_token") or is_kept(value)}
        for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            if isinstance(values.get(key), dict):
                values[key] = {k: value for k, value in values[key].items() if is_kept(value)}
            elif isinstance(values.get(key), list):
                values[key] = [value for value in values[key] if is_kept(value)]
    return json.dumps(values, ensure_ascii=False, indent=2)


def chat_template_of(files: dict[str, str]) -> str | None:
    """Return the template of conversations that a folder has, None without one; of several the default.

    Raises:
        ValueError: Two files disagree, or the template is no text.
    """
    said = parse_json(files.get(CONFIG_FILE, "{}"), CONFIG_FILE).get("chat_template")
    if isinstance(said, list):
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
        said = named.get("default")
        if said is None:
            raise ValueError(f"chat_template in {CONFIG_FILE} is a list, and none of it is called default")
    if not isinstance(said, str | None):
        raise ValueError(f"chat_template in {CONFIG_FILE} is a {type(said).__name__}, and must be a text")
    own = files.get(CHAT_FILE)
    if own is not None and said is not None and own != said:
        raise ValueError(
            f"{CHAT_FILE} and chat_template in {CONFIG_FILE} are two templates; take out the one that is "
            "not meant"
        )
    return said if own is None else own


def is_plain_piece(model: dict[str, Any], id: int) -> bool:
    """Return whether a BPE model gives this id to plain text: it is a character, or a merge makes it."""
    if model.get("type") != "BPE":
        return False
    piece = next((piece for piece, own in model["vocab"].items() if own == id), "")
    made = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]}
    return len(piece) == 1 or piece in made


def named_specials(named: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens that a folder names, by text: `eos_token` and its like, and the lists."""
    values = [value for key, value in named.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = named.get(key) or []
        if not isinstance(extra, (dict, list)):
            raise ValueError(f"{key} in {CONFIG_FILE} or {SPECIALS_FILE} is {extra!r}, which is no list")
        values += list(extra.values() if isinstance(extra, dict) else extra)
    return {token_text(value): value for value in reversed(values) if isinstance(value, (str, dict))}


def token_text(value: Any) -> str:
    """Return the text of a special token as a config has it, a string or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"a special token in {CONFIG_FILE} or {SPECIALS_FILE} is {value!r}, which is no text"
        )
    return text


def added_token(value: str | dict[str, Any], special: bool) -> tokenizers.AddedToken:
    """Return an entry of a config as the library's token; flags that are absent have its defaults."""
    flags = value if isinstance(value, dict) else {}
    return tokenizers.AddedToken(
        token_text(value),
        single_word=bool(flags.get("single_word", False)),
        lstrip=bool(flags.get("lstrip", False)),
        rstrip=bool(flags.get("rstrip", False)),
        normalized=bool(flags.get("normalized", not special)),
        special=special,
    )

"""`python generate.py`: what it streams, fill-in-the-middle, and mistakes in one sentence."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tokenizers
import torch
from decoders import Bytes, chain, saying
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn

from architecture import Decoder
from config import ModelConfig
from config.files import REPOSITORY
from data.fim import MARKERS, fim_end_ids, fim_prompt_ids
from generate import parse_settings
from generation import command
from generation import text as text_module
from generation.command import write_completions
from generation.settings import GenerationConfig
from generation.text import _Stream, added_text, generate
from modules.quantized_linear import KINDS
from pretrained import save_pretrained
from pretrained.load import FAMILIES
from tokenization.healing import Prompt
from tokenizer import BPETokenizer, CodeTokenizer, PretrainedTokenizer, Tokenizer
from training.run import hold_run, load_run

TEXTS = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n"] * 3
END = "<|endoftext|>"


def trained(
    control: tuple[str, ...], special: bool = True, spaces: tuple[str, ...] = ()
) -> PretrainedTokenizer:
    """A byte-level BPE as StarCoder's; tokens that are not special come after the vocabulary, as Qwen's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    first = [END, *(control if special else ())]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if not special:
        backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in spaces])
    config = json.dumps({"eos_token": END, "bos_token": END})
    return PretrainedTokenizer({"tokenizer.json": backend.to_str(), "tokenizer_config.json": config})


STARCODER = trained((*MARKERS[0], "<fim_pad>", "<file_sep>", "<repo_name>", "<filename>")).with_start()


# --- fill-in-the-middle -----------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("markers", MARKERS)
def test_markers_are_ids_and_text_that_looks_like_one_is_text(markers, special):
    tokenizer = trained(markers, special, spaces=("    ",))
    before, after, middle = (tokenizer.token_id(token) for token in markers)
    plain = fim_prompt_ids(tokenizer, "def f(x):\n    ", "\n    return y\n")
    spelled = f"{markers[0]}def f(x):\n    {markers[1]}\n    return y\n{markers[2]}"
    assert plain == tokenizer.encode(spelled, specials=True)
    hostile = f"a{markers[2]}b{END}\n    c"
    ids = fim_prompt_ids(tokenizer, hostile, markers[1])
    control = {before, after, middle, tokenizer.eos_id}
    assert [id for id in ids if id in control] == [before, after, middle]
    gap = ids.index(after)  # pyright: ignore
    assert tokenizer.decode(ids[1:gap]) == hostile
    assert tokenizer.decode(ids[gap + 1 : -1]) == markers[1]
    assert tokenizer.token_id("    ") in ids[1:gap]  # a run of spaces is no marker
    # A planted fault: the rule of transformers lets a file end its own prompt.
    assert middle in tokenizer.encode(hostile, specials=True)


@pytest.mark.parametrize(
    "tokenizer",
    [Bytes(), CodeTokenizer(["def"], [], []), trained(())],
    ids=["bytes", "code of older runs", "pretrained"],
)
def test_a_tokenizer_without_markers_says_so(tokenizer):
    with pytest.raises(ValueError, match="has no fill-in-the-middle tokens") as error:
        fim_prompt_ids(tokenizer, "a", "b")
    assert "\n" not in str(error.value)
    assert tokenizer.token_id("<fim_prefix>") is None


@pytest.mark.parametrize(
    "end",
    [END, "<fim_pad>", "<file_sep>", "<repo_name>", "<filename>", "<fim_prefix>", "<fim_middle>"],
)
def test_a_middle_ends_at_every_end_and_leaves_no_text_of_it(end):
    tokenizer = STARCODER
    middle, stop = tokenizer.token_id("<fim_middle>"), tokenizer.token_id(end)
    assert stop in fim_end_ids(tokenizer) and middle is not None and stop is not None
    (x,) = tokenizer.encode("x")
    model = chain({middle: {x: 1.0}, x: {stop: 1.0}}, tokenizer.vocab_size)
    pieces = []
    chosen = GenerationConfig(max_new_tokens=9)
    results = generate(model, tokenizer, ["def f("], chosen, suffix="):\n", on_text=pieces.append)
    assert [(r.text, r.finish_reason, r.ids) for r in results] == [("x", "eos", [x, stop])]
    assert pieces == ["x"]


# --- streaming --------------------------------------------------------------------------------------


class Fallback(Bytes):
    """A tokenizer with byte fallback like Llama's: a run with a broken character is U+FFFD, a byte each.

    Small letters are pieces of their own, which end a run.
    """

    def decode(self, ids):
        data = bytes(id - 3 for id in ids if id > 2)
        return "".join(map(self.run, re.findall(rb"[a-z]+|[^a-z]+", data)))

    def run(self, data):
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "�" * len(data)


BASES: dict[str, Tokenizer] = {
    "bytes": Bytes(),
    "fallback": Fallback(),
    "code": CodeTokenizer.train(TEXTS, 400),
    "bpe": BPETokenizer.train(TEXTS, 300),
    "pretrained": STARCODER,
}


def unsettled(tokenizer: Tokenizer, before: list[int], stops: tuple[str, ...] = ()) -> _Stream:
    """One that decodes all at each token."""
    with patch.object(_Stream, "_settle"):
        stream = _Stream(tokenizer, Prompt(before), stops, lambda text: None)
    stream.next_settled = 10**9
    return stream


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("text", ["ADD" + "_RETURN" * 9 + "\nA_Ba", "é" * 5 + "\néab" + "\n→a" * 5])
def test_a_stream_settles_where_nothing_before_matters(name, text, monkeypatch):
    """Not in a name whose capitals were set before, nor in a run of bytes that begins outside the context."""
    monkeypatch.setattr("generation.text.SETTLED_EVERY", 1)
    monkeypatch.setattr("generation.text.CONTEXT", 4)
    tokenizer, before = BASES[name], BASES[name].encode("def f")
    ids, stream = tokenizer.encode(text), _Stream(tokenizer, Prompt(before), (), lambda text: None)
    slow = unsettled(tokenizer, before)
    for n in range(1, len(ids) + 1):
        stream.read(ids[:n])
        slow.read(ids[:n])
        assert stream.given == slow.given
    assert stream.start > len(before)


@pytest.mark.parametrize("name", BASES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_streamed_is_never_taken_back(name, data):
    tokenizer = BASES[name]
    text = data.draw(st.text(alphabet="ab_ (\n\tAÉé→\U0001f40d", max_size=24))
    ids = tokenizer.encode(text)
    if name != "fallback" and data.draw(st.booleans()):  # bytes that are no text, case marks, anything
        ids += data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), max_size=8))
    stops = tuple(data.draw(st.lists(st.text(alphabet="ab (\né", min_size=1, max_size=3), max_size=2)))
    asked = data.draw(
        st.sampled_from(["def f", "A\nx = 1\n    return MAX_", "é\n→\n", "\n" + "é" * 9 + "\na"])
    )
    before, given_out = tokenizer.encode(asked), []
    with patch.object(text_module, "SETTLED_EVERY", 1), patch.object(text_module, "CONTEXT", 4):
        stream = _Stream(tokenizer, Prompt(before), stops, given_out.append)
        slow = unsettled(tokenizer, before, stops)
        for n in range(1, len(ids) + 1):
            whole = added_text(tokenizer, before, ids[:n])
            if any(string in whole for string in stops):
                ids = ids[:n]
                break
            stream.read(ids[:n])
            slow.read(ids[:n])
            assert stream.given == slow.given  # The slow one decodes all at each token.
    whole = added_text(tokenizer, before, ids)
    final = whole[: min((whole.find(s) for s in stops if s in whole), default=None)]
    assert final.startswith("".join(given_out))
    stream.end(final)
    assert "".join(given_out) == final


@pytest.mark.parametrize("name", BASES)
def test_a_token_of_a_stream_costs_the_same_after_a_long_prompt(name, monkeypatch):
    tokenizer = copy.copy(BASES[name])
    before = tokenizer.encode("def f(a_b, É):\n    return a_B\n" * 200)
    ids = tokenizer.encode("def f(a_b):\n    return a_B # é\n" * 20)
    decoded, given_out, right = [], [], tokenizer.decode
    stream = _Stream(tokenizer, Prompt(before), (), given_out.append)
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: decoded.append(len(ids)) or right(ids))
    for n in range(1, len(ids) + 1):
        stream.read(ids[:n])
    assert max(decoded) < 300 < len(before) and sum(decoded) < 1000 * len(ids)
    whole, shown = added_text(tokenizer, before, ids), "".join(given_out)
    assert whole.startswith(shown) and len(whole) - len(shown) < 10


def test_a_stream_that_kept_nothing_back_would_be_noticed():
    def streamed(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = (), **faults: object) -> str:
        parts: list[str] = []
        stream, ids = _Stream(tokenizer, Prompt([]), stop, parts.append), tokenizer.encode(text)
        for name, value in faults.items():
            setattr(stream, name, value)
        for n in range(1, len(ids)):
            stream.read(ids[:n])
        return "".join(parts)

    assert streamed(Bytes(), "xEND", ("END",)) == "x"
    assert streamed(Bytes(), "xEND") == "xEN"
    assert streamed(Fallback(), "→→") == ""
    assert streamed(Fallback(), "→→", byte=[]) == "→"  # before the second was whole, the text was "�����"


def test_streamed_parts_come_while_the_text_is_made():
    tokenizer = Bytes()
    model = saying("abcé→xEND", tokenizer)
    parts, forwards = [], []
    model.embed.register_forward_hook(lambda *_: forwards.append(1))
    chosen = GenerationConfig(max_new_tokens=20, stop=("END",))
    result = generate(
        model, tokenizer, ["a"], chosen, on_text=lambda text: parts.append((len(forwards), text))
    )
    assert parts == [(1, "b"), (2, "c"), (4, "é"), (7, "→"), (8, "x")] and result[0].text == "bcé→x"
    assert result == generate(model, tokenizer, ["a"], chosen)
    beams = replace(chosen, num_beams=2)
    parts.clear()
    assert generate(model, tokenizer, ["a"], beams, on_text=parts.append)[0].text == "".join(parts)
    with pytest.raises(ValueError, match="2 completions cannot be streamed"):
        generate(model, tokenizer, ["a", "b"], chosen, on_text=print)


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with StarCoder's tokens."""
    config = ModelConfig(
        vocab_size=STARCODER.vocab_size + 3,
        block_size=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        mlp="swiglu",
        qk_norm=False,
        norm="rms",
        norm_weight=True,
        norm_bias=False,
    )
    model = Decoder(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=draw)
    path = tmp_path_factory.mktemp("model")
    save_pretrained(model.eval(), STARCODER, path)
    return path


def run(capsysbinary, *argv: str) -> tuple[bytes, str]:
    write_completions(parse_settings(list(argv)))
    out, err = capsysbinary.readouterr()
    return out, err.decode()


def expected(folder: Path, prompts: list[str], suffix: str | None = None, **chosen) -> list[str]:
    found = command.open_model(parse_settings(["--model", str(folder), "--prompt", "x"]))
    return [c.text for c in generate(*found, prompts, GenerationConfig(**chosen), suffix=suffix)]


def test_one_prompt_is_streamed(folder, capsysbinary):
    out, err = run(capsysbinary, "--model", str(folder), "--prompt", "def f(", "--max_new_tokens", "9")
    assert out.decode() == expected(folder, ["def f("], max_new_tokens=9)[0] + "\n"
    assert err.startswith(("length, ", "eos, ")) and " tokens/s\n" in err and err.count("\n") == 1


def test_a_text_that_was_speculated_is_the_same(folder, capsysbinary):
    words = ["--model", str(folder), "--prompt", "a = b\n" * 4, "--max_new_tokens", "9"]
    plain = run(capsysbinary, *words)
    found = run(capsysbinary, *words, "--speculate", "lookup")
    assert found[0] == plain[0]
    assert re.match(r"\d+ of \d+ proposed tokens were taken", found[1]) and "proposed" not in plain[1]


def test_texts_are_taken_as_they_are(folder, capsysbinary):
    for text in ("[1, 2]", "null", "--x", "a: b\n  é→", "1", "{"):
        words = [f"--prompt={text}", f"--suffix={text}", "--stop", text, "--stop=never", "--seed", "3"]
        chosen = parse_settings(["--model", "m", *words])
        assert (chosen.prompt, chosen.suffix, chosen.stop, chosen.seed) == ((text,), text, (text, "never"), 3)


def test_several_prompts_come_one_after_another(folder, capsysbinary, monkeypatch, tmp_path):
    (tmp_path / "p.py").write_text("for é in", encoding="utf-8")
    words = ["--model", str(folder), "--prompt", "a", "--prompt", "def add(a,", "--max_new_tokens", "5"]
    out, err = run(capsysbinary, *words, "--prompt_file", str(tmp_path / "p.py"), "--dtype", "fp32")
    texts = expected(folder, ["a", "def add(a,", "for é in"], max_new_tokens=5)
    assert out.decode() == "".join(f"--- completion {i}\n{text}\n" for i, text in enumerate(texts, 1))
    assert [line.split(":")[0] for line in err.splitlines()[:3]] == ["1", "2", "3"]


def test_suffix_and_sampling(folder, capsysbinary):
    flags = ["--temperature", "0.9", "--top_k", "5", "--seed", "7", "--max_new_tokens", "6"]
    words = ["--model", str(folder), "--prompt", "def f(", "--suffix", "):", *flags]
    out, _ = run(capsysbinary, *words)
    chosen = {"temperature": 0.9, "top_k": 5, "seed": 7, "max_new_tokens": 6}
    assert out.decode() == expected(folder, ["def f("], "):", **chosen)[0] + "\n"


OLDER = Path(__file__).parent / "files_of_cf0629c" / "plain"


@pytest.mark.parametrize("held", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("source", ["a published model", "a run"])
def test_matrices_are_held_in_fewer_bits(source, held, folder, capsysbinary):
    path = str(folder if source == "a published model" else OLDER)
    full, _ = command.open_model(parse_settings(["--model", path, "--prompt", "x"]))
    chosen = parse_settings(["--model", path, "--prompt", "def f(", "--held", held, "--max_new_tokens", "4"])
    model, _ = command.open_model(chosen)
    linears = {name: module for name, module in full.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        found: Any = model.get_submodule(name)
        if "blocks." in name or held != "nf4":
            expected = KINDS[held].from_weight(linear.weight)
            assert all(torch.equal(*pair) for pair in zip(found.stored, expected.stored, strict=True)), name
        else:
            assert isinstance(found, nn.Linear)
    assert model.embed.weight.dtype == (torch.float32 if held == "nf4" else torch.bfloat16)
    assert torch.equal(model.embed.weight, full.embed.weight.to(model.embed.weight.dtype))
    write_completions(chosen)
    assert capsysbinary.readouterr().err.decode().startswith(("length, 4 tokens", "eos, "))


def test_a_run_with_adapters_keeps_its_format():
    run = replace(load_run(OLDER), family=FAMILIES["gpt_bigcode"])
    with pytest.raises(ValueError, match=r"run with adapters.* stored as auto; leave --held int8 out"):
        hold_run(run, "int8")
    hold_run(run, "full")


def test_every_generation_setting_is_a_flag():
    words = [sys.executable, "-X", "importtime", "generate.py", "--help"]
    shown = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert shown.returncode == 0
    for name in GenerationConfig.__dataclass_fields__:
        assert f"--{name}" in shown.stdout
    assert " torch\n" not in shown.stderr  # Help with torch would take seconds.


def test_the_standard_input(folder):
    """The whole command, once."""
    words = [sys.executable, "generate.py", "--model", str(folder), "--prompt_file", "-", "--device", "cpu"]
    words += ["--max_new_tokens", "4"]
    done = subprocess.run(words, cwd=REPOSITORY, input="def é".encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == expected(folder, ["def é"], max_new_tokens=4)[0] + "\n"


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_mistake(folder):
    words = [sys.executable, "generate.py", "--model", str(folder), "--prompt", "x", "--device", "cpu"]
    words += ["--max_new_tokens", "9"]
    command = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()  # before anything is written
    assert command.stderr.read() == b"" and command.wait() == 0
    command.stderr.close()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no prompt; give --prompt"),
        (["--prompt", "a", "--top_k", "3"], "top_k is 3 but temperature 0"),
        (["--prompt", "a", "--prompt", "b", "--suffix", "c"], "--suffix belongs to one prompt"),
        (["--prompt", "a", "--suffix", "b", "--suffix", "c"], "--suffix is given 2 times"),
        (["--prompt", "a", "--max_new_token", "3"], "did you mean --max_new_tokens?"),
        (["--prompt", "a", "--stop", ""], "must be a list of strings that are not empty"),
        (["--prompt", "a", "--dtype", "int8"], "dtype is int8; it must be one of auto, bf16, fp32"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        parse_settings(["--model", "m", *words])
    assert error.value.code == 2
    written = capsys.readouterr().err
    assert sentence in written and written.startswith("error: ") and written.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "no such"}, "neither a folder nor a hub id"),
        ({"model": "runs/nope"}, "there is no folder runs/nope; runs holds none"),
        ({"model": "EMPTY"}, "holds no run"),
        ({"model": "BARE"}, "has no tokenizer"),
        ({"prompt": (), "prompt_file": "no such"}, "--prompt_file no such cannot be read"),
        ({"prompt": (), "prompt_file": "LATIN"}, "is not UTF-8: byte 1"),
        ({"device": "tpu"}, "device 'tpu' is not"),
        ({"which": "last"}, "is a published model, and --which last is for runs"),
        ({"adapter": "a", "dtype": "bf16"}, "leave --dtype bf16 out, or --adapter"),
        ({"adapter": "a", "held": "int4"}, "leave --held int4 out"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(change, sentence, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the folder of the repository may hold runs
    bare, empty, latin = tmp_path / "bare", tmp_path / "empty", tmp_path / "latin"
    empty.mkdir()
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    latin.write_bytes(b"a\xe9")
    places = {"EMPTY": str(empty), "BARE": str(bare), "LATIN": str(latin)}
    change = {key: places.get(value, value) if value else value for key, value in change.items()}
    chosen = replace(parse_settings(["--model", str(folder), "--prompt", "a"]), **change)
    with pytest.raises(ValueError, match=sentence) as error:
        write_completions(chosen)
    assert "\n" not in str(error.value)

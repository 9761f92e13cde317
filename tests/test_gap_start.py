"""The same tokens stand before a text with a gap in training, in generation and for other programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from pretrained_folders import tokenizer_with_gaps
from test_generate_command import STARCODER
from tokenizers import Tokenizer as Backend

from architecture import Decoder
from config import DataConfig, ModelConfig
from data.documents import Document
from data.fim import MARKERS, fim_markers, fim_prompt_ids, gap_start
from data.prepare import _store_key
from data.tokenstore import TokenStore, build_store
from dataset import as_shown, shown
from generation.settings import GenerationConfig
from generation.text import generate
from guards.labels import example_in_row
from pretrained.save import save_tokenizer
from suites.stored import text_of_example
from tokenization.healing import Prompt
from tokenizer import STARTS_GAPS, PretrainedTokenizer, Tokenizer, load_tokenizer
from training.run import as_begun

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer as our small bases have it."""
    folder = tmp_path_factory.mktemp("tokenizer") / "gaps"
    tokenizer_with_gaps(["def f(x):\n    return x\n"] * 9, 290, folder)
    return folder


def spelled(markers: tuple[str, str, str]) -> str:
    return f"{markers[0]}def f({markers[1]}):\n{markers[2]}"


def test_another_program_builds_the_prompt_that_was_trained(ours: Path, tmp_path: Path) -> None:
    """The tokenizer.json put bos before a prompt with a gap, and no training text had it there."""
    for n, tokenizer in enumerate((load_tokenizer(ours), STARCODER)):
        save_tokenizer(tokenizer, tmp_path / str(n))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(n))
        asked = fim_prompt_ids(tokenizer, "def f(", "):\n")
        assert theirs(spelled(MARKERS[0])).input_ids == asked
        assert asked[0] == tokenizer.prompt_ids("x")[0] == tokenizer.start_id
        build_store(tmp_path / f"s{n}", [("train", Document("d", "x", "d", "def f(", "):\n"))], tokenizer)
        assert TokenStore(tmp_path / f"s{n}", "train").document(0)[: len(asked)].tolist() == asked


def bare(folder: Path, to: Path) -> Path:
    """Copy a folder as it was written when nothing stood before a gap."""
    to.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    config = json.loads((to / "tokenizer_config.json").read_text())
    config.pop(STARTS_GAPS)
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to


def test_older_bases_and_runs_keep_what_they_were_trained_with(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = load_tokenizer(bare(ours, tmp_path / "base"))
    assert older.bare_gaps and older.fingerprint == load_tokenizer(ours).fingerprint
    assert fim_prompt_ids(older, "a", "b") == fim_prompt_ids(load_tokenizer(ours), "a", "b")[1:]
    assert older.prompt_ids("a")[0] == older.start_id
    STARCODER.save(tmp_path / "new" / "tokenizer")
    bare(tmp_path / "new" / "tokenizer", tmp_path / "run").rename(tmp_path / "tokenizer")
    for folder, is_bare in ((tmp_path, True), (tmp_path / "new", False)):
        as_begun(goes_on := load_tokenizer(ours), folder)
        assert goes_on.bare_gaps == is_bare
    assert not load_tokenizer(tmp_path / "tokenizer").bare_gaps  # a published one, as transformers reads it
    assert isinstance(older, PretrainedTokenizer)
    for same in (older.with_tokens(["<|x|>"]), older.with_start(), older.within(older.vocab_size)):
        assert same.bare_gaps
    assert not capsys.readouterr().err
    save_tokenizer(older, tmp_path / "exported")
    assert "warning: gaps were trained without the start" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "exported").bare_gaps
    data = DataConfig(fim_rate=0.5)
    assert _store_key(data, older, "x", "examples") != _store_key(data, load_tokenizer(ours), "x", "examples")


@pytest.mark.parametrize("is_bare", [True, False])
def test_rows_prompts_and_texts_agree_with_and_without_a_start(
    ours: Path, tmp_path: Path, is_bare: bool
) -> None:
    tokenizer: Tokenizer = load_tokenizer(ours)
    tokenizer.bare_gaps = is_bare
    documents = [Document("d", "M" * m, "d", "ABCDEFGH"[: 3 * m], "RSTUVWXY"[:m]) for m in (1, 2, 3)]
    build_store(tmp_path / "s", [("train", d) for d in documents], tokenizer)
    store = TokenStore(tmp_path / "s", "train")
    markers = fim_markers(tokenizer)
    for length in (11, 13, 40):
        rows = shown(store, length)
        for n, document in enumerate(documents):
            assert gap_start(store.document(n), markers) == (0 if is_bare else 1)
            wanted, n_prompt = example_in_row(store, n, length + 1, tokenizer)
            assert as_shown(store, n, rows).tolist() == wanted.tolist()
            assert int(rows.prompt_length[n]) == n_prompt
            text = text_of_example(store, tokenizer, n)
            assert (text.prompt, text.suffix, text.reference) == (
                document.prompt,
                document.suffix,
                document.text,
            )


def test_the_start_stands_before_a_gap_in_generation(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from generation import text as module

    tokenizer, read = load_tokenizer(ours), []
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=8)
    model, real = Decoder(replace(shape).resolved()), module.generate_ids
    monkeypatch.setattr(module, "generate_ids", lambda *args: read.extend(args[1]) or real(*args))
    generate(model, tokenizer, ["def f("], GenerationConfig(max_new_tokens=2), suffix="):")
    assert read == [Prompt(fim_prompt_ids(tokenizer, "def f(", "):"))] and read[0].ids[0] == tokenizer.bos_id


def test_a_published_model_without_a_start_has_none_before_a_gap(tmp_path: Path) -> None:
    """StarCoder's is such a one: transformers puts nothing before its prompts."""
    backend = Backend.from_str(STARCODER._files["tokenizer.json"])
    state = json.loads(backend.to_str()) | {"post_processor": None}
    tokenizer = PretrainedTokenizer(STARCODER._files | {"tokenizer.json": json.dumps(state)})
    tokenizer.save(tmp_path)
    found = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert fim_prompt_ids(found, "def f(", "):\n") == theirs(spelled(MARKERS[0])).input_ids
    assert fim_prompt_ids(found.with_start(), "a", "b")[0] == found.eos_id

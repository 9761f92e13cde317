"""Tokenizers: what goes in comes out, and broken input is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import STDLIB, stdlib_files
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import tokenization.code_pieces
from config.files import REPOSITORY
from tokenizer import (
    GAPS,
    BPETokenizer,
    CodeTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    load_tokenizer,
)

SMALL = "def get_http_response(url):\n    return url\n\n\nclass HTTPResponse(Response):\n    LIMIT = None\n"


def corpus() -> Iterator[str]:
    for path in sorted((STDLIB / "asyncio").glob("*.py")) + sorted((STDLIB / "http").glob("*.py")):
        yield path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def code() -> CodeTokenizer:
    return CodeTokenizer.train(corpus(), 1500, min_count=10)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(corpus(), 1000)


@pytest.fixture(scope="module")
def tiny() -> CodeTokenizer:
    """Pieces for a few letters only, so that words often are partly or wholly without one."""
    return CodeTokenizer.train(["foo bar_foo fooBar FOO_BAR foo1 22 = ( Foo é\n    "] * 20, 400, min_count=10)


@pytest.fixture(scope="module")
def bpe_as_pretrained(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> PretrainedTokenizer:
    folder = tmp_path_factory.mktemp("hf")
    bpe.save(folder)
    return PretrainedTokenizer.load(folder)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A folder of a fine-tuned code model: runs of spaces and role tokens were added after training."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([SMALL] * 4, trainer)
    size = backend.get_vocab_size()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens([AddedToken("    ", normalized=True)])
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    folder = tmp_path / "hf"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    added = {"    ": size + 1, "<|target|>": size + 2}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    eos = {"content": "<|endoftext|>", "lstrip": False, "rstrip": False, "normalized": False}
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": eos, "pad_token": "<|endoftext|>"})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "bos_token": eos})
    )
    return folder


# Strings that look like code: the joints between these are where spaces and case are implied.
WORDS = st.sampled_from(
    [
        *("a", "A", "foo", "Foo", "FOO", "fooBar", "FooBar", "HTTPResponse", "iOS", "x86", "utf8", "aB"),
        *("ABc", "T_MAX", "O_RDONLY", "FOO_bar", "__init__", "_", "__", "1", "22", "1e5"),
    ]
)
GLUE = st.sampled_from(
    [*" .,=()[]{}:#'\"\\_-", "", "  ", " = ", ", ", "\n", "\n    ", "\r\n", "\r", "\t", "\f", "é"]
)
CODE_LIKE = st.lists(st.one_of(WORDS, GLUE, st.sampled_from("azAZ09_ \n"))).map("".join)
SURROGATES = st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010, exclude_categories=()))
ANY_TEXT = st.one_of(st.text(), st.text(st.characters(exclude_categories=())), SURROGATES, CODE_LIKE)


def check_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert not {0, 1, 2} & set(ids), "encode must not invent special tokens"


class TestCodeRoundTrip:
    @settings(max_examples=200, deadline=None)
    @given(text=ANY_TEXT)
    def test_any_string(self, code: CodeTokenizer, text: str) -> None:
        check_exact(code, text)

    @settings(max_examples=200, deadline=None)
    @given(text=CODE_LIKE)
    def test_code_like(self, code: CodeTokenizer, text: str) -> None:
        check_exact(code, text)

    @settings(max_examples=200, deadline=None)
    @given(text=ANY_TEXT)
    def test_words_that_fall_back_to_bytes(self, tiny: CodeTokenizer, text: str) -> None:
        check_exact(tiny, text)

    @settings(max_examples=100, deadline=None)
    @given(text=ANY_TEXT)
    def test_no_pieces_at_all(self, text: str) -> None:
        check_exact(CodeTokenizer([], [], []), text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "\ud83d\ude00",  # two lone surrogates; must not become the one character below
            "\U0001f600",
            "\udc80\ud800x",
            "a\r\n\r\n\tb\f\v\0\x1c\x85\u2028c",
            "QQQ_foo Foo_BAR FOO_bar FOO_1_BAR UTF8_BAR x_Y",
            "foo 1 2 foo  1 foo1 1foo foo_1 é foo éfoo é1",
            "#FF00AA == != <|eos|><|pad|> \ufeff",
            "a" * 64 + " " + "A" * 65 + "b" + "9" * 129 + "_" * 70,
            "İ ı ß ſ K ﬁ ÀÉ",  # lower() and upper() of these change the length or do not come back
        ],
    )
    @pytest.mark.parametrize("which", ["code", "tiny"])
    def test_traps(self, which: str, text: str, request: pytest.FixtureRequest) -> None:
        check_exact(request.getfixturevalue(which), text)

    @pytest.mark.parametrize("unit", ["a", "aB", "7", "=", " ", "\n", "\t", "é", "a_"])
    def test_long_lines(self, code: CodeTokenizer, unit: str) -> None:
        # Work that grew with the square of the length would take hours here.
        check_exact(code, unit * (1_000_000 // len(unit)))

    def test_long_line_without_repeats(self, code: CodeTokenizer) -> None:
        letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyzABC0189", k=1_000_000))
        check_exact(code, letters)

    def test_150_files_of_the_standard_library(self, code: CodeTokenizer) -> None:
        self.check_files(code, stdlib_files(150))

    @pytest.mark.slow
    def test_every_file_of_the_standard_library(self, code: CodeTokenizer) -> None:
        self.check_files(code, stdlib_files())

    @staticmethod
    def check_files(tokenizer: CodeTokenizer, files: list[Path]) -> None:
        assert len(set(files)) == len(files) >= 150
        for path in files:
            data = path.read_bytes()
            text = data.decode("utf-8", "surrogateescape")
            back = tokenizer.decode(tokenizer.encode(text))
            assert back.encode("utf-8", "surrogateescape") == data, path

    def test_encoding_lines_one_by_one_decodes_to_the_whole(self, code: CodeTokenizer) -> None:
        for text in corpus():
            lines = text.splitlines(keepends=True)
            assert code.decode([id for line in lines for id in code.encode(line)]) == text

    def test_special_tokens_are_silent_and_no_space_crosses_them(self, code: CodeTokenizer) -> None:
        ids = [code.bos_id, *code.encode("foo"), code.eos_id, *code.encode("bar"), code.pad_id]
        assert code.decode(ids) == "foobar"


class TestCodePieces:
    def test_casings_share_pieces(self, code: CodeTokenizer) -> None:
        markers = {"LOW", "CAP", "UP", "JLOW", "JCAP", "JUP", "SNAKE"}
        shared = []
        for name in ("getHTTPResponse", "get_http_response", "GetHttpResponse", "GET_HTTP_RESPONSE"):
            ids = code.encode(name)
            shared.append([i for i, p in zip(ids, code.pieces(ids), strict=True) if p not in markers])
        assert shared[0] == shared[1] == shared[2] == shared[3]
        assert [piece.lower() for piece in code.pieces(shared[0])] == ["get", "http", "response"]

    def test_docstring_examples(self, code: CodeTokenizer) -> None:
        assert code.pieces(code.encode("return getHTTPResponse"))[:1] == ["return"]
        assert code.pieces(code.encode("get_name = None")) == ["get", "SNAKE", "name", " = ", "None"]
        pieces = code.pieces(code.encode("MAX_SIZE"))
        assert pieces[0] == "UP" and pieces.count("UP") == 1

    def test_line_breaks_stand_alone(self, code: CodeTokenizer) -> None:
        pieces = code.pieces(code.encode("x = foo(\n    bar\n)\n\n\ndef f():\n        return 1"))
        breaks = [piece for piece in pieces if "\n" in piece]
        assert breaks[0] == "\n    " and breaks[-1] == "\n        "
        assert "".join(breaks) == "\n    \n\n\n\n\n        "
        for piece in code.plain:
            assert "\n" not in piece or not piece.strip(), piece

    def test_a_space_between_words_costs_nothing(self, code: CodeTokenizer) -> None:
        assert len(code.encode("return self")) == len(code.encode("return")) + len(code.encode("self"))

    @pytest.mark.parametrize("min_count", [3, 10])
    def test_min_count(self, min_count: int) -> None:
        rare, common = "zygote", "wombat"
        text = f"{rare} " * min_count + f"\n{common} " * (min_count + 1) + "\n" + "日" * min_count
        tokenizer = CodeTokenizer.train([text], 600, min_count=min_count)
        assert common in tokenizer.heads
        pieces = tokenizer.heads + tokenizer.tails + tokenizer.plain
        assert all(text.count(piece) > min_count for piece in pieces)
        assert not any("z" in piece or "日" in piece for piece in pieces)
        check_exact(tokenizer, text)

    def test_pieces_occur_often_enough(self, code: CodeTokenizer) -> None:
        text = "\0".join(corpus())
        lower = text.lower()
        for piece in code.heads + code.tails:
            assert lower.count(piece.lower()) > 10, piece
        for piece in code.plain:
            assert text.count(piece) > 10, piece

    def test_vocabulary_is_used_and_no_larger_than_asked(self, code: CodeTokenizer) -> None:
        # What the last choice of pieces leaves idle goes, and nothing takes its place: one row with some
        # versions of the library, whose texts these are, and none with others.
        assert 0.99 * 1500 <= code.vocab_size <= 1500
        for size in (269, 273, 300):
            small = CodeTokenizer.train([SMALL] * 20, size)
            assert small.vocab_size <= size
            check_exact(small, SMALL)

    def test_fewer_tokens_than_bytes_by_far(self, code: CodeTokenizer, bpe: BPETokenizer) -> None:
        text = (STDLIB / "argparse.py").read_text(encoding="utf-8")
        same_size = CodeTokenizer.train(corpus(), bpe.vocab_size)
        assert len(same_size.encode(text)) < 1.1 * len(bpe.encode(text))

    def test_usual_case_needs_no_marker(self) -> None:
        tokenizer = CodeTokenizer.train(["x = None\ny = ERROR\n" * 20], 400)
        assert {"None", "ERROR"} <= set(tokenizer.heads)
        assert tokenizer.pieces(tokenizer.encode("None")) == ["None"]
        assert tokenizer.pieces(tokenizer.encode("none")) == ["LOW", "None"]

    def test_order_of_documents_does_not_matter(self, code: CodeTokenizer) -> None:
        again = CodeTokenizer.train(reversed(list(corpus())), 1500, min_count=10)
        assert again.fingerprint == code.fingerprint

    def test_rows_are_not_spent_on_pieces_that_are_hardly_used(self) -> None:
        large = CodeTokenizer.train(corpus(), 8192, min_count=10)
        used = Counter(id for text in corpus() for id in large.encode(text))
        pieces = large.heads + large.tails + large.plain
        first = large.vocab_size - len(GAPS) - len(pieces)
        idle = [piece for id, piece in enumerate(pieces, first) if len(piece) > 1 and used[id] <= 10]
        assert len(pieces) > 1000
        assert len(idle) < 0.01 * len(pieces), idle

    def test_training_is_deterministic_across_processes(self, code: CodeTokenizer) -> None:
        program = (
            "from tokenizer import CodeTokenizer; import sys; "
            "print(CodeTokenizer.train([sys.stdin.read()], 500, 2).fingerprint)"
        )
        prints = set()
        for seed in ("1", "2"):
            done = subprocess.run(
                [sys.executable, "-c", program],
                input=SMALL * 5,
                capture_output=True,
                text=True,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONHASHSEED": seed},
                check=True,
            )
            prints.add(done.stdout)
        assert len(prints) == 1

    def test_import_needs_no_torch(self) -> None:
        program = "import tokenizer, sys; sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)

    def test_caches_are_bounded_and_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenization.code_pieces, "MAX_CACHE", 7)
        small = CodeTokenizer.train([SMALL] * 20, 400)
        fresh = pickle.loads(pickle.dumps(small))
        for text in corpus():
            assert small.encode(text[:2000]) == fresh.encode(text[:2000])
        assert max(map(len, (small._unit_ids, small._word_ids, small._plain_ids))) <= 7

    @pytest.mark.parametrize("vocab_size", [0, 268])
    def test_vocabulary_too_small(self, vocab_size: int) -> None:
        with pytest.raises(ValueError, match=rf"{vocab_size}.*269"):
            CodeTokenizer.train([SMALL], vocab_size)

    def test_nothing_to_train_on(self) -> None:
        with pytest.raises(ValueError, match="no text"):
            CodeTokenizer.train(["", ""], 500)
        with pytest.raises(ValueError, match="not one string"):
            CodeTokenizer.train(SMALL, 500)
        with pytest.raises(ValueError, match="-1"):
            CodeTokenizer.train([SMALL], 500, min_count=-1)


class TestDecode:
    @pytest.mark.parametrize("which", ["code", "tiny", "bpe"])
    def test_random_ids_decode(self, which: str, request: pytest.FixtureRequest) -> None:
        tokenizer: Tokenizer = request.getfixturevalue(which)
        rng = random.Random(0)
        for _ in range(300):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(60))]
            assert isinstance(tokenizer.decode(ids), str)
            low = [rng.randrange(min(280, tokenizer.vocab_size)) for _ in range(60)]  # bytes and markers
            assert isinstance(tokenizer.decode(low), str)

    def test_invalid_utf8_becomes_the_replacement_character(
        self, code: CodeTokenizer, bpe: BPETokenizer
    ) -> None:
        first_byte = 3
        assert code.decode([first_byte + 0xE2, first_byte + ord("x")]) == "\ufffdx"
        surrogate = [first_byte + byte for byte in "\ud800".encode("utf-8", "surrogatepass")]
        assert code.decode([first_byte + 0xFF, *surrogate, first_byte + 0xC3]) == "\ufffd\ud800\ufffd"
        euro = bpe.encode("\u20ac")
        assert "\ufffd" in bpe.decode(euro[:-1])

    @pytest.mark.parametrize("which", ["code", "bpe"])
    @pytest.mark.parametrize("bad", [-1, 10**6])
    def test_ids_outside_the_vocabulary(self, which: str, bad: int, request: pytest.FixtureRequest) -> None:
        tokenizer: Tokenizer = request.getfixturevalue(which)
        with pytest.raises(ValueError, match=rf"{bad}.*{tokenizer.vocab_size}"):
            tokenizer.decode([5, bad])

    def test_takes_any_iterable(self, code: CodeTokenizer) -> None:
        assert code.decode(iter(code.encode("a b"))) == "a b"


class TestBPE:
    @settings(max_examples=200, deadline=None)
    @given(text=st.one_of(st.text(), CODE_LIKE))
    def test_any_text(self, bpe: BPETokenizer, text: str) -> None:
        check_exact(bpe, text)

    def test_special_token_text_is_text(self, bpe: BPETokenizer) -> None:
        check_exact(bpe, "x = '<|eos|>' <|pad|><|bos|>")

    def test_lone_surrogate_is_refused(self, bpe: BPETokenizer) -> None:
        with pytest.raises(ValueError, match=r"character 2 .*\\ud800"):
            bpe.encode("ab\ud800")
        with pytest.raises(ValueError, match="surrogate"):
            BPETokenizer.train(["ab\ud800"], 500)

    def test_decode_drops_special_tokens(self, bpe: BPETokenizer) -> None:
        assert bpe.decode([1, *bpe.encode("a b"), 2, 0]) == "a b"

    def test_vocabulary_too_small(self) -> None:
        with pytest.raises(ValueError, match=r"100.*262"):
            BPETokenizer.train([SMALL], 100)


class TestGaps:
    @pytest.mark.parametrize("which", ["code", "tiny", "bpe"])
    def test_new_tokenizers_have_tokens_for_gaps_that_no_text_spells(
        self, which: str, request: pytest.FixtureRequest
    ) -> None:
        tokenizer: Tokenizer = request.getfixturevalue(which)
        ids = [tokenizer.token_id(token) for token in GAPS]
        assert None not in ids and len({*ids}) == 3 and max(filter(None, ids)) < tokenizer.vocab_size
        text = "x = ".join(GAPS) + " foo"
        assert not {*ids} & {*tokenizer.encode(text)}
        check_exact(tokenizer, text)
        gap = [id for id in ids if id is not None]
        foo = tokenizer.encode("foo")
        assert tokenizer.decode([*foo, *gap, *foo, *gap]) == "foofoo"
        assert tokenizer.bytes_of(foo) == b"foo" and tokenizer.bytes_of([*foo, gap[0]]) is None
        texts = tokenizer.token_texts(tokenizer.state_after([*foo, gap[2]]))
        assert texts is not None and {texts[id] for id in gap} == {None}

    def test_an_older_code_tokenizer_stays_what_it_was(self, code: CodeTokenizer, tmp_path: Path) -> None:
        older = CodeTokenizer(code.heads, code.tails, code.plain)
        older.save(tmp_path)
        assert '"gaps"' not in (tmp_path / "code_tokenizer.json").read_text("utf-8")
        found = load_tokenizer(tmp_path)
        assert found.fingerprint == older.fingerprint != code.fingerprint
        assert found.token_id(GAPS[0]) is None and found.vocab_size == code.vocab_size - len(GAPS)
        with pytest.raises(ValueError, match="outside this tokenizer's vocabulary"):
            found.decode([code.vocab_size - 1])

    def test_the_order_of_gaps_is_saved(self, bpe: BPETokenizer, tmp_path: Path) -> None:
        other = copy.copy(bpe)
        other.suffix_first = True
        other.save(tmp_path)
        found = load_tokenizer(tmp_path)
        assert found.suffix_first and pickle.loads(pickle.dumps(found)).suffix_first
        bpe.save(tmp_path)
        assert not load_tokenizer(tmp_path).suffix_first


class TestSaveLoad:
    @pytest.mark.parametrize("which", ["code", "tiny", "bpe"])
    def test_same_after_load(self, which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        before: Tokenizer = request.getfixturevalue(which)
        before.save(tmp_path)
        after = load_tokenizer(tmp_path)
        assert type(after) is type(before)
        assert after.fingerprint == before.fingerprint
        assert after.vocab_size == before.vocab_size
        for text in corpus():
            assert after.encode(text) == before.encode(text)
        assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]

    @pytest.mark.parametrize("which", ["code", "bpe"])
    def test_survives_pickling(self, which: str, request: pytest.FixtureRequest) -> None:
        before: Tokenizer = request.getfixturevalue(which)
        after: Tokenizer = pickle.loads(pickle.dumps(before))
        assert after.fingerprint == before.fingerprint
        assert after.encode(SMALL) == before.encode(SMALL)
        assert after.encode("<|eos|>") == before.encode("<|eos|>")

    @pytest.mark.parametrize("cls", [CodeTokenizer, BPETokenizer])
    def test_fingerprint_follows_content(self, cls: type[CodeTokenizer] | type[BPETokenizer]) -> None:
        one, again, other = (cls.train([text] * 20, 400) for text in (SMALL, SMALL, SMALL.upper()))
        assert one.fingerprint == again.fingerprint != other.fingerprint
        assert len(one.fingerprint) == 64

    def test_usual_case_is_part_of_the_fingerprint(self) -> None:
        assert CodeTokenizer(["None"], [], []).fingerprint != CodeTokenizer(["none"], [], []).fingerprint

    def test_pieces_beyond_ascii(self, tmp_path: Path) -> None:
        text = "é = '\U0001f600'  \ud83d\ude00\n" * 20
        tokenizer = CodeTokenizer.train([text], 500)
        assert "é" in tokenizer.plain
        tokenizer.save(tmp_path)
        check_exact(load_tokenizer(tmp_path), text)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no tokenizer"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"heads": ["get", "get"]}, "'get' is twice"),
            ({"heads": ["get", "Get"]}, "'get' is twice"),
            ({"heads": ["gEt"]}, "'gEt' cannot"),
            ({"heads": ["a1"]}, "'a1' cannot"),
            ({"heads": ["get\n"]}, "cannot"),
            ({"heads": [""]}, "0 characters"),
            ({"heads": ["x" * 10**5]}, "100000 characters"),
            ({"heads": "get"}, "lists of strings"),
            ({"tails": ["Ing"]}, "'Ing' cannot"),
            ({"tails": [1]}, "lists of strings"),
            ({"plain": ["a="]}, "'a=' cannot"),
            ({"plain": ["="]}, "'=' cannot"),
            ({"plain": ["\ud800"]}, "cannot"),
            ({"plain": None}, "lists of strings"),
            ({"version": 99}, "version 99"),
            ({"format": "other"}, "is not a plumb code tokenizer"),
            ({"extra": 1}, "is not a plumb code tokenizer"),
        ],
    )
    def test_hostile_code_file(self, tmp_path: Path, change: dict[str, object], said: str) -> None:
        CodeTokenizer(["get"], ["ing"], [" = "]).save(tmp_path)
        path = tmp_path / "code_tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=said) as refusal:
            load_tokenizer(tmp_path)
        assert "code_tokenizer.json" in str(refusal.value)

    @pytest.mark.parametrize("name", ["code_tokenizer.json", "tokenizer.json"])
    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
    def test_broken_files(self, tmp_path: Path, name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_tokenizer(tmp_path)

    def test_failed_save_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = CodeTokenizer(["get"], [], [])
        old.save(tmp_path)

        def no_space(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            CodeTokenizer(["set"], [], []).save(tmp_path)
        assert load_tokenizer(tmp_path).fingerprint == old.fingerprint
        assert [path.name for path in tmp_path.iterdir()] == ["code_tokenizer.json"]

    def test_ends_beside_the_own_one_are_kept(self, tmp_path: Path, bpe: BPETokenizer, tiny: Any) -> None:
        bpe.save(tmp_path / "hf")
        for n, kept in enumerate((tiny, bpe, PretrainedTokenizer.load(tmp_path / "hf"))):
            tokenizer: Any = copy.copy(kept)
            assert load_tokenizer(saved(tokenizer, tmp_path / f"none{n}")).eos_ids == ()
            tokenizer.eos_ids = (tokenizer.eos_id,)  # This adds nothing to `eos_id`.
            assert not (saved(tokenizer, tmp_path / f"one{n}") / "generation_config.json").exists()
            tokenizer.eos_ids = (5, 2, 7)
            folder = saved(tokenizer, tmp_path / f"more{n}")
            again = type(tokenizer).load(folder)
            assert again.eos_ids == (5, 2, 7) and again.fingerprint == tokenizer.fingerprint
            assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [5, 2, 7]
            for ids, left in ((9, (9,)), ([9, 10**6], (9,)), ([-1, 9], (9,)), (-1, ()), (None, ()), ([], ())):
                (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
                assert load_tokenizer(folder).eos_ids == left
            for wrong in ("x", [1, True], [[1]], {"a": 1}, 1.0):
                (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
                with pytest.raises(ValueError, match=r"config.json has eos_token_id .*must be an id"):
                    load_tokenizer(folder)


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(folder)
    return folder


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1], "tokens": ["<|bos|>"]}},
}


class TestStart:
    """The tokens before a prompt are those of transformers, and those of training."""

    def as_theirs(self, folder: Path) -> None:
        ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("def f(x):\n", " x", "y" * 40):
            assert ours.prompt_ids(text) == theirs(text)["input_ids"]

    @pytest.mark.parametrize(
        "before", [None, BYTE_LEVEL, TEMPLATE, {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}]
    )
    @pytest.mark.parametrize(
        ("name", "flags", "bos"),
        [
            ("PreTrainedTokenizerFast", {"add_bos_token": True}, True),
            ("CodeGenTokenizer", {"add_bos_token": False}, True),
            ("GPT2Tokenizer", {}, False),
        ],
    )
    def test_published(
        self, bpe: BPETokenizer, tmp_path: Path, before: Any, name: str, flags: Any, bos: bool
    ) -> None:
        bpe.save(tmp_path / "hf")
        state = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
        state["post_processor"] = before
        (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(state))
        config = {"tokenizer_class": name, "eos_token": "<|eos|>", "unk_token": "<|eos|>"} | flags
        config["bos_token"] = "<|bos|>" if bos else None
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
        self.as_theirs(tmp_path / "hf")
        published = load_tokenizer(tmp_path / "hf")
        published.eos_ids = (5, 7)
        started = published.with_start()
        assert started.start_id is not None and started.eos_ids == (5, 7)
        assert started.with_start() is started
        assert (started is published) == (published.start_id is not None)
        assert (started.fingerprint == published.fingerprint) == (started is published)
        assert started.start_id == (1 if bos or published.start_id is not None else 2)
        assert started.prompt_ids("x") == [started.start_id, *published.encode("x")]
        started.save(tmp_path / "started")
        self.as_theirs(tmp_path / "started")
        assert load_tokenizer(tmp_path / "started").fingerprint == started.fingerprint
        assert isinstance(started, PretrainedTokenizer)
        assert started.with_tokens(["<|more|>"]).start_id == started.start_id

    @pytest.mark.parametrize(
        ("name", "flags"), [("GPT2Tokenizer", {"add_bos_token": True}), ("CodeGenTokenizer", {})]
    )
    def test_of_vocabulary_and_merges(self, bpe: BPETokenizer, tmp_path: Path, name: str, flags: Any) -> None:
        bpe.save(tmp_path / "hf")
        model = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]
        (tmp_path / "hf" / "tokenizer.json").unlink()
        (tmp_path / "hf" / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "hf" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
        config = {"tokenizer_class": name} | dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|eos|>")
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config | flags))
        self.as_theirs(tmp_path / "hf")
        saved(load_tokenizer(tmp_path / "hf").with_start(), tmp_path / "started")
        self.as_theirs(tmp_path / "started")
        assert load_tokenizer(tmp_path / "started").start_id == 2

    def test_of_ours(self, bpe: BPETokenizer, tiny: CodeTokenizer, tmp_path: Path) -> None:
        bpe.save(tmp_path / "bpe")
        self.as_theirs(tmp_path / "bpe")
        assert load_tokenizer(tmp_path / "bpe").fingerprint == bpe.fingerprint
        state = json.loads((tmp_path / "bpe" / "tokenizer.json").read_text())
        (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))
        assert load_tokenizer(tmp_path / "bpe").fingerprint == bpe.fingerprint  # written before it was said
        assert (bpe.with_start(), tiny.with_start()) == (bpe, tiny)
        assert bpe.prompt_ids("x")[0] == bpe.bos_id and tiny.prompt_ids("x")[0] == tiny.bos_id

    def test_more_than_one_is_refused(self, bpe: BPETokenizer, tmp_path: Path) -> None:
        bpe.save(tmp_path)
        state = json.loads((tmp_path / "tokenizer.json").read_text())
        first, *rest = TEMPLATE["single"]
        two: Any = TEMPLATE | {"single": [first, first, *rest]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(state | {"post_processor": two}))
        (tmp_path / "tokenizer_config.json").write_text("{}")
        with pytest.raises(ValueError, match="puts 2 tokens before a text, and at most one is known"):
            load_tokenizer(tmp_path)


class TestPretrained:
    def test_ids_and_special_tokens(self, hf_folder: Path) -> None:
        tokenizer = load_tokenizer(hf_folder)
        assert isinstance(tokenizer, PretrainedTokenizer)
        added = json.loads((hf_folder / "added_tokens.json").read_text())
        end = tokenizer.encode("<|endoftext|>", specials=True)
        assert end == [tokenizer.eos_id] == [tokenizer.bos_id] == [tokenizer.pad_id]
        assert end == [tokenizer.token_id("<|endoftext|>")] and tokenizer.token_id("<|none|>") is None
        assert tokenizer.encode("<|target|>") == [added["<|target|>"]]
        assert tokenizer.encode("    ") == [added["    "]]
        assert tokenizer.vocab_size == added["<|target|>"] + 1

    @settings(max_examples=100, deadline=None)
    @given(text=st.one_of(st.text(), CODE_LIKE))
    def test_any_text(self, text: str, bpe_as_pretrained: Tokenizer) -> None:
        assert bpe_as_pretrained.decode(bpe_as_pretrained.encode(text)) == text

    def test_truncation_and_padding_of_the_file_are_off(self, hf_folder: Path) -> None:
        tokenizer = load_tokenizer(hf_folder)
        assert tokenizer.decode(tokenizer.encode(SMALL * 10)) == SMALL * 10
        assert len(tokenizer.encode("x")) == 1

    def test_only_pad_bos_eos_are_silent(self, hf_folder: Path) -> None:
        tokenizer = PretrainedTokenizer.load(hf_folder)
        ids = tokenizer.encode("a<|target|>b<|endoftext|>", specials=True)
        assert tokenizer.decode(ids) == "a<|target|>b"

    def test_the_text_of_a_special_token_is_text(self, hf_folder: Path) -> None:
        tokenizer = PretrainedTokenizer.load(hf_folder)
        text = "stop at <|endoftext|>, or<|endoftext|>    <|target|>"
        for ids in (tokenizer.encode(text), pickle.loads(pickle.dumps(tokenizer)).encode(text)):
            assert tokenizer.eos_id not in ids
            assert tokenizer.decode(ids) == text
        assert [id == tokenizer.eos_id for id in tokenizer.encode(text, specials=True)].count(True) == 2
        assert tokenizer.encode(text) == ids, "asking for specials once must not change the rule"

    def test_what_is_named_as_the_end_is_special_though_no_flag_says_so(self, hf_folder: Path) -> None:
        path = hf_folder / "tokenizer.json"
        state = json.loads(path.read_text())
        next(token for token in state["added_tokens"] if token["content"] == "<|endoftext|>")["special"] = (
            False
        )
        path.write_text(json.dumps(state))
        tokenizer = load_tokenizer(hf_folder)
        assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>")

    def test_a_special_token_without_other_pieces_is_refused_as_text(self, hf_folder: Path) -> None:
        path = hf_folder / "tokenizer.json"
        state = json.loads(path.read_text())
        state["model"] = {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "?": 2}, "unk_token": "?"}
        state["added_tokens"] = [state["added_tokens"][0] | {"id": 0, "content": "<s>", "special": True}]
        state["pre_tokenizer"] = {"type": "WhitespaceSplit"}
        path.write_text(json.dumps(state))
        for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
            (hf_folder / name).unlink()
        tokenizer = PretrainedTokenizer.load(hf_folder)
        assert tokenizer.encode("a b a") == [1, 2, 1]
        with pytest.raises(ValueError, match="spells the special token '<s>'"):
            tokenizer.encode("a <s> a")
        assert tokenizer.encode("a <s> a", specials=True) == [1, 0, 1]

    @pytest.mark.parametrize("piece", ["!", "merged"])
    def test_a_piece_of_text_that_is_the_pad_token_stays_text(self, hf_folder: Path, piece: str) -> None:
        before = PretrainedTokenizer.load(hf_folder)
        merges = json.loads((hf_folder / "tokenizer.json").read_text())["model"]["merges"]
        pieces = ["".join(merge).replace(" ", "") for merge in merges]
        piece = next(p for p in pieces if p.isascii()) if piece == "merged" else piece
        named = {"eos_token": "<|endoftext|>", "pad_token": piece}
        (hf_folder / "special_tokens_map.json").write_text(json.dumps(named))
        text = "return a if a != b else <|endoftext|>!" + piece
        tokenizer = PretrainedTokenizer.load(hf_folder)
        assert [tokenizer.pad_id] == before.encode(piece)
        assert tokenizer.encode(text) == before.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eos_id is not None and tokenizer.decode([tokenizer.eos_id]) == ""

    def test_vocab_and_merges_are_read_as_tokenizer_json_is(self, hf_folder: Path, tmp_path: Path) -> None:
        whole = PretrainedTokenizer.load(hf_folder)
        path = hf_folder / "tokenizer.json"
        model = json.loads(path.read_text())["model"]
        ids = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
        (hf_folder / "vocab.json").write_text(json.dumps(ids))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (hf_folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        path.unlink()
        parts = PretrainedTokenizer.load(hf_folder)
        assert isinstance(load_tokenizer(hf_folder), PretrainedTokenizer)
        for text in (SMALL, SMALL * 3 + "    <|target|> é\r\n\t", "# <|endoftext|>"):
            for specials in (False, True):
                assert parts.encode(text, specials) == whole.encode(text, specials)
            assert parts.decode(parts.encode(text)) == text
        parts.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").fingerprint == parts.fingerprint

        config = hf_folder / "tokenizer_config.json"
        config.write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
        with pytest.raises(ValueError, match="tokenizer_class is 'CLIPTokenizer', whose"):
            load_tokenizer(hf_folder)
        config.write_text(json.dumps({"tokenizer_class": "CodeGenTokenizer"}))
        for broken in ("a", "a b c", "never seen", "\x00 \x01"):
            (hf_folder / "merges.txt").write_text(broken)
            with pytest.raises(ValueError, match="do not belong together"):
                load_tokenizer(hf_folder)

    @pytest.mark.parametrize(
        "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    )
    def test_a_file_of_a_gigabyte_a_pipe_and_a_deep_one_are_refused(self, hf_folder: Path, name: str) -> None:
        with open(hf_folder / name, "wb") as file:
            file.truncate(10**9)
        with pytest.raises(ValueError, match=f"{name} has 1000000000 bytes; at most 67108864 are read"):
            load_tokenizer(hf_folder)
        for deep in ("[" * 10**6, '{"a":' * 10**6 + "1" + "}" * 10**6):  # Python 3.14 reads a tenth of it.
            (hf_folder / name).write_text(deep)
            with pytest.raises(ValueError, match=name) as error:
                load_tokenizer(hf_folder)
            assert len(str(error.value)) < 500 and "\n" not in str(error.value)
        (hf_folder / name).unlink()
        os.mkfifo(hf_folder / name)
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            load_tokenizer(hf_folder)

    def test_same_after_save_and_load(self, hf_folder: Path, tmp_path: Path) -> None:
        before = load_tokenizer(hf_folder)
        before.save(tmp_path / "copy")
        after = load_tokenizer(tmp_path / "copy")
        assert after.fingerprint == before.fingerprint
        assert after.encode(SMALL + "<|target|>") == before.encode(SMALL + "<|target|>")
        assert pickle.loads(pickle.dumps(before)).fingerprint == before.fingerprint

    def test_added_tokens_decoder_and_prefix_space(self, hf_folder: Path) -> None:
        path = hf_folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        plain = load_tokenizer(hf_folder)
        config["added_tokens_decoder"] = {
            str(plain.vocab_size - 1): {"content": "<|target|>", "special": False, "normalized": False},
            str(plain.vocab_size): {"content": "<|next|>", "special": True, "normalized": False},
        }
        config |= {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}
        config["additional_special_tokens"] = ["<|role|>"]
        path.write_text(json.dumps(config))
        richer = PretrainedTokenizer.load(hf_folder)
        assert richer.encode("<|next|><|role|>", specials=True) == [plain.vocab_size, plain.vocab_size + 1]
        assert richer.vocab_size == plain.vocab_size + 2
        assert richer.encode("url") == plain.encode(" url") != plain.encode("url")
        assert richer.fingerprint != plain.fingerprint

    def test_without_configs(self, hf_folder: Path) -> None:
        for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
            (hf_folder / name).unlink()
        tokenizer = load_tokenizer(hf_folder)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, None)

    def test_id_of_an_added_token_that_cannot_be(self, hf_folder: Path) -> None:
        (hf_folder / "added_tokens.json").write_text(json.dumps({"<|target|>": 9999}))
        with pytest.raises(ValueError, match=r"added_tokens.json.*9999"):
            load_tokenizer(hf_folder)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("tokenizer_config.json", "{"),
            ("tokenizer_config.json", "[]"),
            ("tokenizer_config.json", '{"eos_token": 7}'),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
            ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
            ("special_tokens_map.json", '{"additional_special_tokens": 5}'),
            ("special_tokens_map.json", '{"bos_token": {"lstrip": true}}'),
            ("added_tokens.json", '{"a": "b"}'),
            ("added_tokens.json", "nonsense"),
        ],
    )
    def test_broken_config(self, hf_folder: Path, name: str, text: str) -> None:
        if name == "special_tokens_map.json":
            (hf_folder / "tokenizer_config.json").unlink()
        (hf_folder / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            load_tokenizer(hf_folder)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"tokenizer.json is missing"):
            PretrainedTokenizer.load(tmp_path)

    def test_lone_surrogate_and_wrong_ids(self, hf_folder: Path) -> None:
        tokenizer = load_tokenizer(hf_folder)
        with pytest.raises(ValueError, match="surrogate"):
            tokenizer.encode("\udfff")
        with pytest.raises(ValueError, match=rf"{tokenizer.vocab_size} is outside"):
            tokenizer.decode([tokenizer.vocab_size])

    @pytest.mark.slow
    @pytest.mark.skipif("PLUMB_TOKENIZER" not in os.environ, reason="PLUMB_TOKENIZER names no folder")
    def test_a_published_tokenizer_on_the_standard_library(self) -> None:
        """Ids are those of AutoTokenizer and text comes back, on each file; for byte-level tokenizers."""
        folder = Path(os.environ["PLUMB_TOKENIZER"])
        ours, theirs = PretrainedTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        files = stdlib_files()
        assert len(files) > 500
        for path in files:
            text = path.read_bytes().decode("utf-8", "replace")
            ids = ours.encode(text)
            assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), path
            assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False), path
            assert ours.decode(ids) == text, path


@pytest.mark.parametrize(
    ("text", "units"),
    [("0_:", ["0", "_:"]), ("),  x", ["),", "  ", "x"]), ("a\n\rb", ["a", "\n", "\r", "b"])],
)
def test_a_group_that_fails_half_way_takes_nothing(text: str, units: list[str]) -> None:
    """Python 3.11.2 kept what it took, so that interpreters gave one text different ids."""
    assert tokenization.code_pieces.UNIT.findall(text) == units

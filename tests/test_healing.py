"""The healed end of a prompt: which tokens may come first, and that each comes as often as the model says."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from architecture import Decoder
from data.documents import Document
from data.tokenstore import _encode
from generation.engine import Generated, generate_ids
from generation.settings import GenerationConfig
from generation.text import generate
from tests.decoders import BIASED, scrambled
from tokenization import healing
from tokenization.healing import Branch, Prompt, healed
from tokenizer import SPECIALS, BPETokenizer, CodeTokenizer, PretrainedTokenizer, Tokenizer, load_tokenizer

MERGES = [("a", "b"), ("b", "b"), ("Ċ", "Ġ"), ("ab", "bb"), ("ĊĠ", "Ġ"), ("Ġ", "a"), ("bb", "a")]
PROMPTS = ["ab\n", "a ", "ab", "abb", "a\n ", "b", "\n", "bbab\n  ", "abbb"]


def tiny(cut_words: bool) -> BPETokenizer:
    """Byte-level BPE of 14 ids; words are cut apart first, as GPT-2 does, or not."""
    pieces = ["a", "b", "Ċ", "Ġ", *(left + right for left, right in MERGES)]
    backend = tokenizers.Tokenizer(models.BPE({p: n for n, p in enumerate(pieces, len(SPECIALS))}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut_words)
    backend.decoder = decoders.ByteLevel()
    state = json.loads(backend.to_str())
    state["model"]["vocab"] |= {token: id for id, token in enumerate(SPECIALS)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(list(SPECIALS))
    return BPETokenizer(backend.to_str())


TINY = {"words": tiny(True), "text": tiny(False)}
MODEL = scrambled(replace(BIASED, vocab_size=14, position="rotary"))


def covers(prompt: Prompt) -> dict[tuple[int, ...], None]:
    """All that may come after the ids that stay, up to the token in which the prompt ends."""
    found = [(*branch.ids, id) for branch in prompt.branches for id in branch.allowed.tolist()]
    assert len(set(found)) == len(found)
    return dict.fromkeys(found)


def all_covers(tokenizer: Tokenizer, text: str, before: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every sequence of tokens whose text begins with `text`, and without its last one does not."""
    begun = (tokenizer.bytes_of(before) or b"").decode()
    for id in range(len(SPECIALS), tokenizer.vocab_size):
        now = (tokenizer.bytes_of((*before, id)) or b"").decode()
        if now.startswith(text):
            yield (*before, id)
        elif text.startswith(now) and now != begun:
            yield from all_covers(tokenizer, text, (*before, id))


@torch.no_grad()
def chances(model: Decoder, ids: list[int], n: int) -> dict[tuple[int, ...], float]:
    """log p of every sequence of n tokens after `ids`, of a vocabulary of 14."""
    every = list(itertools.product(range(14), repeat=n))
    rows = torch.tensor([[*ids, *one] for one in every])
    found = model(rows).double().log_softmax(-1)[:, len(ids) - 1 : -1]
    own = found.gather(2, rows[:, len(ids) :, None]).sum(dim=(1, 2))
    return dict(zip(every, own.tolist(), strict=True))


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("text", PROMPTS)
def test_covers_are_those_the_tokenizer_writes_and_those_with_another_last_token(kind, text):
    tokenizer = TINY[kind]
    own = tokenizer.encode(text)
    prompt = healed(tokenizer, [1, *own])
    assert prompt.whole == [1, *own]
    wanted = set()
    for cover in all_covers(tokenizer, text):
        more = (tokenizer.bytes_of(cover) or b"").decode()
        written = any(
            tuple(tokenizer.encode(more + y))[: len(cover)] == cover for y in ("", "a", "b", " ", "\n")
        )
        if written or cover[:-1] == tuple(own[:-1]):
            wanted.add(cover)
    stay = tuple(prompt.ids[1:])
    assert {(*stay, *cover) for cover in covers(prompt)} == (wanted if prompt.branches else set())
    if not prompt.branches:
        assert wanted == {tuple(own)} and prompt == Prompt([1, *own])


@pytest.mark.parametrize(
    "kind, text",
    [
        ("words", "ab\n"),
        ("words", "abb"),
        ("words", "bbab\n  "),
        ("text", "a "),
        ("text", "abbb"),
        ("text", "b"),
    ],
)
def test_a_sample_is_as_likely_as_the_model_says_given_the_prompt(kind, text):
    """Every text of a few tokens is enumerated: one that begins with a cover has the model's own probability
    over the sum of all such.
    """
    prompt = healed(TINY[kind], [1, *TINY[kind].encode("a"), *TINY[kind].encode(text)])
    if not prompt.branches:
        prompt = Prompt(prompt.ids)
    n = max(len(prompt.dropped), 1) + 1
    known = covers(prompt)
    of_all = chances(MODEL, prompt.ids, n)
    given = {
        ids: log_p
        for ids, log_p in of_all.items()
        if not known or any(ids[: len(cover)] == cover for cover in known)
    }
    total = math.log(sum(map(math.exp, given.values())))
    wanted = {ids: math.exp(log_p - total) for ids, log_p in given.items()}
    settings = GenerationConfig(max_new_tokens=n - len(prompt.dropped), temperature=1.0)
    draws = 500
    found = generate_ids(MODEL, [prompt] * draws, settings)
    for one in found[:20]:
        assert one.log_prob == pytest.approx(math.log(wanted[tuple(one.ids)]), abs=1e-4)
    counts = Counter(tuple(one.ids) for one in found)
    assert set(counts) <= set(wanted)
    # Pearson's statistic over the likely ones, whose expectation is their number.
    likely = {ids: p for ids, p in wanted.items() if p * draws >= 5}
    rest = 1 - sum(likely.values())
    statistic = sum((counts[ids] - draws * p) ** 2 / (draws * p) for ids, p in likely.items())
    n_rest = draws - sum(counts[ids] for ids in likely)
    if rest * draws >= 5:
        statistic += (n_rest - draws * rest) ** 2 / (draws * rest)
    free = len(likely)
    assert statistic < free + 4 * math.sqrt(2 * free) + 4
    # Greedy takes the likeliest cover; beams that hold everything find the likeliest text.
    best = max(wanted, key=lambda ids: wanted[ids])
    wide = replace(settings, temperature=0.0, num_beams=14**n)
    (beam,) = generate_ids(MODEL, [prompt], wide)
    assert tuple(beam.ids) == best and beam.log_prob == pytest.approx(math.log(wanted[best]), abs=1e-4)
    (greedy,) = generate_ids(MODEL, [prompt], replace(settings, temperature=0.0))
    if known:
        of_cover = {c: sum(p for ids, p in wanted.items() if ids[: len(c)] == c) for c in known}
        first = max(of_cover, key=lambda c: of_cover[c])
        assert tuple(greedy.ids[: len(first)]) == first


HARD = 'class HTTPReset(getJSONData):\n\tMAX_SIZE = "é → 日本"  # x\n\n\n'
HARD += "    def _a1b2C3(self):\r\n        return  -1\n"


NAMES = re.findall(
    r"\w+",
    """
    add all append args array batch block bool bytes cache call check class close code config copy count data
    decode def device end entry error file find first float folder format from group head index input int is
    item join key keys last layer length line list load loss max min mode model module name next none number
    open pad path pool position raise range read row rows run save seed self set shape size sorted start state
    step store str sum tail tensor text token tokens train tuple type update value version weight width zip
    """,
)


def code(lines: int) -> str:
    """Functions with sampled names, the same on every machine."""
    sample = random.Random("code").choice
    template = "{C}_{d} = {n}\ndef {a}_{b}(self, {c}: int) -> {A}{B}:\n    {d} = self.{a}.{b}({c}[{n}:])\n"
    template += "    if {d} is not None and {b}:\n        return {A}Error(f'the {b} {c}', {d} + {n})\n\n\n"
    values = ({key: sample(NAMES) for key in "abcd"} for _ in range(lines))
    return "".join(
        template.format(
            **v, A=v["a"].capitalize(), B=v["b"].capitalize(), C=v["c"].upper(), n=sample(range(3000))
        )
        for v in values
    )


def trained(kind: str) -> Tokenizer:
    texts = [code(400), HARD * 20]
    if kind == "code":
        return CodeTokenizer.train(texts, 1500, 3)
    if kind == "code without some letters":  # Words with one of them are bytes.
        return CodeTokenizer.train(
            [re.sub("[qzx7]", "", text, flags=re.IGNORECASE) for text in texts], 1500, 3
        )
    return BPETokenizer.train(texts, 1200)


TRAINED = {kind: trained(kind) for kind in ("code", "code without some letters", "bpe")}


WORDS = re.findall(
    r"\w+", "get http max size pool pays Reset cache key x i p id json utf8 v2 é 本 HTML azq 7 12345"
)
BETWEEN = ["_", "__", " ", "  ", "\n", "\n    ", "\r\n\t", " = ", "(", "', ", ".", "é", " " * 70, "-" * 70]


def joined(kind: str) -> str:
    """Words that are joined as identifiers, numbers and prose have them, sampled by a seed of their own."""
    sampled, parts = random.Random(kind), []
    join = {"upper": str.upper, "camel": str.capitalize, "mixed": str.swapcase}.get(kind, str)
    while sum(map(len, parts)) < 700:
        random_word = "".join(sampled.choices("abcdefghijklmnopqrstuvwxyz", k=sampled.randint(1, 7)))
        words = [sampled.choice([*WORDS, random_word]) for _ in range(sampled.randint(1, 9))]
        parts += ["_".join(words).upper() if kind == "upper" else "".join(map(join, words))]
        parts.append(sampled.choice(BETWEEN))
    return "".join(parts)


TEXTS = {
    "hard": HARD * 2,
    "cut": "Rows of 8 tokens.\nPOOL_PAYS_BYTES = 1\nself.GET_POOLL_ID_HWreadMAX = HTTPReset  P  ubii\n",
    **{kind: joined(kind) for kind in ("upper", "camel", "mixed", "words")},
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", TRAINED)
def test_what_a_text_goes_on_with_is_never_ruled_out(kind, text):
    """A text is cut anywhere: of its own ids those up to the cut are a cover of what stands before it."""
    tokenizer, text = TRAINED[kind], TEXTS[text]
    ids, ends = tokenizer.encode(text), []  # bytes at which each token ends
    ends = [len(tokenizer.bytes_of(ids[:n]) or b"") for n in range(len(ids) + 1)]
    assert ends[-1] == len(text.encode())
    cuts = random.Random(0).sample(range(1, len(text)), min(len(text) - 1, 120))
    healed_ends = 0
    for cut in cuts:
        prompt = healed(tokenizer, [1, *tokenizer.encode(text[:cut])])
        last = next(n for n, end in enumerate(ends) if end >= len(text[:cut].encode()))
        kept = len(prompt.ids) - 1
        assert ids[:kept] == prompt.ids[1:], text[max(0, cut - 20) : cut + 10]
        healed_ends += bool(prompt.branches)
        if prompt.branches:
            assert tuple(ids[kept:last]) in covers(prompt), text[max(0, cut - 20) : cut + 10]
        else:
            assert ids[:last] == prompt.ids[1:], text[max(0, cut - 20) : cut + 10]
    assert healed_ends > len(cuts) / 3


SETTINGS = {
    "greedy": GenerationConfig(max_new_tokens=6),
    "sampled": GenerationConfig(max_new_tokens=6, temperature=0.9, top_k=9, top_p=0.95, seed=3),
    "penalty": GenerationConfig(max_new_tokens=6, repetition_penalty=1.4),
    "beam": GenerationConfig(max_new_tokens=6, num_beams=3, length_penalty=0.7),
}


def near(found: list[Generated], wanted: list[Generated]) -> bool:
    return all(
        (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
        and math.isclose(a.log_prob, b.log_prob, abs_tol=1e-4)
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("how", SETTINGS)
def test_healed_prompts_in_a_batch_are_continued_as_alone(how):
    """Prompts without, with one and with several branches, of unequal length, and some twice."""
    tokenizer, settings = TINY["text"], SETTINGS[how]
    texts = ["ab\n", "abbb" * 3, "a ", "b", "abb\n a b", "ab\n", "abb"]
    prompts = [healed(tokenizer, tokenizer.prompt_ids(text)) for text in texts] + [Prompt([1, 4])]
    assert {min(len(prompt.branches), 2) for prompt in prompts} == {0, 1, 2}
    alone = [generate_ids(MODEL, [p], settings, 2, first_row=row)[0] for row, p in enumerate(prompts)]
    assert near(generate_ids(MODEL, prompts, settings, 2), alone)
    if settings.num_beams == 1:
        assert near(generate_ids(MODEL, prompts, settings, 2, most_rows=2), alone)
    for text, one in zip(texts, alone, strict=False):
        prompt = healed(tokenizer, tokenizer.prompt_ids(text))
        assert tokenizer.decode([*prompt.ids, *one.ids]).startswith(text)
        assert len(prompt.ids) + len(one.ids) <= len(prompt.whole) + settings.max_new_tokens


@pytest.mark.parametrize("how", SETTINGS)
def test_a_healed_prompt_needs_no_more_positions_than_it_has(how):
    """A batch uses the rows of a table of positions to the last one."""
    settings = SETTINGS[how]
    tokenizer, texts = TINY["text"], ["abbb" * 3, "ab\nab\nab\n", "a " * 4]
    longest = max(len(tokenizer.prompt_ids(text)) for text in texts)
    block = longest + settings.max_new_tokens
    model = scrambled(replace(BIASED, vocab_size=14, position="learned", qk_norm=False, block_size=block))
    prompts = [healed(tokenizer, tokenizer.prompt_ids(text)) for text in texts]
    assert len(generate_ids(model, prompts, settings)) == 3
    one_more = replace(settings, max_new_tokens=settings.max_new_tokens + 1)
    with pytest.raises(ValueError, match=f"more than the model's {block} positions"):
        generate_ids(model, prompts, one_more)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_a_short_prompt_read_beside_a_long_one_has_its_own_positions(position):
    """Padding stands before the short prompt, and the ids of its branches come after the long one's end."""
    dynamic = {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_context": 16}
    config = replace(BIASED, position=position, qk_norm=False, block_size=16)
    model = scrambled(replace(config, **dynamic if position == "rotary" else {}))
    branches = (Branch((), np.array([3, 4])), Branch((6, 7, 8), np.array([9, 11])))
    prompts = [Prompt(list(range(1, 15))), Prompt([5, 2], (3,), branches)]
    settings = GenerationConfig(max_new_tokens=2)
    together = generate_ids(model, prompts, settings)
    alone = [generate_ids(model, [prompt], settings)[0] for prompt in prompts]
    assert [one.ids for one in together] == [one.ids for one in alone]


def test_texts_are_streamed_and_stopped_after_the_prompt():
    """The dropped text is no part of the completion, and no stop string is found in it."""
    tokenizer, parts = TINY["text"], []
    for seed, text in itertools.product(range(6), ("ab\n", "abb", "a ")):
        settings = GenerationConfig(max_new_tokens=8, temperature=1.0, seed=seed)
        (one,) = generate(MODEL, tokenizer, [text], settings, on_text=parts.append)
        prompt = healed(tokenizer, tokenizer.prompt_ids(text))
        ids = one.ids[:-1] if one.finish_reason == "eos" else one.ids
        assert "".join(parts) == one.text and text + one.text == tokenizer.decode([*prompt.ids, *ids])
        parts.clear()
        (stopped,) = generate(MODEL, tokenizer, [text], replace(settings, stop=("\n",)))
        assert stopped.text == one.text.split("\n")[0]
        assert stopped.finish_reason == ("stop" if "\n" in one.text else one.finish_reason)


def test_healing_is_left_out_where_it_is_asked_or_the_run_was_trained_without_it():
    tokenizer = copy.copy(TINY["text"])
    settings = GenerationConfig(max_new_tokens=5)
    ids = [tokenizer.prompt_ids(text) for text in PROMPTS]
    plain = [one.ids for one in generate_ids(MODEL, ids, settings, 2)]

    def made(heal: bool | None) -> list[list[int]]:
        return [one.ids for one in generate(MODEL, tokenizer, PROMPTS, replace(settings, heal=heal))]

    assert made(False) == plain != made(None) == made(True)
    tokenizer.heals = False
    assert made(None) == plain != made(True)
    assert not pickle.loads(pickle.dumps(tokenizer)).heals


@pytest.mark.parametrize("kind", ["code", "bpe", "pretrained"])
def test_a_folder_says_that_its_model_was_trained_on_prompts_that_were_not_healed(tmp_path, kind):
    TRAINED["code" if kind == "code" else "bpe"].save(tmp_path / "given")
    open_folder = PretrainedTokenizer.load if kind == "pretrained" else load_tokenizer
    tokenizer = open_folder(tmp_path / "given")
    assert tokenizer.heals
    for heals in (False, True):
        tokenizer.heals = heals
        tokenizer.save(tmp_path / str(heals))
        tokenizer = open_folder(tmp_path / str(heals))
        assert tokenizer.heals is heals
        assert tokenizer.fingerprint == open_folder(tmp_path / "given").fingerprint


def test_a_vocabulary_of_50000_is_searched_in_milliseconds():
    """Words of two and three letters, each with and without a space before it."""
    words = [
        "".join(word) for n in (2, 3) for word in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=n)
    ]
    texts = [word.encode() for word in words] + [b" " + word.encode() for word in words]
    found = healing._Texts([None, *texts, *(text + b"xyz" for text in texts[:14000])])
    began = time.perf_counter()
    for start in (b" ", b"a", b" ab", b"zzz", b"q"):
        ids = found.beginning_with(start)
        assert sorted(ids.tolist()) == [i for i, t in enumerate(found.by_id) if t and t.startswith(start)]
    began = time.perf_counter()
    for _ in range(100):
        found.beginning_with(b" ab")
    assert (time.perf_counter() - began) / 100 < 0.005


@pytest.mark.parametrize("prompt", ["# hi\ndef add(a, b):\n", "# hi!\ndef add(a, b):\n"])
def test_the_bytes_that_bear_loss_are_counted_where_a_piece_of_text_fills_up(tmp_path, prompt):
    text = "    return a + b\n"
    BPETokenizer.train([5 * f"def add(a, b):\n{text}"], vocab_size=300).save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    filler = dict(state["added_tokens"][0], id=state["model"]["vocab"]["!"], content="!", special=True)
    state["added_tokens"] = sorted([*state["added_tokens"], filler], key=lambda token: token["id"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "!", "bos_token": "<|bos|>"}', "utf-8")
    tokenizer = PretrainedTokenizer.load(tmp_path)
    document = Document(name="a", group="a", text=text, prompt=prompt)
    (encoded,) = _encode(tokenizer, [document], np.dtype(np.int64))
    learned = tokenizer.decode(encoded.ids[encoded.prompt_length :].tolist()).removesuffix("<|eos|>")
    assert learned == "\n" + text
    assert encoded.dropped_bytes == 1

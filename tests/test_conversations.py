"""Conversations as training data: each answer is an example, whose ids the tokenizer's template wrote."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_chat import ASKS, MORE, SHAPES, SYSTEM, folder_of, theirs

from config import Config, DataConfig, TokenizerConfig
from data import recorded
from data.cache import read_sealed
from data.corpus import read_documents
from data.prepare import prepare_data, prepare_tokenizer, stored_data
from data.run_documents import RunDocuments
from data.tokenstore import TokenStore
from generation.text import end_ids
from guards.labels import example_in_row
from reference.conversations import Spelled, wrong_with
from reference.text import documents_of_rows
from reference.tokens import read_tokenizer
from selftest import data
from selftest.run import small_config
from suites.completing import completion_request
from suites.pairs import file_task
from suites.stored import text_of_example
from suites.task import Given
from tokenization.turn_end import end_turns
from tokenizer import PretrainedTokenizer, load_tokenizer
from training import begin
from training.begin import train

LONG = ASKS + MORE + [{"role": "assistant", "content": "for i in range(10):\n    pass"}]
ROWS = [{"messages": LONG, "name": None}, {"messages": SYSTEM + ASKS + MORE[:1], "name": "b"}]


def opened(folder: Path) -> PretrainedTokenizer:
    """Return a tokenizer as a run has it."""
    found = load_tokenizer(folder).with_start()
    assert isinstance(found, PretrainedTokenizer)
    end_turns(found)
    return found


def source(folder: Path, rows: list[dict[str, Any]]) -> DataConfig:
    folder.mkdir(exist_ok=True)
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    cache = str(folder / "cache")
    return DataConfig(source=str(path), cache=cache, validation_one_in=0, test_one_in=0, workers=1)


def stored(folder: Path, shape: str = "qwen") -> tuple[DataConfig, PretrainedTokenizer, TokenStore]:
    tokenizer = opened(folder_of(folder / "t", shape))
    config = source(folder, ROWS)
    return config, tokenizer, prepare_data(config, tokenizer).train


@pytest.mark.parametrize("shape", ["qwen", "llama3", "phi3"])
def test_each_answer_is_an_example_by_the_ids_of_transformers(tmp_path: Path, shape: str) -> None:
    config, tokenizer, store = stored(tmp_path, shape)
    asked = [LONG[:1], LONG[:3], SYSTEM + ASKS]
    whole = [LONG[:2], LONG, SYSTEM + ASKS + MORE[:1]]
    assert store.n_documents == len(asked) and store.holds_conversations and store.holds_examples
    for number, (before, all_of_it) in enumerate(zip(asked, whole, strict=True)):
        ids, n_prompt = store.document(number).tolist(), int(store.prompt_lengths[number])
        assert ids[:n_prompt] == theirs(tmp_path / "t", before, True)
        assert ids == theirs(tmp_path / "t", all_of_it, False)[: len(ids)]
        assert ids[-1] in {tokenizer.eos_id, *tokenizer.eos_ids}
        assert store.byte_lengths[number] == len(all_of_it[-1]["content"].encode())
    first, second = list(RunDocuments(config))[:2]
    assert first[1].group == second[1].group and first[1].name == second[1].name
    found = stored_data(config, tokenizer, store.fingerprint)
    assert found is not None and found.train.folder == store.folder


def test_an_answer_is_asked_for_by_its_stored_ids(tmp_path: Path) -> None:
    """Its prompt, decoded and written again as text, would spell the marks of turns."""
    _, tokenizer, store = stored(tmp_path)
    example = text_of_example(store, tokenizer, 1)
    ids, n_prompt = store.document(1).tolist(), int(store.prompt_lengths[1])
    assert example.reference == LONG[3]["content"]
    request = completion_request(tokenizer, example, 8, 999)
    assert request.prompt.whole == ids[:n_prompt] != tokenizer.prompt_ids(example.prompt)
    trimmed = completion_request(tokenizer, example, 8, 24).prompt.whole
    in_row, n_kept = example_in_row(store, 1, len(ids) - 5, tokenizer)
    assert in_row.tolist() == [ids[0], *ids[6:]] and n_kept == n_prompt - 5
    assert trimmed == [ids[0], *ids[n_prompt - 15 : n_prompt]]


def test_a_file_of_conversations_is_a_suite_whose_answers_end_with_their_turns(tmp_path: Path) -> None:
    tokenizer = opened(folder_of(tmp_path / "t", "phi3"))
    file = source(tmp_path, ROWS).source
    examples = file_task(Given(tokenizer, 256, None, 0, 8, file=file)).examples
    prompts = [LONG[:1], LONG[:3], SYSTEM + ASKS]
    assert [list(one.ids) for one in examples] == [theirs(tmp_path / "t", one, True) for one in prompts]
    assert [one.reference for one in examples] == [LONG[1]["content"], LONG[3]["content"], MORE[0]["content"]]
    ends = completion_request(tokenizer, examples[0], 8, 256).ends
    assert ends == {tokenizer.eos_id, tokenizer.token_id("<|end|>")}


def test_another_template_has_another_store(tmp_path: Path) -> None:
    config, _, store = stored(tmp_path)
    other = opened(folder_of(tmp_path / "u", "qwen"))
    path = tmp_path / "u" / "tokenizer_config.json"
    said = json.loads(path.read_text("utf-8"))
    said["chat_template"] = said["chat_template"].replace("You help.", "You code.")
    path.write_text(json.dumps(said), "utf-8")
    again = prepare_data(config, opened(tmp_path / "u")).train
    assert other.fingerprint == again.tokenizer_fingerprint == store.tokenizer_fingerprint
    assert again.folder != store.folder and not np.array_equal(again.document(0), store.document(0))


def test_parquet_and_records_hold_the_same_documents(tmp_path: Path) -> None:
    config = source(tmp_path, ROWS)
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "chat.parquet")
    by_line = list(read_documents(config))
    by_row = list(read_documents(replace(config, source=str(tmp_path / "chat.parquet"))))
    assert by_line == by_row and len(by_line) == 3
    RunDocuments(config).record  # noqa: B018
    saved = read_sealed(recorded._path(config.resolved()))
    assert saved is not None and recorded.from_plain(saved).first_documents == by_line
    derived = list(documents_of_rows(config))
    assert [(d.text, d.prompt, d.group, d.turns) for d in derived] == [
        (d.text, d.prompt, d.group, d.messages) for d in by_line
    ]


SAYS = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"messages": ASKS}, "line 1 ends with a message of the user, which nothing answers"),
        ({"messages": [SAYS]}, "line 1 begins with the assistant's message"),
        ({"messages": [*ASKS, SAYS | {"content": " "}]}, "line 1 holds nothing in message 2"),
        ({"messages": "x"}, "line 1: messages must be a list"),
        ({"messages": [*ASKS, {"role": "tool", "content": "x"}]}, "line 1: the role of message 2"),
        ({"messages": [*ASKS, SAYS], "text": "x"}, "holds text, and also messages"),
        ({"messages": [*ASKS, SAYS | {"content": "<|im_end|>"}]}, "line 1 cannot .*: message 2 spells"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_refused(
    tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    tokenizer = opened(folder_of(tmp_path / "t", "qwen"))
    with pytest.raises(ValueError, match=sentence):
        prepare_data(source(tmp_path, [row]), tokenizer)


def test_without_a_template_nothing_is_trained(tmp_path: Path) -> None:
    config = source(tmp_path, ROWS)
    with pytest.raises(ValueError, match="line 1 is a conversation, and a tokenizer that is trained here"):
        prepare_tokenizer(config, TokenizerConfig())
    bare = folder_of(tmp_path / "t", "qwen")
    said = json.loads((bare / "tokenizer_config.json").read_text("utf-8"))
    del said["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(said), "utf-8")
    with pytest.raises(ValueError, match="line 1 is a conversation: the model's tokenizer has no chat"):
        prepare_data(config, opened(bare))


def test_what_a_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    tokenizer = opened(folder_of(tmp_path / "t", "mistral"))
    with pytest.raises(ValueError, match="line 2 cannot be tokenised: the chat template refuses"):
        prepare_data(source(tmp_path, ROWS), tokenizer)


def test_a_template_that_adds_another_start_is_refused(tmp_path: Path) -> None:
    tokenizer = opened(folder_of(tmp_path / "t", "llama3", "{{ bos_token }}" + SHAPES["llama3"][0]))
    with pytest.raises(ValueError, match="line 1 cannot be tokenised: the chat template starts the text tw"):
        prepare_data(source(tmp_path, ROWS), tokenizer)


@pytest.mark.parametrize("shape", ["qwen", "llama3", "phi3"])
def test_the_second_opinion_agrees(tmp_path: Path, shape: str) -> None:
    config, tokenizer, store = stored(tmp_path, shape)
    spelled = spelled_of(tokenizer, tmp_path / "again")
    for number, document in enumerate(documents_of_rows(config)):
        ids, n_prompt = store.document(number).tolist(), int(store.prompt_lengths[number])
        assert wrong_with(document, ids, n_prompt, spelled) is None


@pytest.mark.parametrize("said", ["does not spell the last", "do not spell the answer", "does not end at"])
def test_the_second_opinion_names_what_is_wrong(tmp_path: Path, said: str) -> None:
    config, tokenizer, store = stored(tmp_path)
    spelled = spelled_of(tokenizer, tmp_path / "again")
    document = next(documents_of_rows(config))
    ids, n = store.document(0).tolist(), int(store.prompt_lengths[0])
    wrong = {
        "does not spell the last": (ids[n - 3 :], 3),
        "do not spell the answer": (ids[: n + 1] + ids[-1:], n),
        "does not end at": (ids[:-1], n),
    }
    assert said in (wrong_with(document, *wrong[said], spelled) or "")
    mark = ids[:n].index(ids[0], 1)
    last = max(place for place in range(n) if ids[place] == ids[mark])
    assert "a mark of a turn" in (wrong_with(document, ids, last, spelled) or "")


def chat_run(folder: Path) -> Config:
    """Return settings of a run with the tokenizer of phi3's shape, whose files name no end of a turn."""
    folder_of(folder / "t", "phi3")
    draw = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": data.function(draw)},
                SAYS | {"content": data.function(draw)},
            ]
        }
        for _ in range(60)
    ]
    config = small_config(folder, {"model": {"block_size": 200}})
    held_out = replace(config.data, source=source(folder, rows).source)
    return replace(config, data=held_out, tokenizer=TokenizerConfig("pretrained", path=str(folder / "t")))


def test_a_run_learns_the_end_at_which_its_answers_end_when_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chat_run(tmp_path)
    manager = train(config)
    said = capsys.readouterr().err
    assert said.count("answers end with '<|end|>', as the chat template has it") == 1
    tokenizer = load_tokenizer(Path(config.train.run) / "tokenizer", as_saved=True)
    end = tokenizer.token_id("<|end|>")
    store = manager.data.train
    assert {int(store.document(number)[-1]) for number in range(store.n_documents)} == {end}
    assert end in end_ids(tokenizer, None)
    end_turns(tokenizer)  # As the server does it
    assert not capsys.readouterr().err
    config = replace(config, train=replace(config.train, resume=True, max_steps=config.train.max_steps + 1))
    assert train(config).data.train.folder == store.folder
    assert "answers end" not in capsys.readouterr().err


def test_a_run_that_learns_more_than_the_end_of_a_turn_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: training does not know where answers end when they are served."""
    monkeypatch.setattr(begin, "end_turns", lambda _: None)
    with pytest.raises(ValueError, match=r"\d targets stand behind '<\|end\|>', where the turn is over"):
        train(chat_run(tmp_path))


def spelled_of(tokenizer: PretrainedTokenizer, folder: Path) -> Spelled:
    folder.mkdir()
    tokenizer.save(folder)
    tokens = read_tokenizer(folder)
    assert tokens is not None
    return Spelled(folder, tokens)  # type: ignore[arg-type]

"""A learned repository in the server: prompts of training, the folder as it is, a threshold and updates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from decoders import scrambled
from histories import FAIL, Made, drawer
from test_generate_command import STARCODER
from test_serve_command import SHAPE
from test_serving import Running, post, running, until
from test_serving_adapters import write_adapter

from config import ModelConfig
from data.context import RepositoryFiles
from generation.settings import GenerationConfig
from generation.text import Completion, generate
from pretrained import save_pretrained
from recipes.repository import RepositorySettings, change_said, prompt_of
from recipes.written import Written
from serving.command import open_service
from serving.repository import LearnedRepository
from serving.settings import ServeConfig
from training.run import open_adapted

PREFIX = "from shop.fail import fail_shop\n\n\nclass NewDrawer:\n    def take_new(self, wanted):\n        "
SUFFIX = "\n\n    def count_news(self):\n        return 1\n"
# Of a model that has learned nothing, sampled texts tell prompts apart, and the likeliest ones do not.
CHOSEN: dict[str, Any] = {"temperature": 1.0, "seed": 7}
SAID = {"known": "", "since": "", "head": "", "context_tokens": 420, "row_tokens": 640, "together": {}}


class Learned(NamedTuple):
    """What the recipe writes, and the checkout."""

    out: Path
    made: Made

    @property
    def settings(self) -> ServeConfig:
        return ServeConfig(model=str(self.out), port=0, device="cpu", cache=str(self.out / "cache"))

    def completion(self, adapter: str = "adapter", more: tuple[tuple[str, str], ...] = ()) -> Completion:
        """Return what the model writes by itself, by the recipe's own prompt for the files of the tree."""
        files = RepositoryFiles()
        for path in sorted((self.made.folder / "shop").glob("*.py")):
            files.put(f"shop/{path.name}", path.read_text())
        base = open_adapted(str(self.out / "base"), self.out / adapter)
        assert base.tokenizer is not None
        shape = RepositorySettings(context_tokens=420, row_tokens=640)
        place = Written("shop/new.py", "", 0, "line", PREFIX, "", SUFFIX)
        prefix, suffix = prompt_of(files, place, base.tokenizer, shape, more=more)
        assert "# shop/fail.py\n" in prefix
        how = GenerationConfig(max_new_tokens=12, **CHOSEN)
        return generate(base.model, base.tokenizer, [prefix], how, suffix=suffix)[0]


@pytest.fixture
def learned(tmp_path: Path) -> Learned:
    made = Made(tmp_path / "checkout")
    made.commit({"shop/fail.py": FAIL, "shop/apple_drawer.py": drawer("apple", 1), "note.txt": "fail_shop"})
    made.write({"node_modules/a.py": FAIL, ".hidden/b.py": FAIL})
    out = tmp_path / "repository"
    shape: dict[str, Any] = {"block_size": 768, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = scrambled(ModelConfig(**SHAPE, **shape, vocab_size=STARCODER.vocab_size))
    save_pretrained(model, STARCODER, out / "base")
    write_adapter(out / "base", out / "adapter", 1)
    write_adapter(out / "base", out / "versions" / "2" / "adapter", 2)
    (out / "run").mkdir()
    (out / "run" / "config.yaml").write_text(f"base: {out / 'base'}\n")
    (out / "repository.json").write_text(json.dumps(SAID | {"source": str(made.folder)}))
    return Learned(out, made)


@pytest.fixture
def served(learned: Learned) -> Iterator[Running]:
    service = open_service(learned.settings, lambda *_: None)
    assert service.repository is not None
    with running(learned.settings, "", service) as found:
        files = service.repository.files
        until(lambda: "shop/fail.py" in files.texts and "shop/apple_drawer.py" in files.texts)
        yield found


def tabby(**more: Any) -> dict[str, Any]:
    segments = {"prefix": PREFIX, "suffix": SUFFIX, "filepath": "shop/new.py"} | more
    return {"segments": segments} | CHOSEN


def infill(**more: Any) -> dict[str, Any]:
    body = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "n_predict": 12}
    return body | CHOSEN | {"top_k": 0, "top_p": 1, "min_p": 0} | more


def test_an_editor_gets_what_the_model_writes_by_the_prompt_of_training(
    learned: Learned, served: Running
) -> None:
    expected = learned.completion().text
    found = post(served, infill(), "/infill").json()
    assert found["content"] == expected and expected
    assert post(served, tabby()).json()["choices"][0]["text"].startswith(expected)
    plain = {"prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 12} | CHOSEN
    for model in ("plumb", "repository"):
        assert post(served, plain | {"model": model}).json()["choices"][0]["text"] == expected
    assert post(served, plain | {"model": "base"}).json()["choices"][0]["text"] != expected


def test_pieces_of_an_editor_are_shown_beside_those_of_the_folder(learned: Learned, served: Running) -> None:
    extra = [{"filename": "b.py", "text": "x = 1"}, {"filename": "a.py", "text": "y = 2"}]
    expected = learned.completion(more=(("b.py", "x = 1"), ("a.py", "y = 2"))).text
    assert expected != learned.completion().text
    assert post(served, infill(input_extra=extra), "/infill").json()["content"] == expected
    snippets = [{"filepath": "a.py", "body": "y = 2", "score": 1.0}, {"filepath": "b.py", "body": "x = 1"}]
    body = tabby(relevant_snippets_from_changed_files=snippets)
    assert post(served, body).json()["choices"][0]["text"].startswith(expected)
    assert post(served, tabby(declarations=[1])).status_code == 400


def test_a_file_that_changes_is_shown_as_it_is(learned: Learned, served: Running) -> None:
    before = learned.completion().text
    learned.made.write({"shop/fail.py": FAIL + "\n\ndef wanted_new(wanted):\n    return wanted\n"})
    after = learned.completion().text
    assert after != before
    until(lambda: post(served, infill(), "/infill").json()["content"] == after, 20)


def test_only_files_of_the_folder_are_read(learned: Learned) -> None:
    outside = learned.out / "outside.py"
    outside.write_text(FAIL)
    (learned.made.folder / "link.py").symlink_to(outside)
    (learned.made.folder / "linked").symlink_to(learned.out)
    learned.made.write({"big.py": "x = 1\n" * 100_000, "bytes.py": b"\0\1\2" * 100, "s.py": "x = 1\n"})
    os.mkfifo(learned.made.folder / "pipe.py")
    os.rename(learned.made.folder / "s.py", os.fsencode(learned.made.folder) + b"/odd\xff\n.py")
    repository = LearnedRepository(learned.out)
    repository.look()
    assert set(repository.files.texts) == {"shop/fail.py", "shop/apple_drawer.py", "odd\udcff\n.py"}
    (learned.made.folder / "shop/fail.py").unlink()
    assert repository.look() == 1 and "shop/fail.py" not in repository.files.texts
    assert repository.look() == 0


def test_only_what_is_sure_enough_is_shown_streamed_or_not(learned: Learned) -> None:
    sure = learned.completion()
    for threshold, shown in ((sure.sureness * 0.99, sure.text), (min(1.0, sure.sureness * 1.01), "")):
        change_said(learned.out, threshold=threshold)
        service = open_service(learned.settings, lambda *_: None)
        with running(learned.settings, "", service) as found:
            assert service.repository is not None
            files = service.repository.files
            until(lambda files=files: len(files.texts) == 2)
            assert post(found, infill(), "/infill").json()["content"] == shown
            lines = post(found, infill(stream=True), "/infill").text.splitlines()
            parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
            assert "".join(part["content"] for part in parts) == shown


def test_the_adapter_of_an_update_is_taken_without_a_pause(learned: Learned, served: Running) -> None:
    first, second = (learned.completion(name).text for name in ("adapter", "versions/2/adapter"))
    assert first != second and post(served, infill(), "/infill").json()["content"] == first
    change_said(learned.out, version=2)
    until(lambda: post(served, infill(), "/infill").json()["content"] == second, 20)
    change_said(learned.out, version=1)
    until(lambda: post(served, infill(), "/infill").json()["content"] == first, 20)


def test_the_file_of_the_cursor_is_known_by_its_lines() -> None:
    files = RepositoryFiles()
    for noun in ("apple", "bottle"):
        files.put(f"{noun}.py", drawer(noun, 1))
    text = drawer("bottle", 1)
    assert files.path_of(text[:200], text[230:]) == "bottle.py"
    assert files.path_of("def other():\n    return 1\n", "") == ""


def test_mistakes_are_told(learned: Learned, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--repository nowhere is no folder"):
        LearnedRepository(learned.out, "nowhere")
    settings = ServeConfig(model=str(learned.out / "base"), repository=".", port=0)
    with pytest.raises(ValueError, match="is for a model that has learned one"):
        open_service(settings, lambda *_: None)
    (learned.out / "repository.json").write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        open_service(learned.settings, lambda *_: None)
    (learned.out / "repository.json").write_text(json.dumps(SAID | {"source": "/no/such"}))
    repository = LearnedRepository(learned.out)
    repository.watch(lambda: None)
    repository.end()
    assert "only what editors send of other files is shown" in capfd.readouterr().err

"""Checkpoints: exact both ways, whole or not at all, damage noticed before it is parsed."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import SHAPE

from architecture import Decoder
from config import ModelConfig
from config.files import code_fingerprint
from modules import tensorfiles
from modules.tensorfiles import save_tensors
from pretrained import save_pretrained
from training import checkpoint
from training.checkpoint import (
    FILES,
    Manifest,
    best_of,
    changed_weight,
    checkpoints,
    first_difference,
    load_state,
    load_weights,
    newest_whole,
    not_finite,
    remove_superseded,
    save_checkpoint,
    verify,
)

CONFIG = ModelConfig(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=8)
STATE: dict[str, Any] = {
    "run": {"step": 3, "loss": 0.1, "name": "x", "none": None, "flag": True},
    "optimizers": [
        {"state": {0: {"m": torch.arange(3.0)}, 7: {"m": torch.ones(2, 2)}}, "groups": [{"lr": 0.5}]}
    ],
    "random": torch.get_rng_state(),
}


def model(**settings: Any) -> Decoder:
    built = Decoder(replace(CONFIG, **settings))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    return built


@pytest.fixture
def files(tmp_path: Path) -> dict[Path, bytes]:
    """Three checkpoints in `tmp_path`, that of step 2 the best, with all their bytes."""
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        state = {**STATE, "run": {"step": step}, "random": torch.full((3,), step)}
        save_checkpoint(tmp_path, step, model(), state, loss, keep=False)
    return contents(tmp_path)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_state_come_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    saved, other = model(tie_embeddings=tied), model(tie_embeddings=tied)
    manifest = save_checkpoint(tmp_path, 3, saved, STATE, 1.5, keep=False)
    verify(manifest)
    load_weights(other, manifest)
    assert first_difference(dict(saved.state_dict()), dict(other.state_dict())) is None
    assert first_difference(STATE, load_state(manifest)) is None
    assert changed_weight(other, manifest) is None
    assert checkpoints(tmp_path) == [manifest]
    assert (other.head.weight is other.embed.weight) == tied


def test_the_best_the_last_and_the_kept_ones_stay(tmp_path: Path) -> None:
    for step, loss, keep in [
        (1, 3.0, False),
        (2, 1.0, False),
        (3, 2.0, True),
        (4, 2.0, True),
        (5, 4.0, False),
        (6, 5.0, False),
    ]:
        save_checkpoint(tmp_path, step, model(), {}, loss, keep)
    remove_superseded(tmp_path, keep=1)
    assert [m.step for m in checkpoints(tmp_path)] == [2, 4, 6]
    best = best_of(checkpoints(tmp_path))
    assert best is not None and best.step == 2
    remove_superseded(tmp_path, keep=0)
    assert [m.step for m in checkpoints(tmp_path)] == [2, 4, 6]
    later = save_checkpoint(tmp_path, 7, model(), {}, 1.0, keep=False)
    assert best_of(checkpoints(tmp_path)) == later  # The later of two equals wins.


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def damage(folder: Path, name: str, how: str, at: float) -> None:
    """Damage a file of the newest checkpoint at a share `at` of it, or put its neighbour's in its place."""
    file, other = folder / "step-00000003" / name, folder / "step-00000002" / name
    data = file.read_bytes()
    if how == "flip":
        file.write_bytes(flipped(data, int(at * 8 * len(data))))
    elif how == "cut":
        file.write_bytes(data[: int(at * len(data))])
    elif how == "delete":
        file.unlink()
    else:
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)


def notices(folder: Path, files: dict[Path, bytes], trials: int, capsys: Any, monkeypatch: Any) -> None:
    """Each trial damages one file; the fall back names it, and no tensor or state was parsed."""

    def parse(*_: Any) -> Any:
        raise AssertionError("parsed before it was verified")

    for name in ("load_file", "safe_open", "_put_tensors"):
        monkeypatch.setattr(checkpoint, name, parse)
    draw = random.Random(trials)
    for _ in range(trials):
        name = draw.choice([*FILES, "manifest.json"])
        how = draw.choice(["flip", "cut", "delete", "swap"])
        damage(folder, name, how, draw.random())
        assert newest_whole(folder).step == (1 if how == "swap" else 2), (name, how)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == (2 if how == "swap" else 1) and f"step-00000003/{name}" in told[0], told
        for path, data in files.items():
            path.write_bytes(data)
        assert newest_whole(folder).step == 3 and not capsys.readouterr().err


def test_damage_is_named_before_anything_is_parsed(
    tmp_path: Path, files: dict[Path, bytes], capsys: Any, monkeypatch: Any
) -> None:
    notices(tmp_path, files, 60, capsys, monkeypatch)


@pytest.mark.slow
def test_damage_is_named_500_of_500(
    tmp_path: Path, files: dict[Path, bytes], capsys: Any, monkeypatch: Any
) -> None:
    notices(tmp_path, files, 500, capsys, monkeypatch)


def test_every_bit_of_a_manifest_counts(tmp_path: Path, files: dict[Path, bytes]) -> None:
    """Even one that only changes a space, or the loss by which the best one is chosen."""
    file = tmp_path / "step-00000003" / "manifest.json"
    for bit in range(8 * len(files[file])):
        file.write_bytes(flipped(files[file], bit))
        assert [m.step for m in checkpoints(tmp_path)] == [1, 2], bit
    file.write_bytes(files[file] + b" ")
    assert [m.step for m in checkpoints(tmp_path)] == [1, 2]


def test_swapped_folders_are_noticed(tmp_path: Path, files: dict[Path, bytes], capsys: Any) -> None:
    (tmp_path / "step-00000003").rename(tmp_path / "aside")
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000003")
    (tmp_path / "aside").rename(tmp_path / "step-00000002")
    assert newest_whole(tmp_path).step == 1
    assert "it is that of step 2" in capsys.readouterr().err


def test_none_whole_is_refused_with_the_first_reason(tmp_path: Path, files: dict[Path, bytes]) -> None:
    for path in files:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 checkpoints and none is whole \(.*step-00000003/manifest\.json"):
        newest_whole(tmp_path)


def test_the_first_difference_of_two_states_is_named() -> None:
    def nested() -> dict[str, Any]:
        return {"a": [1, {"t": torch.tensor([0.0, math.nan])}], "b": math.nan, "c": (True, None)}

    assert first_difference(nested(), nested()) is None
    assert first_difference({"x": (1, 2)}, {"x": [1, 2]}) is None
    planted: list[tuple[Any, Any, str]] = [
        (torch.tensor([0.0]), torch.tensor([-0.0]), "x"),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), "x"),
        (torch.ones(2), torch.ones(2, 1), "x"),
        (torch.ones(()), 1.0, "x"),
        (1, 1.0, "x"),
        (True, 1, "x"),
        ({}, None, "x"),
        ([1, 2, 3], [1, 2], "x"),
        ({"m": torch.ones(1)}, {}, "x/m"),
        ({}, {"m": 1}, "x/m"),
        ([{0: {"m": torch.ones(1)}}], [{0: {"m": torch.zeros(1)}}], "x/0/0/m"),
    ]
    for a, b, name in planted:
        assert first_difference({"same": 1, "x": a, "y": 0}, {"same": 1, "x": b, "y": 1}) == name


def test_a_changed_weight_is_named(tmp_path: Path) -> None:
    saved = model()
    manifest = save_checkpoint(tmp_path, 1, saved, STATE, None, keep=False)
    assert changed_weight(saved, manifest) is None
    with torch.no_grad():
        saved.head.weight[3, 2] *= 1 + 2**-23
    assert changed_weight(saved, manifest) == "head.weight"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named(value: float) -> None:
    decoder = model()
    state: dict[str, Any] = {"optimizers": [{"state": {4: {"m": torch.ones(3)}}}], "random": STATE["random"]}
    assert not_finite(decoder, state) is None
    state["optimizers"][0]["state"][4]["m"][1] = value
    assert not_finite(decoder, state) == "optimizers/0/state/4/m"
    with torch.no_grad():
        decoder.head.weight[1, 1] = value
    assert not_finite(decoder, state) == "head.weight"


def test_a_damaged_last_checkpoint_does_not_count_for_retention(tmp_path: Path, capsys: Any) -> None:
    """Without the check the only whole ones would go: the best is damaged, and so is the newest."""
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0), (4, 4.0)):
        save_checkpoint(tmp_path, step, model(), STATE, loss, keep=False)
    for step in (1, 4):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"damaged")
    remove_superseded(tmp_path, keep=0)
    assert [m.step for m in checkpoints(tmp_path)] == [1, 3, 4]
    assert newest_whole(tmp_path).step == 3


def test_a_removal_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, files: dict[Path, bytes], monkeypatch: Any
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_superseded(tmp_path, keep=0)
    monkeypatch.undo()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000003"]
    save_checkpoint(tmp_path, 4, model(), STATE, 2.0, keep=False)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_without_a_readable_manifest_does_not_exist(tmp_path: Path) -> None:
    for content in (
        None,
        "",
        "{",
        "[]",
        '{"step": 1}',
        '{"step": 1, "loss": null, "keep": false, "files": 3}',
        '{"step": 1, "loss": NaN, "keep": false, "files": {}}',
        '{"step": 1, "loss": -Infinity, "keep": false, "files": {}}',
        '{"step": Infinity, "loss": null, "keep": false, "files": {}}',
        "[" * 100_000,
    ):
        folder = tmp_path / "step-00000009"
        folder.mkdir(exist_ok=True)
        if content is not None:
            (folder / "manifest.json").write_text(content)
        assert checkpoints(tmp_path) == []


def test_weights_of_another_config_are_listed(tmp_path: Path) -> None:
    manifest = save_checkpoint(tmp_path, 1, model(), {}, None, keep=False)
    with pytest.raises(ValueError, match=r"another config: .*blocks\.1\..* is missing"):
        load_weights(model(n_layer=2), manifest)
    with pytest.raises(ValueError, match=r"embed\.weight is \(17, 8\), the model's is \(18, 8\)"):
        load_weights(model(vocab_size=18), manifest)
    with pytest.raises(ValueError, match=r"head\.weight is left over"):
        load_weights(model(tie_embeddings=True), manifest)


def full_disks(folder: Path, offsets: int) -> None:
    """The disk is full at a byte drawn from all that a save writes; older checkpoints stay as they are.

    A child may write files of so many bytes at most, from the file drawn on: the limit is of the kernel, and
    so is the error. Forked, since a child that imports torch takes 2 s; that is safe with one thread.
    """
    first = save_checkpoint(folder, 1, model(n_embd=64), STATE, 1.0, keep=False)
    before, draw = contents(folder), random.Random(offsets)
    names = [*FILES, "manifest.json"]
    for i in range(offsets):
        name = names[i % len(names)]
        offset = draw.randrange((first.folder / name).stat().st_size)
        child = os.fork()
        if child == 0:
            os._exit(save_on_a_full_disk(folder, name, offset))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (name, offset)
        assert contents(folder) == before and len(list(folder.iterdir())) == 1, (name, offset)


def save_on_a_full_disk(folder: Path, name: str, offset: int) -> int:
    """Exit code: 0 for one sentence that says what is untouched."""

    def limited(write: Any, path_at: int) -> Any:
        def call(*arguments: Any) -> Any:
            if arguments[path_at].name == name:
                resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))
            return write(*arguments)

        return call

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoint.save_tensors = limited(checkpoint.save_tensors, 1)
    checkpoint.write_atomically = limited(checkpoint.write_atomically, 0)
    try:
        save_checkpoint(folder, 2, model(n_embd=64), STATE, 0.5, keep=False)
    except OSError as error:
        return 0 if "older checkpoints are untouched" in str(error) and "\n" not in str(error) else 3
    except BaseException:
        return 5
    return 4


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path: Path) -> None:
    full_disks(tmp_path, 8)


@pytest.mark.slow
def test_a_full_disk_costs_the_new_checkpoint_only_50_of_50(tmp_path: Path) -> None:
    full_disks(tmp_path, 50)


def test_a_read_only_folder_costs_the_new_checkpoint_only(tmp_path: Path, monkeypatch: Any) -> None:
    """The system's error is raised by hand: tests may run as root, whom no mode of a folder stops."""
    first = save_checkpoint(tmp_path, 1, model(), STATE, 1.0, keep=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"Read-only.*older checkpoints are untouched"):
        save_checkpoint(tmp_path, 2, model(), STATE, 2.0, keep=False)
    assert checkpoints(tmp_path) == [first]


def test_a_manifest_names_its_files_and_their_sha256(tmp_path: Path) -> None:
    manifest = save_checkpoint(tmp_path, 12, model(), STATE, 2.0, keep=True)
    values = json.loads((tmp_path / "step-00000012" / "manifest.json").read_text())
    assert values["step"] == 12 and values["loss"] == 2.0 and values["keep"] is True
    assert set(manifest.files) == {"model.safetensors", "state.safetensors", "state.json"}


class Killed(BaseException):
    """Stands for a kill: nothing in a save may catch it."""


def calls_of_a_save(monkeypatch: Any, die_at: int) -> list[str]:
    """Let a save die before its call number `die_at` to the disk; the list fills with the calls made."""
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == die_at:
                raise Killed
            return function(*arguments, **options)

        return call

    for where, name in (
        (os, "fsync"), (os, "replace"), (shutil, "rmtree"), (tensorfiles, "save_file"),
        (checkpoint, "write_atomically"), (Path, "mkdir"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, counted(name, getattr(where, name)))
    return calls


def test_a_save_that_is_killed_before_any_call_loses_no_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    """The step has a whole checkpoint already: at every instant one of the two is there, and whole."""
    seen: set[float | None] = set()
    folder, calls, die_at = tmp_path, list[str](), 0
    while True:
        die_at += 1
        folder = tmp_path / str(die_at)
        save_checkpoint(folder, 3, model(), STATE, 1.0, keep=False)
        calls = calls_of_a_save(monkeypatch, die_at)
        try:
            save_checkpoint(folder, 3, model(), STATE, 2.0, keep=False)
        except Killed:
            monkeypatch.undo()
        else:
            monkeypatch.undo()
            break
        found: list[Manifest] = [newest_whole(folder), checkpoints(folder)[-1]]
        assert found[0] == found[1]
        seen.add(found[0].loss)
        last = save_checkpoint(folder, 4, model(), STATE, 3.0, keep=False)
        assert checkpoints(folder)[-1] == last and len(checkpoints(folder)) >= 2
        assert not list(folder.glob(".*"))
    assert die_at > 10 and len(calls) == die_at - 1 and seen == {1.0, 2.0}
    assert [m.loss for m in checkpoints(folder)] == [2.0] and newest_whole(folder).loss == 2.0


def test_all_is_on_the_disk_before_its_name_is_and_then_the_folders_are(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """A loss of power may undo whatever was not flushed: a kill, which the other tests make, does not."""
    folder, flushed, replaced = tmp_path / "run" / "checkpoints", list[int](), list[int]()
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).is_dir():
            whole = [target, *Path(target).iterdir()]
            assert len(whole) == 5 and {path.stat().st_ino for path in whole} <= {*flushed}
            replaced.append(len(flushed))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save_checkpoint(folder, 1, model(), STATE, 1.0, keep=False)
    (at,) = replaced
    assert flushed[at:] == [path.stat().st_ino for path in (folder, folder.parent, tmp_path)]


def test_the_fingerprint_of_the_code_is_of_every_package(tmp_path: Path) -> None:
    for name in ("a.py", "p/__init__.py", "p/b.py", "p/q/c.py", "tests/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    seen = {code_fingerprint(tmp_path)}
    for name in ("a.py", "p/b.py", "p/q/c.py"):
        (tmp_path / name).write_text("pass")
        seen.add(code_fingerprint(tmp_path))
    assert len(seen) == 4
    (tmp_path / "tests/d.py").write_text("pass")
    assert code_fingerprint(tmp_path) in seen


def test_a_step_that_was_damaged_is_written_again_under_its_name(
    tmp_path: Path, files: dict[Path, bytes]
) -> None:
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    again = save_checkpoint(tmp_path, 3, model(), STATE, 2.0, keep=False)
    assert again.folder == tmp_path / "step-00000003" and newest_whole(tmp_path) == again
    twice = save_checkpoint(tmp_path, 3, model(), STATE, 2.0, keep=False)
    assert [path.name for path in sorted(tmp_path.glob("*3*"))] == [twice.folder.name]
    thrice = save_checkpoint(tmp_path, 3, model(), STATE, 2.0, keep=False)
    assert checkpoints(tmp_path)[-1] == thrice and len(checkpoints(tmp_path)) == 3


def test_a_failed_rename_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    first = save_checkpoint(tmp_path, 3, model(), STATE, 1.0, keep=False)

    def refuse(source: Path, target: Path) -> None:
        if source.name == ".step-00000003.tmp":
            raise OSError("no")
        os.rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", refuse)
    with pytest.raises(OSError, match="older checkpoints are untouched"):
        save_checkpoint(tmp_path, 3, model(), STATE, 2.0, keep=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert checkpoints(tmp_path) == [first]
    verify(first)


def test_leftovers_of_killed_saves_are_removed_by_the_next_one(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 1, model(), STATE, 1.0, keep=False)
    shutil.copytree(first.folder, tmp_path / ".step-00000002.gone")
    shutil.copytree(first.folder, tmp_path / ".step-00000007.tmp")
    assert checkpoints(tmp_path) == [first]
    second = save_checkpoint(tmp_path, 3, model(), STATE, 1.0, keep=False)
    assert checkpoints(tmp_path) == [first, second]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_of_tensors_are_readable_by_whom_the_umask_lets(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        manifest = save_checkpoint(tmp_path, 1, model(), STATE, 1.0, keep=False)
        save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
        save_pretrained(Decoder(replace(SHAPE, vocab_size=9)), None, tmp_path / "base", max_shard_bytes=9000)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > len(FILES) + 4 and manifest.folder / "model.safetensors" in written
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {
        path.name: 0o666 & ~umask for path in written
    }

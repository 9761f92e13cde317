"""The real server process under a replayed trace and under attack (benchmarks/serving_load.py)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import serving_load
from benchmarks.serving_load import ATTACKS, Edit, Served, load, under_attack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, list[Edit]]]:
    folder = tmp_path_factory.mktemp("load")
    edits = serving_load.trace(*serving_load.write_model(folder / "tiny"))
    served = serving_load.start(folder / "tiny", folder / "cache")
    yield served, edits
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert "Traceback" not in Path(folder / "cache.log").read_text("utf-8")


def test_no_answer_of_a_trace_is_lost_or_mixed_up_and_no_memory(loaded: tuple[Served, list[Edit]]) -> None:
    found = load(*loaded, 10_000, 0.3)
    assert not found["wrong"], found["wrong"][:9]
    assert 2700 < found["cancelled"] < 3300 and found["under_way"] == 0
    assert abs(found["after"] / found["before"] - 1) < 0.05


@pytest.mark.parametrize("name", ATTACKS)
def test_an_honest_client_gets_its_texts_under_attack(loaded: tuple[Served, list[Edit]], name: str) -> None:
    *_, wrong = under_attack(*loaded, name, 40)
    assert not wrong and loaded[0].process.poll() is None

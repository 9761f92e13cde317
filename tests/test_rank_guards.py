"""What several processes get wrong together is named, and healthy runs of them pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import copy_planted
from ranks import Ended, on_ranks, shared

from config import Config
from selftest.planted_faults import PlantedFault
from selftest.rank_faults import RANK_FAULTS
from selftest.run import small_config
from training.begin import train
from training.distributed import World
from training.loop import TrainingManager

pytestmark = pytest.mark.usefixtures("unguarded")


def run(config: Config, folder: Path, size: int = 2) -> list[Ended]:
    return on_ranks(size, shared(lambda world: train(config, world=world)), folder)


def said(ended: list[Ended]) -> str:
    """Return the one sentence with which all ended, if they did."""
    if not any(end.code for end in ended):
        return ""
    assert {end.code for end in ended} == {2}, ended
    (sentence,) = [end.err for end in ended if "error: " in end.err]
    return sentence


@pytest.mark.parametrize("plant", RANK_FAULTS, ids=lambda plant: plant.name)
def test_a_fault_of_several_processes_is_named(plant: PlantedFault, planted: Path, tmp_path: Path) -> None:
    copy_planted(planted, tmp_path, base=False)
    config = small_config(tmp_path, plant.settings)
    with plant.fault():
        assert plant.expected in said(run(config, tmp_path))


@pytest.mark.parametrize("settings", [{}, {"optimizer": {"grad_clip": 0.01}}], ids=["plain", "clipped"])
def test_a_healthy_run_of_several_processes_passes(
    settings: dict[str, dict[str, float]], planted: Path, tmp_path: Path
) -> None:
    copy_planted(planted, tmp_path, base=False)
    assert said(run(small_config(tmp_path, settings), tmp_path, size=4)) == ""


def test_weights_that_part_later_are_seen_by_the_next_validation(planted: Path, tmp_path: Path) -> None:
    copy_planted(planted, tmp_path, base=False)
    config = small_config(tmp_path, {"train": {"validate_every": 5, "max_steps": 10}})

    def work(world: World) -> None:
        update = TrainingManager.update

        def moved(manager: TrainingManager) -> dict[str, float]:
            values = update(manager)
            if manager.state.step == 5 and world.rank == 1:
                with torch.no_grad():
                    manager.model.head.weight[0, 0] += 1e-3
            return values

        TrainingManager.update = moved  # type: ignore[method-assign]
        train(config, world=world)

    assert "ranks-drift: the sum of head.weight is" in said(on_ranks(2, shared(work), tmp_path))


def test_other_settings_on_a_process_are_named_with_both_values(planted: Path, tmp_path: Path) -> None:
    copy_planted(planted, tmp_path, base=False)
    config = small_config(tmp_path, {})

    def work(world: World) -> None:
        own = config if world.is_first else replace(config, optimizer=replace(config.optimizer, lr=0.5))
        train(own, world=world)

    sentence = said(on_ranks(2, shared(work), tmp_path))
    assert "ranks-disagree: optimizer.lr is" in sentence and "0.5 on process 1" in sentence

"""The verdict on a budget: whether the loss still fell steeply when it was used up."""

from __future__ import annotations

import re

import pytest

from training.state import still_falling


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([8 - 2.6 * n / 60 for n in range(60)], "from 6.40 to 5.75 .* quarter of 60 steps, 29% of all"),
        ([8 - 0.1 * n for n in range(20)], "of 20 steps"),
        ([8 - 0.1 * n for n in range(19)], None),  # Too few steps to say.
        ([2.7 + 5.6 / (1 + n / 20) for n in range(1000)], None),  # The default run's falls so.
        ([8.0] * 80 + [3.0] * 20, "from 8.00 to 4.00"),
        ([3 - 0.001 * n for n in range(100)], None),  # It fell by little in all.
        ([3.0] * 100, None),
        ([3 + 0.1 * n for n in range(100)], None),
    ],
)
def test_a_loss_that_still_falls_steeply_at_the_end_is_told(losses: list[float], told: str | None) -> None:
    said = still_falling(losses)
    assert said is None if told is None else said and re.search(told, said)

"""What was compared with the reference so far, and the first quantity that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MOST_ALIKE = 1e-3  # Share of a quantity within which a constant factor, or another formula, explains it.


class Differs(Exception):
    """A quantity of the run is not what the reference derives.

    Args:
        stage: The quantity, and where it is: "block 2, attention scores".
        what: How it differs, with numbers.
        remedy: What to look for.
    """

    def __init__(self, stage: str, what: str, remedy: str):
        self.stage, self.what, self.remedy = stage, what, remedy
        super().__init__(f"{stage}: {what}; {remedy}")


class Comparison:
    """The stages that were compared, in order.

    Attributes:
        agreed: By part the largest relative difference that was found in it; 0.0 is exact agreement.
        stages: The stages that agree, in order, with the difference of each.
        left_out: Sentences about what was not compared, and why.
    """

    def __init__(self):
        self.agreed: dict[str, float] = {}
        self.stages: list[tuple[str, float]] = []
        self.left_out: list[str] = []
        self.part = ""

    def begin(self, part: str) -> None:
        """Begin a part of the run, under the name that the summary gives it."""
        self.part = part

    def leave_out(self, stage: str, reason: str) -> None:
        """Note that a stage was not compared."""
        self.left_out.append(f"{stage} was not compared with the reference: {reason}")

    def exact(self, stage: str, found: object, expected: object, remedy: str) -> None:
        """Compare what must be equal to the last bit: text, ids, numbers of rows.

        Raises:
            Differs: They are not equal.
        """
        if found != expected:
            raise Differs(stage, f"{_shown(found)}, and the reference has {_shown(expected)}", remedy)
        self._agrees(stage, 0.0)

    def close(
        self,
        stage: str,
        found: Tensor,
        expected: Tensor,
        tolerance: float,
        remedy: str,
        explanations: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        """Compare tensors of one shape by their largest difference, relative to the largest of `expected`.

        Six arguments: the two sides, their name and bound, and the two texts of a difference.

        Args:
            tolerance: The relative difference that rounding explains; derived from the format and the size
                of the sums, not tuned.
            remedy: What to look for where no explanation fits.
            explanations: By the name of a known mistake what the run would then have computed; made only when
                the tensors differ.

        Raises:
            Differs: They differ by more than the tolerance, or in shape.
        """
        if found.shape != expected.shape:
            shapes = f"its shape is {tuple(found.shape)}, and the reference has {tuple(expected.shape)}"
            raise Differs(stage, shapes, remedy)
        found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
        difference = relative_difference(found, expected)
        if difference <= tolerance:  # A difference that is not a number does not pass.
            self._agrees(stage, difference)
            return
        for meaning, derive in (explanations or {}).items():
            if relative_difference(found, derive().double().cpu()) <= max(tolerance, MOST_ALIKE):
                remedy = f"{meaning}?"
                break
        raise Differs(stage, _how(found, expected, difference), remedy)

    def _agrees(self, stage: str, difference: float) -> None:
        self.stages.append((stage, difference))
        self.agreed[self.part] = max(self.agreed.get(self.part, 0.0), difference)

    def evidence(self, difference: Differs) -> str:
        """Return the sentence of a difference: where it is, how large, and what agreed before it."""
        before = "it is the first quantity compared"
        if self.stages:
            worst = max(value for _, value in self.stages)
            before = f"first seen there: all before, up to {self.stages[-1][0]}, agrees {_digits(worst)}"
        return f"{difference.stage}: {difference.what}; {before}"

    def summary(self) -> str:
        """Return to how many digits each part agreed: `rows exactly, logits to 2e-07`."""
        return ", ".join(f"{part} {_digits(value)}" for part, value in self.agreed.items())


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors relative to the largest number of the second."""
    if not expected.numel():
        return 0.0
    largest = float(expected.abs().amax())
    difference = float((found - expected).abs().amax())
    return difference / largest if largest else difference


def _digits(difference: float) -> str:
    return f"to {difference:.0e}" if difference else "exactly"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _how(found: Tensor, expected: Tensor, difference: float) -> str:
    """Say how two tensors differ: by a constant factor if one explains it, else by how much and where."""
    squares = float(expected.square().sum())
    factor = float((found * expected).sum()) / squares if squares else 0.0
    if (
        abs(factor - 1) > MOST_ALIKE
        and factor
        and relative_difference(found / factor, expected) <= MOST_ALIKE
    ):
        return f"{factor:.4g} times the reference"
    place = int(torch.argmax((found - expected).abs().flatten()))
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), found.shape)]
    return (
        f"differs by {difference:.1e} of the reference's largest number, most at {index}: "
        f"{float(found.flatten()[place]):.5g}, and the reference has {float(expected.flatten()[place]):.5g}"
    )

"""Guard of all that a run computes: it is derived again, and the first quantity that differs is named.

`reference/` derives what the disk and the settings say; each file here compares one part of it with the very
objects of the run. A part that finds a difference ends the comparison, since all that follows differs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from guards.faults import Fault
from guards.ranks import drift
from guards.reference import dropout, forward, generation, rows, text, updates, weights
from guards.reference.comparison import Comparison, Differs
from guards.subject import GuardSubject

# In the order in which a run computes them.
PARTS: dict[str, Callable[[GuardSubject, Comparison], None]] = {
    "text": text.compare,
    "rows": rows.compare,
    "weights": weights.compare,
    "forward": forward.compare,
    "dropout": dropout.compare,
    "updates": updates.compare,
    "generation": generation.compare,
}


def reference(subject: GuardSubject) -> Iterator[Fault | str]:
    """Compare every part of the run that is about to train with the reference."""
    yield from _compared(subject, PARTS)


def shared_updates(subject: GuardSubject) -> Iterator[Fault | str]:
    """Compare weights among the processes of a run, and updates that all of them make with the reference.

    Every process calls it.
    """
    yield from drift(subject.world, subject.model)
    name = f"updates of {subject.world.size} processes"
    yield from _compared(
        subject,
        {name: lambda subject, comparison: updates.rehearse_if_small(subject, comparison, subject.world)},
    )


def _compared(
    subject: GuardSubject, parts: dict[str, Callable[[GuardSubject, Comparison], None]]
) -> Iterator[Fault | str]:
    comparison = Comparison()
    try:
        for name, compare in parts.items():
            comparison.begin(name)
            compare(subject, comparison)
    except Differs as difference:
        yield Fault("differs-from-reference", comparison.evidence(difference), difference.remedy)
        return
    except Fault as fault:  # A difference that another guard's name explains better.
        yield fault
        return
    yield from comparison.left_out
    yield f"a second opinion agrees: {comparison.summary()}"

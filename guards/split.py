"""Guard of the split: no split holds much of the text of another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from data.store_leaks import store_overlap
from guards.faults import Fault
from guards.subject import GuardSubject


def split(subject: GuardSubject) -> Iterator[Fault | str]:
    """Say how much of the text of one split also stands in another, and refuse too much of it."""
    if subject.config.train.overfit:
        yield "left out: --overfit validates on what it trains on"
        return
    splits = [subject.train, subject.validation]
    splits += [] if subject.test is subject.validation else [subject.test]
    for known, held_out in itertools.combinations(splits, 2):
        found = store_overlap(known, held_out, subject.tokenizer)
        yield f"of {held_out.split} in {known.split} {found.counts}"
        if found.refused:
            largest = "".join(
                f"; {e.held_out!r} and {e.train!r} share {' '.join(e.excerpt.split())[:60]!r}"
                for e in found.examples[:1]
            )
            remedy = "name what belongs together with --data.group_field, or let --fix find it by its text"
            if subject.config.data.regroup:
                remedy = (
                    "the split is by text already (data.regroup), so name what else belongs together with "
                    "--data.group_field, or take it out"
                )
            yield Fault("split-leaks", f"of {held_out.split} in {known.split}: {found}{largest}", remedy)

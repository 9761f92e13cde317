"""An evaluation scored again from the predictions that it holds: `python eval.py --rescore RUN/eval.json`.

A number that was copied, rounded or edited by hand, or computed by other code, is told beside the one that
the predictions have. It imports no torch, so that it takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config.files import code_fingerprint
from suites.documents import add_intervals, values_of
from suites.passing import scores_of
from suites.records import DAMAGED, models_of, not_whole, read_json
from suites.scoring import SUITES, Example, Predictions, record_of, records_of, scored


def rescore(path: str | Path) -> int:
    """Score the predictions in an eval.json again, say whether all is equal, and return the exit code.

    Raises:
        ValueError: It cannot be read, or holds no predictions.
    """
    record = read_json(path)
    try:
        suites = records_of(record)
    except DAMAGED:
        suites = []
    if not suites:
        raise ValueError(
            f"{path} holds no predictions of a suite; give the eval.json of an evaluation "
            "with --samples above 0"
        )
    try:
        found = [sentence for worded, suite in suites for sentence in differences(suite, worded)]
        found += token_differences(record) if "documents" in record else []
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for sentence in found:
        # The file may be a stranger's, and this is for a terminal.
        print("".join(c if c.isprintable() else "?" for c in sentence))
    if found:
        told = record.get("evaluation_code")
        if told != code_fingerprint():
            print(
                "this file is of another version of the evaluation: its intervals and verdicts may be by "
                "another method, its scores may not"
            )
        return 1
    if "documents" in record:
        print(f"equal: token scores of {', '.join(record['documents']['nats'])}")
    for worded, suite in suites:
        scores = suite["scores"]
        count = sum(len(by_name) for by_name in scores.values())
        say = (
            f"equal: {count} scores of {', '.join(scores)} from {len(suite['samples'])} samples each{worded}"
        )
        print(f"{say}, by the results of their runs" if SUITES[suite["suite"]].runs else say)
    return 0


def differences(record: Any, worded: str = "") -> Iterator[str]:
    """Yield a sentence, with both numbers, for each thing that the predictions of a record do not score.

    Args:
        record: The record of a suite.
        worded: The words behind the suite's name that name its prompts.

    Raises:
        ValueError: It is no record of a suite.
    """
    try:
        again = _scored_again(record)
        title = f"{SUITES[record['suite']].name}{worded}"
        yield from _score_differences(record, again, title)
        for name in list(record["signatures"]):
            here = again["signatures"][name]
            if record["signatures"][name] != here:
                said = record["signatures"][name]
                yield f"{title}, {name}: by {said} in the file, and by {here} here"
            yield from _verdict_differences(
                record["verdicts"][name], again["verdicts"][name], f"{title}, {name}"
            )
    except DAMAGED as error:
        raise not_whole("the record of a suite", error) from None


def _scored_again(record: Any) -> dict[str, Any]:
    """Score the predictions of a record again, or the results of programs' runs; return the new record."""
    suite, samples = SUITES[record["suite"]], record["samples"]
    systems = list(record["scores"])
    examples = [Example(str(s["name"]), int(s["where"]), str(s["prompt"]), s["reference"]) for s in samples]
    predictions = {system: _predictions(samples, system) for system in systems}
    strings = [example.reference for example in examples]
    strings += [text for made in predictions.values() for texts in made.draws for text in texts]
    if not all(isinstance(text, str) for text in strings):
        raise ValueError("a prediction or a reference is not text")
    names, seed = list(record["signatures"]), int(record["seed"])
    if suite.runs:
        results = {system: [list(sample["results"][system]) for sample in samples] for system in systems}
        found = scores_of(examples, results, dict(record["left_out"]), str(record["sandbox"]))
        return record_of(suite, examples, predictions, found, record["language"], seed)
    return scored(suite, examples, predictions, names, record["language"], seed, models_of(record))


def _score_differences(record: Any, again: dict[str, Any], title: str) -> Iterator[str]:
    """Yield a sentence for each score, spread or interval that is another one than in the record."""
    said = {
        (system, name): record["scores"][system][name]
        for system in record["scores"]
        for name in [*record["signatures"], *record["scores"][system]]
    }
    missing = [name for _, name in said if name not in again["signatures"]]
    if missing:
        raise ValueError(f"{missing[0]} has a score and no signature")
    for (system, name), values in said.items():
        what, fresh = f"{title}, {system}, {name}", again["scores"][system][name]
        if not _near(values["mean"], fresh["mean"]):
            yield f"{what}: the file says {_both(values['mean'], fresh['mean'])}"
        elif "spread" in fresh and not _near(values["spread"], fresh["spread"]):
            what += ", the spread of its draws"
            yield f"{what}: the file says {_both(values['spread'], fresh['spread'])}"
        elif not all(_near(values[end], fresh[end]) for end in ("low", "high", "n")):
            ends = ("[{low:.4f}, {high:.4f}] of {n}".format(**one) for one in (values, fresh))
            yield "{}: the file has the interval {}, and its predictions {}".format(what, *ends)


def _verdict_differences(own: Any, fresh: dict[str, Any], title: str) -> Iterator[str]:
    """Yield a sentence for each difference, verdict or best baseline that is another one for a metric."""
    for system, gap in fresh["differences"].items():
        said = own["differences"][system]
        wrong = [key for key in gap if said[key] != gap[key] and not _near(said[key], gap[key])]
        for key in wrong:
            yield (
                f"{title}: of the difference from {system} the file says {key} {said[key]}, and its "
                f"predictions {gap[key]}"
            )
    for system, verdict in fresh["against"].items():
        if own["against"][system] != verdict:
            yield (f"{title}: the file says {own['against'][system]!r}, and its predictions are {verdict!r}")
    if own["best"] != fresh["best"]:
        yield (
            f"{title}: the file names {own['best']} as the best baseline, and by its predictions it is "
            f"{fresh['best']}"
        )


def token_differences(record: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each token score of a record that is not that of its documents.

    Raises:
        ValueError: It is no record of token scores.
    """
    try:
        documents, again = record["documents"], {name: {} for name in record["documents"]["nats"]}
        add_intervals(again, documents, int(record["settings"]["seed"]))
        for system in documents["nats"]:
            for key, value in values_of(documents, system).items():
                said = record[system][key]
                # The sums were in fp32 and in another order.
                if not math.isclose(said, value, rel_tol=1e-5):
                    yield f"{system}, {key}: the file says {said:.6g}, and its documents {value:.6g}"
            for key, ends in again[system].get("intervals", {}).items():
                said = record[system]["intervals"][key]
                if not all(math.isclose(said[end], ends[end], rel_tol=1e-9) for end in ends):
                    yield f"{system}, {key}: the file has the interval {said}, and its documents {ends}"
        for key, by_system in again.get("token_verdicts", {}).items():
            for system, fresh in by_system.items():
                said = record["token_verdicts"][key][system]
                if said["verdict"] != fresh["verdict"]:
                    told = f"{said['verdict']!r}, and its documents are {fresh['verdict']!r}"
                    yield f"{key}: the file says {told}"
    except (*DAMAGED, ValueError) as error:  # Columns of different lengths raise a ValueError.
        raise not_whole("the token scores", error) from None


def _predictions(samples: list[Any], system: str) -> Predictions:
    more = [sample.get("more", {}).get(system, []) for sample in samples]
    texts = [sample["predictions"][system] for sample in samples]
    return Predictions(texts, None, [list(draw) for draw in zip(*more, strict=True)])


def _near(one: Any, other: Any) -> bool:
    return (
        isinstance(one, int | float)
        and isinstance(other, int | float)
        and math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    )


def _both(said: Any, found: float) -> str:
    """Return both numbers, with as few digits as they differ in."""
    if not isinstance(said, int | float):
        raise TypeError(f"{said!r} is not a score")
    for digits in range(2, 10):
        if f"{said:.{digits}f}" != f"{found:.{digits}f}":
            return f"{said:.{digits}f}, and its predictions score {found:.{digits}f}"
    return f"{said!r}, and its predictions score {found!r}"

"""Evaluations compared: `python eval.py --compare RUN_A RUN_B`, and the wordings of one run's prompts.

    print(compare_files(["runs/a", "runs/b/eval.json"]))
    print("\\n".join(comparison(columns_of("verbose", record) + columns_of("simple", other_record))))

Scores are computed from the predictions that the files store, on the same samples, and every difference has
its paired bootstrap interval and a verdict. Evaluations that were not measured alike are refused, with both
values. No torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from metrics.intervals import compare
from metrics.registry import Scored
from suites.documents import OF_SUMS, rows_of, units_of, values_of
from suites.records import (
    DAMAGED,
    evaluation_files,
    not_whole,
    number_aside,
    read_evaluation,
    scored_again,
    texts_of,
)
from suites.scoring import (
    SUITES,
    TOGETHER,
    TOKENS,
    empty_share,
    no_verdict,
    origin_of,
    suites_of,
)
from suites.tables import aligned, shares_told

LETTERS = "ABCDEFGH"
OF_TOKENS = "model", "base", "n-gram", "documents"  # The keys of token scores,
OF_TEXTS = "side", "files", "bytes"  # and of the texts that they are over.
SUBJECTS = "model", "base", "given"  # The systems that are compared; the others are their baselines.


@dataclass(frozen=True)
class Column:
    """One system of one evaluation.

    Args:
        label: Its heading in the table.
        system: Its key in the record.
        record: The record of a suite, as `scoring.scored` returns it.
        prompt: The name of the prompts' wording; None where it is the one that was trained on.
    """

    label: str
    system: str
    record: dict[str, Any]
    prompt: str | None = None


def columns_of(label: str, record: dict[str, Any], prompt: str | None = None) -> list[Column]:
    """Return a column for each system of a suite that is compared."""
    return [
        Column(f"{label} {system}", system, record, prompt)
        for system in SUBJECTS
        if system in record["scores"]
    ]


@dataclass(frozen=True)
class Compared:
    """One side of a comparison: the requested suites of its evaluations.

    Args:
        label: Its name in tables.
        prompt: The name of the prompts' wording; None where it is the one that was trained on.
        evaluation: Its evaluations as one, by `_merged`.
        records: The records of its suites, by suite.
        legend: Lines that say what it is, and which of its files were left out.
    """

    label: str
    prompt: str | None
    evaluation: dict[str, Any]
    records: dict[str, dict[str, Any]]
    legend: list[str]


def compare_files(paths: Sequence[str], suite: str = "") -> str:
    """Return the table and the verdicts of several evaluations, over the suites that all of them store.

    Args:
        paths: Run folders or eval.json files, each with `:NAME` behind it for the predictions from prompts of
            that name. So `a:verbose b:simple` are compared though their prompts differ. A folder stands for
            all of its evaluations.
        suite: Names between commas, as those of `--suite`; "" for all that they store.

    Raises:
        ValueError: There are fewer than two, one cannot be read or lacks a suite that `suite` names, they
            share none, or they were not measured alike.
    """
    if len(paths) < 2:
        raise ValueError(f"--compare has {len(paths)} evaluation to compare: name two or more")
    if len(paths) > len(LETTERS):
        raise ValueError(f"--compare has {len(paths)} evaluations; it takes {len(LETTERS)} at most")
    sides = [_opened(letter, given, suite) for letter, given in zip(LETTERS, paths, strict=False)]
    try:
        lines = _compared(sides, suite)
    except DAMAGED as error:
        raise not_whole(" or ".join(paths), error) from None
    # The files may be a stranger's, and this is for a terminal.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _compared(sides: Sequence[Compared], suite: str) -> list[str]:
    """Return the legend, the token scores, and a table for each suite and wording that all sides store."""
    tokens = TOKENS in suite or not suite
    evaluations = [(side.label, side.evaluation) for side in sides]
    lines = [line for side in sides for line in side.legend]
    shared = [name for name in sides[0].records if all(name in side.records for side in sides)]
    scored = _token_lines(evaluations) if tokens else []
    if not shared and not any(line.startswith("metric") for line in scored):
        stored = "; ".join(f"{side.label} holds {', '.join(_stored(side.evaluation))}" for side in sides)
        other_text = "".join(f"; {line}" for line in scored if line)
        raise ValueError(f"they share no suite: {stored}{other_text}; evaluate both alike, with --suite")
    single = [
        f"left out: {name}, which is only in {' and '.join(s.label for s in sides if name in s.records)}"
        for name in dict.fromkeys(name for side in sides for name in side.records)
        if name not in shared
    ]
    lines += [*single, *scored]
    for name in shared:
        columns = [c for side in sides for c in columns_of(side.label, side.records[name], side.prompt)]
        lines += ["", *_told_by_bytes(columns, sides)]
    whole = not suite and all(side.prompt is None for side in sides)
    for prompt in _shared_prompts(evaluations) if whole else ():
        columns = [
            column
            for label, evaluation in evaluations
            for column in columns_of(f"{label} {prompt}", evaluation["prompts"][prompt], prompt)
        ]
        lines += ["", f"prompt {prompt}:", *_told_by_bytes(columns, sides)]
    return lines


def _told_by_bytes(columns: Sequence[Column], sides: Sequence[Compared]) -> list[str]:
    """Return the lines of `comparison`; where tokenizers differ its refusal names what can be compared."""
    try:
        return comparison(columns)
    except ValueError as error:
        tokenizers = {side.evaluation.get("fingerprints", {}).get("tokenizer") for side in sides}
        if len(tokenizers) == 1 or any("model" not in side.evaluation for side in sides):
            raise
        raise ValueError(
            f"{error}; their tokenizers differ, and --suite {TOKENS} compares their bits per byte"
        ) from None


def _opened(letter: str, given: str, suite: str) -> Compared:
    """Read one side from its files; ValueError, with the path, where it lacks what is requested."""
    place, prompt = _path_and_prompt(given)
    label = letter if prompt is None else f"{letter} {prompt}"
    files = {path: read_evaluation(path) for path in evaluation_files(place)}
    try:
        files = _with_earlier(files)
        files, legend = _of_one_checkpoint(_with_requested(files, suite, prompt), label)
        evaluation = _merged(list(files.values()))
        records = _chosen(_records(evaluation, prompt), suite, _stored(evaluation))
        return Compared(label, prompt, evaluation, records, legend)
    except DAMAGED as error:
        raise not_whole(next(iter(files)), error) from None
    except ValueError as error:
        raise ValueError(f"{next(iter(files))}: {error}") from None


def _with_earlier(files: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Return the evaluations of a run, where each that was set aside has only what no newer one stores.

    One of other weights than the newest is left out.
    """
    first = next(iter(files.values()))
    texts = [first.get(key) for key in OF_TEXTS]
    found: dict[Path, dict[str, Any]] = {}
    seen = set[str]()
    for path, evaluation in files.items():
        if evaluation is not first and number_aside(path):
            if evaluation.get("fingerprints", {}).get("weights") != first.get("fingerprints", {}).get(
                "weights"
            ):
                continue
            same_texts = [evaluation.get(key) for key in OF_TEXTS] == texts
            evaluation = _without(evaluation, seen if same_texts else seen | {TOKENS})
            if not _stored(evaluation):
                continue
        found[path] = evaluation
        seen |= {*_stored(evaluation)}
    return found


def _without(evaluation: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return an evaluation without some of its suites, token scores among them."""
    left_out = ("suite", "more_suites", *(OF_TOKENS if TOKENS in names else ()))
    kept = {key: value for key, value in evaluation.items() if key not in left_out}
    records = [record for record in suites_of(evaluation) if record["suite"] not in names]
    if records:
        kept["suite"], *kept["more_suites"] = records
    return kept


def _with_requested(
    files: dict[Path, dict[str, Any]], suite: str, prompt: str | None
) -> dict[Path, dict[str, Any]]:
    """Return the evaluations of a run that store a requested suite or wording, or all where none does."""
    names = {name for one in map(str.strip, suite.split(",")) for name in TOGETHER.get(one, (one,))}
    if len(files) == 1 or not (suite or prompt):
        return files
    found = {
        path: evaluation
        for path, evaluation in files.items()
        if (prompt is not None and prompt in evaluation.get("prompts", {}))
        or names & {record["suite"] for record in suites_of(evaluation)}
        or (TOKENS in names and "model" in evaluation)
    }
    return found or files


def _of_one_checkpoint(
    files: dict[Path, dict[str, Any]], label: str
) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Return the evaluations of the first one's checkpoint, and a line for each that says what it is."""
    weights = {path: evaluation.get("fingerprints", {}).get("weights") for path, evaluation in files.items()}
    first = next(iter(files))
    kept = {path: evaluation for path, evaluation in files.items() if weights[path] == weights[first]}
    lines = []
    for path, evaluation in files.items():
        step = "" if evaluation["step"] is None else f", step {evaluation['step']}"
        said = f"{label}: {evaluation['run'] or 'predictions'}{step}, from {path}"
        lines.append(said if path in kept else f"{said}: left out, for {first} is of another checkpoint")
    return kept, lines


def _merged(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge several evaluations of one checkpoint into one: what the first stores takes precedence.

    A suite is taken from the last one that has it: its own file is newer than an eval.json of several suites.
    """
    whole: dict[str, Any] = {}
    for evaluation in reversed(evaluations):
        whole |= evaluation
    records = {record["suite"]: record for evaluation in evaluations for record in suites_of(evaluation)}
    if records:
        whole["suite"], *whole["more_suites"] = records.values()
    prompts = [evaluation["prompts"] for evaluation in reversed(evaluations) if "prompts" in evaluation]
    if prompts:
        whole["prompts"] = {name: record for by_name in prompts for name, record in by_name.items()}
    return whole


def _shared_prompts(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return the names of the prompts' wordings that all evaluations share."""
    first, *others = ([*evaluation.get("prompts", {})] for _, evaluation in evaluations)
    return [name for name in first if all(name in names for names in others)]


def _records(evaluation: dict[str, Any], prompt: str | None) -> dict[str, dict[str, Any]]:
    """Return the records of an evaluation by suite; ValueError where there is nothing to compare."""
    if prompt is None:
        if not suites_of(evaluation) and "model" not in evaluation:
            raise ValueError("it holds no predictions of a suite; evaluate with --samples above 0")
        return {record["suite"]: record for record in suites_of(evaluation)}
    worded = evaluation.get("prompts", {})
    if prompt not in worded:
        names = ", ".join(worded) or "none"
        raise ValueError(
            f"it was not evaluated with prompts called {prompt!r} (there are {names}); evaluate with "
            "--prompts"
        )
    return {worded[prompt]["suite"]: worded[prompt]}


def _stored(evaluation: dict[str, Any]) -> list[str]:
    """Return the names of an evaluation's suites, token scores among them."""
    return [TOKENS] * ("model" in evaluation) + [record["suite"] for record in suites_of(evaluation)]


def _chosen(records: dict[str, dict[str, Any]], suite: str, stored: list[str]) -> dict[str, dict[str, Any]]:
    """Return the records of the requested suites; ValueError where one is not stored."""
    if not suite:
        return records
    found: dict[str, dict[str, Any]] = {}
    for requested in map(str.strip, suite.split(",")):
        own = {name: records[name] for name in TOGETHER.get(requested, (requested,)) if name in records}
        if not own and (requested != TOKENS or TOKENS not in stored):
            raise ValueError(
                f"it holds no suite {requested!r} but {', '.join(stored)}; evaluate with --suite {requested}"
            )
        found |= own
    return found


def _path_and_prompt(given: str) -> tuple[Path, str | None]:
    path, prompt = Path(given), None
    if not path.exists() and ":" in given:
        start, _, prompt = given.rpartition(":")
        path = Path(start)
    return path, prompt


def comparison(columns: Sequence[Column]) -> list[str]:
    """Return lines: scores with 95% intervals, a column for each system, then differences and verdicts.

    The systems of one evaluation are compared with each other, and those of one kind between evaluations.

    Raises:
        ValueError: They were not measured alike.
    """
    first = columns[0]
    for other in columns[1:]:
        _refuse_unlike(first, other)
    record, suite = first.record, SUITES[first.record["suite"]]
    names, seed = list(record["signatures"]), int(record["seed"])
    found = [scored_again(column.record, [column.system])[column.system] for column in columns]
    baselines = _baselines(columns)
    rows = [["metric", *(column.label for column in columns), "best baseline"]]
    for name in names:
        intervals = (by_name[name].interval(seed) for by_name in found)
        best = max(baselines, key=lambda one: one[1][name].value, default=None)
        rows.append(
            [
                name,
                *(f"{i.mean:.1f} [{i.low:.1f}, {i.high:.1f}]" for i in intervals),
                f"{best[1][name].value:.1f} {best[0]}" if best is not None else "",
            ]
        )
    rows += [[*row, ""] for row in shares_told([(column.record, column.system) for column in columns])]
    n, files = len(record["samples"]), len({origin_of(sample["name"]) for sample in record["samples"]})
    over = " over files" if 1 < files < n else ""
    head = f"{suite.title}: {suite.counted.format(n=n, files=files)}, with 95% intervals{over}"
    lines = [head, *aligned(rows)]
    for name in names:
        for i, j in combinations(range(len(columns)), 2):
            one, other = columns[i], columns[j]
            if one.record is not other.record and one.system != other.system:
                continue
            # The later system is judged by the earlier; within one record the model is judged by its base.
            if one.record is other.record:
                i, j, one, other = j, i, other, one
            compared = found[j][name].compare(found[i][name], seed)
            gap = compared.difference
            refused = no_verdict({column.label: _empty(column) for column in (one, other)})
            lines.append(
                f"{name}: {other.label} less {one.label} is {gap.mean:+.1f} [{gap.low:.1f}, {gap.high:.1f}], "
                + (refused or compared.verdict(one.label))
            )
    return lines


def _empty(column: Column) -> float:
    samples = column.record["samples"]
    return empty_share([text for sample in samples for text in texts_of(sample, column.system)])


def _baselines(columns: Sequence[Column]) -> list[tuple[str, dict[str, Scored]]]:
    """Return the baselines of every evaluation by name: their n-gram models may be of other files."""
    records = {id(column.record): column.record for column in columns}.values()
    return [
        (system, scored_again(record, [system])[system])
        for record in records
        for system in record["scores"]
        if system not in SUBJECTS
    ]


def _refuse_unlike(one: Column, other: Column) -> None:
    """Raise ValueError, with both values, for what must be equal if a difference is to mean anything."""

    def refuse(what: str, ours: Any, theirs: Any, flag: str = "") -> None:
        if ours != theirs:
            raise ValueError(
                f"{one.label} and {other.label} cannot be compared: {what} is {_short(ours)} in one and "
                f"{_short(theirs)} in the other; evaluate both alike{flag}"
            )

    ours, theirs = one.record, other.record
    for key in ("suite", "language", "stop", "sampling", "draws"):
        refuse(key, ours.get(key), theirs.get(key))
    limits = [record.get("max_new_tokens") for record in (ours, theirs)]
    # A limit that is not given depends on the tokenizer. A limit that no text ran into changed nothing. The
    # limit of predictions made elsewhere is not known.
    made_here = one.system != "given" and other.system != "given"
    if made_here:
        refuse("whether a prompt's end was healed", bool(ours.get("healed")), bool(theirs.get("healed")))
    if made_here and any(one.record.get("ran_long", {}).get(one.system, 1.0) for one in (one, other)):
        refuse(
            "max_new_tokens",
            *limits,
            flag=f", as by --max_new_tokens {max(filter(None, limits), default=64)}",
        )
    refuse("the list of metrics", sorted(ours["signatures"]), sorted(theirs["signatures"]))
    for name, signature in ours["signatures"].items():
        refuse(f"the signature of {name}", signature, theirs["signatures"][name])
    refuse("the number of samples", len(ours["samples"]), len(theirs["samples"]))
    left_out = (", ".join(record.get("left_out", {})) or "none" for record in (ours, theirs))
    refuse("what could not be judged", *left_out)
    same_prompts = one.prompt == other.prompt
    for number, (a, b) in enumerate(zip(ours["samples"], theirs["samples"], strict=True), 1):
        for key in ("id", "reference", *(("prompt", "suffix") if same_prompts else ())):
            refuse(f"the {key} of sample {number}", a.get(key), b.get(key))


def _short(value: Any) -> str:
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = 80
    shorten.maxlist = 20
    return shorten.repr(value)


def _token_lines(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return the token scores of evaluations over the same text; by token only where tokenizers are alike."""
    scored = [(letter, found) for letter, found in evaluations if "model" in found]
    if len(scored) < 2:
        return []
    texts = {(found["side"], found["files"], found["bytes"]) for _, found in scored}
    if len(texts) > 1:
        one, other = sorted(texts)[:2]
        return [
            "",
            f"token scores are left out: they are over {one[2]:,} bytes of {one[1]:,} {one[0]} files, and "
            f"over {other[2]:,} bytes of {other[1]:,} {other[0]} files",
        ]
    # Scores are computed from the documents, so that a number that somebody edited does not count.
    systems = [
        (f"{letter} {system}", found[system] | values_of(found["documents"], system))
        if system in found.get("documents", {}).get("nats", {})
        else (f"{letter} {system}", found[system])
        for letter, found in scored
        for system in ("model", "base", "n-gram")
        if system in found
    ]
    alike = len({(f["fingerprints"]["tokenizer"], f["model"]["tokens"]) for _, f in scored}) == 1
    rows = [["metric", *(label for label, _ in systems)]]
    for key, name, form in (
        ("bits_per_byte", "bits per byte", "{:.4f}"),
        ("loss", "loss, nats a token", "{:.4f}"),
        ("perplexity", "perplexity", "{:.2f}"),
        ("top1", "top-1 accuracy", "{:.2%}"),
        ("top5", "top-5 accuracy", "{:.2%}"),
    ):
        if alike or key == "bits_per_byte":
            rows.append([name, *(form.format(values[key]) for _, values in systems)])
    split, files, size = texts.pop()
    lines = ["", f"tokens: {size:,} bytes of {files:,} {split} files", *aligned(rows)]
    if not alike:
        lines.append("the tokenizers differ, so only what is by byte is compared")
    for (one, a), (other, b) in combinations(scored, 2):
        lines += [f"bits per byte: {said}" for said in _token_difference(one, a, other, b)]
    return lines


def _token_difference(one: str, ours: dict[str, Any], other: str, theirs: dict[str, Any]) -> Iterator[str]:
    """Yield how far apart two models are on the same documents, where both evaluations store these."""
    a, b = ours.get("documents"), theirs.get("documents")
    if a is None or b is None or len(a["names"]) < 2:
        return
    if a["names"] != b["names"] or a["bytes"] != b["bytes"]:
        yield f"{one} and {other} were not over the same documents, so their difference has no interval"
        return
    found = compare(rows_of(b, "model"), rows_of(a, "model"), OF_SUMS["bits_per_byte"])
    gap = found.difference
    said = f"{other} model less {one} model is {gap.mean:+.4f} [{gap.low:.4f}, {gap.high:.4f}]"
    if found.distinguishable:
        yield f"{said}, {'better' if gap.mean < 0 else 'worse'} on {gap.n} {units_of(a)}"
    else:
        yield f"{said}, {found.verdict(one + ' model').replace('samples', units_of(a))}"

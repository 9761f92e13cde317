"""python -m scraping clean: turn the ledger's files into documents, and drop those that do not belong.

Reads `FOLDER/ledger.sqlite` and writes, for shard i of n:

    FOLDER/clean/part-0000i-of-0000n.parquet           the documents, in the ledger's order
    FOLDER/clean/part-0000i-of-0000n.dropped.jsonl.gz  each dropped file: stage, reason, evidence
    FOLDER/clean/part-0000i-of-0000n.json              settings, versions and counts; it comes last

Each file appears whole or not at all. A shard whose record names these settings, versions and input is not
computed again. Equal input gives equal bytes, whatever the number of processes and of interruptions.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from config import write_atomically
from scraping.documents import Drop, RawFile, ScrapedDocument, shard_path, write_shard
from scraping.ledger import Ledger, fingerprint_line
from scraping.pool import Died, cores, guarded
from scraping.shards import alone, file_sha256, parse_shard
from scraping.stages import (
    Note,
    Stage,
    encoding,
    formatting,
    headers,
    licences,
    origin,
    secrets,
    shape,
    syntax,
)

BATCH_BYTES = 2**18  # a child receives batches of about this size, with at most BATCH_FILES files
BATCH_FILES = 64


@dataclass(frozen=True)
class CleanSettings:
    """Settings of the command clean: which files belong in the corpus.

    Args:
        folder: The corpus's folder: `folder/ledger.sqlite` is read, `folder/clean` is written.
        shard: `i/n`: only the i-th of n parts of the repositories, counted from 0.
        whole: Read the whole ledger, since it holds that part alone: it was crawled with the same --shard.
        workers: Number of processes; 0 means one for each core.
        skip: Stages to leave out: any of licence, origin, headers, shape, secrets, syntax.
        latin1: Read a file that is not UTF-8 and names no encoding as latin-1 instead of dropping it.
        line_ends: `lf` turns CRLF and CR into LF; `keep` keeps them.
        licences: SPDX identifiers that are allowed; an expression must be met by them.
        unknown_licence: Keep files whose licence nobody states.
        min_lines: Fewest lines that are not blank.
        max_line: Greatest length of a line, in characters.
        max_mean_line: Greatest mean length of the lines, in characters.
        min_alnum: Least share of letters and digits among the characters that are not space.
        max_escapes: Most escapes such as `\\u00e9` in a row, in one line; 0 sets no bound.
        max_numbers: Most numbers, or escapes, in a row, as in a table over many lines; 0 sets no bound.
        max_errors: Largest share of a Kotlin or Java file that its grammar may not place. The grammars do not
            know all of their languages: of 1,039 files of kotlinx.coroutines two are above 0.3.
        personal: Replace e-mail and internet addresses by placeholders too, not only secrets.
        format: Formatter of Python files: `none`, `autopep8`, or `ruff`, some hundred times as fast.
        seconds: Processor time that the stages may take for one file.
        format_seconds: Processor time to format one file; a file that takes longer stays as it is.
        memory_mb: Address space of a process, in MiB.
    """

    folder: str = "corpus"
    shard: str = "0/1"
    whole: bool = False
    workers: int = 0
    skip: tuple[str, ...] = ()
    latin1: bool = False
    line_ends: Literal["lf", "keep"] = "lf"
    licences: tuple[str, ...] = licences.PERMISSIVE
    unknown_licence: bool = False
    min_lines: int = 3
    max_line: int = 1000
    max_mean_line: int = 100
    min_alnum: float = 0.25
    max_escapes: int = 64
    max_numbers: int = 200
    max_errors: float = 0.3
    personal: bool = True
    format: Literal["none", "autopep8", "ruff"] = "none"
    seconds: float = 5.0
    format_seconds: float = 20.0
    memory_mb: int = 1024


# Stage -> (its version, how to build it), in the order in which a document passes the stages. Licence and
# origin read the header before it is removed; short and absurd texts are dropped before they are parsed; the
# syntax is checked of the text that stays.
STAGES: dict[str, tuple[int, Callable[[CleanSettings, Note], Stage]]] = {
    "licence": (licences.VERSION, lambda s, note: licences.build(s.licences, s.unknown_licence, note)),
    "origin": (origin.VERSION, lambda s, note: origin.build()),
    "headers": (headers.VERSION, lambda s, note: headers.build(note)),
    "shape": (
        shape.VERSION,
        lambda s, note: shape.build(
            s.min_lines, s.max_line, s.max_mean_line, s.min_alnum, s.max_escapes, s.max_numbers
        ),
    ),
    "secrets": (secrets.VERSION, lambda s, note: secrets.build(s.personal, note)),
    "syntax": (syntax.VERSION, lambda s, note: syntax.build(s.max_errors)),
    "formatting": (formatting.VERSION, lambda s, note: formatting.build(s.format, note)),
}
WHERE_ONLY = ("folder", "shard", "workers")  # settings that change nothing in a shard's documents
# Stage -> packages whose versions decide its result.
PACKAGES = {
    "licence": ("license-expression",),
    "syntax": ("tree-sitter", "tree-sitter-kotlin", "tree-sitter-java"),
}


def stages_of(settings: CleanSettings) -> list[str]:
    """Return the names of the stages that a document passes after `encoding`."""
    left_out = {*settings.skip, *(("formatting",) if settings.format == "none" else ())}
    return [name for name in STAGES if name not in left_out]


@dataclass(frozen=True)
class CleanOutcome:
    """The result of cleaning one file.

    Args:
        result: The document, or why there is none.
        stage: The stage that dropped the file; "" if it stays.
        notes: (stage, change) -> how often.
    """

    result: ScrapedDocument | Drop
    stage: str
    notes: dict[tuple[str, str], int]


def make_cleaner(settings: CleanSettings) -> Callable[[tuple[RawFile, bool]], CleanOutcome]:
    """Return the function that a child process runs on (file, whether it may be formatted)."""
    notes: Counter[tuple[str, str]] = Counter()

    def note_of(stage: str) -> Note:
        return lambda change: notes.update([(stage, change)])

    decode = encoding.build(settings.latin1, settings.line_ends, note_of("encoding"))
    stages = [(name, STAGES[name][1](settings, note_of(name))) for name in stages_of(settings)]

    def clean(item: tuple[RawFile, bool]) -> CleanOutcome:
        file, may_format = item
        notes.clear()
        name = "encoding"
        try:
            result = decode(file)
            for name, stage in stages:
                if isinstance(result, Drop):
                    break
                if name == "formatting":
                    if not may_format:
                        notes[name, "kept unformatted: too slow, or the tool crashed"] += 1
                        continue
                    signal.setitimer(signal.ITIMER_PROF, settings.format_seconds)
                before, result = name, stage(result)
                if isinstance(result, Drop):
                    return CleanOutcome(result, before, {})
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # No stranger's file may end the run: the failure is recorded and counted.
            return CleanOutcome(Drop("the stage failed", type(error).__name__), name, {})
        if isinstance(result, Drop):
            return CleanOutcome(result, "encoding", {})
        return CleanOutcome(result, "", dict(notes))

    return clean


def without_formatting(item: tuple[RawFile, bool]) -> tuple[RawFile, bool] | None:
    """Return the second attempt at a file that killed its child, unformatted; None after that one."""
    return (item[0], False) if item[1] else None


# ---------------------------------------------------------------------------------------------
# One shard


def how(settings: CleanSettings) -> dict[str, Any]:
    """Return all that decides a shard's documents: settings, and versions of stages, Python and packages."""
    names = stages_of(settings)
    packages = [package for name in names for package in PACKAGES.get(name, ())]
    packages += [settings.format] if settings.format != "none" else []
    values = {key: value for key, value in dataclasses.asdict(settings).items() if key not in WHERE_ONLY}
    return {
        "settings": json.loads(json.dumps(values)),  # tuples become lists, as in a record that was read
        "stages": {"encoding": encoding.VERSION, **{name: STAGES[name][0] for name in names}},
        "python": ".".join(map(str, sys.version_info[:2])),
        "packages": {package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # Ruff may be a program without a package.
        return "unknown"


class _Tally:
    """The counts of one shard, in which `files == documents + the sum of dropped`."""

    def __init__(self) -> None:
        self.files = self.bytes_in = self.documents = self.bytes_out = 0
        self.fingerprint = hashlib.sha256()
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.dropped_bytes: Counter[tuple[str, str]] = Counter()
        self.changed: Counter[tuple[str, str]] = Counter()

    def record(self, made: dict[str, Any], shard: tuple[int, int], sha256: dict[str, str]) -> dict[str, Any]:
        dropped: dict[str, dict[str, dict[str, int]]] = {}
        for (stage, reason), count in sorted(self.dropped.items()):
            counts = {"files": count, "bytes": self.dropped_bytes[stage, reason]}
            dropped.setdefault(stage, {})[reason] = counts
        changed: dict[str, dict[str, int]] = {}
        for (stage, change), count in sorted(self.changed.items()):
            changed.setdefault(stage, {})[change] = count
        return {
            "shard": f"{shard[0]}/{shard[1]}",
            **made,
            "input": {
                "files": self.files,
                "bytes": self.bytes_in,
                "fingerprint": self.fingerprint.hexdigest(),
            },
            "output": {"documents": self.documents, "bytes": self.bytes_out, **sha256},
            "dropped": dropped,
            "changed": changed,
        }


Name = tuple[str, str, int]  # repository, path, bytes


def _batches(
    files: Iterable[RawFile], tally: _Tally, names: deque[Name]
) -> Iterator[list[tuple[RawFile, bool]]]:
    """Yield lists of files of about `BATCH_BYTES`; append each file's name and size to `names`."""
    batch: list[tuple[RawFile, bool]] = []
    size = 0
    for file in files:
        tally.files += 1
        tally.bytes_in += len(file.data)
        sha256 = hashlib.sha256(file.data).hexdigest()
        line = fingerprint_line(file.repository, file.path, file.commit, file.licence, sha256)
        tally.fingerprint.update(line)
        names.append((file.repository, file.path, len(file.data)))
        batch.append((file, True))
        size += len(file.data)
        if size >= BATCH_BYTES or len(batch) == BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _kept(
    outcomes: Iterable[CleanOutcome | Died], names: deque[Name], tally: _Tally, dropped: BinaryIO
) -> Iterator[ScrapedDocument]:
    """Yield the documents that stay; write a line into `dropped` and count a drop for each other file."""
    for outcome in outcomes:
        repository, path, size = names.popleft()
        if isinstance(outcome, Died):
            outcome = CleanOutcome(Drop(outcome.reason), "limits", {})
        if isinstance(outcome.result, ScrapedDocument):
            tally.documents += 1
            tally.bytes_out += len(outcome.result.text.encode())
            tally.changed.update(outcome.notes)
            yield outcome.result
            continue
        drop = outcome.result
        tally.dropped[outcome.stage, drop.reason] += 1
        tally.dropped_bytes[outcome.stage, drop.reason] += size
        evidence = ScrapedDocument(drop.evidence, "", "", "", "")  # It may quote the file.
        evidence = secrets.redact(evidence, secrets.findings(evidence)).text
        row = {"repository": repository, "path": path, "stage": outcome.stage, "reason": drop.reason}
        dropped.write(json.dumps(row | {"evidence": evidence}, ensure_ascii=False).encode() + b"\n")


def _is_current(
    record: dict[str, Any], made: dict[str, Any], fingerprint: str, shard: Path, dropped: Path
) -> bool:
    """Return whether a record is of the same settings and input, and its two files are there."""
    return (
        all(record.get(key) == value for key, value in made.items())
        and record["input"]["fingerprint"] == fingerprint
        and shard.is_file()
        and dropped.is_file()
        and record["output"]["sha256"] == file_sha256(shard)
        and record["output"]["dropped_sha256"] == file_sha256(dropped)
    )


def clean_shard(
    settings: CleanSettings,
    ledger: Ledger,
    shard: tuple[int, int],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Write one shard and its record, unless they are there and would be the same; return the record.

    Args:
        settings: The settings of the command.
        ledger: The ledger whose files are read.
        shard: (i, n).
        advance: Called for each file that is finished.
    """
    path = shard_path(Path(settings.folder) / "clean", *shard)
    with alone(path):
        paths = {"record": path.with_suffix(".json"), "dropped": path.with_suffix(".dropped.jsonl.gz")}
        made = how(settings)
        read = (0, 1) if settings.whole else shard
        _, fingerprint = ledger.outline(read)
        made["not stored"] = ledger.not_stored(read)  # The counts begin with all files that were found.
        record = _read_record(paths["record"])
        if record is not None and _is_current(record, made, fingerprint, path, paths["dropped"]):
            return record
        paths["record"].unlink(missing_ok=True)  # A record may only stand beside its own shard.

        tally = _Tally()
        names: deque[Name] = deque()
        partial = paths["dropped"].with_name(f".{paths['dropped'].name}.partial")
        outcomes = guarded(
            make_cleaner,
            (settings,),
            _batches(ledger.files(read), tally, names),
            workers=settings.workers or cores(),
            seconds=settings.seconds,
            memory_mb=settings.memory_mb,
            retry=without_formatting if settings.format != "none" else None,
        )
        try:
            # A gzip header without a name and a time makes equal lines equal bytes.
            with open(partial, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as dropped:

                def counted() -> Iterator[CleanOutcome | Died]:
                    for outcome in outcomes:
                        yield outcome
                        advance()

                write_shard(path, _kept(counted(), names, tally, cast(BinaryIO, dropped)))
            os.replace(partial, paths["dropped"])
        finally:
            outcomes.close()
            partial.unlink(missing_ok=True)
        assert tally.files == tally.documents + sum(tally.dropped.values()), "a file was lost"
        sha256 = {"sha256": file_sha256(path), "dropped_sha256": file_sha256(paths["dropped"])}
        record = tally.record(made, shard, sha256)
        write_atomically(paths["record"], json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return record


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return a shard's record, or None where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["input"]["fingerprint"] and record["output"]["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reasons_table(record: dict[str, Any]) -> list[str]:
    """Return a shard's record as a table: one line a reason, most files first, and the sums."""
    rows = [
        (counts["files"], counts["bytes"], stage, reason)
        for stage, reasons in record["dropped"].items()
        for reason, counts in reasons.items()
    ]
    files, documents = record["input"]["files"], record["output"]["documents"]
    lines = [f"  {'files':>10}  {'bytes':>14}", f"  {files:>10,}  {record['input']['bytes']:>14,}  in"]
    lines += [
        f"  {count:>10,}  {size:>14,}  dropped by {stage}: {reason}"
        for count, size, stage, reason in sorted(rows, key=lambda row: (-row[0], row[2:]))
    ]
    lines.append(f"  {documents:>10,}  {record['output']['bytes']:>14,}  documents out")
    for stage, changes in record["changed"].items():
        lines.append(f"  {stage}: " + ", ".join(f"{change} {count:,}" for change, count in changes.items()))
    return lines


def refuse_empty(record: dict[str, Any]) -> None:
    """Raise a ValueError if no document is left, with the most frequent reason and its remedy."""
    if record["output"]["documents"]:
        return
    files = record["input"]["files"]
    if not files:
        raise ValueError("the ledger has no stored file, so there is nothing to clean: take in some first")
    count, stage, reason = max(
        (counts["files"], stage, reason)
        for stage, reasons in record["dropped"].items()
        for reason, counts in reasons.items()
    )
    remedy = f"loosen that, or leave the stage out with --skip {stage}"
    if reason == "licence unknown":
        remedy = (
            "if you know it, take the files into a new --folder with --licence; or keep such files with "
            "--unknown_licence true"
        )
    raise ValueError(f"no document is left: of {files:,} files {count:,} went by {stage}: {reason}; {remedy}")


def check(settings: CleanSettings) -> tuple[int, int]:
    """Return the shard that the settings name, after a check of all settings.

    Raises:
        ValueError: there is no ledger, a value is out of its range, or shards of another number are there.
    """
    shard = parse_shard(settings.shard)
    folder = Path(settings.folder)
    if not (folder / "ledger.sqlite").is_file():
        raise ValueError(f"{folder} holds no ledger.sqlite: name a corpus folder with --folder")
    known = [name for name in STAGES if name != "formatting"]
    for name in settings.skip:
        if name not in known:
            raise ValueError(f"--skip names {name}; the stages that can be skipped are {', '.join(known)}")
    least = {
        "seconds": 0.1,
        "format_seconds": 0.1,
        "memory_mb": 256,
        "workers": 0,
        "min_lines": 0,
        "max_line": 1,
    }
    for name, bound in {
        **least,
        "max_mean_line": 1,
        "max_escapes": 0,
        "max_numbers": 0,
        "min_alnum": 0,
        "max_errors": 0,
    }.items():
        if not getattr(settings, name) >= bound:
            raise ValueError(f"--{name} is {getattr(settings, name)}; it must be at least {bound}")
    licences.check(settings.licences)
    formatting.check(settings.format)
    others = sorted(path.name for path in (folder / "clean").glob("part-*-of-*.json"))
    if other := [name for name in others if not name.endswith(f"-of-{shard[1]:05}.json")]:
        raise ValueError(
            f"{folder / 'clean'} holds {other[0]}, and --shard {settings.shard} makes one of {shard[1]}: the"
            f" corpus would hold its files twice; remove {folder / 'clean'}, or keep to its number of shards"
        )
    return shard


def run(settings: CleanSettings) -> None:
    """Clean one shard and print what became of its files."""
    from config.bars import progress_bar

    shard = check(settings)
    ledger = Ledger(Path(settings.folder) / "ledger.sqlite")
    try:
        files, _ = ledger.outline((0, 1) if settings.whole else shard)
        with progress_bar(total=files, desc="cleaning", unit=" files", leave=False) as bar:
            record = clean_shard(settings, ledger, shard, bar.update)
    finally:
        ledger.close()
    print("\n".join(reasons_table(record)))
    if shard[1] == 1:  # One of several may have none.
        refuse_empty(record)

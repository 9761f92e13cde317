"""Rows of JSONL and Parquet files, and the fields that make a text or an example of them."""

from __future__ import annotations

import difflib
import gzip
import itertools
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import DataConfig, bounded_lines, parse_line
from data.documents import Report
from tokenization.chat import ASSISTANT, Conversation, messages_of

CHAT = "messages"  # The field of a conversation.
# The fields of a plain text, of a conversation, or of an example, whose completion is the last.
ROW_KINDS = (
    ("text",),
    ("content",),
    (CHAT,),
    ("prompt", "completion"),
    ("input", "output"),
    ("instruction", "output"),
    ("instruction", "input", "output"),
    ("prefix", "suffix", "middle"),
)
NAME_FIELDS = ("path", "name", "repository")


def listed(fields: Iterable[str]) -> str:
    return ", ".join(sorted(fields)) or "no fields"


class RowText(NamedTuple):
    """A text that a row holds: plain, or the completion of a prompt, or the answer to messages."""

    text: str
    prompt: str | None = None
    suffix: str | None = None
    messages: Conversation | None = None


def texts_of(row: dict[str, Any], config: DataConfig, where: str) -> list[RowText]:
    """Return what a row holds: a text, an example, or each answer of a conversation.

    No other code decides what a row is.

    Raises:
        ValueError: the row is of no kind or of two, holds something that is not text, or completes nothing.
    """
    fields = _fields_of(row, config, where)
    if fields == (CHAT,) and config.text_field is None:
        return _answers(row[CHAT], where)
    return [_example_of(row, fields, where)]


def _answers(value: Any, where: str) -> list[RowText]:
    """Return each of the assistant's messages with those before it, as generation would be asked for it."""
    try:
        messages = messages_of(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if messages[-1].role != ASSISTANT:
        raise ValueError(
            f"{where} ends with a message of the {messages[-1].role}, which nothing answers: end with the "
            "assistant's, or remove the row"
        )
    places = [place for place, message in enumerate(messages) if message.role == ASSISTANT]
    for place in places:
        if place == 0:
            raise ValueError(f"{where} begins with the assistant's message, which answers nothing: remove it")
        if not messages[place].content.strip():
            raise ValueError(
                f"{where} holds nothing in message {place + 1}, which is the assistant's: remove the row"
            )
    contents = [message.content for message in messages]
    return [
        RowText(contents[place], "\n".join(contents[:place]), messages=messages[:place]) for place in places
    ]


def _example_of(row: dict[str, Any], fields: tuple[str, ...], where: str) -> RowText:
    values: list[Any] = [row[field] for field in fields]
    if len(fields) == 3 and values[1] is None:  # Parquet leaves the input out by a null.
        values[1] = ""
    for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str):
            found = "null" if value is None else f"the {type(value).__name__} {reprlib.repr(value)}"
            raise ValueError(
                f"{where} holds {found} in the field {field}, not text: write text there, or remove the row"
            )
    *given, text = values
    if not given:
        return RowText(text)
    if not text:
        raise ValueError(
            f"{where} holds nothing in the field {fields[-1]}, and so nothing to learn: remove the row"
        )
    if fields[0] == "instruction":
        return RowText(text, alpaca_prompt(*given))
    return RowText(text, given[0], given[1] if len(given) == 2 else None)


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Fill the template in train.py of github.com/tatsu-lab/stanford_alpaca, with or without an input."""
    paired = ", paired with an input that provides further context" if given else ""
    given = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:"
    )


def _fields_of(
    present: Iterable[str], config: DataConfig, where: str, one_row: bool = True
) -> tuple[str, ...]:
    """Return the fields to read of those present: the text's, or an example's with the completion last.

    Args:
        one_row: They are the fields of one row, which could be removed, and not of a whole file.
    """
    present = set(present)
    kinds = [kind for kind in ROW_KINDS if present.issuperset(kind)]
    kinds = [kind for kind in kinds if not any(set(kind) < set(other) for other in kinds)]
    if config.text_field in present:
        return (config.text_field,)
    if config.text_field is not None:
        examples = any(len(kind) > 1 for kind in kinds)
        remedy = "leave --data.text_field out to read examples" if examples else "set --data.text_field"
        raise ValueError(f"{where} has no field {config.text_field} but {listed(present)}: {remedy}")
    if len(kinds) > 1 and kinds != [("text",), ("content",)]:
        one, other = (" and ".join(kind) for kind in kinds[:2])
        raise ValueError(
            f"{where} holds {one}, and also {other}: take one kind out of the file, or set --data.text_field "
            "to read one field as plain text"
        )
    if kinds:
        return kinds[0]
    examples = [kind for kind in ROW_KINDS if len(kind) > 1]
    for kind in sorted(examples, key=lambda kind: len(present.intersection(kind)) / len(kind), reverse=True):
        lacking = [field for field in kind if field not in present]
        near = difflib.get_close_matches(lacking[0], present.difference(kind), n=1)
        n_present = len(kind) - len(lacking)
        # A single field of an example, such as a suffix, may be unrelated to examples.
        if n_present > 1 or (n_present and (near or present <= {*kind, *NAME_FIELDS})):
            meant = f" (is {near[0]} meant for it?)" if near else ""
            remove = "remove the row, " if one_row else ""
            raise ValueError(
                f"{where} has no field {' and no field '.join(lacking)} but {listed(present)}{meant}: give "
                f"{' and '.join(kind)}, {remove}or set --data.text_field to read plain text"
            )
    raise ValueError(
        f"{where} has no field text or content but {listed(present)}: set --data.text_field, or give "
        "prompt and completion"
    )


def jsonl_rows(path: Path, config: DataConfig, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a .jsonl or .jsonl.gz file, each with the number of its line, from 1.

    Empty lines may stand at the end alone. A row that is not UTF-8 is left out and counted, where the
    settings say so.

    Raises:
        ValueError: A line is empty or no JSON object, or the gzip file is cut.
    """
    offset = blank = number = rows = 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        try:
            for number, line in enumerate(bounded_lines(lines, path), 1):
                text = decoded(line, f"{path} line {number}", offset, config, report)
                offset += len(line)
                if text is None:
                    continue
                if not text.strip():
                    blank = blank or number  # The last lines of a file may be empty.
                    continue
                if blank:
                    raise ValueError(f"{path} line {blank} is empty: remove it, or write the row it was for")
                row = parse_line(text, f"{path} line {number}")
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path} line {number} is a JSON {type(row).__name__}, not an object: give its "
                        "fields names, or remove the line"
                    )
                rows += 1
                yield number, row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    if not rows:
        report.without_rows.append(f"{path} has {number} lines and no row in them")


def parquet_rows(path: Path, config: DataConfig, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a Parquet file, each with its number, from 1, without columns that nothing uses.

    Raises:
        ValueError: A field is missing or stands twice, or the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = itertools.count(1)
    try:
        with pq.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if twice := next((field for field in fields if fields.count(field) > 1), None):
                raise ValueError(f"{path} has two columns {twice}; leave one out")
            wanted = {
                *_fields_of(fields, config, str(path), one_row=False),
                "path",
                "name",
                "repository",
                "prompts",
                config.group_field,
            }
            for batch in file.iter_batches(batch_size=64, columns=[f for f in fields if f in wanted]):
                # Strings are read as bytes: pyarrow does not check that they are UTF-8, and one bad value
                # would make the conversion of the whole batch fail.
                columns = {
                    field: (
                        column.cast(pa.large_binary())
                        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
                        else column
                    ).to_pylist()
                    for field, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                for values in zip(*columns.values(), strict=True):
                    row = dict(zip(columns, values, strict=True))
                    n = next(number)
                    for field, value in row.items():
                        if isinstance(value, bytes):
                            row[field] = decoded(value, f"{path} row {n} field {field}", 0, config, report)
                            if row[field] is None:
                                break
                    else:
                        yield n, row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from error


def decoded(data: bytes, where: str, offset: int, config: DataConfig, report: Report) -> str | None:
    """Decode strict UTF-8; None for other bytes if they are skipped. `data` begins at byte `offset`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if config.skip_undecodable:
            report.undecodable += 1
            return None
        raise ValueError(
            f"{where} is not UTF-8 at byte {offset + error.start}: convert it, or leave such documents out "
            "with --data.skip_undecodable true"
        ) from None

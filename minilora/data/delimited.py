"""Delimited text in, fields out: TSV and CSV as programs write them, with what they leave to be guessed.

    lines -> delimiter, quoting -> the header's names -> a record's fields by column

What is guessed is seen in the header, or in all quotes of a file; everything else is an error that says so.
"""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minilora.data.lines import iter_file_lines
from minilora.errors import UserError, capped

# A record of a TSV whose quotes are those of a CSV writer, and what shows one: a doubled quote in a text.
QUOTED_RECORD = re.compile(r'(?:(?:"(?:[^"]|"")*"|[^"\t]*)\t)*(?:"(?:[^"]|"")*"|[^"\t]*)')
DOUBLED_QUOTE = re.compile(r'[^"\t\n]""|""[^"\t\n]')
LONGEST_QUOTED = 1000  # lines

Found = tuple[str, dict[str, Any] | UserError]  # file and line; value by column, or what is wrong with this record


def read_tsv(path: Path, encoding: str) -> Iterator[Found]:
    """Quotes are characters unless a CSV writer wrote the file.

    In ChnSentiCorp a quote is a character, and would swallow the records up to the next one.
    """
    if path.is_file() and _is_csv(path, encoding):  # a pipe is read once
        return read_csv(path, encoding)
    if path.is_file() and _is_quoted(path, encoding):
        return named_fields(path, _csv_records(path, iter_file_lines(path, encoding), "\t"))
    lines = enumerate(iter_file_lines(path, encoding), start=1)
    return named_fields(path, ((number, line.split("\t")) for number, line in lines))


def _is_csv(path: Path, encoding: str) -> bool:
    """Whether the header of a TSV has commas or the like in place of tabs."""
    *_, header = _through_first_filled(iter_file_lines(path, encoding))
    return "\t" not in header and re.search("[,;|]", header) is not None


def _is_quoted(path: Path, encoding: str) -> bool:
    """Whether all quotes of a TSV are where a CSV writer puts them, and it could not be read without.

    That shows in quoted names of columns, a quote that is doubled in a text, or a line that has too few or too many
    fields by itself. Lines that are records by themselves are none together.
    """
    record: list[str] = []
    tabs, is_open, is_shown = -1, False, False
    for line in iter_file_lines(path, encoding):
        if tabs < 0 and line:
            tabs, is_shown = line.count("\t"), line.startswith('"')
        if not record and '"' not in line:
            continue
        record.append(line)
        is_open ^= line.count('"') % 2 == 1
        if not is_open:
            text = "\n".join(record)
            is_ragged = any(part.count("\t") != tabs for part in record)
            if not QUOTED_RECORD.fullmatch(text) or (len(record) > 1 and not is_ragged):
                return False
            is_shown = is_shown or is_ragged or DOUBLED_QUOTE.search(text) is not None
            record = []
        elif len(record) > LONGEST_QUOTED:
            return False
    return is_shown and not record


def read_csv(path: Path, encoding: str) -> Iterator[Found]:
    """The delimiter is that of Excel's line `sep=;`, or what the header has in place of commas: `;`, `|` or tabs."""
    lines = iter_file_lines(path, encoding)
    head = list(_through_first_filled(lines))
    declared = re.fullmatch(r'"?sep=(.)"? *', head[-1], re.IGNORECASE) if head else None
    if declared is not None:
        head[-1] = ""  # keeps the numbers of the lines
        delimiter = declared[1]
    else:
        names = re.sub(r'"[^"]*("|$)', "", head[-1]) if head else ""
        found = [mark for mark in ",;\t|" if mark in names]
        delimiter = found[0] if len(found) == 1 else ","
    return named_fields(path, _csv_records(path, itertools.chain(head, lines), delimiter))


def _through_first_filled(lines: Iterator[str]) -> Iterator[str]:
    """The lines up to the first one that is not blank."""
    for line in lines:
        yield line
        if line.strip():
            return


def _csv_records(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    line = 0
    try:
        for fields in reader:
            yield line + 1, fields  # where the record begins: it may take several lines
            line = reader.line_num
    except csv.Error as error:
        remedy = 'close the quote that is opened there, and double those within a text ("")'
        if str(error).startswith("new-line"):
            error, remedy = csv.Error("a carriage return ends a line"), "quote the text that holds it, or save with \\n"
        raise UserError(f"{path}:{line + 1}: {error}; {remedy}") from None


def named_fields(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[Found]:
    """Of numbered records those after the header, which names the columns; blank lines are skipped.

    UserError: a name twice, or no record.
    """
    header: list[str] | None = None
    header_line, is_empty = 0, True
    for line, fields in records:
        if not fields or fields == [""]:
            continue
        if header is None:
            header, header_line = [name.strip() for name in fields], line
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise UserError(
                    f"{path}:{line}: column {capped(', '.join(twice))} is there twice; rename or remove one"
                )
        elif len(fields) < len(header) or any(fields[len(header) :]):  # Excel adds empty ones
            is_empty = False
            yield (
                f"{path}:{line}",
                UserError(
                    f"{path}:{line}: {len(fields)} fields, expected {len(header)} ({capped(', '.join(header))}); "
                    f"correct the line, remove line {header_line} if it names no columns, or save as JSONL if the text "
                    "holds the delimiter"
                ),
            )
        else:
            is_empty = False
            yield f"{path}:{line}", dict(zip(header, fields, strict=False))
    if is_empty:
        raise UserError(f"{path}: has a header line and no record; add records, or end each line with \\n")

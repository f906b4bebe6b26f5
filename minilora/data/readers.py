"""Data files in, fields out: what a record has by column, with its file and line for messages.

    bytes -> lines.py -> lines (.tsv, .csv, .jsonl, .txt), blocks (.json) -> fields by column
    .parquet, .arrow, .xlsx, a folder of datasets' save_to_disk ------------^

READERS has a reader for each kind of file; a text file may be compressed too (.csv.gz). A reader holds one record of a
file or a pipe, or a batch of them. `records.py` makes records of the fields.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minilora.data.json_stream import DECODER, iter_json
from minilora.data.lines import count_lines, iter_file_lines
from minilora.errors import UserError, capped, shown
from minilora.system.console import warn
from minilora.system.files import read_json, similar_path
from minilora.system.optional import MissingPackageError, import_optional

ARROW_BATCH = 1024  # records of a parquet file that are Python objects at once
DATASET, DATASET_DICT = "state.json", "dataset_dict.json"  # what `save_to_disk` puts into its folders
OTHER_KINDS = {
    **dict.fromkeys((".xls", ".ods"), "save it as .xlsx or as CSV UTF-8"),
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), "rename it to .jsonl"),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz"), "unpack it"),
}
# A record of a TSV whose quotes are those of a CSV writer, and what shows one: a doubled quote in a text.
QUOTED_RECORD = re.compile(r'(?:(?:"(?:[^"]|"")*"|[^"\t]*)\t)*(?:"(?:[^"]|"")*"|[^"\t]*)')
DOUBLED_QUOTE = re.compile(r'[^"\t\n]""|""[^"\t\n]')
LONGEST_QUOTED = 1000  # lines

Fields = tuple[str, dict[str, Any]]  # file and line, value by column
Found = tuple[str, dict[str, Any] | UserError]  # the same, or what is wrong with this record


def iter_fields(
    path: Path, encoding: str, on_error: Callable[[str, UserError], None] | None = None
) -> Iterator[Fields]:
    """The records of a file as its reader finds them; of a folder that `save_to_disk` wrote, those of its files.

    `on_error` is called with a record that cannot be used, by its place, and the next one is read; without it, or where
    the file itself is at fault, UserError.
    """
    for file in data_files(path) if path.is_dir() else [path]:
        kind = kind_of(file)
        if kind not in READERS:
            advice = OTHER_KINDS.get(kind, "convert it or rename it")
            raise UserError(f"{file}: is not one of {', '.join(READERS)}; {advice}")
        for where, fields in READERS[kind](file, encoding):
            if not isinstance(fields, UserError):
                yield where, fields
            elif on_error is None:
                raise fields
            else:
                on_error(where, fields)


def approximate_count(path: Path) -> int | None:
    """The lines of a text file, about its number of records; None where that is unknown, or counting would consume."""
    is_text = kind_of(path) == path.suffix.lower() not in (".parquet", ".arrow", ".xlsx", ".json")
    return count_lines(path) if path.is_file() and is_text else None


def kind_of(path: Path) -> str:
    """A file's ending in lower case, without that of its compression."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def data_files(path: Path) -> list[Path]:
    """A file itself; the files of a folder that `save_to_disk` of datasets wrote, of one split.

    UserError: another folder, or one of several splits.
    """
    if not path.is_dir():
        return [path]
    if (path / DATASET).is_file():
        return [path / str(part["filename"]) for part in read_json(path / DATASET)["_data_files"]]
    if (path / DATASET_DICT).is_file():
        raise UserError(f"{path}: has the splits {', '.join(map(str, split_folders(path)))}; name one of these folders")
    raise UserError(f"{path}: is a folder, and none that datasets' save_to_disk wrote; name the files in it")


def split_folders(path: Path) -> list[Path]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; [path] for any other folder or file."""
    index = path / DATASET_DICT
    return [path / str(name) for name in read_json(index)["splits"]] if index.is_file() else [path]


def _read_tsv(path: Path, encoding: str) -> Iterator[Found]:
    """Quotes are characters unless a CSV writer wrote the file.

    In ChnSentiCorp a quote is a character, and would swallow the records up to the next one.
    """
    if path.is_file() and _is_csv(path, encoding):  # a pipe is read once
        return _read_csv(path, encoding)
    if path.is_file() and _is_quoted(path, encoding):
        return _named_fields(path, _csv_records(path, iter_file_lines(path, encoding), "\t"))
    lines = enumerate(iter_file_lines(path, encoding), start=1)
    return _named_fields(path, ((number, line.split("\t")) for number, line in lines))


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


def _read_csv(path: Path, encoding: str) -> Iterator[Found]:
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
    return _named_fields(path, _csv_records(path, itertools.chain(head, lines), delimiter))


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
        elif len(fields) < len(header) or any(fields[len(header) :]):  # Excel adds empty ones
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
            yield f"{path}:{line}", dict(zip(header, fields, strict=False))
    if is_empty:
        raise UserError(f"{path}: has a header line and no record; add records, or end each line with \\n")


def _read_jsonl(path: Path, encoding: str) -> Iterator[Found]:
    is_first = True
    for number, line in enumerate(iter_file_lines(path, encoding), start=1):
        if not line.strip():
            continue
        is_json = is_first and line.strip()[:2] in ("[", "{", "[{")
        advice = "remove the comma at its end" if line.rstrip().endswith("},") else "correct the line"
        advice = f"rename it to {path.stem}.json" if is_json else advice
        try:
            record = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            record = UserError(f"{path}:{number}: is not JSON ({error}); {advice}")
        if not isinstance(record, dict | UserError):
            what = "an array of objects" if line.strip().startswith("[{") else shown(record)
            record = UserError(f"{path}:{number}: holds {what}, expected an object; {advice}")
        if is_json and isinstance(record, UserError):  # the file, not this line
            raise record
        is_first = False
        yield f"{path}:{number}", record


def _read_json(path: Path, encoding: str) -> Iterator[Found]:
    return ((f"{path}:{number}", record) for number, record in iter_json(path, encoding))


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
            f"{path}: cannot be read as {path.suffix} ({capped(str(error), 200)}); check the path, or download "
            f"or write the file again{similar_path(path)}"
        ) from None


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The words of each integer column for which Hugging Face's datasets stored them in a file: its ClassLabels."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {column: kind for column, kind in features.items() if isinstance(kind, dict)}  # a list is of a list
        return {column: kind["names"] for column, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # not there, or of another program
        return {}


def _read_xlsx(path: Path, _: str) -> Iterator[Found]:
    """The first sheet, each cell as Excel would save it as CSV."""
    try:
        openpyxl: Any = import_optional("openpyxl")
    except MissingPackageError as error:
        raise UserError(f"{path}: cannot be read: {error}, or save it as CSV UTF-8") from None

    def rows() -> Iterator[list[str]]:
        try:
            with path.open("rb") as file:
                sheet, *others = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets
                if others:
                    warn(f"note: {path}: its first sheet {sheet.title!r} is read, {len(others)} more are not")
                for cells in sheet.iter_rows(values_only=True):
                    yield [_as_in_csv(cell) for cell in cells]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path{similar_path(path)}") from None
        except Exception as error:  # any: it is a zip archive of XML
            raise UserError(f"{path}: cannot be read as .xlsx ({capped(str(error))}); save it as CSV UTF-8") from None

    def records() -> Iterator[tuple[int, list[str]]]:
        width = 0
        for number, fields in enumerate(rows(), start=1):
            filled = max((index for index, text in enumerate(fields, start=1) if text), default=0)
            width = width or filled  # the header's; a row may have fewer cells, and empty ones behind them
            yield number, [*fields[:filled], *[""] * (width - filled)] if filled else []

    return _named_fields(path, records())


def _as_in_csv(cell: Any) -> str:
    if isinstance(cell, bool):
        return str(cell).upper()
    return "" if cell is None else str(cell)


# By a file's ending; each gives a record's place and its fields.
READERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
    ".xlsx": _read_xlsx,
}

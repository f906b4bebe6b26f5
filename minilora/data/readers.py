"""Data files in, fields out: what a record has by column, with its file and line for messages.

    bytes -> lines.py -> lines (.tsv and .csv by delimited.py, .jsonl, .txt), blocks (.json) -> fields by column
    .parquet, .arrow, .xlsx, a folder of datasets' save_to_disk ------------^

READERS has a reader for each kind of file; a text file may be compressed too (.csv.gz). A reader holds one record of a
file or a pipe, or a batch of them. `records.py` makes records of the fields.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minilora.data.delimited import Found, named_fields, read_csv, read_tsv
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

Fields = tuple[str, dict[str, Any]]  # file and line, value by column


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

    return named_fields(path, records())


def _as_in_csv(cell: Any) -> str:
    if isinstance(cell, bool):
        return str(cell).upper()
    return "" if cell is None else str(cell)


# By a file's ending; each gives a record's place and its fields.
READERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
    ".xlsx": _read_xlsx,
}

"""The files of the splits: what they are called, and how all of them are replaced, or none."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.system.files import (
    WRITING,
    GrowingFile,
    make_folder,
    patiently,
    read_json,
    sha256,
    storage_errors,
    sync,
    write_file,
)
from minilora.system.locks import lock_folder

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}
PART = re.compile(r"data-\d+-of-\d+\.arrow")  # of a split that datasets' save_to_disk wrote into a folder
REPORT = "data_report.json"


def split_of(path: Path) -> str | None:
    """The split in a file's name ("train-00000-of-00001", "dev"), or None if it has none or several.

    Only whole words count: "latest.tsv" is no test file. A folder that `save_to_disk` wrote names that of its files.
    """
    path = path.parent if PART.fullmatch(path.name) else path
    named = {SPLIT_NAMES[word] for word in re.split("[^a-z]+", path.stem.lower()) if word in SPLIT_NAMES}
    return named.pop() if len(named) == 1 else None


def write_splits(splits: Mapping[str, Iterable[bytes]], directory: Path, report: dict[str, Any]) -> None:
    """Writes each split, given as blocks of JSONL, and data_report.json with their SHA-256, all of them or none.

    Everything is written and synced under temporary names before the first file is replaced: a full disk leaves the old
    splits together. The report is written last, and after a kill `recover_splits` completes the replacing: a new
    training file never stays beside an old test file that it leaks into.

    Raises:
        UserError: the folder cannot be written.
    """
    make_folder(directory, "folder for the data")
    recover_splits(directory)
    with lock_folder(directory, "folder for the data"):
        report["sha256_out"] = {}
        for name, blocks in splits.items():
            report["sha256_out"][f"{name}.jsonl"] = _write_blocks(directory / f"{WRITING}{name}.jsonl", blocks)
        content = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_file(directory / f"{WRITING}{REPORT}", content.encode())
        _put_in_place(directory, {name: directory / f"{WRITING}{name}" for name in (*report["sha256_out"], REPORT)})


def _write_blocks(path: Path, blocks: Iterable[bytes]) -> str:
    """Writes and syncs a file; its SHA-256."""
    digest = hashlib.sha256()
    with contextlib.closing(GrowingFile(path)) as file:
        for block in blocks:
            digest.update(block)
            file.append(block)
        file.sync()
    return digest.hexdigest()


def recover_splits(directory: Path) -> None:
    """Completes a killed `write_splits` if all its temporary files are complete; otherwise removes them.

    Raises:
        UserError: another process is writing there, or the folder cannot be written.
    """
    if not any(directory.glob(f"{WRITING}*")):
        return
    with lock_folder(directory, "folder for the data"), storage_errors(directory):
        try:
            digests = dict(read_json(directory / f"{WRITING}{REPORT}")["sha256_out"])
        except UserError:  # it was not written, or not all of it
            digests = {}
        temporary = {name: directory / f"{WRITING}{name}" for name in (*digests, REPORT)}
        written = {name: path if path.is_file() else directory / name for name, path in temporary.items()}
        if digests and all(written[name].is_file() and sha256(written[name]) == digests[name] for name in digests):
            _put_in_place(directory, written)
        for leftover in directory.glob(f"{WRITING}*"):
            leftover.unlink()


def _put_in_place(directory: Path, written: Mapping[str, Path]) -> None:
    with storage_errors(directory):
        for name, path in written.items():
            patiently(path.replace, directory / name)
        sync(directory)


def read_report(directory: str | Path) -> dict[str, Any]:
    """The report of a folder's data; empty where another program wrote the files."""
    path = Path(directory) / REPORT
    return dict(read_json(path)) if path.is_file() else {}


def prepared_columns(directory: str | Path) -> dict[str, str]:
    """The columns that were named when a folder's data was prepared, by what they are ("text", "label")."""
    return dict(read_report(directory).get("columns", {}))

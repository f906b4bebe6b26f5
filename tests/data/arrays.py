"""The functions of clean.py on lists of records, for tests."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minilora.data.clean import CAUSES, KEPT, Indices, Table, find_causes, group_by_label, split_groups
from minilora.data.records import Record
from minilora.data.spill import Spill
from minilora.data.split_files import SPLITS


def records_of(*pairs: tuple[str, int]) -> list[Record]:
    return [Record(f"x:{number}", text, label) for number, (text, label) in enumerate(pairs, start=2)]


def table_of(*parts: Sequence[Record]) -> tuple[Table, list[Indices]]:
    """One table of all records, and the indices of each part."""
    with Spill(Path(tempfile.gettempdir())) as spill:
        for part in parts:
            for record in part:
                spill.append(record)
        table = spill.table()
    ends = np.cumsum([0, *map(len, parts)], dtype=np.uint32)
    return table, [np.arange(*ends[i : i + 2], dtype=np.uint32) for i in range(len(parts))]


def clean_records(
    files: dict[str, list[Record]], across_files: bool = True
) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """What is kept by file, and the number dropped by cause."""
    table, parts = table_of(*files.values())
    find_causes(table, [np.concatenate(parts)] if across_files else parts)
    records = [record for part in files.values() for record in part]
    kept = {
        name: [records[i] for i in part if table.causes[i] == KEPT] for name, part in zip(files, parts, strict=True)
    }
    return kept, {cause: int((table.causes == number).sum()) for number, cause in enumerate(CAUSES)}


def split_records(records: Sequence[Record], seed: int) -> dict[str, list[Record]]:
    table, (indices,) = table_of(records)
    splits = split_groups(group_by_label(table, indices), seed, SPLITS[1:])
    return {name: [records[i] for i in part] for name, part in splits.items()}


def find_leaks(records: Sequence[Record], other: Sequence[Record]) -> list[Record]:
    """The records whose text is in `other` too."""
    table, (indices, others) = table_of(records, other)
    return [record for record, leaks in zip(records, table.leaks(indices, others), strict=True) if leaks]

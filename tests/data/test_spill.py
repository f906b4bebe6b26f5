"""Records come back from the disk as they were, in any order, and leave no name there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from minilora.data import spill
from minilora.data.records import Record
from minilora.data.spill import Spill

RECORDS = [Record(f"文件 a\t{n}.tsv:{n + 2}", "好\n" * (n * 7 % 31), n % 3) for n in range(50)]


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
def test_lines_come_in_the_order_that_is_asked_for_whatever_the_blocks(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("READ_BYTES", "WRITE_BYTES", "READ_ENTRIES"):
        monkeypatch.setattr(spill, name, block_bytes)
    with Spill(tmp_path) as records:
        for record in RECORDS:
            records.append(record)
        order = np.random.default_rng(0).permutation(50).astype(np.uint32)
        lines = b"".join(records.iter_lines(order)).decode().splitlines()
        assert list(map(json.loads, lines)) == [RECORDS[index].to_json() for index in order]
        assert [records.where(index) for index in range(50)] == [record.where for record in RECORDS]
        assert records.column("characters").tolist() == [len(record.content) for record in RECORDS]
        records.append(RECORDS[7])  # after it was read
        assert len(records) == 51
        assert records.table().first[50] == 7


@pytest.mark.skipif(os.name == "nt", reason="a file has a name there until it is closed")
def test_a_killed_process_leaves_nothing_because_the_files_have_no_name(tmp_path: Path) -> None:
    with Spill(tmp_path / "not" / "there") as records:
        records.append(RECORDS[5])
        records.column("label")
        assert list(tmp_path.iterdir()) == []

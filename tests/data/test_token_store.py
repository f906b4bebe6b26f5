"""Examples come back from a store as they went in; one that is damaged or of something else is made anew."""

import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from minilora.data import token_store
from minilora.data.records import read_records
from minilora.data.token_store import Encode, FileRecords, TokenStore, build_store, load_store
from minilora.errors import UserError
from minilora.qlora.batch import common_prefix
from minilora.qlora.prompt import Example
from minilora.system.files import WRITING, StorageError, sha256

# Supervised stretches at the beginning, in the middle, at the end, of all, next to those of the neighbours.
EXAMPLES = [
    Example([1, 2, 3, 4], [False, False, True, True], 1, 7),
    Example([1, 2], [True, True]),
    Example([1, 2, 150_000, 9, 2**32 - 1], [True, False, True, False, True], 0),
    Example([1, 2, 5], [False, True, False], 0),
]
FACTS = {"data": "a checksum", "prompt": ["s", ["负面", "正面"], 512]}


def encode(*pieces: list[Example]) -> Encode:
    def passed(append: Callable[..., None]) -> dict[str, Any]:
        line = 0
        for piece in pieces:
            append([(line := line + 1, example) for example in piece])
        return {"overlong": 3, "labels": [0, "正面"]}

    return passed


def refused(append: object) -> NoReturn:
    pytest.fail("it was made anew")


def load(cache: Path, make: Encode, **facts: Any) -> TokenStore:
    return load_store(cache, "train", {**FACTS, **facts}, make)


@pytest.fixture(params=[1, 3, 1 << 16])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "PART", request.param)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("pieces", [[EXAMPLES], [EXAMPLES[:1], [], EXAMPLES[1:3], EXAMPLES[3:]]])
@pytest.mark.parametrize("is_kept", [True, False])
def test_examples_come_back_as_they_were(pieces: list[list[Example]], is_kept: bool, tmp_path: Path) -> None:
    stores = [load(tmp_path, encode(*pieces)), load(tmp_path, refused)] if is_kept else [build_store(encode(*pieces))]
    for store in stores:
        assert list(store) == EXAMPLES == store[:]
        assert store[-1] == EXAMPLES[-1]
        assert store[2:0:-1] == EXAMPLES[2:0:-1]
        with pytest.raises(IndexError):
            store[4]
        assert store.lengths.tolist() == [4, 2, 5, 3]
        assert store.num_supervised.tolist() == [2, 2, 3, 1]
        assert store.labels.tolist() == [1, -1, 0, 0]
        assert store.truncated.tolist() == [7, 0, 0, 0]
        assert store.lines.tolist() == [1, 2, 3, 4]
        assert store.facts == {"overlong": 3, "labels": [0, "正面"]}


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("chosen", [[0], [0, 3], [0, 0], [2, 3], [0, 1, 2, 3], [0, 1, 0, 1, 3]])
def test_the_common_prefix_is_that_of_the_examples(chosen: list[int]) -> None:
    longer = [Example([8, 8, 8, *e.input_ids], [False] * 3 + e.supervised) for e in EXAMPLES]
    examples = [longer[index] for index in chosen]
    assert build_store(encode(examples)).common_prefix == common_prefix(examples)


@pytest.mark.parametrize("file", ["tokens", "spans", "entries", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_store_is_made_anew(file: str, damage: str, tmp_path: Path) -> None:
    load(tmp_path, encode(EXAMPLES))
    (path,) = tmp_path.glob(f"train-*/{file}")
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1] if damage == "bit" else []))
    assert list(load(tmp_path, encode(EXAMPLES[::-1]))) == EXAMPLES[::-1]
    assert list(load(tmp_path, refused)) == EXAMPLES[::-1]


def test_another_store_is_not_taken_for_it(tmp_path: Path) -> None:
    load(tmp_path, encode(EXAMPLES))
    assert len(load(tmp_path, encode(EXAMPLES[:1]), data="another")) == 1
    assert len(load_store(tmp_path, "test", FACTS, encode(EXAMPLES[:2]))) == 2
    assert len(load(tmp_path, refused)) == 4
    one, other = tmp_path.glob("train-*")
    shutil.rmtree(one)
    shutil.copytree(other, one)  # sound, and of other facts
    lengths = {len(load(tmp_path, encode(EXAMPLES[:3]), data=data)) for data in (FACTS["data"], "another")}
    assert 3 in lengths


def test_an_error_of_the_data_is_raised_and_leaves_nothing(tmp_path: Path) -> None:
    def fails(append: Callable[..., None]) -> NoReturn:
        append([(1, EXAMPLES[0])])
        raise UserError("train.jsonl:2: label 'x'")

    with pytest.raises(UserError, match=r"train\.jsonl:2"):
        load(tmp_path, fails)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_it_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert list(load(tmp_path / "file" / "cache", encode(EXAMPLES))) == EXAMPLES
    assert "cannot be written" in capsys.readouterr().out

    def full(self: object, content: bytes) -> None:
        raise StorageError("no room") from OSError(28, "No space left on device")

    monkeypatch.setattr(token_store.GrowingFile, "append", full)
    assert list(load(tmp_path, encode(EXAMPLES))) == EXAMPLES
    assert "No space left on device" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_leave_to_write_a_store_is_only_read(tmp_path: Path) -> None:
    assert len(load_store(tmp_path, "train", FACTS, encode(EXAMPLES), may_write=False)) == 4
    assert list(tmp_path.iterdir()) == []
    load(tmp_path, encode(EXAMPLES))
    assert len(load_store(tmp_path, "train", FACTS, refused, may_write=False)) == 4


def test_several_may_make_the_same_at_a_time(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def together(append: Callable[..., None]) -> dict[str, Any]:
        barrier.wait(timeout=60)
        return encode(EXAMPLES)(append)

    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: load(tmp_path, together if barrier.n_waiting < 4 else refused), range(4)))
    assert [list(store) for store in stores] == [EXAMPLES] * 4
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["train"]


def test_old_stores_and_what_was_left_unfinished_are_removed(tmp_path: Path) -> None:
    for number in range(7):
        load(tmp_path, encode(EXAMPLES), data=number)
        for path in tmp_path.iterdir():
            os.utime(path, (time.time() - 3600 * (7 - number),) * 2)
    assert len(list(tmp_path.iterdir())) == 7  # of this day: a process may have them mapped
    (tmp_path / f"{WRITING}new").mkdir()
    for path in (*tmp_path.iterdir(), tmp_path / f"{WRITING}old"):
        path.mkdir(exist_ok=True)
        if path.name != f"{WRITING}new":
            os.utime(path, (path.stat().st_mtime - 90_000,) * 2)
    load(tmp_path, refused, data=0)  # in use again
    load(tmp_path, encode(EXAMPLES), data="newest")
    assert [path.name for path in tmp_path.glob(".*")] == [f"{WRITING}new"]
    assert len(list(tmp_path.glob("train-*"))) == token_store.KEPT
    load(tmp_path, refused, data=0)


def test_memory_does_not_grow_with_the_examples(tmp_path: Path) -> None:
    piece = [Example(list(range(100)), [False] * 98 + [True] * 2, 1)] * 500

    def peaks(count: int) -> tuple[int, int]:
        """Most bytes while a store of `count` pieces is made, and while it is opened again."""
        found = []
        for make in (encode(*[piece] * count), refused):
            tracemalloc.start()
            store = load(tmp_path, make, data=count)
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(store) == 500 * count
        return found[0], found[1]

    few, many = peaks(15), peaks(45)
    assert max(more - less for less, more in zip(few, many, strict=True)) < 4 * 30 * 500  # of an int in a list: 36


def test_records_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\ufeff{"text": "一\\n", "label": 1}\n\n{"text": "二\u2028", "label": "0"}\r\n{"messages": ['
        '{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}',
        "utf-8",
        newline="",
    )
    store = build_store(lambda append: append([(n, EXAMPLES[0]) for n in (1, 3, 4)]) or {})
    records = FileRecords(path, sha256(path), store.lines)
    assert [(r.where, r.text, r.label) for r in records[:2]] == [
        (f"{path}:1", "一\n", 1),
        (f"{path}:3", "二\u2028", 0),
    ]
    assert records[-1].content == "问\n答"
    assert len(records) == 3


def test_a_record_that_is_read_again_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"instruction": "问", "input": NaN, "output": "答"}\n', "utf-8")
    assert list(FileRecords(path, sha256(path), np.array([1]))) == read_records(path)


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_a_record_of_a_changed_file_has_no_text(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "一", "label": 1}\n', "utf-8")
    records = FileRecords(path, sha256(path), build_store(encode(EXAMPLES[:1])).lines)
    assert records[0].text == "一"
    path.unlink()
    if change == "edited":
        path.write_text('{"text": "二", "label": 1}\n', "utf-8")
    assert records[0].where == f"{path}:1"
    assert records[0].text == f"({path}:1 has changed since it was read)"

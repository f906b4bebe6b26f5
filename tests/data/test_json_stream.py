"""A .json file gives its records one by one, and holds no more of itself in memory than one of them."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from minilora.data.json_stream import LONGEST, iter_json
from minilora.data.readers import iter_fields
from minilora.errors import UserError
from tests.data.conftest import write

ODD = '很好"\\, [}\u2028\ud83d😀'


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_records_of_any_length_and_layout_are_found(indent: int | None, is_ascii: bool, tmp_path: Path) -> None:
    odd = ODD if is_ascii else ODD.replace("\ud83d", "")
    records: list[dict[str, Any]] = [
        {"text": odd * (7**i % 9000), "label": -1.5e3 * i, "more": [True, None, {"": {}}]} for i in range(40)
    ]
    array = json.dumps(records, indent=indent, ensure_ascii=is_ascii)
    lines = "\n".join(json.dumps(record, indent=indent, ensure_ascii=is_ascii) for record in records)
    for content in (array, f"\n {array}\n\n", lines):
        found = list(iter_json(write(tmp_path / "a.json", content), "utf-8"))
        assert found == list(enumerate(records, start=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"a\.json: ends without '\]' after 0 records; part of it is missing"),
        ('[{"a": 1}, {"a": 2}', r"a\.json: ends without '\]' after 2 records"),
        ("[]", r"a\.json: holds no record"),
        ("", r"a\.json: is empty"),
        ('[{"a": 1},]', r"a\.json:1: goes on with a comma that no record follows; remove it"),
        ('[{"a": 1},, {"a": 2}]', r"a\.json:1: goes on with a comma that no record follows"),
        ('{"a": 1},\n{"a": 2}', r"a\.json:1: has commas between its records; put \[ and \] around all"),
        ('[{"a": 1} {"a": 2}]', r"a\.json:1: is not followed by a comma"),
        ('[{"a": 1}, 2]', r"a\.json:2: holds 2, expected an object"),
        ('[["text", "label"]]', r"a\.json:1: holds \['text', 'label'\], expected an object"),
        ('[{"a": 1}] {"a": 2}', r"a\.json: goes on behind"),
        (
            '[{"a": tru',
            r"a\.json:1: this record is not JSON .*; correct it, or copy the file again if its",
        ),
        ('[{"a": "x}]', r"a\.json:1: this record is not JSON \(Unterminated string"),
        ('[{"a": 1}, {"b: ', r"a\.json:2: this record is not JSON .*, or copy the file again if its end is missing$"),
        ("[" * 100_000, r"a\.json:1: this record is not JSON \(maximum recursion"),
        ("text", r"a\.json:1: this record is not JSON"),
    ],
)
def test_what_is_no_array_of_objects_is_named_with_its_record(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(iter_fields(write(tmp_path / "a.json", content), "utf-8"))


def test_nan_is_a_missing_value_and_infinity_none(tmp_path: Path) -> None:
    content = '{"a": NaN, "b": [-Infinity, NaN]}'
    for name in ("a.json", "a.jsonl"):
        ((_, found),) = iter_fields(write(tmp_path / name, content), "utf-8")
        assert found == {"a": None, "b": [float("-inf"), None]}


def test_records_behind_one_that_is_no_object_are_read(tmp_path: Path) -> None:
    errors: list[str] = []
    path = write(tmp_path / "a.json", '[{"a": 1}, 2, {"a": 3}]')
    found = list(iter_fields(path, "utf-8", lambda where, _: errors.append(where)))
    assert (found, errors) == ([(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 3})], [f"{path}:2"])


def peak_bytes(path: Path) -> int:
    tracemalloc.start()
    try:
        for _ in iter_json(path, "utf-8"):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    record = json.dumps({"text": "很好" * 100, "label": 1}, ensure_ascii=False)
    small, large = (write(tmp_path / f"{n}.json", f"[{','.join([record] * n)}]") for n in (1000, 10_000))
    assert large.stat().st_size > 6e6
    assert peak_bytes(large) < 1.2 * peak_bytes(small) < 1.5e6


def test_a_damaged_record_is_found_before_the_rest_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"text": bad}' + ', {"text": "x"}' * 500_000 + "]")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.json:1: this record is not JSON .*; correct it$"):
        list(iter_json(path, "utf-8"))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_an_object_of_the_size_of_a_file_is_no_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"data": [' + '{"text": "x"},' * (LONGEST // 6) + "{}]}")
    with pytest.raises(UserError, match=r"a\.json:1: .*longer than .* characters; records are in an array"):
        list(iter_json(path, "utf-8"))

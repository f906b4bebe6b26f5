"""Mutated safetensors files beside the library: what it refuses we refuse, with one kind of error, in little memory."""

import json
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from minilora.errors import UserError
from minilora.weights.safetensors_io import (
    FILE_BYTES_PER_HEADER_BYTE,
    MAX_HEADER_BYTES,
    SHORT_HEADER_BYTES,
    read_header,
    read_tensor,
)
from tests.faults.conftest import Count, HowMany

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [2], "data_offsets": [32, 34]},
    "d": {"dtype": "F32", "shape": [0], "data_offsets": [34, 34]},
}
DATA = bytes(range(32)) + b"\x00\x01"


def file_of(header: str | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def read_all(path: Path) -> None:
    for found in read_header(path).values():
        read_tensor(found)


def is_accepted(path: Path) -> bool:
    """By us; anything but a UserError is a test's failure."""
    try:
        read_all(path)
    except UserError:
        return False
    return True


def is_accepted_by_the_library(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    "content",
    [
        file_of(json.dumps(HEADER)),
        file_of("  \n" + json.dumps(HEADER)),
        file_of(json.dumps(HEADER) + " " * 7),
        file_of(json.dumps(HEADER) + "\n\t\r"),
        file_of(json.dumps({name: HEADER[name] for name in "dcba"})),
        file_of("{}", b""),
        file_of(json.dumps({"字": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}), b"1"),
    ],
    ids=["plain", "space before", "padded", "other space", "another order", "empty", "a scalar under a Chinese name"],
)
def test_legal_files_are_read_aligned_or_not(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert is_accepted_by_the_library(content)
    assert is_accepted(path)


def changed(**changes: Any) -> bytes:
    return file_of(json.dumps({**HEADER, **changes}))


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


BAD = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "header longer than the file": file_of(json.dumps(HEADER), length=10_000),
    "header longer than allowed": file_of("{}", b"", MAX_HEADER_BYTES + 1),
    "header of all 64 bits": file_of("{}", b"", 2**64 - 1),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of("[]", b""),
    "NUL behind": file_of(json.dumps(HEADER) + "\0"),
    "a name twice": file_of(json.dumps(HEADER)[:-1] + ', "a": ' + json.dumps(entry("I32")) + "}"),
    "metadata twice": file_of('{"__metadata__": {"x": "1", "x": "2"}}', b""),
    "metadata that is no text": changed(__metadata__={"format": 1}),
    "a hole": changed(b=entry("BF16", [3], [26, 32])),
    "an overlap": changed(b=entry("BF16", [5], [22, 32])),
    "a gap at the start": file_of(json.dumps({"a": entry("U8", [1], [1, 2])}), b"12"),
    "trailing bytes": file_of(json.dumps(HEADER), DATA + b"x"),
    "missing bytes": file_of(json.dumps(HEADER), DATA[:-1]),
    "a longer shape": changed(a=entry(shape=[2, 4])),
    "an unknown dtype": changed(a=entry("F33")),
    "a dtype in a list": changed(a=entry(["F32"])),
    "a missing field": changed(a={"dtype": "F32", "shape": [2, 3]}),
    "three offsets": changed(a=entry(offsets=[0, 12, 24])),
    "backwards": changed(a=entry(offsets=[24, 0])),
    "negative": changed(a=entry(shape=[-2, -3])),
    "true for 1": changed(b=entry("BF16", [4, True], [24, 32])),
    "1.0 for 1": changed(b=entry("BF16", [4, 1.0], [24, 32])),
    "-0 for 0": file_of(json.dumps(HEADER).replace("[0, 24]", "[-0, 24]")),
    "a shape beyond 64 bits": changed(d=entry(shape=[2**40, 2**40, 0], offsets=[34, 34])),
    "half a character": file_of(json.dumps({"\ud83d": entry("U8", [1], [0, 1])}), b"1"),
    "NaN": changed(a=entry(shape=[float("nan")])),
    "a dtype that no model here has": changed(c=entry("BOOL", [2], [32, 34])),
    "nested deep": file_of("[" * 100_000, b""),
}


@pytest.mark.parametrize("name", BAD)
def test_every_rule_is_held(path: Path, name: str) -> None:
    path.write_bytes(BAD[name])
    with pytest.raises(UserError, match=r"a\.safetensors: .+; download or copy it again$"):
        read_all(path)


def mutate(chooser: random.Random) -> bytes:
    """A file with one to three faults, in its bytes, its text or its meaning."""
    header: dict[str, Any] = json.loads(json.dumps(HEADER))
    data = DATA
    for _ in range(chooser.randint(0, 2)):
        name = chooser.choice(list(HEADER))
        number: Any = chooser.choice(
            [0, 1, 2, 3, 4, 6, 24, 25, 32, 34, 35, -1, 2**31, 2**63, 2**64, 2**70, True, 1.0, None]
        )
        kind = chooser.randrange(8)
        target = header.get(name)
        if kind == 0:
            header.pop(name, None)
        elif kind == 1:
            header[chooser.choice(["e", "", "a\n", "字", "__metadata__", name])] = chooser.choice(
                [target, {}, [], 3, None]
            )
        elif isinstance(target, dict) and "shape" in target and isinstance(target.get("shape"), list):
            if kind == 2:
                target["dtype"] = chooser.choice(["F64", "F16", "U8", "I64", "f32", "F8_E4M3", "F4", "", 4])
            elif kind == 3:
                target["shape"] = [*target["shape"], number]
            elif kind == 4 and target["shape"]:
                target["shape"][chooser.randrange(len(target["shape"]))] = number
            elif kind == 5 and isinstance(target.get("data_offsets"), list):
                target["data_offsets"][chooser.randrange(2)] = number
            elif kind == 6:
                target.pop(chooser.choice(["dtype", "shape", "data_offsets"]), None)
            else:
                target["data_offsets"] = [number, number]
    text = bytearray(json.dumps(header).encode())
    for _ in range(chooser.randint(0, 2)):
        place = chooser.randrange(len(text) + 1)
        kind = chooser.randrange(4)
        if kind == 0:
            text[place:place] = chooser.choice(
                [b" ", b"\n", b"\0", b",", b"1", b"-", b'"', b"\\ud800", b"\xff", b"{", b"}"]
            )
        elif kind == 1:
            del text[place : place + chooser.randint(1, 3)]
        elif kind == 2 and place < len(text):
            text[place] ^= 1 << chooser.randrange(8)
        elif kind == 3:
            data = data[: chooser.randrange(len(data) + 1)] + chooser.choice([b"", b"x", b"\0" * 8])
    length = len(text) + (chooser.choice([-8, -1, 1, 8, 2**20, 2**40]) if chooser.random() < 0.1 else 0)
    return file_of(bytes(text), data, max(length, 0))


def test_what_the_library_refuses_is_refused(path: Path, count: Count, how_many: HowMany) -> None:
    chooser = random.Random(6)
    cases, accepted, stricter = how_many(1000, 5000, 1_000_000), 0, 0
    for _ in range(cases):
        content = mutate(chooser)
        path.write_bytes(content)
        ours, theirs = is_accepted(path), is_accepted_by_the_library(content)
        assert theirs or not ours, content
        accepted += ours
        stricter += theirs and not ours
    count(
        f"mutated safetensors files: {cases}, accepted by us and refused by the library: 0, by both: {accepted}, "
        f"refused only by us: {stricter}, other exceptions: 0"
    )
    assert accepted > cases / 100


def test_a_hostile_header_takes_no_memory(path: Path, how_many: HowMany) -> None:
    """At most twice the file, and what an error message takes."""
    chooser = random.Random(7)
    padding = "x" * 100_000  # so that the file is more than the interpreter's own noise
    for _ in range(how_many(30, 100, 2000)):
        content = mutate(chooser)
        length, text = struct.unpack("<Q", content[:8])[0], content[8:]
        path.write_bytes(struct.pack("<Q", length) + text + padding.encode())
        tracemalloc.start()
        try:
            is_accepted(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * path.stat().st_size


def repeated(unit: str, size: int) -> str:
    """A list of as many units as fit into `size` characters."""
    return "[" + unit * ((size - len("[0]")) // len(unit)) + "0]"


@pytest.mark.parametrize("unit", ["[" * 900 + "]" * 900 + ",", '{"a":{"":[]}},'], ids=["lists", "tables"])
def test_a_header_as_long_as_it_may_be_takes_no_more_than_twice_the_file(path: Path, unit: str) -> None:
    """Python's lists and tables take up to 45 times the characters that they are written with."""
    for length in (SHORT_HEADER_BYTES, 2 * SHORT_HEADER_BYTES):
        text = repeated(unit, length)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text.encode())
            file.truncate(length * FILE_BYTES_PER_HEADER_BYTE)  # zeros that take no room
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match="is not a complete safetensors file"):
                read_header(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * path.stat().st_size


def test_a_long_header_of_a_long_file_is_read(path: Path) -> None:
    length = 2 * SHORT_HEADER_BYTES
    size = length * FILE_BYTES_PER_HEADER_BYTE
    header = json.dumps({"a": {"dtype": "U8", "shape": [size - 8 - length], "data_offsets": [0, size - 8 - length]}})
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + header.ljust(length).encode())
        file.truncate(size)
    assert read_header(path)["a"].offset == 8 + length
    with path.open("r+b") as file:
        file.truncate(size - FILE_BYTES_PER_HEADER_BYTE)
    with pytest.raises(UserError, match=f"header of {length} bytes in a file of {size - FILE_BYTES_PER_HEADER_BYTE}"):
        read_header(path)

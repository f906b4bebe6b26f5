"""Tensors and headers are read as the safetensors library reads them; what no writer produces is refused."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.errors import UserError
from minilora.system.files import StorageError
from minilora.weights import safetensors_io
from minilora.weights.safetensors_io import read_checkpoint_entries, read_header, read_tensor, write_tensors


def test_own_reader_equals_the_library(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint() / "model.safetensors"
    expected = load_file(path)
    entries = read_header(path)
    assert set(entries) == set(expected)
    assert all(torch.equal(read_tensor(entry), expected[name]) for name, entry in entries.items())


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 988097824\n")
    with pytest.raises(UserError, match=r"a pointer of Git LFS, which `git lfs pull` in its repository replaces"):
        read_header(path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: is not a complete safetensors file \(.+\); download"):
            read_header(path)


def test_a_huge_header_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(UserError, match="header of 4611686018427387904 bytes in a file of 10"):
        read_header(path)


@pytest.mark.parametrize(("size", "longest"), [(10, 2), (100, 92), (1100, 1000), (32_064, 1002), (99_999, 2000)])
def test_a_header_is_as_long_as_its_file_allows(
    size: int, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_io, "SHORT_HEADER_BYTES", 1000)
    monkeypatch.setattr(safetensors_io, "MAX_HEADER_BYTES", 2000)
    path = tmp_path / "model.safetensors"
    found = []
    for length in (longest, longest + 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}".ljust(size - 8))
        try:
            read_header(path)
            found.append("read")
        except UserError as error:
            found.append("too long" if f"header of {length} bytes in a file of {size}" in str(error) else "read")
    assert found == ["read", "too long"]


def write_header(path: Path, header: bytes, data: bytes = b"data") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(**changes: object) -> dict[str, object]:
    """One float32 value that takes all of `write_header`'s data."""
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def test_a_header_may_have_spaces_around_it_metadata_and_empty_tensors(tmp_path: Path) -> None:
    content = {
        "__metadata__": {"format": "pt", "": ""},
        "b": entry(),
        "a": entry(shape=[2, 0], data_offsets=[0, 0]),
        "c": entry(shape=[0], data_offsets=[4, 4]),
    }
    path = write_header(tmp_path / "model.safetensors", b" \n" + json.dumps(content).encode() + b"   ")
    entries = read_header(path)
    assert {name: tuple(found.shape) for name, found in entries.items()} == {"a": (2, 0), "b": (1,), "c": (0,)}
    assert read_tensor(entries["b"]).numpy().tobytes() == b"data"
    assert read_tensor(entries["a"]).shape == (2, 0)
    path = write_header(tmp_path / "model.safetensors", json.dumps({"a": entry(shape=[])}).encode())
    assert read_tensor(read_header(path)["a"]).shape == ()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1, 2]", r"header: holds a list"),
        (b"[" * 100_000, r".*recursion"),
        (b"\xff\xfe", r".*utf-8"),
        (b'{"a"', r"Expecting ':'.*"),
        (b"{}", r"its tensors end at byte 10, the file at 14"),
        (b'{"__metadata__": 3}', r"header: __metadata__ is"),
        (b'{"__metadata__": {"a": 3}}', r"header: __metadata__ is"),
        (b'{"__metadata__": {"a": "\\ud83d"}}', r".*surrogates not allowed"),
        (b'{"\\ud83d": null}', r".*surrogates not allowed"),
        (b'{"a": 1, "a": 2}', r"'a' occurs twice"),
        (b'{"a": NaN}', r"NaN is not JSON"),
        (b'{"a": null}', r"tensor a needs exactly dtype, shape and data_offsets"),
        (b'{"a": {"dtype": "F32"}}', r"tensor a needs exactly dtype, shape and data_offsets"),
        ({"a": entry(device="cpu")}, r"tensor a needs exactly dtype, shape and data_offsets"),
        ({"": entry()}, r"tensor name '' is empty"),
        ({"a\n": entry()}, r"tensor name 'a\\n' .*control characters"),
        ({"a": entry(dtype="F8_E4M3")}, r"tensor a has dtype 'F8_E4M3', expected one of F64, F32, .*, BOOL"),
        ({"a": entry(dtype=["F32"])}, r"tensor a has dtype \['F32'\], expected one of"),
        ({"a": entry(shape=1)}, r"tensor a has shape .*data_offsets .*expected two lists"),
        ({"a": entry(data_offsets=None)}, r"tensor a has shape .*data_offsets .*expected two lists"),
        ({"a": entry(data_offsets=[0])}, r"tensor a has shape .*data_offsets .*expected two lists"),
        ({"a": entry(data_offsets=["0", "4"])}, r"tensor a .*data_offsets \['0', '4'\]"),
        ({"a": entry(shape=[1e30])}, r"tensor a .*shape \[1e\+30\]"),
        ({"a": entry(shape=[1.0])}, r"tensor a .*shape \[1\.0\]"),
        ({"a": entry(shape=[True])}, r"tensor a .*shape \[True\]"),
        ({"a": entry(shape=[-1])}, r"tensor a .*shape \[-1\]"),
        ({"a": entry(shape=[10**30])}, r"tensor a .*shape \[1000"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]}}', r"tensor a .*data_offsets \[-0\.0, 4\]"),
        ({"a": entry(shape=[2**40, 2**40])}, r"tensor a .*shape \[1099511627776, 1099511627776.*no file can hold"),
        ({"a": entry(shape=[2**40, 2**40, 0])}, r"tensor a .*shape \[1099511627776, 1099511627776.*no file can hold"),
        ({"a": entry(shape=[2])}, r"tensor a .*bytes 0 to 4.* \(2,\) takes 8"),
        ({"a": entry(data_offsets=[4, 0])}, r"tensor a .*bytes 4 to 0.* \(1,\) takes 4"),
        ({"a": entry(data_offsets=[1, 5])}, r"tensor a begins at byte 1 of the data, the one before ends at 0"),
        ({"a": entry(), "b": entry()}, r"tensor [ab] begins at byte 0 of the data, the one before ends at 4"),
        ({"a": entry(), "b": entry(data_offsets=[4, 8])}, r"its tensors end at byte \d+, the file at \d+"),
    ],
)
def test_an_invalid_header_is_refused(header: bytes | dict[str, object], message: str, tmp_path: Path) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write_header(tmp_path / "model.safetensors", content)
    with pytest.raises(
        UserError, match=rf"model\.safetensors: is not a complete safetensors file \({message}.*\); download or copy it"
    ):
        read_header(path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot be read \(.+\); check the path"):
        read_header(tmp_path / "absent")


def test_a_file_that_was_cut_or_removed_since_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0)}, path)
    found = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: ends within a tensor; download or copy it again"):
        read_tensor(found)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(.+\); check the disk"):
        read_tensor(found)


@pytest.mark.parametrize("data", [b"\0\1\1\0", b"\0\1\2\0"])
def test_a_bool_is_0_or_1(data: bytes, tmp_path: Path) -> None:
    header = json.dumps({"a": entry(dtype="BOOL", shape=[4])}).encode()
    found = read_header(write_header(tmp_path / "model.safetensors", header, data))["a"]
    if max(data) == 1:
        assert read_tensor(found).tolist() == [False, True, True, False]
    else:
        with pytest.raises(UserError, match=r"neither 0 nor 1; download or copy it again"):
            read_tensor(found)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: names 'model-1\.safetensors', .*; download or copy"):
        read_checkpoint_entries(tmp_path)


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    with pytest.raises(UserError, match=r"index\.json: disagrees .*about a, b; .*download them again"):
        read_checkpoint_entries(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", *(f'{{"weight_map": {files}}}' for files in ('["a"]', '{"a": 5, "b": "c"}', '{"a": null}'))],
)
def test_an_index_without_a_file_for_each_tensor_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"index\.json: has no weight_map .*download it"):
        read_checkpoint_entries(tmp_path)


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_checkpoint_entries(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint(sharded=True), tmp_path / "model"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    shard = "model-00001-of-00002.safetensors"
    for file, message in ((shard, r"disagrees .*model\.extra\.weight"), ("../other", r"names '\.\./other'")):
        weight_map = {**index["weight_map"], "model.extra.weight": file}
        path.write_text(json.dumps({**index, "weight_map": weight_map}), "utf-8")
        with pytest.raises(UserError, match=rf"index\.json: {message}.*download"):
            read_checkpoint_entries(folder)


def test_weights_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent/model\.safetensors: cannot be written"):
        write_tensors({"a": torch.ones(2)}, tmp_path / "absent" / "model.safetensors")

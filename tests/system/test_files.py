"""A file that is written stays, and a hash is that of its bytes."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilora.errors import UserError
from minilora.system import files
from minilora.system.files import (
    GrowingFile,
    StorageError,
    json_bytes,
    make_folder,
    parse_json,
    patiently,
    remove,
    replace_file,
    replacing,
    sha256,
    storage_errors,
    write_file,
)
from tests.system.conftest import names_in, raising

ROOT = Path(__file__).parents[2]


def test_a_digest_is_that_of_the_bytes_and_a_missing_file_is_named(tmp_path: Path) -> None:
    # printf abc | sha256sum
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UserError, match=r"nowhere: cannot be read .*; check the path"):
        sha256(tmp_path / "nowhere")


def test_a_digest_of_a_file_of_several_blocks_is_that_of_the_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def counting_hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that are read to be hashed from now on."""
    read: list[Path] = []
    plain = files.hash_file
    monkeypatch.setattr(files, "hash_file", lambda path: read.append(path) or plain(path))
    return read


def write_long_ago(path: Path, content: bytes, seconds: int) -> None:
    path.write_bytes(content)
    long_ago = time.time_ns() - seconds * 10**9
    os.utime(path, ns=(long_ago, long_ago))


def test_a_digest_is_taken_once_while_the_file_is_the_same_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = counting_hashes(monkeypatch)
    write_long_ago(tmp_path / "a", b"abc", 60)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "link") == hashlib.sha256(b"abc").hexdigest()
    assert read == [tmp_path / "a"]
    write_long_ago(tmp_path / "a", b"abd", 50)  # as long as before
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abd").hexdigest()
    (tmp_path / "b").write_bytes(b"abe")
    os.utime(tmp_path / "b", ns=(0, (tmp_path / "a").stat().st_mtime_ns))
    (tmp_path / "b").replace(tmp_path / "a")  # another file as old as the one before
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abe").hexdigest()


@pytest.mark.parametrize("seconds", [0, -60], ids=["just now", "in the future"])
def test_a_digest_of_a_file_whose_next_change_the_clock_may_not_tell_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    read = counting_hashes(monkeypatch)
    write_long_ago(tmp_path / "a", b"abc", seconds)
    for _ in range(2):
        sha256(tmp_path / "a")
    assert read == [tmp_path / "a"] * 2


def test_json_is_the_same_bytes_for_the_same_content() -> None:
    content = json_bytes({"b": 1, "a": "好"})
    assert content == json_bytes({"a": "好", "b": 1}) == '{\n  "a": "好",\n  "b": 1\n}\n'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_json_is_not_written_as_it(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"a": [value]})


def test_a_folder_is_made_with_all_above_it_and_trying_it_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b", "train.output_dir")
    assert names_in(tmp_path / "a" / "b") == []


def test_every_folder_that_is_made_is_on_the_disk_before_anything_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    make_folder(tmp_path / "a" / "b", "train.output_dir")
    assert sorted(synced) == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b", "train.output_dir")
    assert len(synced) == 2


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file", "utf-8")
    with pytest.raises(UserError, match=rf"{place}: cannot be written to \(.+\); choose another --output_dir"):
        make_folder(tmp_path / place, "--output_dir")


def test_what_is_removed_is_gone_and_what_a_link_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("x", "utf-8")
    (tmp_path / "kept" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("folder", "file", "link", "absent"):
        remove(tmp_path / name)
    assert names_in(tmp_path) == ["kept"]
    assert names_in(tmp_path / "kept") == ["inner"]


@pytest.mark.parametrize("content", [b"", b"a", bytes(range(256))])
def test_a_file_is_written_whole_whatever_stood_there(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"longer than all of them" * 100)
    write_file(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == content
    plain = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, rest: plain(descriptor, rest[:7]))  # as the system may do
    write_file(tmp_path / "b", content)
    assert (tmp_path / "b").read_bytes() == content


def test_a_file_that_cannot_be_written_says_how_much_room_was_needed_and_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError) as caught:
        write_file(tmp_path / "a", b"x" * 12_345)
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'a'}: cannot be written (No space left on device); 12,345 bytes were to be written; "
    )
    assert message.endswith(" bytes are free there; make room or mend the disk, and run the same command again")
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_without_a_reason_on_a_disk_that_tells_nothing_is_still_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", raising(OSError()))
    with (
        pytest.raises(StorageError, match=r"a/b: cannot be written \(odd\); make room or mend"),
        storage_errors(tmp_path / "a" / "b"),
    ):
        raise OSError("odd")


def test_a_folder_that_cannot_be_synced_is_accepted_where_the_file_system_syncs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("x", "utf-8")
    for number in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
        monkeypatch.setattr(os, "fsync", raising(OSError(number, os.strerror(number))))
        files.sync(tmp_path)
        with pytest.raises(OSError, match=os.strerror(number)):
            files.sync(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.sync(tmp_path)


def test_every_rename_is_a_patient_one() -> None:
    sources = [path for folder in ("minilora", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert sources
    assert [
        path.name for path in sources if re.search(r"\.rename\(|os\.(rename|replace)\(", path.read_text("utf-8"))
    ] == []


def test_on_windows_no_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    windows = SimpleNamespace(
        name="nt", O_RDWR=2, open=lambda path, _: opened.append(path), fsync=lambda _: None, close=lambda _: None
    )
    (tmp_path / "a").write_text("x", "utf-8")
    monkeypatch.setattr(files, "os", windows)
    files.sync(tmp_path)
    files.sync(tmp_path / "a")
    assert opened == [tmp_path / "a"]


@pytest.mark.parametrize(
    ("system", "refusals", "succeeds"), [("nt", 3, True), ("nt", 10**6, False), ("posix", 1, False)]
)
def test_on_windows_a_file_that_a_scanner_has_open_is_renamed_a_little_later(
    system: str, refusals: int, succeeds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("x", "utf-8")
    calls: list[Path] = []

    def rename(target: Path) -> None:
        calls.append(target)
        if len(calls) <= refusals:
            raise PermissionError(errno.EACCES, "Access is denied")
        (tmp_path / "a").rename(target)

    monkeypatch.setattr(files, "os", SimpleNamespace(name=system))
    monkeypatch.setattr(files, "SCAN_S", 0.2)
    with contextlib.nullcontext() if succeeds else pytest.raises(PermissionError):
        patiently(rename, tmp_path / "b")
    assert (tmp_path / "b").exists() == succeeds
    assert len(calls) > 1 if system == "nt" else len(calls) == 1


@pytest.mark.skipif(os.name == "nt", reason="file modes of POSIX")
def test_a_file_that_is_written_is_no_program(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"x")
    GrowingFile(tmp_path / "b").append(b"x")
    for name in ("a", "b"):
        assert not (tmp_path / name).stat().st_mode & 0o111


def test_a_folder_is_tried_by_writing_into_it_and_not_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    plain = files.tempfile.TemporaryFile
    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda dir: tried.append(dir) or plain(dir=dir))
    make_folder(tmp_path / "a", "key")
    assert tried == [tmp_path / "a"]


def test_minus_zero_stays_one() -> None:
    found = parse_json("[-0, 0, -1]")
    assert [str(number) for number in found] == ["-0.0", "0", "-1"]


def test_a_growing_file_replaces_what_stood_there_with_its_first_piece(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a longer file than the new one")
    file = GrowingFile(path)
    assert path.read_bytes() == b"a longer file than the new one"
    for piece in (b"one\n", b"two\n"):
        file.append(piece)
    assert path.read_bytes() == b"one\ntwo\n"
    file.close()
    file.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_growing_file_that_gets_nothing_is_not_made(tmp_path: Path) -> None:
    GrowingFile(tmp_path / "a").close()
    assert names_in(tmp_path) == []
    file = GrowingFile(tmp_path / "a")
    file.append(b"")
    file.close()
    assert names_in(tmp_path) == ["a"]


@pytest.mark.parametrize("is_continued", [False, True])
def test_a_growing_file_on_a_full_disk_keeps_whole_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_continued: bool
) -> None:
    file = GrowingFile(tmp_path / "a")
    file.append(b"one\n")
    if is_continued:
        file = GrowingFile(tmp_path / "a", replaces=False)
    plain, calls = os.write, []

    def fill(descriptor: int, content: bytes) -> int:
        calls.append(len(content))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(descriptor, content[:2])

    file.append(b"more\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        with pytest.raises(StorageError, match=r"a: cannot be written \(No space left on device\); 4 bytes were to be"):
            file.append(b"two\n")
    assert calls == [4, 2]
    assert (tmp_path / "a").read_bytes() == b"one\nmore\n"
    file.append(b"three\n")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"one\nmore\nthree\n"


def test_a_growing_file_that_cannot_be_opened_or_synced_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"cannot be written \(Is a directory\)"):
        GrowingFile(tmp_path).append(b"x")
    file = GrowingFile(tmp_path / "a")
    file.append(b"x")
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(StorageError, match=r"a: cannot be written \(Input/output error\)"):
        file.sync()


@pytest.mark.skipif(os.name == "nt", reason="a device of POSIX")
def test_what_has_no_disk_need_not_wait_for_one() -> None:
    file = GrowingFile(Path(os.devnull))
    file.append(b"x")
    file.sync()


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_a_file_is_replaced_as_a_whole_or_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "report.html"
    replace_file(path, b"first")
    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(Path if name == "replace" else os, name, raising(error))
        with pytest.raises(StorageError, match=r"report\.html: cannot be written \(No space left on device\)"):
            replace_file(path, b"second")
    assert (names_in(tmp_path), path.read_bytes()) == (["report.html"], b"first")
    replace_file(path, b"third")
    assert (names_in(tmp_path), path.read_bytes()) == (["report.html"], b"third")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, None])
def test_files_that_are_replaced_together_are_all_written_first(
    stop: type[BaseException] | None, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(stop) if stop else contextlib.nullcontext(), contextlib.ExitStack() as stack:
        for name in "ab":
            write_file(stack.enter_context(replacing(tmp_path / name)), b"new")
            assert (tmp_path / name).read_bytes() == b"old"
        if stop is not None:
            raise stop
    expected = b"new" if stop is None else b"old"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": expected, "b": expected}


def test_a_path_that_is_not_there_reminds_of_one_that_is(tmp_path: Path) -> None:
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "train.jsonl").write_text("x", "utf-8")
    for slip in ("data/mnie", "dta/mine", "data/mine/trian.jsonl", "data/mnie/train.jsonl"):
        meant = slip.replace("mnie", "mine").replace("dta", "data").replace("trian", "train")
        assert files.similar_path(tmp_path / slip) == f"; did you mean {tmp_path / meant}?"
    for path in ("data/mine", "data/xyz", "data/mnie/test.jsonl", "data/mine/train.jsonl/below"):
        assert files.similar_path(tmp_path / path) == ""

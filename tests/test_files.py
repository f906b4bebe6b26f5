"""A folder is there as a whole or not at all, knows when it was damaged, and belongs to one process at a time."""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minilora import files
from minilora.errors import UserError
from minilora.files import (
    StorageError,
    explained,
    finish_folder,
    json_bytes,
    lock_folder,
    make_folder,
    read_manifest,
    recover_folders,
    remove,
    set_aside,
    sha256,
    verify_folder,
    write_file,
    write_folder,
)

OLD = {"a": b"old", "b": b"older"}
NEW = {"a": b"new", "c": b"newer\n"}
WRITING_OPERATIONS = ("mkdir", "open", "write", "fsync", "rename")


def write(target: Path, contents: dict[str, bytes], facts: dict[str, Any] | None = None) -> Path:
    write_folder(target, contents.items(), facts or {})
    return target


def finish(target: Path, contents: dict[str, bytes], facts: dict[str, Any] | None = None) -> Path:
    """`write` for files that are there already."""
    temporary = target.with_name(".writing-" + target.name)
    temporary.mkdir(parents=True)
    for name, content in contents.items():
        (temporary / name).write_bytes(content)
    finish_folder(temporary, target, facts or {})
    return target


BOTH = pytest.mark.parametrize("make", [write, finish])


def read(folder: Path) -> dict[str, bytes]:
    """Contents of a folder's files but the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object) -> None:
        raise error

    return function


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
        explained(tmp_path / "a" / "b"),
    ):
        raise OSError("odd")


@BOTH
def test_a_folder_holds_its_files_and_a_manifest_of_them(tmp_path: Path, make: Callable[..., Path]) -> None:
    target = make(tmp_path / "deep" / "x", OLD, {"step": 3})
    assert read(target) == OLD
    assert names_in(target.parent) == ["x"]
    manifest = read_manifest(target)
    assert manifest["facts"] == {"step": 3}
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in OLD.items()
    }
    assert verify_folder(target) is None


def test_equal_folders_have_equal_bytes_in_whatever_order_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "x", OLD, {"a": 1, "b": 2})
    finish(tmp_path / "y", dict(reversed(OLD.items())), {"b": 2, "a": 1})
    assert (tmp_path / "x" / "manifest.json").read_bytes() == (tmp_path / "y" / "manifest.json").read_bytes()


def test_files_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    def one_by_one() -> Any:
        for number in range(3):
            yield str(number), b"x"
            assert (tmp_path / ".writing-x" / str(number)).read_bytes() == b"x"

    write_folder(tmp_path / "x", one_by_one(), {})
    assert names_in(tmp_path / "x") == ["0", "1", "2", "manifest.json"]


@BOTH
def test_all_is_on_the_disk_before_the_folder_takes_its_place_and_the_place_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Path]
) -> None:
    synced: list[tuple[int, int, bool]] = []
    target = tmp_path / "x"

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size, target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    make(target, OLD)
    written = {(path.stat().st_ino, path.stat().st_size) for path in target.iterdir()}
    before = [(number, size) for number, size, in_place in synced if not in_place]
    assert len(written) == 3
    assert written <= set(before)
    assert before[-1][0] == target.stat().st_ino
    assert [number for number, _, in_place in synced if in_place] == [tmp_path.stat().st_ino]


@BOTH
@pytest.mark.parametrize("obstacle", ["folder", "other folder", "file", "link to nowhere", "leftovers"])
def test_what_stood_there_is_replaced_and_nothing_is_left_of_it(
    tmp_path: Path, make: Callable[..., Path], obstacle: str
) -> None:
    target = tmp_path / "x"
    if obstacle == "folder":
        write(target, OLD)
    elif obstacle == "other folder":
        (target / "inner").mkdir(parents=True)
    elif obstacle == "file":
        target.write_text("a file", "utf-8")
    elif obstacle == "link to nowhere":
        target.symlink_to(tmp_path / "nowhere")
    else:
        write(target, OLD)
        (tmp_path / ".replaced-x" / "inner").mkdir(parents=True)
        if make is write:
            (tmp_path / ".writing-x").write_text("a file", "utf-8")
    make(target, NEW)
    assert read(target) == NEW
    assert names_in(tmp_path) == ["x"]


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Makes writing operation `number` fail as on a full disk; returns a list that takes the names of all that come."""
    seen: list[str] = []

    def wrapped(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            seen.append(name)
            if len(seen) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(*arguments, **keywords)

        return operation

    for name in WRITING_OPERATIONS:
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    return seen


@pytest.mark.parametrize("has_old", [True, False])
def test_a_failure_at_any_stage_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_old: bool
) -> None:
    stages: list[str] = []
    number = 0
    while len(stages) >= number:
        number += 1
        target = tmp_path / str(number) / "x"
        target.parent.mkdir()
        if has_old:
            write(target, OLD)
        with monkeypatch.context() as patch, contextlib.suppress(StorageError):
            stages = fail_at(patch, number)
            write(target, NEW)
        is_in_place = stages[: number - 1].count("rename") == (2 if has_old else 1)
        assert not list(target.parent.glob(".writing-*")), stages[:number]
        expected = NEW if is_in_place else OLD if has_old else None
        assert (read(target) if target.exists() else None) == expected, stages[:number]
        recover_folders(target.parent)
        assert names_in(target.parent) == (["x"] if expected else []), stages[:number]
        assert (read(target) if target.exists() else None) == expected
    assert number > 10  # the manifest and each file are opened, written and synced


def test_what_is_checked_is_checked_before_it_takes_its_place(tmp_path: Path) -> None:
    write(tmp_path / "x", OLD)
    seen: list[dict[str, bytes]] = []

    def check(folder: Path) -> None:
        seen.append(read(folder))
        assert verify_folder(folder) is None
        raise UserError("not as it was")

    with pytest.raises(UserError, match="not as it was"):
        write_folder(tmp_path / "x", NEW.items(), {}, check)
    assert seen == [NEW]
    assert read(tmp_path / "x") == OLD
    assert names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("has_old", [True, False])
def test_what_was_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_old: bool) -> None:
    target = tmp_path / "x"
    if has_old:
        write(target, OLD)
    monkeypatch.setattr(files, "verify_folder", lambda _: "a has 2 bytes, expected 3")
    with pytest.raises(StorageError) as caught:
        write(target, NEW)
    assert str(caught.value) == (
        f"{target}: what was just written is damaged (a has 2 bytes, expected 3); check the disk"
    )
    assert names_in(tmp_path) == ["damaged-x-1", *(["x"] if has_old else [])]
    assert read(tmp_path / "damaged-x-1") == NEW
    if has_old:
        assert read(target) == OLD


@BOTH
def test_an_old_folder_that_cannot_be_removed_does_no_harm_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Path]
) -> None:
    write(tmp_path / "x", OLD)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", raising(OSError(errno.EBUSY, "Device or resource busy")))
        make(tmp_path / "x", NEW)
    assert read(tmp_path / "x") == NEW
    assert names_in(tmp_path) == [".replaced-x", "x"]
    recover_folders(tmp_path)
    assert names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("state", ["missing", "sound", "damaged", "not finished"])
def test_a_folder_that_was_replaced_too_early_comes_back(tmp_path: Path, state: str) -> None:
    write(tmp_path / "x", OLD).rename(tmp_path / ".replaced-x")
    if state != "missing":
        write(tmp_path / "x", NEW)
        write(tmp_path / "y", OLD).rename(tmp_path / ".replaced-x")
    if state == "damaged":
        (tmp_path / "x" / "a").write_bytes(b"neu")
    elif state == "not finished":
        (tmp_path / "x" / "manifest.json").unlink()
    recover_folders(tmp_path)
    assert read(tmp_path / "x") == (NEW if state == "sound" else OLD)
    assert verify_folder(tmp_path / "x") is None
    is_aside = state in ("damaged", "not finished")
    assert names_in(tmp_path) == ["damaged-x-1", "x"] if is_aside else ["x"]
    if is_aside:
        assert (tmp_path / "damaged-x-1" / "c").read_bytes() == NEW["c"]


def test_leftovers_go_and_everything_else_stays(tmp_path: Path) -> None:
    write(tmp_path / "x", OLD)
    (tmp_path / ".writing-x" / "inner").mkdir(parents=True)
    (tmp_path / ".writing-log").write_text("a file", "utf-8")
    for name in ("damaged-x-1", ".lock", "y"):
        (tmp_path / name).mkdir()
    recover_folders(tmp_path)
    assert names_in(tmp_path) == [".lock", "damaged-x-1", "x", "y"]


def test_leftovers_that_cannot_be_removed_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".writing-x").mkdir()
    monkeypatch.setattr(shutil, "rmtree", raising(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(StorageError, match=r"cannot be written \(Read-only file system\)"):
        recover_folders(tmp_path)


def test_what_is_set_aside_gets_a_name_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / "x", OLD)
        assert set_aside(tmp_path / "x") == tmp_path / f"damaged-x-{number}"
    assert names_in(tmp_path) == ["damaged-x-1", "damaged-x-2"]
    with pytest.raises(StorageError, match=r"x: cannot be written \(.+\)"):
        set_aside(tmp_path / "x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "x", OLD, {"step": 3})


def test_files_that_the_manifest_does_not_name_are_ignored(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine", "utf-8")
    (folder / "inner").mkdir()
    assert verify_folder(folder) is None


def test_a_file_that_is_not_as_it_was_is_named_and_only_where_it_is_asked_for(folder: Path) -> None:
    (folder / "a").write_bytes(b"odd")
    assert verify_folder(folder, ["b"]) is None
    found, expected = hashlib.sha256(b"odd").hexdigest(), hashlib.sha256(b"old").hexdigest()
    problem = f"a has SHA-256 {found}, expected {expected}"
    assert verify_folder(folder) == verify_folder(folder, ["b", "a"]) == problem
    (folder / "a").write_bytes(b"older")
    assert verify_folder(folder) == "a has 5 bytes, expected 3"
    (folder / "a").unlink()
    assert verify_folder(folder) == "a is missing"
    (folder / "a").mkdir()
    assert verify_folder(folder) == "a is missing"
    assert verify_folder(folder, ["c"]) == "c is not in its manifest"


def test_a_file_that_the_disk_has_lost_is_a_problem_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_sha256", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    assert verify_folder(folder) == "a cannot be read (Input/output error)"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_a_file_that_may_not_be_read_now_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    reason = re.escape(os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sha256", raising(OSError(number, os.strerror(number))))
        with pytest.raises(StorageError, match=rf"x/a: cannot be read \({reason}\); check the rights and run it again"):
            verify_folder(folder)
    monkeypatch.setattr(Path, "read_bytes", raising(OSError(number, os.strerror(number))))
    for function in (verify_folder, read_manifest):
        with pytest.raises(
            StorageError, match=rf"manifest\.json: cannot be read \({reason}\); check the rights and run"
        ):
            function(folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_what_was_replaced_is_not_put_back_for_a_new_folder_that_may_not_be_read_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(folder.with_name(".replaced-x"), NEW)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sha256", raising(OSError(number, os.strerror(number))))
        with pytest.raises(StorageError, match="cannot be read"):
            recover_folders(folder.parent)
    assert (names_in(folder.parent), read(folder)) == ([".replaced-x", "x"], OLD)


def test_every_flipped_bit_of_a_file_is_noticed(folder: Path) -> None:
    for place in range(8 * len(OLD["a"])):
        content = bytearray(OLD["a"])
        content[place // 8] ^= 1 << place % 8
        (folder / "a").write_bytes(content)
        assert str(verify_folder(folder)).startswith("a has SHA-256 ")


def test_every_flipped_bit_of_the_manifest_is_noticed(folder: Path) -> None:
    path = folder / "manifest.json"
    sound = path.read_bytes()
    for place in range(8 * len(sound)):
        content = bytearray(sound)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        assert verify_folder(folder) == f"{path}: is damaged"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{}", '{"facts": {}}', '{"facts": 3, "files": {}}', '{"facts": "x", "files": {}}', "[" * 9999],
)
def test_a_manifest_that_is_none_is_damaged(folder: Path, content: str) -> None:
    path = folder / "manifest.json"
    path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"manifest\.json: is damaged$"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"../a": {"size": 3, "sha256": "ab"}},
        {"/etc/passwd": {"size": 3, "sha256": "ab"}},
        {"a": {"size": 3}},
        {"a": {"size": 3, "sha256": "ab", "more": 1}},
        {"a": [3, "ab"]},
        {"a": None},
    ],
)
def test_a_manifest_of_other_entries_than_files_with_size_and_hash_is_damaged(
    folder: Path, entries: dict[str, Any]
) -> None:
    (folder / "manifest.json").write_bytes(files._render_manifest({}, entries))
    assert verify_folder(folder) == f"{folder / 'manifest.json'}: is damaged"


def test_a_manifest_that_was_cut_off_or_extended_is_damaged(folder: Path) -> None:
    path = folder / "manifest.json"
    sound = path.read_bytes()
    for content in (*(sound[:length] for length in range(len(sound))), sound + b"\n", sound.rstrip()):
        path.write_bytes(content)
        assert verify_folder(folder) == f"{path}: is damaged"


def test_a_manifest_that_is_missing_or_cannot_be_read_is_said(folder: Path) -> None:
    path = folder / "manifest.json"
    path.unlink()
    assert verify_folder(folder) == (
        f"{path}: is missing, so the folder was not written to its end, or not by this version"
    )
    path.mkdir()
    assert verify_folder(folder) == f"{path}: cannot be read (Is a directory); check the rights and run it again"
    assert verify_folder(folder.parent / "absent") is not None


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


HOLD = """
import sys, time
from pathlib import Path
from minilora.files import lock_folder
with lock_folder(Path(sys.argv[1]), "train.output_dir"):
    print("locked", flush=True)
    time.sleep(60)
"""
needs_locks = pytest.mark.skipif(files.fcntl is None, reason="folders are not locked on Windows")


@needs_locks
def test_a_second_process_is_refused_until_the_first_one_is_gone_however_that_happens(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, encoding="ascii")
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as caught, lock_folder(tmp_path, "train.output_dir"):
            pytest.fail("two processes have the folder")
        message = str(caught.value)
        today = time.strftime("%Y-")
        assert message.startswith(f"{tmp_path}: another run is writing there (process {holder.pid} on ")
        assert f", since {today}" in message
        assert message.endswith("); wait for it, stop it, or choose another train.output_dir")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert f"process {holder.pid} " in (tmp_path / ".lock").read_text("utf-8")  # it could not tidy up
    with lock_folder(tmp_path, "train.output_dir"):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text("utf-8")
    assert (tmp_path / ".lock").read_bytes() == b""


@needs_locks
def test_a_lock_is_let_go_of_after_an_error_too(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"), lock_folder(tmp_path, "a"):
            raise ValueError("mine")


@needs_locks
def test_a_holder_that_could_not_write_its_name_holds_the_folder_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", raising(OSError(errno.ENOSPC, "No space left on device")))
    with (
        lock_folder(tmp_path, "a"),
        pytest.raises(UserError, match=r"is writing there \(another process\); wait"),
        lock_folder(tmp_path, "a"),
    ):
        pytest.fail("two have the folder")


@pytest.mark.parametrize("place", ["absent", "file"])
def test_a_folder_that_cannot_be_locked_because_it_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file", "utf-8")
    with (
        pytest.raises(UserError, match=rf"{place}/\.lock: cannot be written \(.+\); choose another train\.output_dir"),
        lock_folder(tmp_path / place, "train.output_dir"),
    ):
        pytest.fail("locked")


@needs_locks
def test_where_the_file_system_has_no_locks_it_is_said_and_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files.fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    with lock_folder(tmp_path, "a"):
        pass
    said = f"{tmp_path}: cannot be locked (No locks available); start no second run there\n"
    assert capsys.readouterr().err == said


def test_where_the_system_has_no_locks_the_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("files_without_locks", files.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.lock_folder(tmp_path, "a"), module.lock_folder(tmp_path, "a"):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text("utf-8")


def test_a_manifest_is_plain_json_with_a_digest_of_the_rest(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text("utf-8"))
    digest = content.pop("sha256")
    assert sorted(content) == ["facts", "files"]
    assert hashlib.sha256(json_bytes(content)).hexdigest() == digest

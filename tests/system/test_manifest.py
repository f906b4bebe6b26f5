"""A folder is there as a whole or not at all, and knows when it was damaged."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.errors import UserError
from minilora.system import manifest
from minilora.system.files import StorageError, json_bytes
from minilora.system.manifest import (
    MANIFEST,
    add_file,
    finish_folder,
    read_manifest,
    recover_folders,
    set_aside,
    verify_folder,
    write_folder,
)
from tests.system.conftest import names_in, raising

OLD = {"a": b"old", "b": b"older"}
NEW = {"a": b"new", "c": b"newer\n"}
WRITING_OPERATIONS = ("mkdir", "open", "write", "fsync", "rename")
PATHLIB = getattr(pathlib, "_NormalAccessor", object)  # Python 3.10 binds os's functions when it imports pathlib


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
        plain = getattr(os, name)
        operation = wrapped(name, plain)
        monkeypatch.setattr(os, name, operation)
        if vars(PATHLIB).get(name) is plain:
            monkeypatch.setattr(PATHLIB, name, staticmethod(operation))
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
    monkeypatch.setattr(manifest, "verify_folder", lambda _: "a has 2 bytes, expected 3")
    with pytest.raises(StorageError) as caught:
        write(target, NEW)
    assert str(caught.value) == (
        f"{target}: what was just written is damaged (a has 2 bytes, expected 3); check the disk"
    )
    assert names_in(tmp_path) == (["x"] if has_old else [])
    if has_old:
        assert read(target) == OLD


def test_what_cannot_be_cleaned_up_after_a_failure_does_not_hide_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: Path) -> None:
        monkeypatch.setattr(shutil, "rmtree", raising(OSError(errno.EROFS, "Read-only file system")))
        raise UserError("the reason")

    with pytest.raises(UserError, match="the reason"):
        write_folder(tmp_path / "x", OLD.items(), {}, check)


def test_files_of_a_library_that_cannot_be_synced_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "sync", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError, match=r"/\.writing-x: cannot be written \(Input/output error\)"):
        finish(tmp_path / "x", OLD)


def test_every_folder_that_was_replaced_is_looked_at(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / name, NEW)
        write(tmp_path / f".replaced-{name}", OLD)
    recover_folders(tmp_path)
    assert names_in(tmp_path) == ["a", "b", "c"]
    assert all(read(tmp_path / name) == NEW for name in ("a", "b", "c"))


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
    (folder / "a").unlink()
    assert verify_folder(folder) == "a is missing"
    (folder / "a").mkdir()
    assert verify_folder(folder) == "a is missing"
    assert verify_folder(folder, ["c"]) == "c is not in its manifest"


def test_a_file_that_the_disk_has_lost_is_a_problem_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "hash_file", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    assert str(verify_folder(folder)).startswith(f"{folder / 'a'}: cannot be read (Input/output error)")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_a_file_that_may_not_be_read_now_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    reason = re.escape(os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "hash_file", raising(OSError(number, os.strerror(number))))
        with pytest.raises(StorageError, match=rf"x/a: cannot be read \({reason}\); check the rights"):
            verify_folder(folder)
    monkeypatch.setattr(Path, "read_bytes", raising(OSError(number, os.strerror(number))))
    for function in (verify_folder, read_manifest):
        with pytest.raises(StorageError, match=rf"manifest\.json: cannot be read \({reason}\); check the rights"):
            function(folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_what_was_replaced_is_not_put_back_for_a_new_folder_that_may_not_be_read_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(folder.with_name(".replaced-x"), NEW)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "hash_file", raising(OSError(number, os.strerror(number))))
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
        {"": {"size": 3, "sha256": "ab"}},
        {".": {"size": 3, "sha256": "ab"}},
        {"..": {"size": 3, "sha256": "ab"}},
    ],
)
def test_a_manifest_of_other_entries_than_files_with_size_and_hash_is_damaged(
    folder: Path, entries: dict[str, Any]
) -> None:
    (folder / "manifest.json").write_bytes(manifest._render_manifest({}, entries))
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
    assert str(verify_folder(folder)).startswith(f"{path}: is missing")
    path.mkdir()
    assert str(verify_folder(folder)).startswith(f"{path}: cannot be read (Is a directory)")
    assert verify_folder(folder.parent / "absent") is not None


def test_a_manifest_is_plain_json_with_a_digest_of_the_rest(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text("utf-8"))
    digest = content.pop("sha256")
    assert sorted(content) == ["facts", "files"]
    assert hashlib.sha256(json_bytes(content)).hexdigest() == digest


def test_a_file_that_is_added_is_in_the_manifest_and_the_others_stay(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", OLD, {"step": 3})
    before = read_manifest(folder)
    for content in (b"first", b"second"):
        add_file(folder, "c", content)
        assert (folder / "c").read_bytes() == content
        assert verify_folder(folder) is None
    after = read_manifest(folder)
    assert after["facts"] == before["facts"]
    assert {name: entry for name, entry in after["files"].items() if name != "c"} == before["files"]
    assert names_in(folder) == sorted([*OLD, "c", MANIFEST])


def test_a_file_is_added_to_a_folder_without_a_manifest_too(tmp_path: Path) -> None:
    add_file(tmp_path, "c", b"new")
    assert names_in(tmp_path) == ["c"]


def test_nothing_is_added_to_a_folder_whose_manifest_is_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", OLD)
    (folder / MANIFEST).write_bytes(b"{}")
    with pytest.raises(UserError, match="is damaged"):
        add_file(folder, "c", b"new")
    assert names_in(folder) == sorted([*OLD, MANIFEST])


def test_between_the_two_writes_the_old_files_are_sound_and_the_new_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "folder", {**OLD, "c": b"first"})
    plain = manifest.replace_file

    def replace_file(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        plain(path, content)

    monkeypatch.setattr(manifest, "replace_file", replace_file)
    with pytest.raises(KeyboardInterrupt):
        add_file(folder, "c", b"second")
    monkeypatch.undo()
    assert verify_folder(folder, OLD) is None
    assert "c has SHA-256" in (verify_folder(folder, ["c"]) or "")

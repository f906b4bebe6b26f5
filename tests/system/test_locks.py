"""A folder belongs to one process at a time."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minilora.errors import UserError
from minilora.system import locks
from minilora.system.files import StorageError
from minilora.system.locks import lock_folder, lock_output
from tests.system.conftest import names_in, raising

HOLD = """
import sys, time
from pathlib import Path
from minilora.system.locks import lock_folder
with lock_folder(Path(sys.argv[1]), "train.output_dir"):
    print("locked", flush=True)
    time.sleep(60)
"""
needs_locks = pytest.mark.skipif(locks.fcntl is None, reason="folders are not locked on Windows")


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
def test_a_folder_that_is_yet_to_be_made_is_locked_beside_it_and_nothing_of_the_lock_is_left(tmp_path: Path) -> None:
    output, other = tmp_path / "merged", tmp_path / "other"
    with lock_output(output, "--output_dir"), lock_output(other, "--output_dir"):
        output.mkdir()
        with pytest.raises(UserError, match=rf"process {os.getpid()} .+ choose another --output_dir"):
            lock_output(output, "--output_dir").__enter__()
        assert list(output.iterdir()) == []  # no open file keeps Windows from renaming it
        output.rename(tmp_path / "renamed")
    assert names_in(tmp_path) == ["renamed"]
    with pytest.raises(ZeroDivisionError), lock_output(output, "--output_dir"):
        raise ZeroDivisionError
    assert names_in(tmp_path) == ["renamed"]


@needs_locks
def test_a_lock_that_was_removed_between_opening_and_locking_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = locks._lock

    def remove_and_lock(*arguments: Any) -> None:
        (tmp_path / ".lock-merged").unlink()
        plain(*arguments)

    monkeypatch.setattr(locks, "_lock", remove_and_lock)
    with pytest.raises(UserError, match="merged: another run has just ended there"):
        lock_output(tmp_path / "merged", "--output_dir").__enter__()


@needs_locks
def test_a_lock_is_let_go_of_after_an_error_too(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"), lock_folder(tmp_path, "a"):
            raise ValueError("mine")


@needs_locks
def test_a_holder_that_could_not_write_its_name_holds_the_folder_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", raising(OSError(errno.ENOSPC, "No space left on device")))
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
        pytest.raises(StorageError, match=rf"{place}/\.lock: cannot be written \(.+\); .*make room or mend the disk"),
        lock_folder(tmp_path / place, "train.output_dir"),
    ):
        pytest.fail("locked")


@needs_locks
def test_where_the_file_system_has_no_locks_it_is_said_and_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    with lock_folder(tmp_path, "a"):
        pass
    said = f"{tmp_path}: cannot be locked (No locks available); do not start a second run in it\n"
    assert capsys.readouterr().err == said


class WindowsLocks:
    """msvcrt's part in locking: a byte that is locked can be read by nobody; closing the file lets go of it."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, descriptor: int, mode: int, size: int) -> None:
        assert (mode, size) == (self.LK_NBLCK, 1)
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if place in self.held:
            raise PermissionError(errno.EACCES, "Permission denied")
        self.held[place] = descriptor

    def close(self, descriptor: int) -> None:
        self.held = {place: holder for place, holder in self.held.items() if holder != descriptor}


def test_on_windows_the_folder_belongs_to_one_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, close = WindowsLocks(), os.close
    monkeypatch.setattr(os, "close", lambda descriptor: (held.close(descriptor), close(descriptor)))
    for name in ("pread", "pwrite"):  # Windows has none
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", held)
    spec = importlib.util.spec_from_file_location(locks.__name__, locks.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for _ in range(2):
        with module.lock_folder(tmp_path, "key"):
            holder = (tmp_path / ".lock").read_text("utf-8")
            assert f"process {os.getpid()} " in holder
            assert len(holder) < module.LOCKED_BYTE
            with (
                pytest.raises(UserError, match=r"another run is writing there \(process \d+ on .*\); wait"),
                module.lock_folder(tmp_path, "key"),
            ):
                pytest.fail("two have the folder")
        assert (tmp_path / ".lock").read_bytes() == b""


def test_a_holder_whose_name_is_no_text_is_told_all_the_same(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "key"):
        (tmp_path / ".lock").write_bytes(b"process \xff")
        with pytest.raises(UserError, match="process \N{REPLACEMENT CHARACTER}"), lock_folder(tmp_path, "key"):
            pass

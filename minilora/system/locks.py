"""One process at a time in a folder: a lock of the operating system, which ends with the process, however it ends."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from minilora.errors import UserError
from minilora.system.console import warn
from minilora.system.files import storage_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

LOCK = ".lock"
LOCKED_BYTE = 1 << 30  # on Windows, where a locked byte cannot be read: far after the holder's name


@contextlib.contextmanager
def lock_folder(folder: Path, key: str) -> Iterator[None]:
    """Locks `folder`, which the key `key` names; the system unlocks it when the process ends, however it ends.

    UserError with id, host and start of another process that has it.
    """
    with _lock_file(folder / LOCK, folder, key):
        yield


@contextlib.contextmanager
def lock_output(output: Path, key: str) -> Iterator[None]:
    """`lock_folder` for a folder that is renamed into place, by a file beside it, which is removed in the end.

    Windows renames no folder in which a file is open, and a lock in the replaced folder would be gone with it.
    """
    path = output.with_name(f"{LOCK}-{output.name}")
    with _lock_file(path, output, key):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps it
                path.unlink()


@contextlib.contextmanager
def _lock_file(path: Path, folder: Path, key: str) -> Iterator[None]:
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder, key)
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):  # removed since it was opened
            raise UserError(f"{folder}: another run has just ended there; run the same command again")
        holder = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with contextlib.suppress(OSError):  # a full disk: the lock holds nevertheless
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, holder.encode())
        yield
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, key: str) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, 1000).decode("utf-8", "replace") or "another process"
        raise UserError(
            f"{folder}: another run is writing there ({holder}); wait for it, stop it, or choose another {key}"
        ) from None
    except OSError as error:  # some network file systems have no locks
        warn(f"{folder}: cannot be locked ({error.strerror}); do not start a second run in it")

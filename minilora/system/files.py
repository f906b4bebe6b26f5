"""Single files: durable and atomic writes, strict reads, checksums; folders are created.

`os` functions are called one by one, so that a test can fail or kill each of them (tests/faults/).
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minilora.errors import UserError

SCAN_S = 1.0  # how long Windows may refuse to rename what a virus scanner has open; pip waits as long
WRITING = ".writing-"  # begins the name of an unfinished file or folder
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)


class StorageError(UserError):
    """A full or failing disk, or a folder without write access: the run itself is sound."""


def similar_path(path: Path) -> str:
    """ "; did you mean data/mine?" for data/mnie: the end of a message about a path that is not there."""
    with contextlib.suppress(OSError):
        missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
        if missing is not None:
            names = [found.name for found in missing.parent.iterdir()]
            close = difflib.get_close_matches(missing.name, names, n=1)
            meant = [missing.with_name(name) / path.relative_to(missing) for name in close]
            return "".join(f"; did you mean {found}?" for found in meant if found.exists())
    return ""


def hash_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """`hash_file`, computed once per process, because several modules need the checksums of one base model.

    A file is known by device, inode, size and modification time. One that changed within the last second is hashed
    again, because its next change could have the same time. A disk that loses bits changes none of these, so files that
    this process writes are read back by `hash_file`. UserError if the file cannot be read.
    """
    try:
        found = path.stat()
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        digest = _known_digests.get(key) or hash_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if time.time_ns() - found.st_mtime_ns > 1e9:
        _known_digests[key] = digest
    return digest


_known_digests: dict[tuple[int, int, int, int], str] = {}


def json_bytes(content: Any) -> bytes:
    """Pretty JSON with sorted keys: equal content, equal bytes. ValueError for NaN or inf."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path, remedy: str = "write or download it again") -> Any:
    """Content of a JSON file; UserError where it is missing, or not JSON, with what to do then."""
    try:
        return parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); {remedy}") from None


def parse_json(text: str) -> Any:
    """Strict JSON: ValueError for NaN, inf and duplicate keys."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise ValueError(f"{name!r} occurs twice")
            content[name] = value
        return content

    return json.loads(
        text,
        parse_constant=refuse,
        parse_int=lambda digits: -0.0 if digits == "-0" else int(digits),  # JSON has no integer -0, Python has
        object_pairs_hook=unique,
    )


def make_folder(folder: Path, key: str) -> None:
    """Creates `folder`, which the option `key` names; UserError, before hours of computing, if it cannot be written."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:  # a loss of power must not take the folder with everything in it
            sync(path.parent)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another {key}") from None


def remove(path: Path) -> None:
    """Removes a folder, a file or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_all(descriptor: int, content: bytes | bytearray) -> None:
    """`os.write`, repeated until nothing is left."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_file(path: Path, content: bytes) -> None:
    """Writes or overwrites a file, and syncs it; StorageError with the bytes needed and free."""
    with storage_errors(path, len(content)):
        descriptor = os.open(path, NEW_FILE, 0o666)
        try:
            write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class GrowingFile:
    """A file that grows piece by piece and holds whole pieces only; SIGKILL or a loss of power may cut the last one.

    The first piece opens it: until then an existing file stays, and then it is replaced, or continued.
    """

    def __init__(self, path: Path, replaces: bool = True):
        self._path = path
        self._flags = os.O_APPEND | (NEW_FILE if replaces else NEW_FILE & ~os.O_TRUNC)
        self._descriptor: int | None = None
        self._end = 0

    def append(self, content: bytes) -> None:
        """Writes at the end; after a StorageError the file ends as before."""
        with storage_errors(self._path, len(content)):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, self._flags, 0o666)
                self._end = os.fstat(self._descriptor).st_size
            try:
                write_all(self._descriptor, content)
            except OSError:
                with contextlib.suppress(OSError):  # the first error counts
                    os.ftruncate(self._descriptor, self._end)
                raise
            self._end += len(content)

    def sync(self) -> None:
        """Makes the pieces so far survive a loss of power."""
        if self._descriptor is not None:
            with storage_errors(self._path):
                try:
                    os.fsync(self._descriptor)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # a pipe or a device, which has no disk
                        raise

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def replace_file(path: Path, content: bytes) -> None:
    """Atomic `write_file`: an existing file stays until the new one is on the disk."""
    with replacing(path) as temporary:
        write_file(temporary, content)


def patiently(rename: Callable[[Path], object], target: Path) -> None:
    """Calls `rename`, on Windows until it succeeds or SCAN_S are over.

    There neither a file that another program has open nor the folder around it can be renamed, and virus scanners and
    indexers open what was just written.
    """
    end = time.monotonic() + SCAN_S
    while True:
        try:
            rename(target)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > end:
                raise
        time.sleep(SCAN_S / 20)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write and sync a file under, which then takes the place of `path`, or is removed after any exception.

    Of several in one ExitStack, all are written before the first takes its place. StorageError.
    """
    temporary = path.with_name(WRITING + path.name)
    try:
        yield temporary
        with storage_errors(path):
            patiently(temporary.replace, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def storage_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turns an OSError about `path` into a StorageError with the bytes needed and free."""
    try:
        yield
    except OSError as error:
        room = f"; {needed_bytes:,} bytes were to be written" if needed_bytes else ""
        with contextlib.suppress(OSError):
            place = next(parent for parent in path.absolute().parents if parent.is_dir())
            room += f"; {shutil.disk_usage(place).free:,} bytes are free there"
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}){room}; make room or mend the disk, and run the "
            "same command again"
        ) from error


def sync(path: Path) -> None:
    """fsync of a file, or of a folder's list of names."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder; its rename is durable with the journal
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
            raise  # these: some network file systems do not sync folders
    finally:
        os.close(descriptor)

"""Folders that are there as a whole or not at all, and that know when they were damaged.

    write_folder(step-000120)
        .writing-step-000120/          on the same disk; every file written and fsynced
            manifest.json              last: name, size and SHA-256 of every file, and its own
        step-000120/                   renamed, the parent fsynced, read back and verified

A process that is killed, or a machine that loses power, at any instant leaves the finished folder or none. A folder
cannot be renamed onto a filled one, so what is replaced first steps aside as `.replaced-step-000120`; whoever opens
the parent next calls `recover_folders`, which puts it back if the new one is not there in full.

Neither safetensors nor JSON notices a flipped bit: of 1,000 in a small safetensors file 968 load as other tensors.
SHA-256 does, so whatever is trusted later is verified against the manifest first. It protects from accidents; who can
write the folder can write a manifest too.

`os` functions are called one by one, so that a test can fail or kill each of them (tests/faults/).
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minilora.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where output folders are not locked
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
LOCK = ".lock"
WRITING, REPLACED, DAMAGED = ".writing-", ".replaced-", "damaged-"


class StorageError(UserError):
    """A disk that is full or fails, or a folder that may not be written: nothing is wrong with the run."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return _sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_bytes(content: Any) -> bytes:
    """Pretty JSON with sorted keys: equal content, equal bytes. ValueError for NaN, which JSON has not."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); write or download it again") from None


def parse_json(text: str) -> Any:
    """JSON without Python's liberties: no NaN, no key twice; ValueError otherwise."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

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
    """Makes `folder` and writes into it: where that fails it should fail before hours are computed, not after.

    Args:
        folder: made if needed, with all above it.
        key: configuration key or option that named it, for the message.

    Raises:
        UserError: it is not a folder, or nothing can be written there.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:  # a loss of power must not take the folder with all that was saved in it
            sync(path.parent)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another {key}") from None


def remove(path: Path) -> None:
    """Removes a folder or a file, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, whatever stood there, and waits until it is on the disk.

    Raises:
        StorageError: with the bytes that were needed and are free.
    """
    with explained(path, len(content)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_folder(
    target: Path,
    files: Iterable[tuple[str, bytes]],
    facts: Mapping[str, Any],
    check: Callable[[Path], object] | None = None,
) -> None:
    """Makes `target` a folder with these files and a manifest, whatever stood there, durable and verified.

    Args:
        target: its parent is made if needed.
        files: (name, content) pairs; a generator is asked for one at a time, so that one is in memory.
        facts: what else the manifest says.
        check: called with the temporary folder before it takes its place; what it raises ends the writing.

    Raises:
        StorageError: something could not be written, or is not what was written. What stood at `target` stays.
    """
    temporary = target.with_name(WRITING + target.name)
    try:
        with explained(temporary):
            remove(temporary)
            temporary.mkdir(parents=True)
        entries = {}
        for name, content in files:
            write_file(temporary / name, content)
            entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_file(temporary / MANIFEST, _render_manifest(facts, entries))
        if check is not None:
            check(temporary)
        _put_in_place(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # after a failure; on success nothing is there any more
            remove(temporary)


def finish_folder(temporary: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """`write_folder` for files that a library has written into `temporary` already."""
    entries = {}
    with explained(temporary):
        for path in sorted(temporary.iterdir()):
            sync(path)
            entries[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_file(temporary / MANIFEST, _render_manifest(facts, entries))
    _put_in_place(temporary, target)


def _put_in_place(temporary: Path, target: Path) -> None:
    replaced = target.with_name(REPLACED + target.name)
    with explained(target):
        sync(temporary)
        if target.exists() or target.is_symlink():
            remove(replaced)
            target.rename(replaced)
        try:
            temporary.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        sync(target.parent)
    problem = verify_folder(target)
    if problem is not None:
        with explained(target):
            set_aside(target)
            if replaced.exists():
                replaced.rename(target)
        raise StorageError(f"{target}: what was just written is damaged ({problem}); check the disk")
    with contextlib.suppress(OSError):  # the new one is in place; `recover_folders` tries again
        remove(replaced)


def recover_folders(directory: Path) -> None:
    """Ends what an interrupted `write_folder` left in `directory`: what was replaced too early comes back.

    Only the process that holds the folder's lock may call it: it takes another one's unfinished folder for a leftover.

    Raises:
        StorageError: something cannot be renamed or removed.
    """
    with explained(directory):
        for replaced in directory.glob(REPLACED + "*"):
            target = replaced.with_name(replaced.name.removeprefix(REPLACED))
            if target.exists() and verify_folder(target) is None:
                remove(replaced)
                continue
            if target.exists():
                set_aside(target)
            replaced.rename(target)
        for leftover in directory.glob(WRITING + "*"):
            remove(leftover)


def set_aside(path: Path) -> Path:
    """Renames a damaged folder, so that nobody takes it for a sound one, and returns its new path."""
    number = 1
    while (aside := path.with_name(f"{DAMAGED}{path.name}-{number}")).exists():
        number += 1
    with explained(path):
        path.rename(aside)
    return aside


def verify_folder(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a folder that `write_folder` wrote, None if every byte is as it was.

    Args:
        folder: what is not in the manifest is ignored.
        names: files to verify; all by default.

    Raises:
        StorageError: a file is there and may not be read, which says nothing about what it holds.
    """
    try:
        entries = read_manifest(folder)["files"]
    except StorageError:
        raise
    except UserError as error:
        return str(error)
    for name in entries if names is None else names:
        path = folder / name
        if name not in entries:
            return f"{name} is not in its manifest"
        if not path.is_file():
            return f"{name} is missing"
        expected = entries[name]
        try:
            size, found = path.stat().st_size, _sha256(path)
        except OSError as error:
            if error.errno == errno.EIO:  # the disk has lost it
                return f"{name} cannot be read ({error.strerror})"
            raise StorageError(
                f"{path}: cannot be read ({error.strerror}); check the rights and run it again"
            ) from None
        if size != expected["size"]:
            return f"{name} has {size} bytes, expected {expected['size']}"
        if found != expected["sha256"]:
            return f"{name} has SHA-256 {found}, expected {expected['sha256']}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, if it is to the byte what was written.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing, so the folder was not written to its end, or not by this version"
        ) from None
    except OSError as error:
        kind = UserError if error.errno in (errno.EIO, errno.EISDIR, errno.ENOTDIR) else StorageError
        raise kind(f"{path}: cannot be read ({error.strerror}); check the rights and run it again") from None
    try:
        content = json.loads(text)
        if text == _render_manifest(content["facts"], content["files"]) and all(
            map(_is_entry, content["files"].items())
        ):
            return dict(content)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{path}: is damaged")


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether a manifest's entry names a file of its own folder, with size and hash."""
    name, entry = item
    is_plain = Path(name).name == name and name not in ("", ".", "..")
    return is_plain and isinstance(entry, dict) and entry.keys() == {"size", "sha256"}


def _render_manifest(facts: Mapping[str, Any], entries: Mapping[str, Any]) -> bytes:
    """The manifest's bytes; its own SHA-256 is that of the rest."""
    content = {"facts": dict(facts), "files": dict(entries)}
    return json_bytes({**content, "sha256": hashlib.sha256(json_bytes(content)).hexdigest()})


@contextlib.contextmanager
def lock_folder(folder: Path, key: str) -> Iterator[None]:
    """Keeps `folder` for this process; the system lets go of it when the process ends, however that happens.

    Args:
        folder: where `.lock` is written.
        key: configuration key that named it, for the message.

    Raises:
        UserError: another process has it; says which, and since when.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another {key}") from None
    try:
        _lock(descriptor, folder, key)
        holder = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, key: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "another process"
        raise UserError(
            f"{folder}: another run is writing there ({holder}); wait for it, stop it, or choose another {key}"
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(f"{folder}: cannot be locked ({error.strerror}); start no second run there", file=sys.stderr)


@contextlib.contextmanager
def explained(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turns an OSError about `path` into a StorageError that says how much room was needed and is there."""
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
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder; its rename is durable with the journal
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
            raise  # those are how some network file systems say that they sync no folders
    finally:
        os.close(descriptor)

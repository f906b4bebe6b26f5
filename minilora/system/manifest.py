"""Atomic writes of whole folders, with checksums of their files.

    write_folder(step-000120)
        .writing-step-000120/          on the same disk; every file written and fsynced
            manifest.json              last: name, size and SHA-256 of every file, and its own
                                       all of it read back and verified
        step-000120/                   renamed, the parent fsynced

A process that is killed, or a machine that loses power, at any instant leaves the finished folder or none. A folder
cannot be renamed onto one with files, so a replaced one is first renamed to `.replaced-step-000120`; the next process
that opens the parent calls `recover_folders`, which renames it back if the new one is not complete.

Neither safetensors nor JSON detects a flipped bit, so files are verified against the manifest before they are used. It
protects from accidents only: whoever can write the folder can also write a manifest.
"""

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from minilora.errors import UserError
from minilora.system.files import (
    WRITING,
    StorageError,
    hash_file,
    json_bytes,
    patiently,
    remove,
    replace_file,
    storage_errors,
    sync,
    write_file,
)

T = TypeVar("T")

MANIFEST = "manifest.json"
REPLACED, DAMAGED = ".replaced-", "damaged-"


def write_folder(
    target: Path,
    files: Iterable[tuple[str, bytes]],
    facts: Mapping[str, Any],
    check: Callable[[Path], object] | None = None,
) -> None:
    """Writes `target` as a folder with these files and a manifest, atomically; reads it back. Replaces an existing one.

    Args:
        target: the folder; its parents are made too.
        files: names and contents; a generator keeps one at a time in memory.
        facts: further content of the manifest.
        check: called with the temporary folder before it is renamed; an exception cancels the write.

    An existing `target` stays if a write fails or the files read back differ, a StorageError.
    """
    temporary = target.with_name(WRITING + target.name)
    try:
        with storage_errors(temporary):
            remove(temporary)
            temporary.mkdir(parents=True)
        entries = {}
        for name, content in files:
            write_file(temporary / name, content)
            entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_file(temporary / MANIFEST, _render_manifest(facts, entries))
        problem = verify_folder(temporary)
        if problem is not None:
            raise StorageError(f"{target}: what was just written is damaged ({problem}); check the disk")
        if check is not None:
            check(temporary)
        _put_in_place(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # after a failure; on success it no longer exists
            remove(temporary)


def add_file(folder: Path, name: str, content: bytes) -> None:
    """Writes a file into a folder that has a manifest or none, atomically, and names it in the manifest.

    Between the two writes a crash leaves a file that differs from its entry. StorageError if one of them fails;
    UserError for a damaged manifest, where nothing is written.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    replace_file(folder / name, content)
    if manifest is not None:
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        replace_file(folder / MANIFEST, _render_manifest(manifest["facts"], {**manifest["files"], name: entry}))


def finish_folder(temporary: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """`write_folder` for files that a library has written into `temporary`; they are read back for their checksums."""
    entries = {}
    with storage_errors(temporary):
        for path in sorted(temporary.iterdir()):
            sync(path)
            entries[path.name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    write_file(temporary / MANIFEST, _render_manifest(facts, entries))
    _put_in_place(temporary, target)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames `temporary` to `target`; what it replaces goes last."""
    replaced = target.with_name(REPLACED + target.name)
    with storage_errors(target):
        sync(temporary)
        if target.exists() or target.is_symlink():
            remove(replaced)
            patiently(target.rename, replaced)
        try:
            patiently(temporary.rename, target)
        except OSError:
            if replaced.exists():
                patiently(replaced.rename, target)
            raise
        sync(target.parent)
    with contextlib.suppress(OSError):  # the new one is in place; `recover_folders` retries
        remove(replaced)


def recover_folders(directory: Path) -> None:
    """Cleans up after an interrupted `write_folder` in `directory`, and restores a folder that was not replaced yet.

    Only the holder of the folder's lock may call it: it removes unfinished folders.
    """
    with storage_errors(directory):
        for replaced in directory.glob(REPLACED + "*"):
            target = replaced.with_name(replaced.name.removeprefix(REPLACED))
            if target.exists() and verify_folder(target) is None:
                remove(replaced)
                continue
            if target.exists():
                set_aside(target)
            patiently(replaced.rename, target)
        for leftover in directory.glob(WRITING + "*"):
            remove(leftover)


def set_aside(path: Path) -> Path:
    """Renames a damaged folder to `damaged-...`, and returns its new path."""
    number = 1
    while (aside := path.with_name(f"{DAMAGED}{path.name}-{number}")).exists():
        number += 1
    with storage_errors(path):
        patiently(path.rename, aside)
    return aside


def verify_folder(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """The first difference between a folder and its manifest; None if there is none.

    Only `names` are looked at, by default all that the manifest lists. StorageError if one cannot be read now.
    """
    try:
        entries = read_manifest(folder)["files"]
        for name in entries if names is None else names:
            if name not in entries:
                return f"{name} is not in its manifest"
            if not (folder / name).is_file():
                return f"{name} is missing"
            found, expected = _read(folder / name, hash_file), entries[name]["sha256"]
            if found != expected:
                return f"{name} has SHA-256 {found}, expected {expected}"
    except StorageError:
        raise
    except UserError as error:
        return str(error)
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, byte for byte as it was written; UserError if it is missing or damaged."""
    path = folder / MANIFEST
    text = _read(path, Path.read_bytes)
    try:
        content = json.loads(text)
        if text == _render_manifest(content["facts"], content["files"]) and all(
            map(_is_entry, content["files"].items())
        ):
            return dict(content)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{path}: is damaged")


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` returns; UserError if the disk has lost the file, StorageError if it may be sound, but not now."""
    try:
        return read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: the folder is incomplete, or of another program") from None
    except OSError as error:
        kind = UserError if error.errno in (errno.EIO, errno.EISDIR, errno.ENOTDIR) else StorageError
        raise kind(
            f"{path}: cannot be read ({error.strerror}); check the rights and run the same command again"
        ) from None


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether a manifest's entry names a file of its own folder, with size and checksum."""
    name, entry = item
    is_plain = Path(name).name == name and name not in ("", "..")
    return is_plain and isinstance(entry, dict) and entry.keys() == {"size", "sha256"}


def _render_manifest(facts: Mapping[str, Any], entries: Mapping[str, Any]) -> bytes:
    """The manifest's bytes; its own SHA-256 is that of the rest."""
    content = {"facts": dict(facts), "files": dict(entries)}
    return json_bytes({**content, "sha256": hashlib.sha256(json_bytes(content)).hexdigest()})

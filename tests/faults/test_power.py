"""The log of a run's file operations replayed as a loss of power: whatever was not synced may be gone, torn or late.

What a file system promises without fsync is nothing, so a state after the loss is made of the operations before it so:
each change of a folder's names that was not followed by an fsync of that folder is kept or dropped by chance, and each
file that was not synced holds nothing, a part of what was written, or noise of that length.
"""

import base64
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from minilora.errors import UserError
from minilora.runs.checkpoint import find_checkpoint
from minilora.system.manifest import recover_folders
from tests.faults.conftest import Count, HowMany
from tests.faults.runner import Runs

ROOT = PurePosixPath("checkpoints")


@dataclass
class File:
    """Content as written, and as it was when it was last synced."""

    content: bytes = b""
    synced: bytes | None = None


@dataclass
class Tree:
    """Names to files; None is a folder."""

    names: dict[PurePosixPath, File | None] = field(default_factory=lambda: {ROOT: None})

    def apply(self, operation: dict[str, Any], files: dict[int, File]) -> None:
        """One change of names; one whose objects are not there, because an earlier one was dropped, does nothing."""
        path = PurePosixPath(operation["path"])
        if path.parent not in self.names:
            return
        if operation["name"] == "open":
            self.names[path] = files[operation["number"]]
        elif operation["name"] == "mkdir":
            self.names.setdefault(path, None)
        elif operation["name"] in ("unlink", "rmdir"):
            for name in [name for name in self.names if name == path or path in name.parents]:
                del self.names[name]
        else:
            to = PurePosixPath(operation["to"])
            if path not in self.names:
                return
            moved = [name for name in self.names if name == path or path in name.parents]
            for name in [name for name in self.names if name == to or to in name.parents]:
                del self.names[name]
            for name in moved:
                self.names[to / name.relative_to(path)] = self.names.pop(name)


def crash(operations: list[dict[str, Any]], chooser: random.Random | None) -> dict[PurePosixPath, bytes | None]:
    """What is on the disk after these operations and a loss of power; with no chooser, after an orderly end."""
    files: dict[int, File] = {}
    opened: dict[str, File] = {}  # the last file that was opened under a name
    changes: list[dict[str, Any]] = []
    is_durable: dict[int, bool] = {}
    for operation in operations:
        name, path = operation["name"], operation["path"]
        if name == "open" and operation["flags"] & os.O_CREAT:
            opened[path] = files[operation["number"]] = File()
            changes.append(operation)
        elif name == "write":
            opened[path].content += base64.b64decode(operation["content"])
        elif name == "fsync" and path in opened:
            opened[path].synced = opened[path].content
        elif name == "fsync":
            for change in changes:  # all names in this folder so far
                if str(PurePosixPath(change["path"]).parent) == path:
                    is_durable[change["number"]] = True
        elif name in ("mkdir", "unlink", "rmdir", "rename", "replace"):
            changes.append(operation)
    tree = Tree()
    for change in changes:
        if chooser is None or is_durable.get(change["number"]) or chooser.random() < 0.5:
            tree.apply(change, files)
    return {name: None if file is None else _content(file, chooser) for name, file in tree.names.items()}


def _content(file: File, chooser: random.Random | None) -> bytes:
    if chooser is None or file.synced == file.content:
        return file.content
    kind = chooser.randrange(4)
    if kind == 0:
        return file.synced or b""
    if kind == 1:
        return file.content[: chooser.randrange(len(file.content) + 1)]
    if kind == 2:
        return bytes(len(file.content))
    return file.content


def write_tree(tree: dict[PurePosixPath, bytes | None], folder: Path) -> Path:
    for name in sorted(tree):
        content = tree[name]
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).write_bytes(content)
    return folder / ROOT


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class Save:
    """One save of the logged run: all operations, and where its own begin, end, and are safe."""

    operations: list[dict[str, Any]]
    begin: int
    end: int
    synced: int


@pytest.fixture(scope="module")
def save(runs: Runs, keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Save:
    """The fourth checkpoint of a run that keeps one, so that it removes the third."""
    folder = tmp_path_factory.mktemp("power")
    more = ["train.save_total_limit=1", "train.save_steps=1", "train.eval_steps=6"]
    assert runs.run([*keys, *more], folder / "run", {"log": str(folder / "operations")}) == 0
    operations = [json.loads(line) for line in (folder / "operations").read_text("utf-8").splitlines()]
    operations = [
        operation
        for operation in operations
        if operation["path"].startswith("checkpoints/") or operation["path"] == "checkpoints"
    ]
    begin = next(index for index, operation in enumerate(operations) if ".writing-step-000004" in operation["path"])
    end = next(index for index, operation in enumerate(operations) if ".writing-step-000005" in operation["path"])
    in_place = next(p for p in range(begin, end) if operations[p].get("to", "").endswith("checkpoints/step-000004"))
    is_safe = (
        p for p in range(in_place, end) if operations[p]["name"] == "fsync" and operations[p]["path"] == "checkpoints"
    )
    return Save(operations, begin, end, next(is_safe))


def sound_contents(save: Save, folder: Path) -> dict[str, dict[str, bytes]]:
    """What the two checkpoints hold when nothing happens."""
    before = write_tree(crash(save.operations[: save.begin], None), folder / "before")
    after = write_tree(crash(save.operations[: save.synced + 1], None), folder / "after")
    return {"step-000003": contents(before / "step-000003"), "step-000004": contents(after / "step-000004")}


def replay(save: Save, operations: list[dict[str, Any]], folder: Path, states: int) -> tuple[int, list[str]]:
    """Loses power `states` times within the save; how often the new checkpoint was found, and what was lost."""
    sound, chooser = sound_contents(save, folder), random.Random(3)
    found_new, lost = 0, []
    for number in range(states):
        length = save.begin + number % (save.end - save.begin) + 1
        checkpoints = write_tree(crash(operations[:length], chooser), folder / "state")
        recover_folders(checkpoints)
        try:
            found = find_checkpoint(checkpoints)
        except UserError:
            found = None
        if found is None or contents(found) != sound.get(found.name):
            lost.append(f"after {length} operations: neither checkpoint is whole")
        elif length > save.synced and found.name != "step-000004":
            lost.append(f"after {length} operations: a checkpoint that was said to be saved is gone")
        else:
            found_new += found.name == "step-000004"
        shutil.rmtree(folder / "state")
    return found_new, lost


@pytest.mark.slow
def test_a_loss_of_power_leaves_the_last_checkpoint_or_the_next_one(
    save: Save, tmp_path: Path, count: Count, how_many: HowMany
) -> None:
    states = how_many(60, 300, 5000)
    found_new, lost = replay(save, save.operations, tmp_path, states)
    count(
        f"loss of power within a save, {states} states: {found_new} had the new checkpoint, the others the old, "
        f"lost: {len(lost)}"
    )
    assert lost == []
    assert 0 < found_new < states


@pytest.mark.slow
@pytest.mark.parametrize("what", ["files", "the folder", "its parent"])
def test_no_fsync_of_a_save_can_be_left_out(save: Save, tmp_path: Path, what: str, how_many: HowMany) -> None:
    """Without one kind of them something gets lost, and the replay notices."""
    writing = "checkpoints/.writing-step-000004"

    def is_left_out(operation: dict[str, Any]) -> bool:
        if operation["name"] != "fsync":
            return False
        if what == "files":
            return str(operation["path"]).startswith(f"{writing}/")
        return bool(operation["path"] == (writing if what == "the folder" else "checkpoints"))

    kept = [
        operation if not is_left_out(operation) or index < save.begin else {**operation, "name": "none"}
        for index, operation in enumerate(save.operations)
    ]
    _, lost = replay(save, kept, tmp_path, how_many(100, 300, 300))
    assert lost


def test_the_replay_notices_a_missing_fsync() -> None:
    """Without the fsyncs, the same replay loses files."""
    create = {"number": 1, "name": "open", "path": "checkpoints/a", "flags": os.O_CREAT}
    write = {"number": 2, "name": "write", "path": "checkpoints/a", "content": base64.b64encode(b"text").decode()}
    sync = {"number": 3, "name": "fsync", "path": "checkpoints/a"}
    sync_folder = {"number": 4, "name": "fsync", "path": "checkpoints"}
    chooser = random.Random(4)
    path = PurePosixPath("checkpoints/a")
    unsynced = [crash([create, write], chooser).get(path) for _ in range(50)]
    assert None in unsynced
    assert b"" in unsynced
    assert bytes(4) in unsynced
    assert all(crash([create, write, sync, sync_folder], chooser)[path] == b"text" for _ in range(50))

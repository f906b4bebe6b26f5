"""The files of the splits are replaced together or not at all, whenever the process is killed."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from minilora.data.prepare import SplitOptions, prepare
from minilora.data.split_files import recover_splits, split_of
from minilora.errors import UserError
from minilora.system.files import GrowingFile, StorageError
from minilora.system.locks import lock_folder


@pytest.fixture
def source(tmp_path: Path) -> list[Path]:
    path = tmp_path / "a.tsv"
    path.write_text("label\ttext\n" + "".join(f"{n % 2}\t评论{n}\n" for n in range(40)), "utf-8")
    return [path]


def test_a_failed_write_leaves_the_earlier_splits_together(
    source: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, tmp_path / "out", SplitOptions(seed=1))
    before = contents(tmp_path / "out")
    calls = itertools.count(1)

    def full_disk(file: GrowingFile, content: bytes) -> None:
        if next(calls) == 3:
            raise StorageError("test.jsonl: cannot be written (No space left on device)")
        plain(file, content)

    plain = GrowingFile.append
    monkeypatch.setattr(GrowingFile, "append", full_disk)
    with pytest.raises(StorageError, match="cannot be written"):
        prepare(source, tmp_path / "out", SplitOptions(seed=2))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    recover_splits(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("has_earlier", [True, False])
def test_a_replacing_killed_anywhere_is_completed_with_all_old_files_or_all_new_ones(
    source: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_earlier: bool
) -> None:
    prepare(source, tmp_path / "old", SplitOptions(seed=1))
    prepare(source, tmp_path / "new", SplitOptions(seed=2))
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert old["train.jsonl"] != new["train.jsonl"]
    ends = []
    for moment in ("written", *range(1, 6)):
        folder = tmp_path / f"{moment}"
        if has_earlier:
            shutil.copytree(tmp_path / "old", folder)
        with monkeypatch.context() as patch:
            if moment == "written":  # in the middle of the temporary files
                stop_at(patch, GrowingFile, "append", 3)
            else:
                stop_at(patch, Path, "replace", moment)
            if moment == 5:  # there are four files
                prepare(source, folder, SplitOptions(seed=2))
            else:
                with pytest.raises(KeyboardInterrupt):
                    prepare(source, folder, SplitOptions(seed=2))
        recover_splits(folder)
        ends.append(contents(folder))
    assert ends == [old if has_earlier else {}, *[new] * 5]


def stop_at(patch: pytest.MonkeyPatch, owner: object, name: str, number: int) -> None:
    """Kills the process, as it were, in call `number` of a function."""
    plain = getattr(owner, name)
    calls = itertools.count(1)

    def stop(*arguments: object) -> object:
        if next(calls) == number:
            raise KeyboardInterrupt
        return plain(*arguments)

    patch.setattr(owner, name, stop)


def test_a_recovery_that_was_killed_is_completed(
    source: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, tmp_path / "new", SplitOptions(seed=2))
    for moment in range(1, 5):
        folder = tmp_path / f"{moment}"
        prepare(source, folder, SplitOptions(seed=1))
        with monkeypatch.context() as patch:
            stop_at(patch, Path, "replace", 1)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, folder, SplitOptions(seed=2))
        with monkeypatch.context() as patch:
            stop_at(patch, Path, "replace", moment)
            with pytest.raises(KeyboardInterrupt):
                recover_splits(folder)
        recover_splits(folder)
        assert contents(folder) == contents(tmp_path / "new")


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_splits_that_are_not_as_they_were_written_do_not_replace_others(
    damage: str, source: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    prepare(source, folder, SplitOptions(seed=1))
    before = contents(folder)
    with monkeypatch.context() as patch:
        stop_at(patch, Path, "replace", 1)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, folder, SplitOptions(seed=2))
    unfinished = folder / ".writing-test.jsonl"
    unfinished.unlink()
    if damage == "changed":
        unfinished.write_text('{"text": "好", "label": 1}\n', "utf-8")
    recover_splits(folder)
    assert contents(folder) == before


def test_a_second_kill_while_other_splits_are_written_leaves_no_mixture_either(
    source: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    wholes = []
    for seed in (1, 2, 3):
        prepare(source, tmp_path / f"{seed}", SplitOptions(seed=seed))
        wholes.append(contents(tmp_path / f"{seed}"))
    prepare(source, folder, SplitOptions(seed=1))
    for seed, owner, name in ((2, Path, "replace"), (3, GrowingFile, "append")):
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, 2)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, folder, SplitOptions(seed=seed))
    recover_splits(folder)
    assert contents(folder) in wholes


def test_without_leftovers_nothing_is_recovered(source: list[Path], tmp_path: Path) -> None:
    recover_splits(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    prepare(source, tmp_path / "out", SplitOptions(seed=1))
    before = contents(tmp_path / "out")
    recover_splits(tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.skipif(os.name == "nt", reason="folders are not locked there")
def test_what_another_process_is_writing_is_no_leftover(source: list[Path], tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", SplitOptions(seed=1))
    (tmp_path / "out" / ".writing-train.jsonl").write_text("begun", "utf-8")
    with lock_folder(tmp_path / "out", "folder for the data"):
        before = contents(tmp_path / "out")
        with pytest.raises(UserError, match="out: another run is writing there"):
            recover_splits(tmp_path / "out")
        with pytest.raises(UserError, match="out: another run is writing there"):
            prepare(source, tmp_path / "out", SplitOptions(seed=2))
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.tsv", "train"),
        ("dev.tsv", "validation"),
        ("chn_senti_corp-valid.arrow", "validation"),
        ("Test-00000-of-00001.parquet", "test"),
        ("latest.tsv", None),
        ("constrained.tsv", None),
        ("train_test.tsv", None),
    ],
)
def test_a_file_name_holds_its_split_as_a_whole_word(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split

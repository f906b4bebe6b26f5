"""metrics.jsonl survives an interruption."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from minilora.errors import UserError
from minilora.runs.metrics_log import RunLog, read_metrics
from minilora.system.files import StorageError, json_bytes

VALUES = {"train_loss": 0.5, "learning_rate": 2e-4, "tokens_per_s": 812.3}


def entry(step: int) -> dict[str, Any]:
    return {"step": step, **VALUES}


def write_entries(directory: Path, *steps: int, start: int = 0) -> None:
    log = RunLog(directory, 10, start)
    for step in steps:
        log.show(entry(step))
        log.write(entry(step))
    log.close()


def test_entries_read_back_as_written(tmp_path: Path) -> None:
    write_entries(tmp_path, 1, 2)
    assert read_metrics(tmp_path) == [entry(1), entry(2)]
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert b"\r" not in content
    assert [json.loads(line)["step"] for line in content.splitlines()] == [1, 2]


def test_a_written_entry_is_there_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, 0)
    log.write(entry(1))
    assert read_metrics(tmp_path) == [entry(1)]
    log.close()


def test_resuming_removes_the_lines_behind_the_checkpoint(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    write_entries(tmp_path / "whole", 1, 2, 3, 4)
    write_entries(tmp_path / "cut", 1, 2, 3)
    write_entries(tmp_path / "cut", 3, 4, start=2)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_pending_entry_out_of_a_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    pending = {"step": 1, "epoch": 0.1, **VALUES, "skipped": True, "rows": ["a:1"], "peak_memory_bytes": 5}
    for name, first in (("straight", pending), ("resumed", json.loads(json_bytes(pending)))):
        (tmp_path / name).mkdir()
        log = RunLog(tmp_path / name, 10, 0)
        log.write({**first, "eval_loss": 0.1, "eval_accuracy": 1.0, "eval_f1": 1.0})
        log.close()
    straight, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "resumed"))
    assert straight == resumed
    assert list(json.loads(straight)) == [*pending, "eval_loss", "eval_accuracy", "eval_f1"]


def test_a_new_run_begins_an_empty_log(tmp_path: Path) -> None:
    write_entries(tmp_path, 1, 2)
    RunLog(tmp_path, 10, 0).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", [b'{"step": 3, "tra', b"{", b"\0" * 40])
def test_a_line_that_was_cut_off_in_writing_is_left_out_and_replaced(tmp_path: Path, cut: bytes) -> None:
    write_entries(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(cut)
    assert read_metrics(tmp_path) == [entry(1), entry(2)]
    write_entries(tmp_path, 3, start=2)
    assert read_metrics(tmp_path) == [entry(1), entry(2), entry(3)]


@pytest.mark.parametrize("line", [b'{"foo": 1}', b"5", b'{"step": "2"}', b"\xff\xfe{\x00", b'{"step": 2, "tra'])
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, line: bytes) -> None:
    write_entries(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .+expected a step; move the file away"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_json_is_never_written(tmp_path: Path, value: float) -> None:
    log = RunLog(tmp_path, 1, 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({**entry(1), "train_loss": value})
    log.close()
    assert read_metrics(tmp_path) == []


def test_a_missing_log_has_no_entries(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_the_bar_shows_the_current_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 10, 4)
    log.show(entry(5))
    log.show({**entry(6), "eval_loss": 0.3, "eval_f1": 0.75}, improved=True)
    log.close()
    out, err = capsys.readouterr()
    assert "6/10" in err
    assert "loss=0.5000, lr=2.00e-04, tok/s=812" in err
    assert out == "step 6: loss 0.3000  f1 0.7500  best so far\n"


def test_a_step_that_was_skipped_has_no_loss_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {**entry(1), "train_loss": None, "grad_norm": None, "skipped": True, "rows": ["数据.jsonl:3"]}
    log = RunLog(tmp_path, 10, 0)
    log.show(skipped)
    log.write(skipped)
    log.close()
    assert "loss=non-finite, lr=2.00e-04" in capsys.readouterr().err
    assert read_metrics(tmp_path) == [skipped]


def test_lines_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    log = RunLog(tmp_path, 10, 0)
    log.write(entry(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        log.sync()
    log.close()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size] != [0]


def test_a_log_is_shortened_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write_entries(tmp_path, 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            RunLog(tmp_path, 10, 2)
    assert read_metrics(tmp_path) == [entry(1), entry(2), entry(3)]
    RunLog(tmp_path, 10, 2).close()
    assert read_metrics(tmp_path) == [entry(1), entry(2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a full disk")
def test_a_line_that_cannot_be_written_is_explained_and_closing_says_nothing_more(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        log.write(entry(1))
    log.close()


def test_a_log_that_cannot_be_synced_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    log = RunLog(tmp_path, 10, 0)
    log.write(entry(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written \(Input/output error\)"):
            log.sync()
    log.close()


def test_a_line_goes_to_the_file_whole_however_little_of_it_the_system_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.write
    log = RunLog(tmp_path, 10, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, rest: plain(descriptor, rest[:7]))
        log.write(entry(1))
    log.close()
    assert read_metrics(tmp_path) == [entry(1)]


def test_a_folder_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written \(No such file or directory\)"):
        RunLog(tmp_path / "absent", 10, 0)


def test_a_line_that_is_no_entry_does_no_harm_behind_the_checkpoint_and_is_named_before_it(tmp_path: Path) -> None:
    write_entries(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 40 + b"\n" + json.dumps(entry(4)).encode() + b"\n")
    assert read_metrics(tmp_path, 2) == [entry(1), entry(2)]
    for step in (None, 3):
        with pytest.raises(UserError, match=r"metrics\.jsonl:3: .+expected a step"):
            read_metrics(tmp_path, step)
    write_entries(tmp_path, 3, start=2)
    assert read_metrics(tmp_path) == [entry(1), entry(2), entry(3)]

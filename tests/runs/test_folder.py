"""The output folder: locked, refused early where it cannot be used, set aside on request; errors say what is saved."""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.errors import UserError
from minilora.runs import folder as folder_module
from minilora.runs import train
from minilora.runs.folder import RESTARTING, RUN_FILES, set_run_aside
from minilora.runs.metrics_log import read_metrics
from minilora.runs.train import fit
from minilora.system.files import StorageError
from minilora.system.locks import lock_folder
from minilora.system.signals import Interrupted
from tests.runs.conftest import Fit, contents, lasting, make_config, saved_steps


def open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "open_run", lambda *_: pytest.fail("too late"))


def test_a_second_run_in_the_same_folder_is_refused(run: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with lock_folder(tmp_path / "run", "train.output_dir"):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .+ choose another train\.output_dir"):
            run()
        assert read_metrics(tmp_path / "run") == []
    assert run().is_dir()


def test_restart_sets_everything_aside_and_begins_anew(
    final: Path, tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    expected, log = contents(final), lasting(tmp_path / "run")
    assert fit(make_config(data, tmp_path / "run"), tiny_checkpoint(), restart=True) == final
    assert [path.name for path in (tmp_path / "run").glob("previous-*")] == ["previous-1"]
    previous = tmp_path / "run" / "previous-1"
    assert contents(final) == contents(previous / "checkpoints" / "final") == expected
    assert lasting(tmp_path / "run") == lasting(previous) == log


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("moment", range(1, 9))
def test_a_restart_that_was_killed_anywhere_is_completed_by_the_next_run(
    final: Path, run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, is_finished: bool
) -> None:
    directory = tmp_path / "run"
    for name in ("tensorboard", "wandb"):
        (directory / name).mkdir()
    (directory / "loss.png").write_bytes(b"a plot")
    if not is_finished:
        shutil.rmtree(final)
    names = sorted(name for name in RUN_FILES if (directory / name).exists())
    assert len(names) == 7  # and the folder that they are in: eight renamings
    log, saved = lasting(directory), saved_steps(final)
    calls = itertools.count(1)
    plain = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if next(calls) == moment:
            raise KeyboardInterrupt
        return plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            set_run_aside(directory)
    run()
    previous = directory / "previous-1"
    assert sorted(path.name for path in previous.iterdir()) == names
    assert (lasting(previous), saved_steps(previous / "checkpoints" / "final")) == (log, saved)
    assert lasting(directory) == log
    assert not (directory / RESTARTING).exists()
    assert [path.name for path in directory.glob("previous-*")] == ["previous-1"]


def test_restart_where_there_is_nothing_sets_nothing_aside(
    tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    fit(make_config(data, tmp_path / "run"), tiny_checkpoint(), restart=True)
    assert not list((tmp_path / "run").glob("previous-*"))


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "."])
def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_is_computed(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    open_nothing(monkeypatch)
    path = tmp_path / place if place != "." else tmp_path / "file"
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file", "utf-8")
    more = {"train.output_dir": path / "below"} if place == "." else {}
    with pytest.raises(UserError, match=r"cannot be written to \(.+\); choose another train\.output_dir"):
        run(**more)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_is_refused(run: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
        run()


def test_a_folder_in_place_of_the_log_is_refused_before_anything_is_computed(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_nothing(monkeypatch)
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl: .+; move it away"):
        run()


def test_a_missing_tensorboard_is_named_before_anything_is_computed(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    open_nothing(monkeypatch)
    with pytest.raises(UserError, match=r"train\.report_to: .*pip install tensorboard"):
        run(**{"train.report_to": "tensorboard"})
    assert read_metrics(tmp_path / "run") == []


def test_a_full_disk_says_that_what_is_saved_is_intact(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train.save_checkpoint

    def fill(*arguments: Any, state: Any, **more: Any) -> Path:
        if state.step == 2:
            raise StorageError("step-000002: cannot be written (No space left on device); make room")
        return plain(*arguments, state=state, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", fill)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            run()
    assert str(caught.value).endswith(f": {tmp_path / 'run' / 'checkpoints' / 'step-000001'}")
    expected = contents(run(**{"train.output_dir": tmp_path / "whole"}))
    resumed = contents(run())
    assert resumed["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    assert resumed["metrics.json"] == expected["metrics.json"]


def test_a_disk_that_fails_before_the_run_is_opened_does_not_hide_what_is_saved(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise StorageError("checkpoints: cannot be written (Input/output error)")

    shutil.rmtree(final)
    monkeypatch.setattr(folder_module, "recover_folders", fail)
    with pytest.raises(StorageError, match=r"Input/output error") as caught:
        run()
    assert str(caught.value).endswith(f": {final.with_name('step-000004')}")


@pytest.mark.parametrize(("place", "newest"), [("score_test_set", "none"), ("finish", "step-000004")])
def test_a_signal_outside_the_steps_names_the_newest_checkpoint_and_the_run_resumes_to_the_same_end(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, newest: str
) -> None:
    expected = contents(run(**{"train.output_dir": tmp_path / "whole"}))

    def interrupted(*_: object) -> Path:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, place, interrupted)
        with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
            run()
    assert caught.value.is_explained
    path = tmp_path / "run" / "checkpoints" / newest
    assert ("nothing done" if newest == "none" else f"resumes from {path}") in str(caught.value)
    final = contents(run())
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert final[name] == expected[name]

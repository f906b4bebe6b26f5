"""Entries go where `train.report_to` says; where a tracker fails, the run does not."""

import errno
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minilora.errors import UserError
from minilora.runs.trackers import Tracker, check_tracker, open_tracker, scalars_in

CONFIG = {"lora": {"r": 8}}
SKIPPED = {"step": 3, "train_loss": None, "learning_rate": 1e-4, "skipped": True, "rows": ["a.jsonl:1"]}


class FakeRun:
    """What `wandb.init` returns, as far as it is used; notes the calls."""

    def __init__(self, offline: bool) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.config = SimpleNamespace(update=lambda values, **more: self.calls.append(("config", values, more)))
        self.offline, self.dir, self.url = offline, "somewhere", "https://wandb.test/run"
        self.failure: Exception | None = None

    def define_metric(self, name: str, **more: Any) -> None:
        self.calls.append(("define", name, more))

    def log(self, entry: dict[str, Any]) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("log", entry))

    def finish(self, exit_code: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("finish", exit_code))


class FakeModule:
    """The module `wandb`, as far as it is used."""

    Settings = staticmethod(lambda **values: values)

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.begun: list[dict[str, Any]] = []
        self.offline = False
        self.failure: Exception | None = None

    def init(self, **settings: Any) -> FakeRun:
        if self.failure is not None:
            raise self.failure
        self.begun.append(settings)
        self.runs.append(FakeRun(self.offline))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    module = FakeModule()
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_without_a_tracker_entries_go_nowhere(tmp_path: Path) -> None:
    with open_tracker("none", tmp_path, 0, CONFIG) as tracker:
        tracker.write(SKIPPED)
    assert type(tracker) is Tracker
    assert list(tmp_path.iterdir()) == []


def test_only_numeric_values_are_sent() -> None:
    assert scalars_in(SKIPPED) == {"step": 3, "learning_rate": 1e-4, "skipped": True}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_tracker("none")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^train\.report_to: {name} .+pip install {name}, or use none"):
        check_tracker(name)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_cannot_be_imported_is_named_before_the_run(
    break_package: Callable[..., None], name: str
) -> None:
    break_package(name, "raise TypeError('Descriptors cannot be created directly.\\nIf this call came from')")
    with pytest.raises(UserError, match=rf"^train\.report_to: {name} .+\(TypeError: Descriptors .+ly\.\); .+ none"):
        check_tracker(name)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_entries_and_drops_those_that_are_repeated(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, numbers in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        with open_tracker("tensorboard", tmp_path, step, CONFIG) as tracker:
            for number in numbers:
                tracker.write({**SKIPPED, "step": number, "learning_rate": number * (1 + step)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["learning_rate", "skipped"]
    assert [(e.step, e.value) for e in events.Scalars("learning_rate")] == [(1, 1), (2, 4), (3, 6), (4, 8)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_file_in_place_of_tensorboards_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match=r"tensorboard: cannot be written to .*; choose another train\.output_dir"):
        open_tracker("tensorboard", tmp_path, 0, CONFIG)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.parametrize("moment", ["add_scalar", "close"])
def test_a_run_continues_without_a_tensorboard_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_tracker("tensorboard", tmp_path, 0, CONFIG) as tracker:
        tracker.write({"step": 1, "train_loss": 1.0})
        monkeypatch.setattr(SummaryWriter, moment, fail)
        tracker.write({"step": 2, "train_loss": 1.0})
    warning = (
        "tensorboard: [Errno 28] No space left on device; the run continues without it; metrics.jsonl has everything\n"
    )
    assert capsys.readouterr().err == warning


def test_entries_are_drawn_over_their_own_step_and_weights_and_biases_counts_calls(
    tmp_path: Path, wandb: FakeModule
) -> None:
    with open_tracker("wandb", tmp_path, 0, CONFIG) as tracker:
        tracker.write({"step": 1, "train_loss": 0.5})
        tracker.write(SKIPPED)
    assert wandb.runs[0].calls == [
        ("config", CONFIG, {"allow_val_change": True}),
        ("define", "step", {}),
        ("define", "*", {"step_metric": "step"}),
        ("log", {"step": 1, "train_loss": 0.5}),  # no step= that has to grow
        ("log", {"step": 3, "learning_rate": 1e-4, "skipped": True}),
        ("finish", 0),
    ]


def test_a_resumed_run_is_the_same_run_there_and_a_new_one_another(tmp_path: Path, wandb: FakeModule) -> None:
    for name, step in (("first", 0), ("first", 5), ("second", 0)):
        open_tracker("wandb", tmp_path / name, step, CONFIG).close(True)
    first, resumed, second = wandb.begun
    assert first["id"] == resumed["id"] != second["id"]
    assert first["resume"] == "allow"
    assert first["dir"] == str(tmp_path / "first")


def test_the_project_is_the_environments_where_it_names_one(
    tmp_path: Path, wandb: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_tracker("wandb", tmp_path, 0, CONFIG)
    monkeypatch.setenv("WANDB_PROJECT", "reviews")
    open_tracker("wandb", tmp_path, 0, CONFIG)
    assert [settings["project"] for settings in wandb.begun] == ["minilora", "reviews"]


def test_where_the_run_is_to_be_seen_is_said(
    tmp_path: Path, wandb: FakeModule, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_tracker("wandb", tmp_path, 0, CONFIG)
    monkeypatch.setattr(wandb, "offline", True)
    open_tracker("wandb", tmp_path, 0, CONFIG)
    assert capsys.readouterr().out == "Weights & Biases: https://wandb.test/run\nWeights & Biases: somewhere\n"


def test_a_run_that_cannot_be_begun_there_says_what_to_do(tmp_path: Path, wandb: FakeModule) -> None:
    wandb.failure = RuntimeError("No API key configured.")
    with pytest.raises(
        UserError, match=r"train\.report_to: .+No API key configured.+`wandb login`.+WANDB_MODE=offline"
    ):
        open_tracker("wandb", tmp_path, 0, CONFIG)


def test_a_run_that_was_stopped_did_not_end_well_there(tmp_path: Path, wandb: FakeModule) -> None:
    with pytest.raises(KeyboardInterrupt), open_tracker("wandb", tmp_path, 0, CONFIG):
        raise KeyboardInterrupt
    assert wandb.runs[0].calls[-1] == ("finish", 1)


@pytest.mark.parametrize("moment", ["write", "close"])
def test_a_run_continues_without_a_tracker_that_fails(
    tmp_path: Path, wandb: FakeModule, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    with open_tracker("wandb", tmp_path, 0, CONFIG) as tracker:
        wandb.runs[0].failure = BrokenPipeError("the service has ended")
        if moment == "write":
            tracker.write({"step": 1})
            tracker.write({"step": 2})
    warning = "wandb: the service has ended; the run continues without it; metrics.jsonl has everything\n"
    assert capsys.readouterr().err == warning


def test_the_library_itself_takes_the_entries_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for config, steps in (({"train": {"save_steps": 1}}, (1, 2, 3)), ({"train": {"save_steps": 2}}, (2, 3, 4))):
        with open_tracker("wandb", tmp_path, steps[0] - 1, config) as tracker:
            for step in steps:
                tracker.write({**SKIPPED, "step": step})
    name = (tmp_path / "wandb" / "run-id").read_text("utf-8")
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))) == 2

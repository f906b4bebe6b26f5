"""What the tests of runs share: a run of four steps on a tiny model, and ways to disturb it."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.config import Config, load_config
from minilora.qlora import step as step_module
from minilora.qlora.step import StepResult, StepSettings, TrainState
from minilora.runs import setup, train
from minilora.runs.checkpoint import list_checkpoints, step_of
from minilora.runs.metrics_log import MEASURED_KEYS, read_metrics
from minilora.runs.train import fit
from minilora.system.files import json_bytes
from minilora.system.manifest import read_manifest, write_folder

Fit = Callable[..., Path]
STEPS = 4
CONSTANT = {"train.lr_scheduler_type": "constant", "train.warmup_ratio": 0}


def make_config(data: Path, output: Path, **more: Any) -> Config:
    keys = {
        "data.dir": data,
        "lora.r": 2,
        "model.compute_dtype": "float32",
        "train.output_dir": output,
        "train.max_steps": STEPS,
        "train.per_device_train_batch_size": 4,
        "train.learning_rate": 1e-2,
        "train.eval_steps": 2,
        "train.save_steps": 1,
        "train.save_total_limit": 9,
        **more,
    }
    return load_config(None, [f"{name}={value}" for name, value in keys.items()])


@pytest.fixture
def data(processed_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(processed_data, tmp_path / "data"))


@pytest.fixture
def run(tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path) -> Fit:
    """`fit` in tmp_path/"run", with keys that differ from `make_config`'s: run(**{"lora.r": 4})."""
    return lambda **more: fit(make_config(data, tmp_path / "run", **more), tiny_checkpoint())


@pytest.fixture
def with_plots() -> None:
    """For tests that look at the plots."""


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of such a run's time is matplotlib's."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def final(run: Fit) -> Path:
    """The final folder of a finished run."""
    return run()


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lasting(directory: Path) -> list[dict[str, Any]]:
    """The log without what is measured."""
    return [{k: v for k, v in entry.items() if k not in MEASURED_KEYS} for entry in read_metrics(directory)]


def saved_steps(final: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(final.parent)]


def remove_folders(final: Path, *steps: int) -> None:
    """Leaves a run as if it had been killed before these checkpoints and its end."""
    for name in ("final", *(f"step-{step:06d}" for step in steps)):
        shutil.rmtree(final.with_name(name))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Changes a file of a folder together with its manifest, as if it had been written so."""
    files = {path: (folder / path).read_bytes() for path in read_manifest(folder)["files"]}
    write_folder(folder, {**files, name: content}.items(), read_manifest(folder)["facts"])


def change_best_step(checkpoint: Path, step: int) -> None:
    """Makes a step the best one so far, which no later one surpasses."""
    best = {"best_step": step, "best_metric": 1.0, "best_loss": 0.0}
    rewrite(checkpoint, "state.json", json_bytes({**read(checkpoint / "state.json"), **best}))


def load_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a run comes to loading the base model."""
    monkeypatch.setattr(setup, "build_model", lambda *_, **__: pytest.fail("too late"))


def change_steps(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[TrainState, StepSettings], StepResult | None]
) -> None:
    """Calls `change` before each optimizer step; a result that it returns replaces the step."""
    plain = train.train_step

    def take(state: TrainState, micro_batches: Any, settings: StepSettings, interruptible: Any) -> StepResult:
        return change(state, settings) or plain(state, micro_batches, settings, interruptible)

    monkeypatch.setattr(train, "train_step", take)


def raise_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Raises `error` in place of an optimizer step."""

    def change(_: TrainState, settings: StepSettings) -> None:
        if settings.step == step:
            raise error

    change_steps(monkeypatch, change)


def spoil_steps(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Makes the losses of these optimizer steps NaN."""
    plain, plain_step = step_module.next_token_nll, train.train_step

    def spoiled(*arguments: Any) -> tuple[torch.Tensor, int]:
        nll, count = plain(*arguments)
        return nll * math.nan, count

    def take(state: TrainState, micro_batches: Any, settings: StepSettings, interruptible: Any) -> StepResult:
        with monkeypatch.context() as patch:
            if settings.step in steps:
                patch.setattr(step_module, "next_token_nll", spoiled)
            return plain_step(state, micro_batches, settings, interruptible)

    monkeypatch.setattr(train, "train_step", take)

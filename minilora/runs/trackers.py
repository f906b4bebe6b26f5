"""The rows of metrics.jsonl, sent to TensorBoard or Weights & Biases as well.

metrics.jsonl has everything and is what a run goes on from; a tracker is a copy of it for other eyes. A resumed run
writes the steps behind its checkpoint again. TensorBoard is told to forget them. Weights & Biases forgets nothing and
wants its own step to grow, so that is left to count calls, and the curves are drawn over the row's "step".
"""

import importlib.util
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from minilora.errors import UserError
from minilora.system.console import info, warn
from minilora.system.files import make_folder, replace_file

PROJECT = "minilora"  # at Weights & Biases, where WANDB_PROJECT names no other


class Tracker:
    """Where rows go beside metrics.jsonl: this one sends them nowhere. A context manager around the whole run.

    What fails there, a full disk or a network, is said, and the run goes on without it.
    """

    _name = "none"
    _is_lost = False

    def write(self, row: dict[str, Any]) -> None:
        """Takes a row of metrics.jsonl."""
        self._try(lambda: self._write(row))

    def close(self, is_done: bool) -> None:
        """Ends it; `is_done` says whether the run came to its end."""
        self._try(lambda: self._close(is_done))

    def _write(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def _close(self, is_done: bool) -> None:
        """Nothing."""

    def _try(self, work: Callable[[], None]) -> None:
        if self._is_lost:
            return
        try:
            work()
        except Exception as error:  # of many kinds, by the library
            self._is_lost = True
            warn(f"{self._name}: {error}; the run goes on without it, metrics.jsonl has everything")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kind is None)


class TensorBoard(Tracker):
    """Event files in `directory/tensorboard`."""

    _name = "tensorboard"

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / "tensorboard"
        make_folder(folder, "train.output_dir")
        self._events = SummaryWriter(folder, purge_step=step + 1)

    def _write(self, row: dict[str, Any]) -> None:
        """Adds a point to each curve."""
        numbers = numbers_in(row)
        step = numbers.pop("step")
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def _close(self, is_done: bool) -> None:
        """Closes the files."""
        self._events.close()


class WeightsAndBiases(Tracker):
    """A run at Weights & Biases, the same one when it is continued.

    WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY and the like have the say that they have everywhere. The run's id stands in
    `directory/wandb/run-id`, where the library keeps its own files too.
    """

    _name = "wandb"

    def __init__(self, directory: Path, config: dict[str, Any]):
        import wandb

        folder = directory / "wandb"
        make_folder(folder, "train.output_dir")
        path = folder / "run-id"
        if not path.is_file():
            replace_file(path, secrets.token_hex(4).encode())
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                id=path.read_text("utf-8"),
                resume="allow",
                dir=str(directory),
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._run.config.update(config, allow_val_change=True)  # a resumed run may save more often, for instance
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # no key, no network, no such project: the library has many errors for it
            raise UserError(
                f"train.report_to: wandb cannot begin a run ({error}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or use none"
            ) from error
        place = self._run.dir if self._run.offline else self._run.url
        if place:  # WANDB_MODE=disabled has none
            info(f"Weights & Biases: {place}")

    def _write(self, row: dict[str, Any]) -> None:
        """Sends a row."""
        self._run.log(numbers_in(row))

    def _close(self, is_done: bool) -> None:
        """Waits for what is still to be sent, and says how the run ended."""
        self._run.finish(exit_code=0 if is_done else 1)


def check_tracker(report_to: str) -> None:
    """Raises UserError where what `train.report_to` names is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"train.report_to: {report_to} is not installed; pip install {report_to}, or use none")


def open_tracker(report_to: str, directory: Path, step: int, config: dict[str, Any]) -> Tracker:
    """The tracker that `train.report_to` names.

    Args:
        report_to: "none", "tensorboard" or "wandb".
        directory: the run's output folder.
        step: steps that are done.
        config: the resolved configuration, which Weights & Biases shows beside the curves.

    Raises:
        UserError: Weights & Biases cannot begin a run, or there is no folder for the files.
    """
    if report_to == "tensorboard":
        return TensorBoard(directory, step)
    if report_to == "wandb":
        return WeightsAndBiases(directory, config)
    return Tracker()


def numbers_in(row: dict[str, Any]) -> dict[str, float]:
    """What of a row is a number: not the places of skipped records, nor a loss that was none."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}

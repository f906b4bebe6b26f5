"""What a run says while it goes: metrics.jsonl, and a progress bar with the numbers of the moment.

metrics.jsonl has a line for every logged step, with the keys that apply to it:

    {"step": 20, "epoch": 0.16, "train_loss": 0.41, "learning_rate": 0.0002, "grad_norm": 1.3,
     "tokens_per_s": 850.2, "peak_memory_bytes": 1417000000, "eval_loss": 0.33, "eval_accuracy": 0.87, "eval_f1": 0.86}

A step that changed nothing, because its loss or gradient was no number, has null for it, "skipped": true, and "rows":
where its records stand.

All of it but tokens_per_s and peak_memory_bytes, which are measurements of the machine, is equal to the bit when a run
is interrupted and goes on: lines behind the checkpoint are taken back and written again.
"""

import json
import os
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.runs.trackers import Tracker
from minilora.system.console import progress
from minilora.system.files import replace_file, storage_errors

MEASURED_KEYS = ("tokens_per_s", "peak_memory_bytes")


class RunLog:
    """Writer of metrics.jsonl and owner of the progress bar."""

    def __init__(self, directory: Path, total_steps: int, step: int, tracker: Tracker | None = None):
        """Opens the log of a run that stands at `step`; later lines, written before it was stopped, go.

        Args:
            directory: where metrics.jsonl is.
            total_steps: length of the progress bar.
            step: steps that are done.
            tracker: gets the lines as well; whoever opened it closes it.
        """
        self._path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(directory, step) if row["step"] <= step]
        replace_file(self._path, "".join(_line(row) for row in kept).encode())
        with storage_errors(self._path):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._bar = progress("train", total_steps, "step", initial=step, leave=True)
        self._tracker = tracker or Tracker()

    def advance(self, numbers: dict[str, Any]) -> None:
        """One step on; shows the numbers of the moment beside the bar."""
        self._bar.set_postfix(
            {
                "loss": "no number" if numbers["train_loss"] is None else f"{numbers['train_loss']:.4f}",
                "lr": f"{numbers['learning_rate']:.2e}",
                "tok/s": f"{numbers['tokens_per_s']:.0f}",
            },
            refresh=False,
        )
        self._bar.update()

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line, and makes it survive the end of this process."""
        line = _line(row).encode()
        with storage_errors(self._path, len(line)):
            while line:
                line = line[os.write(self._descriptor, line) :]
        self._tracker.write(row)

    def sync(self) -> None:
        """Makes the lines so far survive a loss of power, as the checkpoint does that is written next."""
        with storage_errors(self._path):
            os.fsync(self._descriptor)

    def info(self, text: str) -> None:
        """A line of text above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        """Ends the bar and closes the file."""
        self._bar.close()
        os.close(self._descriptor)


class NoLog(RunLog):
    """The log of a rank that is not the first: nothing is written, and nothing is shown."""

    def __init__(self) -> None:
        """Opens nothing."""

    def advance(self, numbers: dict[str, Any]) -> None:
        """Nothing."""

    def write(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def info(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"  # NaN and Infinity are not JSON


def read_metrics(directory: Path, step: int | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut off in writing is left out.

    Args:
        directory: where it is.
        step: where a checkpoint is: lines behind it are written again, whatever a loss of power made of them.

    Raises:
        UserError: another line is not a row, or the file cannot be read.
    """
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); move it away") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:
            if number == len(lines) or (step is not None and rows and rows[-1]["step"] >= step):
                break
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{number}: is not a line of a run's log, expected a step; move the file away")
        rows.append(row)
    return rows

"""A run's log: metrics.jsonl, and a progress bar with the current metrics.

metrics.jsonl has a line for every logged step, with the keys that apply to it:

    {"step": 20, "epoch": 0.16, "train_loss": 0.41, "learning_rate": 0.0002, "grad_norm": 1.3,
     "tokens_per_s": 850.2, "peak_memory_bytes": 1417000000, "eval_loss": 0.33, "eval_accuracy": 0.87, "eval_f1": 0.86,
     "eval_macro_f1": 0.87}

train_loss is what is trained on, with train.class_weights. eval_loss never has weights: runs with and without them are
compared by it, and it is the mean over texts as they come.

A step that was skipped, because its loss or gradient was non-finite, has null for it, "skipped": true, and "rows": file
and line of its records. On a GPU "reserved_bytes" is what PyTorch holds of it, with holes: more than the peak.

When a run is interrupted and resumed, lines behind the checkpoint are removed and written anew; all of them are equal
to the bit, except those that are measured (MEASURED_KEYS).
"""

import json
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.runs.trackers import Tracker
from minilora.system.console import progress
from minilora.system.files import GrowingFile, replace_file

VALIDATED = ("loss", "accuracy", "f1", "macro_f1")  # metrics of a validation, logged with eval_ before them
MEASURED_KEYS = ("tokens_per_s", "peak_memory_bytes", "reserved_bytes")
# In this order: a checkpoint has those of a pending entry sorted.
KEYS = (
    *("step", "epoch", "train_loss", "learning_rate", "grad_norm", "tokens_per_s", "skipped", "rows"),
    *("peak_memory_bytes", "reserved_bytes", *(f"eval_{name}" for name in VALIDATED)),
)


class RunLog:
    """Writer of metrics.jsonl and owner of the progress bar."""

    def __init__(self, directory: Path | None, total_steps: int, step: int, tracker: Tracker | None = None):
        """Opens the log of a run that has done `step` of `total_steps`, and removes later lines.

        `directory` is None on a rank that writes nothing. `tracker`, which its opener closes, gets the entries as well.
        """
        self._file: GrowingFile | None = None
        if directory is not None:
            path = directory / "metrics.jsonl"
            kept = [entry for entry in read_metrics(directory, step) if entry["step"] <= step]
            replace_file(path, b"".join(map(_line, kept)))
            self._file = GrowingFile(path, replaces=False)
        self._bar = progress("train", total_steps, "step", initial=step, leave=True)
        self._tracker = tracker or Tracker()

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line, which survives the end of this process."""
        if self._file is not None:
            self._file.append(_line(entry))
            self._tracker.write(entry)

    def show(self, entry: dict[str, Any], improved: bool = False) -> None:
        """Moves the bar by a step; prints the metrics of a validation above it."""
        loss = "non-finite" if entry["train_loss"] is None else f"{entry['train_loss']:.4f}"
        shown = {"loss": loss, "lr": f"{entry['learning_rate']:.2e}", "tok/s": f"{entry['tokens_per_s']:.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if "eval_loss" in entry:
            self.info(f"step {entry['step']}: {format_metrics(entry)}{'  best so far' if improved else ''}")

    def sync(self) -> None:
        """Makes the lines so far survive a loss of power: the checkpoint that is written next counts on them."""
        if self._file is not None:
            self._file.sync()

    def info(self, text: str) -> None:
        """A line of text above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()


def format_metrics(metrics: dict[str, Any]) -> str:
    """Loss, accuracy and F1 for a line on the screen, and macro F1 where that is another number."""
    shown = {name: metrics.get(name, metrics.get(f"eval_{name}")) for name in VALIDATED}
    if shown["macro_f1"] == shown["f1"]:
        del shown["macro_f1"]
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)


def _line(entry: dict[str, Any]) -> bytes:
    entry = {**{key: entry[key] for key in KEYS if key in entry}, **entry}
    return (json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n").encode()  # NaN and Infinity are not JSON


def read_metrics(directory: Path, step: int | None = None) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl without a last line that was cut off in writing; UserError if another is damaged.

    Lines behind `step`, the checkpoint to resume from, are written anew, so they may be damaged.
    """
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); move it away") from None
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line.decode("utf-8"))
        except ValueError:
            if number == len(lines) or (step is not None and entries and entries[-1]["step"] >= step):
                break
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise UserError(f"{path}:{number}: is not a line of a run's log, expected a step; move the file away")
        entries.append(entry)
    return entries

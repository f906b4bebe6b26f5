"""The entries of metrics.jsonl, sent to TensorBoard or Weights & Biases as well.

metrics.jsonl has everything and is what a run resumes from; a tracker has a copy. A resumed run repeats the steps
behind its checkpoint. TensorBoard is told to drop them (`purge_step`). Weights & Biases keeps everything and needs its
own step to increase, so that step counts calls, and the curves are drawn over the entry's "step".
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.system.console import info, warn
from minilora.system.files import make_folder, replace_file
from minilora.system.optional import MissingPackageError, import_optional

LIBRARIES = {"none": (), "tensorboard": ("tensorboard", "torch.utils.tensorboard"), "wandb": ("wandb",)}


class Tracker:
    """Where entries go beside metrics.jsonl; without arguments nowhere. A context manager around the run.

    When it fails, by a full disk or a network, it warns once and the run continues without it.
    """

    def __init__(
        self,
        name: str = "none",
        log: Callable[[dict[str, Any]], object] = lambda entry: None,
        finish: Callable[[bool], object] = lambda is_done: None,
    ):
        self._name, self._log, self._finish = name, log, finish
        self._is_lost = False

    def write(self, entry: dict[str, Any]) -> None:
        """Takes an entry of metrics.jsonl."""
        self._try(lambda: self._log(entry))

    def close(self, is_done: bool) -> None:
        """Ends it; `is_done` says whether the run came to its end."""
        self._try(lambda: self._finish(is_done))

    def _try(self, work: Callable[[], object]) -> None:
        if self._is_lost:
            return
        try:
            work()
        except Exception as error:  # of many kinds, by the library
            self._is_lost = True
            warn(f"{self._name}: {error}; the run continues without it; metrics.jsonl has everything")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(kind is None)


def _open_tensorboard(directory: Path, step: int) -> Tracker:
    """Event files in `directory/tensorboard`."""
    folder = directory / "tensorboard"
    make_folder(folder, "train.output_dir")
    events = import_optional("torch.utils.tensorboard").SummaryWriter(folder, purge_step=step + 1)

    def log(entry: dict[str, Any]) -> None:
        scalars = scalars_in(entry)
        step = scalars.pop("step")
        for name, value in scalars.items():
            events.add_scalar(name, value, step)

    return Tracker("tensorboard", log, lambda is_done: events.close())


def _open_wandb(directory: Path, config: dict[str, Any]) -> Tracker:
    """A run at Weights & Biases, the same one when it is resumed.

    WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY and the like work as usual. The run's id is in `directory/wandb/run-id`,
    beside the library's own files.
    """
    wandb = import_optional("wandb")
    folder = directory / "wandb"
    make_folder(folder, "train.output_dir")
    path = folder / "run-id"
    if not path.is_file():
        replace_file(path, secrets.token_hex(4).encode())
    try:
        run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "minilora",
            id=path.read_text("utf-8"),
            resume="allow",
            dir=str(directory),
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.config.update(config, allow_val_change=True)  # such as save_steps of a resumed run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
    except Exception as error:  # no key, no network, no such project: the library has many errors for it
        raise UserError(
            f"train.report_to: wandb cannot begin a run ({error}); log in with `wandb login`, set "
            "WANDB_MODE=offline, or use none"
        ) from error
    where = run.dir if run.offline else run.url
    if where:  # WANDB_MODE=disabled has none
        info(f"Weights & Biases: {where}")
    # `finish` waits until everything is sent.
    return Tracker(
        "wandb", lambda entry: run.log(scalars_in(entry)), lambda is_done: run.finish(exit_code=0 if is_done else 1)
    )


def check_tracker(report_to: str) -> None:
    """Imports what `train.report_to` names; UserError where it cannot be."""
    try:
        for name in LIBRARIES[report_to]:
            import_optional(name)
    except MissingPackageError as error:
        raise UserError(f"train.report_to: {error}, or use none") from None


def open_tracker(report_to: str, directory: Path, step: int, config: dict[str, Any]) -> Tracker:
    """The tracker that `train.report_to` names, for a run in `directory` with `step` steps done."""
    if report_to == "tensorboard":
        return _open_tensorboard(directory, step)
    if report_to == "wandb":
        return _open_wandb(directory, config)
    return Tracker()


def scalars_in(entry: dict[str, Any]) -> dict[str, float]:
    """The numeric values of an entry: without the list of skipped records and a non-finite loss, which is null."""
    return {name: value for name, value in entry.items() if isinstance(value, int | float)}

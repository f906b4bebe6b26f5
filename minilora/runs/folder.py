"""The output folder of a run: claimed for one process, with an earlier run resumed, left as finished, or set aside.

outputs/
    metrics.jsonl, loss.png, report.html, tensorboard/, wandb/
    checkpoints/                see checkpoint.py and finish.py
    previous-1/                 an earlier run, all of the above, after --restart
    .lock                       who writes here
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minilora.build import SharedBase
from minilora.config import Config
from minilora.runs.advice import NonFiniteError, out_of_memory
from minilora.runs.checkpoint import list_checkpoints, newest_checkpoint, prune_checkpoints, step_of
from minilora.runs.metrics_log import read_metrics
from minilora.runs.predictions import PREDICTIONS
from minilora.runs.run import Run
from minilora.runs.setup import open_run
from minilora.runs.trackers import check_tracker, open_tracker
from minilora.system.console import info
from minilora.system.distributed import Ranks
from minilora.system.files import StorageError, make_folder, patiently, storage_errors
from minilora.system.locks import lock_folder
from minilora.system.manifest import recover_folders
from minilora.system.memory import is_out_of_memory
from minilora.system.signals import Interrupted

RUN_FILES = ("metrics.jsonl", "loss.png", "report.html", PREDICTIONS, "tensorboard", "wandb", "checkpoints")
RESTARTING = ".restarting"


@contextmanager
def run_folder(
    config: Config, model_folder: Path, restart: bool, ranks: Ranks, base: SharedBase | None = None
) -> Iterator[Run | None]:
    """Locks the output folder and opens its run, at the newest checkpoint or at its beginning; None if it is finished.

    Of what ends the run within it says what is saved, and what to do. `base`: as `open_run`.
    """
    run: Run | None = None
    with ExitStack() as stack:
        try:
            if not ranks.run_on_rank_0(lambda: _claim(config, restart, stack)):
                run = _open_run(config, model_folder, ranks, stack, base=base)
            yield run
        except Interrupted as stop:
            if stop.is_explained or run is None:
                raise
            newest = newest_checkpoint(run.checkpoints)
            where = "nothing done" if newest == "none" else f"the same command resumes from {newest}"
            raise Interrupted(stop.signum, f"{stop}: {where}") from None
        except (StorageError, NonFiniteError) as error:
            newest = newest_checkpoint(Path(config.train.output_dir) / "checkpoints")
            raise type(error)(f"{error}\n  what is saved is intact; the newest checkpoint: {newest}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(config, run, error) from error


def _claim(config: Config, restart: bool, stack: ExitStack) -> bool:
    """Locks the folder and clears up what an earlier run left; returns whether that one is finished."""
    directory = Path(config.train.output_dir)
    checkpoints = directory / "checkpoints"
    restart = restart or (directory / RESTARTING).is_dir()  # a restart that was killed is ended first
    if (checkpoints / "final").is_dir() and not restart:
        return True
    make_folder(checkpoints, "train.output_dir")
    stack.enter_context(lock_folder(directory, "train.output_dir"))
    if restart:
        set_run_aside(directory)
    recover_folders(checkpoints)
    # What `RunLog` and the tracker would refuse shows here, before the first hour and not after it.
    read_metrics(directory, max(map(step_of, list_checkpoints(checkpoints)), default=0))
    check_tracker(config.train.report_to)
    return False


def _open_run(config: Config, model_folder: Path, ranks: Ranks, stack: ExitStack, base: SharedBase | None) -> Run:
    run, train = open_run(config, model_folder, ranks, base), config.train
    with ranks.barrier():
        if ranks.is_rank_0:
            prune_checkpoints(run.checkpoints, train.save_total_limit)  # what a run that was killed left to remove
            tracker = open_tracker(train.report_to, run.directory, run.logged_steps, config.to_dict())
            run.tracker = stack.enter_context(tracker)
    return run


def set_run_aside(directory: Path) -> None:
    """Moves an earlier run into `directory/previous-N`; nothing is deleted.

    It goes into `RESTARTING` first. Where that is there, a restart was killed half-way, and this completes it.
    """
    moving = directory / RESTARTING
    checkpoints = directory / "checkpoints"  # the one that was moved left an empty one
    earlier = [directory / name for name in RUN_FILES if (directory / name).exists() and not (moving / name).exists()]
    if not moving.is_dir() and earlier in ([], [checkpoints]) and not any(checkpoints.iterdir()):
        return  # there is none
    taken = [int(path.name[9:]) for path in directory.iterdir() if re.fullmatch(r"previous-[0-9]+", path.name)]
    target = directory / f"previous-{1 + max(taken, default=0)}"
    with storage_errors(target):
        moving.mkdir(exist_ok=True)
        for path in earlier:
            patiently(path.rename, moving / path.name)
        patiently(moving.rename, target)
        checkpoints.mkdir(exist_ok=True)
    finished = list_checkpoints(target / "checkpoints")
    info(f"set the earlier run ({len(finished)} checkpoints) aside in {target}")

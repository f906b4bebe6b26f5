"""Everything that a run needs to go on, written so that it is there as a whole or not at all.

    checkpoints/step-000120/
        adapter_config.json, adapter_model.safetensors   the adapter, as peft reads it, float32
        optimizer.safetensors                            AdamW's moments
        state.json                                       step, position in the data, best metric, hashes, configuration

A run's state is small because little of it lives in objects: the order of the data is a function of
(seed, epoch), the learning rate of the step, dropout of (seed, step, micro-batch). There is no generator to
save, none to restore too late, and none to forget.

A folder is written under a temporary name on the same disk, every file fsynced, then renamed, and the parent
fsynced: a reader sees the finished folder or none. Tensors are safetensors and the rest is JSON; nothing is
pickled. Older checkpoints are removed only after a newer one is in place, and the best one never.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from minilora.adapter import AdapterConfig, load_adapter_weights, save_adapter
from minilora.errors import UserError
from minilora.model import Qwen2ForCausalLM
from minilora.optim import Optimizer
from minilora.tensorfile import read_header, read_json, read_tensor

STEP_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class RunState:
    """What a run knows beside weights and moments.

    Attributes:
        step: optimizer steps done.
        samples_seen: training examples done, over all epochs: the position in the data.
        best_step: step of the best validation so far, 0 before the first.
        best_metric: its value.
        evals_without_improvement: validations since then, for early stopping.
        test_before: metrics of the test set before training, None if not asked for.
        data_sha256: of the split files, by name.
        model_sha256: of the base model's files, by name.
        scaler: state of the float16 loss scale, empty otherwise.
        config: the resolved configuration.
    """

    step: int
    samples_seen: int
    best_step: int
    best_metric: float | None
    evals_without_improvement: int
    test_before: dict[str, Any] | None
    data_sha256: dict[str, str]
    model_sha256: dict[str, str]
    scaler: dict[str, Any]
    config: dict[str, Any]


def save_checkpoint(
    directory: Path,
    model: Qwen2ForCausalLM,
    adapter: AdapterConfig,
    optimizer: Optimizer,
    state: RunState,
) -> Path:
    """Writes `directory/step-NNNNNN` and returns it; a leftover of the same name is replaced."""
    target = directory / f"step-{state.step:06d}"
    temporary = begin_folder(target)
    save_adapter(model, temporary, adapter)
    save_file(optimizer.tensors(), temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", dataclasses.asdict(state))
    replace_folder(temporary, target)
    return target


def load_checkpoint(folder: Path, model: Qwen2ForCausalLM, optimizer: Optimizer) -> RunState:
    """Puts weights and moments back into `model` and `optimizer`, and returns the rest.

    Raises:
        UserError: a file is missing or does not fit the model.
    """
    state = read_state(folder)
    load_adapter_weights(model, folder)
    path = folder / "optimizer.safetensors"
    entries = read_header(path)
    # No moments at all: saved before the first update, which float16 may leave out.
    if entries and {name: entry.shape for name, entry in entries.items()} != optimizer.state_shapes():
        raise UserError(f"{path}: its moments do not fit the adapter's parameters; start anew with --restart")
    optimizer.load_tensors({name: read_tensor(entry) for name, entry in entries.items()})
    return state


def read_state(folder: Path) -> RunState:
    """state.json of a checkpoint.

    Raises:
        UserError: it is missing, or of another version of this program.
    """
    path = folder / "state.json"
    content = read_json(path)
    try:
        return RunState(**content)
    except TypeError as error:
        raise UserError(f"{path}: is not a run's state ({error}); start anew with --restart") from None


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first; folders that were being written do not count."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[len("step-") :]))


def prune_checkpoints(directory: Path, keep: int, best_step: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best one, and leftovers of interrupted writes."""
    checkpoints = list_checkpoints(directory)
    kept = {*checkpoints[-keep:], directory / f"step-{best_step:06d}"}
    for path in checkpoints:
        if path not in kept:
            remove(path)
    for leftover in directory.glob(".writing-*"):
        remove(leftover)


def remove(path: Path) -> None:
    """Removes a folder or a file, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path, key: str) -> None:
    """Makes `folder` and writes into it: where that fails it should fail before hours are computed, not after.

    Args:
        folder: made if needed, with all above it.
        key: configuration key or option that named it, for the message.

    Raises:
        UserError: it is not a folder, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another {key}") from None


def write_json(path: Path, content: Any) -> None:
    """Pretty JSON with sorted keys: equal content, equal bytes."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, "utf-8", newline="\n")


def begin_folder(target: Path) -> Path:
    """The name under which `target` is written until `replace_folder`; what an interrupted write left there goes."""
    temporary = target.with_name(f".writing-{target.name}")
    remove(temporary)
    return temporary


def replace_folder(temporary: Path, target: Path) -> None:
    """Makes the finished folder `temporary` be `target`, whatever stood there, and durable.

    A folder cannot be renamed onto a filled one, so an old `target` first steps aside under a name that no
    reader takes for a checkpoint, and is removed when the new one is in place.
    """
    for path in sorted(temporary.rglob("*")):
        _fsync(path)
    _fsync(temporary)
    aside = target.with_name(f".writing-old-{target.name}")
    remove(aside)
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    _fsync(target.parent)
    with contextlib.suppress(OSError):  # the new one is in place
        remove(aside)


def _fsync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder; its rename is durable with the journal
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)  # some network file systems refuse it for folders
    finally:
        os.close(descriptor)

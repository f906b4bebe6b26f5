"""Everything that a run needs to resume, verified before it is trusted.

    checkpoints/step-000120/
        adapter_config.json, adapter_model.safetensors   the adapter, as peft reads it, float32
        optimizer.safetensors                            AdamW's moments
        state.json                                       step, position in the data, best metric, hashes, configuration
        manifest.json                                    size and SHA-256 of each (`manifest.py`); format, version

A run's state is small because little of it lives in objects: the order of the data is a function of (seed, epoch), the
learning rate of the step, dropout of (seed, step, micro-batch). There is no random generator to save.

A checkpoint is hashed once when it is written, as it is read back, and once when it is read: `load_checkpoint` trusts
what `find_checkpoint` returns. Tensors are safetensors and the rest is JSON; nothing is pickled. Older checkpoints are
removed only after a newer one was verified, and the best one never. Those of earlier versions are read.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save

from minilora import __version__
from minilora.adapters.attach import lora_parameters
from minilora.adapters.peft_config import BaseModel
from minilora.adapters.peft_files import adapter_files, damage_of_adapter, load_adapter_weights
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.optim import Optimizer
from minilora.runs.provenance import Provenance
from minilora.system.console import warn
from minilora.system.files import WRITING, json_bytes, patiently, read_json, remove, storage_errors
from minilora.system.manifest import DAMAGED, read_manifest, set_aside, write_folder
from minilora.weights.safetensors_io import read_header, read_tensor

STEP_FOLDER = re.compile(r"step-(\d{6,})")
FORMAT = 1  # raised where an earlier version would misread a checkpoint; 0 had no number
RENAMED_FIELDS = {"unfinished_row": "pending_entry"}  # as earlier versions wrote them in state.json


@dataclass(frozen=True)
class RunState(Provenance):
    """A run's state beside weights and moments, and what it was made from, as state.json holds them."""

    step: int = 0  # optimizer steps done
    samples_seen: int = 0  # training examples done, over all epochs: the position in the data
    pending_entry: dict[str, Any] | None = None  # of the log, for a step that is not yet validated or logged
    validated_step: int = 0  # of the last validation; 0 before the first, as below
    best_step: int = 0  # of the best validation so far
    best_metric: float | None = None  # its value
    best_loss: float | None = None  # its loss, which decides between equal values
    evals_without_improvement: int = 0  # validations since then, for early stopping
    skipped_steps: int = 0  # whose loss or gradient was non-finite, and which changed nothing
    skipped_in_a_row: int = 0  # how many of them came last, without another step behind them
    test_before: dict[str, Any] | None = None  # metrics of the test set before training
    auto_tokens: int | None = None  # what train.max_tokens_per_micro_batch=auto was resolved to; None: no limit
    scaler: dict[str, Any] = field(default_factory=dict)  # state of the float16 loss scale, empty otherwise


def save_checkpoint(
    directory: Path,
    model: Qwen2ForCausalLM,
    adapter: tuple[LoraConfig, BaseModel],
    optimizer: Optimizer,
    state: RunState,
) -> Path:
    """Writes `directory/step-NNNNNN`, verified, and returns it; an earlier one of the same step is replaced.

    After a StorageError everything in `directory` is as before.
    """

    def files() -> Iterator[tuple[str, bytes]]:
        yield from adapter_files(model, *adapter)
        yield "optimizer.safetensors", save(optimizer.tensors())
        yield "state.json", json_bytes(dataclasses.asdict(state))

    target = checkpoint_path(directory, state.step)
    config_sha256 = hashlib.sha256(json_bytes(state.config)).hexdigest()
    facts = {
        "format": FORMAT,
        "step": state.step,
        "config_sha256": config_sha256,
        "minilora_version": __version__,
    }
    write_folder(target, files(), facts)
    return target


def state_digests(model: Qwen2ForCausalLM, optimizer: Optimizer) -> dict[str, str]:
    """SHA-256 of the adapter and of its moments, as they would be saved."""
    weights = {str(index): parameter.detach().cpu() for index, parameter in enumerate(lora_parameters(model))}
    named = {"adapter": weights, "optimizer state": optimizer.tensors()}
    return {name: hashlib.sha256(save(tensors)).hexdigest() for name, tensors in named.items()}


def find_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; damaged newer ones are reported and set aside.

    UserError where there are checkpoints, and none is sound.
    """
    for path in reversed(list_checkpoints(directory)):
        problem = damage_of_adapter(path)
        if problem is None:
            return path
        warn(f"{path}: is damaged ({problem}); set aside as {set_aside(path).name}")
    damaged = sorted(directory.glob(f"{DAMAGED}step-*"))
    if damaged:
        raise UserError(
            f"{directory}: holds no sound checkpoint, only {', '.join(path.name for path in damaged)}; put a sound "
            "copy of one back under its own name, or begin anew with --restart"
        )
    return None


def check_format(checkpoint: Path) -> None:
    """UserError for a checkpoint of a later format; a note on one that another version wrote."""
    facts = read_manifest(checkpoint)["facts"]
    version = facts.get("minilora_version", "unknown")
    if facts.get("format", 0) > FORMAT:
        raise UserError(
            f"{checkpoint}: has format {facts['format']} (minilora {version}), and minilora {__version__} reads up to "
            f"{FORMAT}; resume with that version, or begin anew with --restart"
        )
    if version != __version__:
        warn(f"note: {checkpoint}: minilora {version} -> {__version__}; the rest may differ in the last bits")


def load_checkpoint(checkpoint: Path, model: Qwen2ForCausalLM, optimizer: Optimizer) -> None:
    """Loads the weights and moments of a verified checkpoint; UserError where they do not fit the model."""
    path = checkpoint / "optimizer.safetensors"
    entries = read_header(path)
    # No moments at all: saved before the first update, because every step so far was skipped.
    if entries and {name: entry.shape for name, entry in entries.items()} != optimizer.state_shapes():
        raise UserError(f"{path}: its moments do not fit the adapter's parameters; start anew with --restart")
    load_adapter_weights(model, checkpoint, is_verified=True)
    optimizer.load_tensors({name: read_tensor(entry) for name, entry in entries.items()})


def read_state(folder: Path) -> RunState:
    """state.json of a checkpoint; UserError where it is missing, or of another version of this program."""
    path = folder / "state.json"
    content = read_json(path)
    try:
        return RunState(**{RENAMED_FIELDS.get(name, name): value for name, value in content.items()})
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path}: is not a run's state ({error}); start anew with --restart") from None


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints, oldest first, without folders that were being written or were set aside."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest_checkpoint(directory: Path) -> Path | str:
    """For messages: "none" where there is none."""
    return next(reversed(list_checkpoints(directory)), "none")


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name holds."""
    return int(checkpoint.name.removeprefix("step-"))


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best ones that they know of; StorageError if it cannot.

    Each kept one is complete with its best: should the newest be damaged, the one before it still has both.
    """
    checkpoints = list_checkpoints(directory)
    kept = set(checkpoints[-keep:])
    for path in checkpoints[-keep:]:
        with contextlib.suppress(UserError, TypeError, ValueError):  # damaged; whoever resumes from it says so
            kept.add(checkpoint_path(directory, read_state(path).best_step))
    for path in checkpoints:
        if path not in kept:
            leaving = path.with_name(WRITING + path.name)  # a half-removed one must not have a checkpoint's name
            with storage_errors(path):
                remove(leaving)
                patiently(path.rename, leaving)
                remove(leaving)

"""The objects of a run and its state: opened where it stands, or refused where it is another one's.

A run is a function of its configuration, its data and its base model. All three are compared with what the
newest checkpoint says before anything is loaded: a continuation that differs would be a third run, neither the
old nor the new.
"""

import importlib.metadata
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from minilora import ops
from minilora.adapter import attach_adapter
from minilora.batch import MicroBatch, cut_micro_batches, pack
from minilora.build import (
    Examples,
    adapter_config,
    build_model,
    build_prompt,
    choose_device,
    choose_dtype,
    read_split,
)
from minilora.checkpoint import RunState, damage_of, list_checkpoints, load_checkpoint, new_state, read_state
from minilora.config import Config, changed_keys
from minilora.data import SPLITS, epoch_order
from minilora.errors import UserError
from minilora.files import DAMAGED, explained, read_json, set_aside, sha256
from minilora.lora import DropoutSeed, lora_parameters
from minilora.model import Qwen2ForCausalLM
from minilora.optim import Optimizer, build_optimizer, check_optimizer
from minilora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.tensorfile import dtype_name

RUN_FILES = ("metrics.jsonl", "loss.png", "tensorboard", "checkpoints")
RESTARTING = ".restarting"


@dataclass
class Run:
    """The objects of a run, and its state."""

    config: Config
    directory: Path
    device: torch.device
    prompt: ClassificationPrompt
    splits: dict[str, Examples]
    model: Qwen2ForCausalLM
    dropout_seed: DropoutSeed
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None
    state: RunState

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.directory / "checkpoints"

    @property
    def newest_checkpoint(self) -> Path | str:
        """For messages: "none" where there is none."""
        return next(iter(reversed(list_checkpoints(self.checkpoints))), "none")

    @property
    def samples_per_step(self) -> int:
        """Training examples of a full optimizer step."""
        train = self.config.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data; the last one may be short."""
        return math.ceil(len(self.splits["train"].examples) / self.samples_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.config.train
        return train.max_steps or train.num_train_epochs * self.steps_per_epoch

    @property
    def best_by(self) -> str:
        """The metric that decides which checkpoint is best: F1 for labelled data unless the user chose."""
        chosen = self.config.train.metric_for_best_model
        return ("eval_f1" if self.splits["validation"].labelled else "eval_loss") if chosen == "auto" else chosen


def read_saved_config(path: Path) -> dict[str, dict[str, Any]]:
    """The configuration in training_args.json of a final adapter, or in state.json of a checkpoint.

    Raises:
        UserError: the file is missing or has other content.
    """
    content = read_json(path)
    if path.name == "state.json" and isinstance(content, dict):
        content = content.get("config")
    sections = [section.name for section in fields(Config)]
    if (
        not isinstance(content, dict)
        or sorted(content) != sorted(sections)
        or not all(isinstance(keys, dict) for keys in content.values())
    ):
        raise UserError(f"{path}: holds no run's configuration, expected {', '.join(sections)}; put the file back")
    return content


@dataclass(frozen=True)
class Origin:
    """All that a run is a function of.

    Attributes:
        config: values by section and key.
        data_sha256: of the split files, by name.
        model_sha256: of the base model's files, by name.
    """

    config: dict[str, dict[str, Any]]
    data_sha256: dict[str, str]
    model_sha256: dict[str, str]


def current_origin(config: Config, model_folder: Path) -> Origin:
    """What a run would be made from now: the files' SHA-256 are taken, which reads all of them."""
    data = [Path(config.data.dir) / f"{split}.jsonl" for split in SPLITS]
    return Origin(config.to_dict(), {path.name: sha256(path) for path in data}, model_digests(model_folder))


def model_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that make a base model what it is, by name."""
    names = ("config.json", "tokenizer.json")
    return {path.name: sha256(path) for path in sorted([*(folder / n for n in names), *folder.glob("*.safetensors")])}


def read_origin(folder: Path) -> Origin:
    """What the run that wrote `folder`, a checkpoint or the final adapter, was made from.

    Raises:
        UserError: a file is missing or has other content.
    """
    names = ("training_args.json", "metrics.json") if folder.name == "final" else ("state.json", "state.json")
    config = read_saved_config(folder / names[0])
    content = read_json(folder / names[1])
    digests = ("data_sha256", "model_sha256")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in digests):
        raise UserError(f"{folder / names[1]}: holds no SHA-256 of data and model; put the file back")
    return Origin(config, content["data_sha256"], content["model_sha256"])


def refuse_another_run(before: Origin, now: Origin, config: Config, directory: Path) -> None:
    """Raises UserError with all that would make the run in `directory`, made from `before`, another one."""
    changes = changed_keys(before.config, config)
    if changes:
        raise UserError(
            f"{directory}: holds a run with another configuration; choose another train.output_dir, put the keys "
            "back, or begin anew with --restart\n  " + "\n  ".join(changes)
        )
    for what, old, new in (
        (f"data in {config.data.dir}", before.data_sha256, now.data_sha256),
        (f"base model {config.model.name_or_path}", before.model_sha256, now.model_sha256),
    ):
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if changed:
            raise UserError(
                f"{directory}: its run was made with another {what} (SHA-256 of {', '.join(changed)}); "
                "put the files back, choose another train.output_dir, or begin anew with --restart"
            )


def _find_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is sound; damaged ones that are newer are reported and set aside.

    Raises:
        UserError: there are checkpoints, and none is sound.
    """
    checkpoints = list_checkpoints(directory)
    for checkpoint in reversed(checkpoints):
        problem = damage_of(checkpoint)
        if problem is None:
            return checkpoint
        print(f"{checkpoint}: is damaged ({problem}); set aside as {set_aside(checkpoint).name}", file=sys.stderr)
    damaged = sorted(directory.glob(f"{DAMAGED}step-*"))
    if damaged:
        raise UserError(
            f"{directory}: holds no sound checkpoint, only {', '.join(path.name for path in damaged)}; put a sound "
            "copy of one back under its own name, or begin anew with --restart"
        )
    return None


def _check_best(config: Config, directory: Path, state: RunState) -> None:
    """Raises UserError where the checkpoint that the run is to end with is lost: now, not after all its hours."""
    best = directory / f"step-{state.best_step:06d}"
    if state.best_step in (0, state.step) or not config.train.load_best_model_at_end:
        return
    problem = damage_of(best)
    if problem is not None:
        raise UserError(
            f"{best}: the best checkpoint so far cannot be read ({problem}); put it back, or take the last adapter "
            "with train.load_best_model_at_end=false"
        )


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What else decides the bits of a run; `auto` in a configuration does not say it."""
    versions = {}
    for name in ("torch", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {"device": device.type, "dtype": dtype_name(dtype), "threads": torch.get_num_threads(), **versions}


def _check_machine(before: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    """Says what has changed about the machine.

    Raises:
        UserError: another kind of device or another dtype, with which a run takes another course.
    """
    changes = {
        name: f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    }
    serious = [changes[name] for name in ("device", "dtype") if name in changes]
    if serious:
        raise UserError(
            f"{directory}: its run was computed otherwise ({', '.join(serious)}); set model.device and "
            "model.compute_dtype to what it had, choose another train.output_dir, or begin anew with --restart"
        )
    if changes:
        print(f"note: {', '.join(changes.values())}; the rest may differ in the last bits", file=sys.stderr)


def open_run(config: Config, directory: Path, model_folder: Path, origin: Origin) -> Run:
    """Data, model, adapter and optimizer, as the newest sound checkpoint left them or as they begin.

    Raises:
        UserError: another run's folder, a lost checkpoint, or something in the input is wrong.
    """
    checkpoint = _find_checkpoint(directory / "checkpoints")
    if checkpoint is not None:
        refuse_another_run(read_origin(checkpoint), origin, config, directory)
        _check_best(config, directory / "checkpoints", read_state(checkpoint))

    check_optimizer(config.train.optim)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    machine = describe_machine(device, dtype)
    if checkpoint is not None:
        _check_machine(read_state(checkpoint).machine, machine, directory)
    prompt = build_prompt(config, ChatTokenizer(model_folder))
    splits = {name: read_split(config, prompt, name) for name in SPLITS}
    _check_splits(config, splits)
    model = build_model(config, model_folder, device, dtype)
    problem = ops.compile_swiglu(config.train.compile_swiglu, dtype, device)
    if problem is not None:
        print(
            f"train.compile_swiglu: goes on without, because nothing can be compiled here ({problem})", file=sys.stderr
        )
    model.model.gradient_checkpointing = config.train.gradient_checkpointing
    model.model.offload_checkpoints = config.train.offload_checkpoints
    dropout_seed = attach_adapter(model, adapter_config(config), config.train.seed)
    optimizer = build_optimizer(
        lora_parameters(model),
        (config.train.adam_beta1, config.train.adam_beta2),
        config.train.adam_epsilon,
        config.train.weight_decay,
        config.train.optim,
    )
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    state = new_state(origin.config, origin.data_sha256, origin.model_sha256, machine)
    if checkpoint is not None:
        state = replace(load_checkpoint(checkpoint, model, optimizer), config=origin.config, machine=machine)
        if scaler is not None:
            scaler.load_state_dict(state.scaler)
        print(f"going on from {checkpoint}")
    run = Run(config, directory, device, prompt, splits, model, dropout_seed, optimizer, scaler, state)
    is_validated = state.step == state.validated_step or state.unfinished_row is not None
    if state.step > run.total_steps or (state.step == run.total_steps and not is_validated):
        raise UserError(
            f"{checkpoint}: has {state.step} steps behind it, the configuration asks for {run.total_steps}; raise "
            "train.num_train_epochs or train.max_steps, or begin anew with --restart"
        )
    counts = ", ".join(f"{len(split.examples)} {name}" for name, split in splits.items())
    truncated = sum(split.num_truncated for split in splits.values())
    print(
        f"{config.model.name_or_path} ({config.model.quantization}, {dtype_name(dtype)}, {device}): "
        f"{sum(p.numel() for p in lora_parameters(model)):,} adapter parameters; examples: {counts}; "
        f"{truncated} cut to {config.data.max_length} tokens; {run.total_steps} steps"
    )
    return run


def set_run_aside(directory: Path) -> None:
    """Moves an earlier run into `directory/previous-N`; nothing is deleted.

    It goes into `RESTARTING` first. Where that is there, a restart was killed half-way, and this ends it.
    """
    going = directory / RESTARTING
    checkpoints = directory / "checkpoints"  # one that is moved already has an empty one in its place
    earlier = [directory / name for name in RUN_FILES if (directory / name).exists() and not (going / name).exists()]
    if not going.is_dir() and earlier in ([], [checkpoints]) and not any(checkpoints.iterdir()):
        return  # there is none
    taken = [int(path.name[9:]) for path in directory.iterdir() if re.fullmatch(r"previous-[0-9]+", path.name)]
    target = directory / f"previous-{1 + max(taken, default=0)}"
    with explained(target):
        going.mkdir(exist_ok=True)
        for path in earlier:
            path.rename(going / path.name)
        going.rename(target)
        checkpoints.mkdir(exist_ok=True)
    finished = list_checkpoints(target / "checkpoints")
    print(f"set the earlier run ({len(finished)} checkpoints) aside in {target}")


def _check_splits(config: Config, splits: dict[str, Examples]) -> None:
    for name, split in splits.items():
        if not split.examples:
            raise UserError(f"{Path(config.data.dir) / name}.jsonl: holds no record; prepare the data again")
        mute = [
            row.where for row, found in zip(split.rows, split.examples, strict=True) if True not in found.supervised
        ]
        if mute:
            raise UserError(f"{', '.join(mute[:8])}: {len(mute)} records without one token to learn; remove them")
    if config.train.metric_for_best_model == "eval_f1" and not splits["validation"].labelled:
        raise UserError("train.metric_for_best_model: eval_f1 needs labels, free-form chat has none; use eval_loss")


def step_places(run: Run, step: int) -> list[int]:
    """Which training examples optimizer step `step` takes: a function of (seed, step)."""
    epoch, place = divmod(step - 1, run.steps_per_epoch)
    order = epoch_order(len(run.splits["train"].examples), run.config.train.seed, epoch)
    return list(order[place * run.samples_per_step : (place + 1) * run.samples_per_step])


def iter_micro_batches(run: Run, step: int) -> Iterator[MicroBatch]:
    """The micro-batches of optimizer step `step`; any step can be made alone."""
    train = run.config.train
    step_examples = [run.splits["train"].examples[place] for place in step_places(run, step)]
    for part in cut_micro_batches(step_examples, train.per_device_train_batch_size, train.max_tokens_per_micro_batch):
        yield pack(part).to(run.device)

"""The objects of a run and its state: opened where it stands, on the newest checkpoint that is sound."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.attach import attach, iter_lora_weights, lora_parameters, parameter_groups
from minilora.adapters.init import BY_WEIGHTS, initialize
from minilora.adapters.peft_config import BaseModel
from minilora.build import (
    Examples,
    build_model,
    build_prompt,
    choose_device,
    choose_dtype,
    read_split,
)
from minilora.config import Config, LoraConfig
from minilora.data.prepare import SPLITS, epoch_order
from minilora.errors import UserError
from minilora.qlora.batch import MicroBatch, pack, split_across_ranks, split_into_micro_batches
from minilora.qlora.dropout import DropoutSeed
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.optim import Optimizer, build_optimizer, check_optimizer
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example
from minilora.runs.checkpoint import (
    RunState,
    checkpoint_path,
    damage_of,
    list_checkpoints,
    load_checkpoint,
    new_state,
    read_state,
)
from minilora.runs.provenance import (
    Provenance,
    describe_machine,
    note_another_cut,
    read_provenance,
    refuse_another_machine,
    refuse_another_run,
)
from minilora.system.console import info, progress, warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import storage_errors
from minilora.system.manifest import DAMAGED, set_aside
from minilora.system.memory import trim_heap
from minilora.weights.safetensors_io import dtype_name

RUN_FILES = ("metrics.jsonl", "loss.png", "report.html", "tensorboard", "wandb", "checkpoints")
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
    ranks: Ranks

    @property
    def adapter(self) -> tuple[LoraConfig, BaseModel]:
        """What adapter_config.json names: the adapter and what it belongs to."""
        return self.config.lora, BaseModel(self.config.model.name_or_path, self.config.model.revision)

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
        """Training examples of a full optimizer step, those of all ranks."""
        return self.samples_per_rank * self.ranks.size

    @property
    def samples_per_rank(self) -> int:
        """Most training examples that one rank has in an optimizer step."""
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
        warn(f"{checkpoint}: is damaged ({problem}); set aside as {set_aside(checkpoint).name}")
    damaged = sorted(directory.glob(f"{DAMAGED}step-*"))
    if damaged:
        raise UserError(
            f"{directory}: holds no sound checkpoint, only {', '.join(path.name for path in damaged)}; put a sound "
            "copy of one back under its own name, or begin anew with --restart"
        )
    return None


def check_best(config: Config, directory: Path, state: RunState) -> None:
    """Raises UserError where the checkpoint that the run is to end with is lost: at its beginning, not after hours."""
    best = checkpoint_path(directory, state.best_step)
    if state.best_step in (0, state.step) or not config.train.load_best_model_at_end:
        return
    problem = damage_of(best)
    if problem is not None:
        raise UserError(
            f"{best}: the best checkpoint so far cannot be read ({problem}); put it back, or take the last adapter "
            "with train.load_best_model_at_end=false"
        )


def _choose_checkpoint(config: Config, directory: Path, origin: Provenance, machine: dict[str, Any]) -> str | None:
    """Path of the checkpoint that the run goes on from; None where it begins.

    Raises:
        UserError: it is another run's, or another machine's, or the best one so far is lost.
    """
    checkpoint = _find_checkpoint(directory / "checkpoints")
    if checkpoint is None:
        return None
    before = read_provenance(checkpoint)
    refuse_another_run(before, origin, config, directory)
    check_best(config, directory / "checkpoints", read_state(checkpoint))
    refuse_another_machine(read_state(checkpoint).machine, machine, directory)
    note_another_cut(before, origin)
    return str(checkpoint)


def open_run(
    config: Config, directory: Path, model_folder: Path, origin: Provenance, ranks: Ranks = SINGLE_RANK
) -> Run:
    """Data, model, adapter and optimizer, as the newest sound checkpoint left them or as they begin.

    The first rank reads the checkpoint, which the others need not see, and sends them what is in it.

    Raises:
        UserError: another run's folder, a lost checkpoint, or something in the input is wrong.
    """
    check_optimizer(config.train.optim)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    machine = describe_machine(device, dtype)
    ranks.require_same(
        {**origin.facts, **{name: value for name, value in machine.items() if name != "threads"}},
        "give all machines the same command, files and library versions",
    )
    checkpoint = ranks.run_on_rank_0(lambda: _choose_checkpoint(config, directory, origin, machine))
    prompt = build_prompt(config, ChatTokenizer(model_folder))
    splits = {name: read_split(config, prompt, name) for name in SPLITS}
    _check_splits(config, splits)
    model = build_model(config, model_folder, device, dtype, ranks)
    model.model.gradient_checkpointing = config.train.gradient_checkpointing
    model.model.offload_checkpoints = config.train.offload_checkpoints
    dropout_seed = attach(model, config.lora, seed=config.train.seed)
    if checkpoint is None:
        ranks.run_on_rank_0(lambda: _initialize(model, model_folder, config.lora.init_lora_weights))
    trim_heap()  # DoRA, PiSSA and LoftQ dequantise all weights, one after another
    optimizer = build_optimizer(
        parameter_groups(model, config.train.loraplus_lr_ratio),
        (config.train.adam_beta1, config.train.adam_beta2),
        config.train.adam_epsilon,
        config.train.weight_decay,
        config.train.optim,
    )
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    machine = {**machine, "ranks": ranks.size}
    state = new_state(origin.config, origin.data_sha256, origin.model_sha256, machine)
    if checkpoint is not None:
        loaded = ranks.run_on_rank_0(lambda: asdict(load_checkpoint(Path(checkpoint), model, optimizer)))
        state = replace(RunState(**loaded), config=origin.config, machine=machine)
        if scaler is not None:
            scaler.load_state_dict(state.scaler)
        info(f"going on from {checkpoint}")
    share_adapter(model, ranks)
    moments = ranks.broadcast_tensors(optimizer.tensors())
    if not ranks.is_rank_0:
        optimizer.load_tensors(moments)
    run = Run(config, directory, device, prompt, splits, model, dropout_seed, optimizer, scaler, state, ranks)
    is_validated = state.step == state.validated_step or state.pending_entry is not None
    if state.step > run.total_steps or (state.step == run.total_steps and not is_validated):
        raise UserError(
            f"{checkpoint}: has {state.step} steps behind it, the configuration asks for {run.total_steps}; raise "
            "train.num_train_epochs or train.max_steps, or begin anew with --restart"
        )
    counts = ", ".join(f"{len(split.examples)} {name}" for name, split in splits.items())
    truncated = sum(split.num_truncated for split in splits.values())
    info(
        f"{config.model.name_or_path} ({config.model.quantization}, {dtype_name(dtype)}, {device}): "
        f"{sum(p.numel() for p in lora_parameters(model)):,} adapter parameters; examples: {counts}; "
        f"{truncated} cut to {config.data.max_length} tokens; {run.total_steps} steps"
    )
    return run


def _initialize(model: Qwen2ForCausalLM, model_folder: Path, init_lora_weights: str) -> None:
    """The adapter's first values that depend on the weights, behind a progress bar: minutes for a large model."""
    if init_lora_weights in BY_WEIGHTS:
        with progress(init_lora_weights, None, "layer") as bar:

            def on_progress(done: int, total: int) -> None:
                bar.total = total
                bar.update()

            initialize(model, model_folder, init_lora_weights, on_progress)


def share_adapter(model: Qwen2ForCausalLM, ranks: Ranks) -> None:
    """Gives all ranks the first one's adapter."""
    tensors = [tensor.detach() for _, w in iter_lora_weights(model) for tensor in (*w.parameters(), *w.buffers())]
    first = ranks.broadcast_tensors({str(place): tensor.cpu() for place, tensor in enumerate(tensors)})
    if not ranks.is_rank_0:
        for place, tensor in enumerate(tensors):
            tensor.copy_(first[str(place)])


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
    with storage_errors(target):
        going.mkdir(exist_ok=True)
        for path in earlier:
            path.rename(going / path.name)
        going.rename(target)
        checkpoints.mkdir(exist_ok=True)
    finished = list_checkpoints(target / "checkpoints")
    info(f"set the earlier run ({len(finished)} checkpoints) aside in {target}")


def _check_splits(config: Config, splits: dict[str, Examples]) -> None:
    for name, split in splits.items():
        if not split.examples:
            raise UserError(f"{Path(config.data.dir) / name}.jsonl: holds no record; prepare the data again")
        mute = [
            row.where for row, found in zip(split.records, split.examples, strict=True) if True not in found.supervised
        ]
        if mute:
            raise UserError(f"{', '.join(mute[:8])}: {len(mute)} records without one token to learn; remove them")
    if config.train.metric_for_best_model == "eval_f1" and not splits["validation"].labelled:
        raise UserError("train.metric_for_best_model: eval_f1 needs labels, free-form chat has none; use eval_loss")


def step_indices(run: Run, step: int) -> list[int]:
    """Which training examples optimizer step `step` takes: a function of (seed, step)."""
    epoch, place = divmod(step - 1, run.steps_per_epoch)
    order = epoch_order(len(run.splits["train"].examples), run.config.train.seed, epoch)
    return list(order[place * run.samples_per_step : (place + 1) * run.samples_per_step])


def step_examples(run: Run, step: int) -> list[Example]:
    """The training examples of optimizer step `step`, those of all ranks; any step can be made alone."""
    return [run.splits["train"].examples[place] for place in step_indices(run, step)]


def iter_micro_batches(run: Run, examples: list[Example]) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a step of `examples`."""
    train = run.config.train
    share = split_across_ranks(examples, run.ranks.size, run.samples_per_rank)[run.ranks.rank]
    for part in split_into_micro_batches(share, train.per_device_train_batch_size, train.max_tokens_per_micro_batch):
        yield pack(part).to(run.device)

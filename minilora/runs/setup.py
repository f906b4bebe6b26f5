"""Opens a run at its newest sound checkpoint, or at its beginning: data, model, adapter, optimizer, state."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.attach import attach, iter_lora_weights, lora_parameters, parameter_groups
from minilora.adapters.init import BY_WEIGHTS, initialize
from minilora.adapters.optimizers import build_optimizer, check_optimizer
from minilora.adapters.peft_files import damage_of_adapter, load_adapter_weights
from minilora.build import (
    SharedBase,
    build_model,
    build_prompt,
    choose_device,
    choose_dtype,
    note_other_system,
    read_splits,
    says_indices,
)
from minilora.config import Config
from minilora.data.examples import class_weights, tell_of_class_weights, tell_of_labels
from minilora.data.hub import fetch_adapter
from minilora.errors import UserError
from minilora.planning.budget import resolve_token_limit
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.optim import AdamWSettings, Optimizer
from minilora.qlora.prompt import ChatTokenizer
from minilora.runs.checkpoint import (
    RunState,
    check_format,
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    read_state,
)
from minilora.runs.provenance import (
    Provenance,
    changed_names,
    current_provenance,
    describe_machine,
    read_provenance,
    refuse_other_machine,
    refuse_other_run,
)
from minilora.runs.run import Run
from minilora.system.console import info, progress, warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.memory import peak_memory_bytes, trim_heap
from minilora.weights.safetensors_io import dtype_name


def check_best(config: Config, directory: Path, state: RunState) -> Path | None:
    """The best checkpoint, verified; None where it is the run's last state anyway, or none is to be loaded.

    UserError if it is lost: a run asks at its beginning, before it computes for hours.
    """
    if state.best_step in (0, state.step) or not config.train.load_best_model_at_end:
        return None
    best = checkpoint_path(directory, state.best_step)
    problem = damage_of_adapter(best)
    if problem is not None:
        raise UserError(
            f"{best}: the best checkpoint so far cannot be read ({problem}); put it back, or take the last adapter "
            "with train.load_best_model_at_end=false"
        )
    return best


def load_best(run: Run) -> int:
    """Loads the best checkpoint's adapter if so configured; returns the step whose adapter the model has."""
    best = check_best(run.config, run.checkpoints, run.state)
    if best is None:
        return run.state.step
    load_adapter_weights(run.model, best, is_verified=True)
    return run.state.best_step


def _choose_checkpoint(config: Config, directory: Path, provenance: Provenance) -> dict[str, Any] | None:
    """The path and state of the checkpoint to resume from, as JSON; None where the run begins."""
    checkpoint = find_checkpoint(directory / "checkpoints")
    if checkpoint is None:
        return None
    check_format(checkpoint)
    state = read_state(checkpoint)
    refuse_other_run(state, provenance, config, directory)
    check_best(config, directory / "checkpoints", state)
    refuse_other_machine(state, provenance, directory)
    return {"path": str(checkpoint), "state": asdict(state)}


def open_run(config: Config, model_folder: Path, ranks: Ranks = SINGLE_RANK, base: SharedBase | None = None) -> Run:
    """Data, model, adapter and optimizer, as the newest sound checkpoint left them or as they begin.

    `base` has the base model of an earlier run of this process, and gets this one's.
    Rank 0 reads the checkpoint, which the others need not see, and broadcasts what is in it.
    """
    process_bytes = peak_memory_bytes(torch.device("cpu")) if base is None else base.process_bytes
    directory = Path(config.train.output_dir)
    check_optimizer(config.train.optim)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    provenance = current_provenance(config, model_folder, describe_machine(device, dtype, ranks.size))
    ranks.require_same(provenance.facts, "give all machines the same command, files, library versions and GPUs")
    checkpoint = ranks.run_on_rank_0(lambda: _choose_checkpoint(config, directory, provenance))
    prompt = build_prompt(config, ChatTokenizer(model_folder))
    note_other_system(prompt)
    with ranks.rank_0_first():
        splits = read_splits(config, prompt)
    best_by, trained = config.train.metric_for_best_model, splits["train"]
    if best_by not in ("auto", "eval_loss") and not splits["validation"].labelled:
        raise UserError(f"train.metric_for_best_model: {best_by} needs labels, free-form chat has none; use eval_loss")
    weights = class_weights(config.train.class_weights, trained, prompt.labels)
    words = prompt.scored_ids if trained.labelled else ()
    limit_of = partial(resolve_token_limit, config, model_folder, trained.examples, device=device, ranks=ranks.size)
    resolve = partial(limit_of, words=words)
    is_resolved = checkpoint is not None and _is_auto(checkpoint["state"]["config"])
    auto_tokens = checkpoint["state"]["auto_tokens"] if checkpoint and is_resolved else _least_limit(ranks, resolve)
    build = build_model if base is None else base.build
    model = build(config, model_folder, device, dtype, ranks=ranks)
    model.model.gradient_checkpointing = config.train.gradient_checkpointing
    model.model.offload_checkpoints = config.train.offload_checkpoints
    dropout_seed = attach(model, config.lora, seed=config.train.seed)
    if checkpoint is None:
        ranks.run_on_rank_0(lambda: _initialize(model, model_folder, config, provenance))
    trim_heap()  # DoRA, PiSSA and LoftQ dequantise all weights, one after another
    run = Run(
        config=config,
        directory=directory,
        device=device,
        process_bytes=process_bytes,
        prompt=prompt,
        splits=splits,
        model=model,
        dropout_seed=dropout_seed,
        optimizer=_build_optimizer(config, model),
        scaler=torch.amp.GradScaler(device.type) if dtype == torch.float16 else None,
        ranks=ranks,
        state=RunState(**vars(provenance), auto_tokens=auto_tokens),
        class_weights=weights,
    )
    if checkpoint is not None:
        _resume(run, Path(checkpoint["path"]), RunState(**checkpoint["state"]))
    share_adapter(model, ranks)
    moments = ranks.broadcast_tensors(run.optimizer.tensors())
    if not ranks.is_rank_0:
        run.optimizer.load_tensors(moments)
    _describe(run, dtype)
    return run


def _least_limit(ranks: Ranks, resolve: Callable[[], int | None]) -> int | None:
    """What fits the GPU of each rank, one of which may be shared with a screen or another program; None on CPUs."""
    with ranks.barrier(is_long=True):
        own = resolve()
    return min((limit for limit in ranks.all_gather(own) if limit is not None), default=None)


def _is_auto(config: dict[str, dict[str, Any]]) -> bool:
    return config["train"].get("max_tokens_per_micro_batch") == "auto"


def _build_optimizer(config: Config, model: Qwen2ForCausalLM) -> Optimizer:
    train = config.train
    settings = AdamWSettings((train.adam_beta1, train.adam_beta2), train.adam_epsilon, train.weight_decay)
    return build_optimizer(parameter_groups(model, train.loraplus_lr_ratio), settings, train.optim)


def _resume(run: Run, checkpoint: Path, state: RunState) -> None:
    """Puts the run where the checkpoint is; UserError if that has more steps than the configuration asks for."""
    run.ranks.run_on_rank_0(lambda: load_checkpoint(checkpoint, run.model, run.optimizer))
    own = run.state
    run.state = replace(state, config=own.config, machine=own.machine, auto_tokens=own.auto_tokens)
    if state.best_loss is None and run.lacks_a_class_for_f1:  # an earlier version compared F1 there
        run.state = replace(run.state, best_metric=None)
    if run.scaler is not None:
        run.scaler.load_state_dict(state.scaler)
    is_validated = state.step == state.validated_step or state.pending_entry is not None
    if state.step > run.total_steps or (state.step == run.total_steps and not is_validated):
        raise UserError(
            f"{checkpoint}: has {state.step} steps behind it, the configuration asks for {run.total_steps}; raise "
            "train.num_train_epochs or train.max_steps, or begin anew with --restart"
        )
    info(f"resuming from {checkpoint}")


def _describe(run: Run, dtype: torch.dtype) -> None:
    """A line about what is trained on what."""
    config, splits = run.config, run.splits
    counts = ", ".join(f"{len(split.examples)} {name}" for name, split in splits.items())
    files = {f"{config.data.dir}/{name}.jsonl": split for name, split in splits.items()}
    tell_of_labels(files, run.prompt.labels, says_indices(config))
    tell_of_class_weights(run.class_weights, splits["train"], run.prompt.labels, run.samples_per_step)
    chosen, positive = config.train.metric_for_best_model, config.prompt.positive
    is_always_0 = chosen == "eval_f1" and positive is not None and positive not in splits["validation"].labels
    if run.lacks_a_class_for_f1 or is_always_0:
        info("eval_loss decides which checkpoint is best, because F1 of such a validation set says nothing")
    truncated = sum(split.num_truncated for split in splits.values())
    overlong = sum(split.num_overlong for split in splits.values())
    info(
        f"{config.model.name_or_path} ({config.model.quantization}, {dtype_name(dtype)}, {run.device}): "
        f"{sum(p.numel() for p in lora_parameters(run.model)):,} trainable parameters; examples: {counts}; "
        f"{truncated} cut to {config.data.max_length} tokens; "
        + (f"{overlong} conversations too long (data.overlong={config.data.overlong}); " if overlong else "")
        + f"{run.total_steps} steps"
    )


def _initialize(model: Qwen2ForCausalLM, model_folder: Path, config: Config, provenance: Provenance) -> None:
    """Initial values of the adapter: another adapter's, or those that depend on the base: minutes for a large model."""
    init_lora_weights = config.lora.init_lora_weights
    if config.model.adapter is not None:
        folder = fetch_adapter(config.model.adapter)
        load_adapter_weights(model, folder)
        before = read_provenance(folder).model_sha256
        changed = changed_names(before, provenance.model_sha256) if before else []
        if changed:
            warn(f"note: {folder}: was trained on another base model (SHA-256 of {', '.join(changed)})")
        info(f"beginning with the adapter in {folder}")
    elif init_lora_weights in BY_WEIGHTS:
        with progress(init_lora_weights, None, "layer") as bar:

            def on_progress(done: int, total: int) -> None:
                bar.total = total
                bar.update()

            initialize(model, model_folder, init_lora_weights, on_progress)


def share_adapter(model: Qwen2ForCausalLM, ranks: Ranks) -> None:
    """Gives all ranks the adapter of rank 0."""
    tensors = [tensor.detach() for _, w in iter_lora_weights(model) for tensor in (*w.parameters(), *w.buffers())]
    first = ranks.broadcast_tensors({str(index): tensor.cpu() for index, tensor in enumerate(tensors)})
    if not ranks.is_rank_0:
        for index, tensor in enumerate(tensors):
            tensor.copy_(first[str(index)])

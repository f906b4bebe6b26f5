"""`fit()`: the only training loop.

    for step in the steps that are left:
        micro-batches of the step -> train_step -> validate? -> log -> save?

The run is a function of its configuration, its data and its base model. What `fit` finds in the output folder
decides where it begins: nothing, a checkpoint to go on from, or a finished run to leave alone.

    outputs/
        metrics.jsonl, loss.png
        checkpoints/step-000100/    see checkpoint.py
        checkpoints/final/          adapter, training_args.json, metrics.json, README.md
"""

import hashlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minilora.adapter import attach_adapter, load_adapter_weights, save_adapter
from minilora.batch import MicroBatch, pack
from minilora.build import (
    SPLITS,
    Examples,
    adapter_config,
    build_model,
    build_prompt,
    choose_device,
    choose_dtype,
    read_split,
)
from minilora.checkpoint import (
    RunState,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    replace_folder,
    save_checkpoint,
    write_json,
)
from minilora.config import Config, changed_keys
from minilora.data import epoch_order
from minilora.errors import UserError
from minilora.evaluate import score
from minilora.load import read_json
from minilora.lora import DropoutSeed, lora_parameters
from minilora.memory import peak_memory_bytes
from minilora.metrics import classification_metrics
from minilora.model import Qwen2ForCausalLM
from minilora.modelcard import render_model_card
from minilora.optim import build_optimizer, lr_at
from minilora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.runlog import RunLog, plot_metrics
from minilora.step import train_step


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
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler | None
    state: RunState

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.directory / "checkpoints"

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


def fit(config: Config, model_folder: Path) -> Path:
    """Trains, or goes on training, or finds it done.

    Args:
        config: the resolved configuration; `data.dir` holds the three splits.
        model_folder: the base model's files.

    Returns:
        The folder of the final adapter.

    Raises:
        UserError: the output folder belongs to another run, or something in the input is wrong.
    """
    directory = Path(config.train.output_dir)
    final = directory / "checkpoints" / "final"
    hashes = _hash_inputs(config, model_folder)
    if final.is_dir():
        _refuse_another_run(read_json(final / "training_args.json"), config, directory)
        print(f"{final}: this run is finished; --restart begins anew")
        return final

    run = _open_run(config, directory, model_folder, *hashes)
    if run.config.train.do_predict and run.state.test_before is None:
        run.state = replace(run.state, test_before=_test(run, "test before training"))
    if run.state.test_before is not None:
        print(f"test before training: {_in_words(run.state.test_before)}")

    log = RunLog(directory, run.total_steps, run.state.step, config.train.report_to)
    try:
        while run.state.step < run.total_steps and not _has_stalled(run):
            row = _take_step(run, run.state.step + 1)
            improved = _is_due(run, config.train.eval_steps) and _validate(run, row)
            log.advance(row)
            if row["step"] % config.train.logging_steps == 0 or "eval_loss" in row:
                log.write(row)
            if "eval_loss" in row:
                log.say(f"step {row['step']}: {_in_words(row)}{'  best so far' if improved else ''}")
            if improved or _has_stalled(run) or _is_due(run, config.train.save_steps):
                save_checkpoint(run.checkpoints, run.model, adapter_config(config), run.optimizer, run.state)
                prune_checkpoints(run.checkpoints, config.train.save_total_limit, run.state.best_step)
        if _has_stalled(run):
            log.say(f"no better validation in {run.state.evals_without_improvement} tries: stopped early")
    finally:
        log.close()
    return _finish(run, final)


def _hash_inputs(config: Config, model_folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of the split files and of the base model's files, by name."""
    data = [Path(config.data.dir) / f"{split}.jsonl" for split in SPLITS]
    model = sorted([model_folder / "config.json", model_folder / "tokenizer.json", *model_folder.glob("*.safetensors")])
    return _hash_files(data), _hash_files(model)


def _hash_files(paths: list[Path]) -> dict[str, str]:
    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); check data.dir and model.name_or_path"
            ) from None
        digests[path.name] = digest.hexdigest()
    return digests


def _refuse_another_run(before: dict[str, Any], config: Config, directory: Path) -> None:
    changes = changed_keys(before, config)
    if changes:
        raise UserError(
            f"{directory}: holds a run with another configuration; choose another train.output_dir, put the keys "
            "back, or begin anew with --restart\n  " + "\n  ".join(changes)
        )


def _open_run(
    config: Config,
    directory: Path,
    model_folder: Path,
    data_sha256: dict[str, str],
    model_sha256: dict[str, str],
) -> Run:
    """Data, model, adapter and optimizer, as the newest checkpoint left them or as they begin."""
    checkpoints = list_checkpoints(directory / "checkpoints")
    if checkpoints:
        _refuse_changed_inputs(read_state(checkpoints[-1]), config, data_sha256, model_sha256, directory)

    device = choose_device(config)
    dtype = choose_dtype(config, device)
    prompt = build_prompt(config, ChatTokenizer(model_folder))
    splits = {name: read_split(config, prompt, name) for name in SPLITS}
    _check_splits(config, splits)
    model = build_model(config, model_folder, device, dtype)
    model.model.gradient_checkpointing = config.train.gradient_checkpointing
    dropout_seed = attach_adapter(model, adapter_config(config), config.train.seed)
    optimizer = build_optimizer(
        lora_parameters(model),
        (config.train.adam_beta1, config.train.adam_beta2),
        config.train.adam_epsilon,
        config.train.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    state = RunState(0, 0, 0, None, 0, None, data_sha256, model_sha256, {}, config.to_dict())
    if checkpoints:
        state = replace(load_checkpoint(checkpoints[-1], model, optimizer), config=config.to_dict())
        if scaler is not None:
            scaler.load_state_dict(state.scaler)
        print(f"going on from {checkpoints[-1]}")
    run = Run(config, directory, device, prompt, splits, model, dropout_seed, optimizer, scaler, state)
    counts = ", ".join(f"{len(split.examples)} {name}" for name, split in splits.items())
    truncated = sum(split.num_truncated for split in splits.values())
    print(
        f"{config.model.name_or_path} ({config.model.quantization}, {str(dtype).removeprefix('torch.')}, {device}): "
        f"{sum(p.numel() for p in lora_parameters(model)):,} adapter parameters; examples: {counts}; "
        f"{truncated} cut to {config.data.max_length} tokens; {run.total_steps} steps"
    )
    return run


def _refuse_changed_inputs(
    state: RunState,
    config: Config,
    data_sha256: dict[str, str],
    model_sha256: dict[str, str],
    directory: Path,
) -> None:
    _refuse_another_run(state.config, config, directory)
    for what, before, now in (
        (f"data in {config.data.dir}", state.data_sha256, data_sha256),
        (f"base model {config.model.name_or_path}", state.model_sha256, model_sha256),
    ):
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            raise UserError(
                f"{directory}: its run was made with another {what} (SHA-256 of {', '.join(changed)}); "
                "put the files back, choose another train.output_dir, or begin anew with --restart"
            )


def _check_splits(config: Config, splits: dict[str, Examples]) -> None:
    for name, split in splits.items():
        if not split.examples:
            raise UserError(f"{Path(config.data.dir) / name}.jsonl: holds no record; prepare the data again")
    if config.train.metric_for_best_model == "eval_f1" and not splits["validation"].labelled:
        raise UserError("train.metric_for_best_model: eval_f1 needs labels, free-form chat has none; use eval_loss")


def _take_step(run: Run, step: int) -> dict[str, Any]:
    """One optimizer step; returns the row for the log and moves the run's state on."""
    train = run.config.train
    started = time.perf_counter()
    micro_batches = list(iter_micro_batches(run, step))
    rate = lr_at(step, run.total_steps, train.learning_rate, train.lr_scheduler_type, train.warmup_ratio)
    run.model.train()
    result = train_step(
        run.model,
        micro_batches,
        run.optimizer,
        rate,
        train.max_grad_norm,
        run.dropout_seed,
        train.seed,
        step,
        run.scaler,
    )
    samples = run.state.samples_seen + sum(batch.num_examples for batch in micro_batches)
    scaler = run.scaler.state_dict() if run.scaler is not None else {}
    run.state = replace(run.state, step=step, samples_seen=samples, scaler=scaler)
    row: dict[str, Any] = {
        "step": step,
        "epoch": round(samples / len(run.splits["train"].examples), 4),
        "train_loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": round(result.num_real_tokens / (time.perf_counter() - started), 1),
    }
    peak = peak_memory_bytes(run.device)
    return row if peak is None else {**row, "peak_memory_bytes": peak}


def iter_micro_batches(run: Run, step: int) -> Iterator[MicroBatch]:
    """The micro-batches of optimizer step `step`: a function of (seed, step), so any step can be made alone."""
    examples = run.splits["train"].examples
    epoch, place = divmod(step - 1, run.steps_per_epoch)
    order = epoch_order(len(examples), run.config.train.seed, epoch)
    chosen = order[place * run.samples_per_step : (place + 1) * run.samples_per_step]
    size = run.config.train.per_device_train_batch_size
    for start in range(0, len(chosen), size):
        yield pack([examples[i] for i in chosen[start : start + size]]).to(run.device)


def _is_due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.total_steps


def _validate(run: Run, row: dict[str, Any]) -> bool:
    """Adds the validation metrics to `row`; says whether they are the best so far and keeps count of it."""
    split = run.splits["validation"]
    prompt = run.prompt if split.labelled else None
    scores = score(run.model, split.examples, prompt, run.config.train.per_device_eval_batch_size)
    row["eval_loss"] = scores.loss
    if scores.probabilities is not None:
        metrics = _metrics(run, split, scores.probabilities)
        row |= {"eval_accuracy": metrics["accuracy"], "eval_f1": metrics["f1"]}
    value, best = row[run.best_by], run.state.best_metric
    improved = best is None or (value > best if run.best_by == "eval_f1" else value < best)
    if improved:
        run.state = replace(run.state, best_step=row["step"], best_metric=value, evals_without_improvement=0)
    else:
        run.state = replace(run.state, evals_without_improvement=run.state.evals_without_improvement + 1)
    return improved


def _has_stalled(run: Run) -> bool:
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.state.evals_without_improvement >= patience


def _metrics(run: Run, split: Examples, probabilities: np.ndarray) -> dict[str, Any]:
    labels = np.array(split.labels)
    return classification_metrics(labels, probabilities, run.prompt.labels, run.config.prompt.positive)


def _test(run: Run, title: str) -> dict[str, Any]:
    """Loss and metrics of the test set, behind a progress bar of its own."""
    split = run.splits["test"]
    with tqdm(total=len(split.examples), desc=title, unit="review", leave=False, file=sys.stderr) as bar:
        prompt = run.prompt if split.labelled else None
        scores = score(run.model, split.examples, prompt, run.config.train.per_device_eval_batch_size, bar.update)
    metrics: dict[str, Any] = {"loss": scores.loss}
    if scores.probabilities is not None:
        metrics |= _metrics(run, split, scores.probabilities)
    return metrics


def _in_words(metrics: dict[str, Any]) -> str:
    """The few numbers that a line on the screen has room for."""
    names = ("loss", "accuracy", "f1")
    shown = ((name, metrics.get(name, metrics.get(f"eval_{name}"))) for name in names)
    return "  ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)


def _finish(run: Run, final: Path) -> Path:
    """Writes the final folder, from the best checkpoint if so configured, and the plot."""
    train = run.config.train
    step = run.state.step
    best = run.checkpoints / f"step-{run.state.best_step:06d}"
    if train.load_best_model_at_end and best.is_dir() and run.state.best_step != step:
        load_adapter_weights(run.model, best)
        step = run.state.best_step
    after = _test(run, "test after training") if train.do_predict else None
    results = {
        "step": step,
        "validation": {run.best_by: run.state.best_metric, "step": run.state.best_step},
        "test_before": run.state.test_before,
        "test": after,
        "data_sha256": run.state.data_sha256,
        "model_sha256": run.state.model_sha256,
    }
    temporary = final.with_name(f".writing-{final.name}")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[train.save_dtype]
    save_adapter(run.model, temporary, adapter_config(run.config), train.save_format, dtype)
    write_json(temporary / "training_args.json", run.config.to_dict())
    write_json(temporary / "metrics.json", results)
    (temporary / "README.md").write_text(render_model_card(run.config.to_dict(), results), "utf-8", newline="\n")
    plot = plot_metrics(run.directory)
    replace_folder(temporary, final)
    if after is not None:
        print(f"test after training:  {_in_words(after)}")
    print(f"final adapter (step {step}): {final}" + (f"; plot: {plot}" if plot else ""))
    return final

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

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minilora.adapter import load_adapter_weights, save_adapter
from minilora.build import adapter_config
from minilora.checkpoint import (
    begin_folder,
    list_checkpoints,
    make_folder,
    prune_checkpoints,
    replace_folder,
    save_checkpoint,
    write_json,
)
from minilora.config import Config
from minilora.errors import UserError
from minilora.evaluate import score
from minilora.lora import adapter_disabled, lora_parameters
from minilora.memory import peak_memory_bytes
from minilora.metrics import classification_metrics
from minilora.modelcard import render_model_card
from minilora.optim import lr_at
from minilora.run import Run, current_origin, iter_micro_batches, open_run, read_origin, refuse_another_run
from minilora.runlog import RunLog, check_log, plot_metrics
from minilora.step import train_step

# Keys that change nothing in the course of a run, and yet what is in its final folder.
FINAL_KEYS = ("do_predict", "load_best_model_at_end", "save_format", "save_dtype")


def fit(config: Config, model_folder: Path) -> Path:
    """Trains, or goes on training, or finds it done.

    Args:
        config: the resolved configuration; `data.dir` holds the three splits.
        model_folder: the base model's files.

    Returns:
        The folder of the final adapter.

    Raises:
        UserError: the output folder belongs to another run or cannot be written, something in the input is wrong,
            the loss is no longer a number, or the final adapter cannot be read back as it was.
    """
    directory = Path(config.train.output_dir)
    final = directory / "checkpoints" / "final"
    if final.is_dir():
        _check_finished(final, config, model_folder)
        print(f"{final}: this run is finished; --restart begins anew")
        return final

    make_folder(directory, "train.output_dir")
    make_folder(directory / "checkpoints", "train.output_dir")
    check_log(directory, config.train.report_to)
    run = open_run(config, directory, model_folder, current_origin(config, model_folder))
    if run.config.train.do_predict and run.state.test_before is None:
        with adapter_disabled(run.model):  # a run that was begun without do_predict may have an adapter by now
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


def _check_finished(final: Path, config: Config, model_folder: Path) -> None:
    """Raises UserError where a finished run is not the one that is asked for."""
    before, now = read_origin(final), current_origin(config, model_folder)
    refuse_another_run(before, now, config, final.parent.parent)
    for name in FINAL_KEYS:
        old, new = before.config["train"].get(name), now.config["train"][name]
        if old != new:
            raise UserError(
                f"train.{name}: {new!r} comes too late, {final} was written with {old!r}; move that folder away to "
                "have it written again from the checkpoints, or put the key back"
            )


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
    _check_finite(run, step, "training loss", result.loss)
    if result.updated:  # with float16, an overflow that was left out is part of finding the scale
        _check_finite(run, step, "gradient norm", result.grad_norm)
    samples = run.state.samples_seen + sum(batch.num_examples for batch in micro_batches)
    scaler = run.scaler.state_dict() if run.scaler is not None else {}
    run.state = replace(run.state, step=step, samples_seen=samples, scaler=scaler)
    row: dict[str, Any] = {
        "step": step,
        "epoch": round(samples / len(run.splits["train"].examples), 4),
        "train_loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm if result.updated else None,
        "tokens_per_s": round(result.num_real_tokens / (time.perf_counter() - started), 1),
    }
    if not result.updated:
        row["skipped"] = True
    peak = peak_memory_bytes(run.device)
    return row if peak is None else {**row, "peak_memory_bytes": peak}


def _is_due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.total_steps


def _validate(run: Run, row: dict[str, Any]) -> bool:
    """Adds the validation metrics to `row`; says whether they are the best so far and keeps count of it."""
    metrics = _score(run, "validation")
    row |= {f"eval_{name}": metrics[name] for name in ("loss", "accuracy", "f1") if name in metrics}
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


def _score(run: Run, name: str, on_progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Loss of a split, and its metrics where it is labelled."""
    split = run.splits[name]
    prompt = run.prompt if split.labelled else None
    scores = score(run.model, split.examples, prompt, run.config.train.per_device_eval_batch_size, on_progress)
    _check_finite(run, run.state.step, f"{name} loss", scores.loss)
    metrics: dict[str, Any] = {"loss": scores.loss, "num_examples": len(split.examples)}
    if scores.probabilities is not None:
        labels = np.array(split.labels)
        metrics |= classification_metrics(labels, scores.probabilities, run.prompt.labels, run.config.prompt.positive)
    return metrics


def _test(run: Run, title: str) -> dict[str, Any]:
    """Loss and metrics of the test set, behind a progress bar of its own."""
    with tqdm(total=len(run.splits["test"].examples), desc=title, unit="review", leave=False, file=sys.stderr) as bar:
        return _score(run, "test", bar.update)


def _check_finite(run: Run, step: int, what: str, value: float) -> None:
    """Raises UserError for NaN and infinity: from there on every number of the run would be one of them."""
    if math.isfinite(value):
        return
    kept = list_checkpoints(run.checkpoints)
    train, model = run.config.train, run.config.model
    raise UserError(
        f"step {step}: the {what} is {value}, expected a number; begin anew with --restart and a lower "
        f"train.learning_rate (it is {train.learning_rate:g}) or with another model.compute_dtype (it is "
        f"{model.compute_dtype}). The newest checkpoint that stays: {kept[-1] if kept else 'none'}"
    )


def _in_words(metrics: dict[str, Any]) -> str:
    """The few numbers that a line on the screen has room for."""
    names = ("loss", "accuracy", "f1")
    shown = ((name, metrics.get(name, metrics.get(f"eval_{name}"))) for name in names)
    return "  ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)


def _load_best(run: Run) -> None:
    """Puts the adapter of the best checkpoint into the model."""
    folder = run.checkpoints / f"step-{run.state.best_step:06d}"
    try:
        load_adapter_weights(run.model, folder)
    except UserError as error:
        what = str(error).partition("; ")[0]
        raise UserError(
            f"{folder}: the best checkpoint cannot be read ({what}); put it back, or take the last adapter with "
            "train.load_best_model_at_end=false"
        ) from None


def _check_saved(run: Run, folder: Path, dtype: torch.dtype) -> None:
    """Reads the written adapter back into the model: its values are the trained ones in `dtype`, its loss is a number.

    Nobody looks at the file before it is used elsewhere, where a damaged one is only a model that does worse.
    """
    trained = [parameter.detach().to(dtype, copy=True) for parameter in lora_parameters(run.model)]
    what = "its values differ"
    try:
        load_adapter_weights(run.model, folder)
        pairs = zip(lora_parameters(run.model), trained, strict=True)
        is_equal = all(torch.equal(parameter, value.to(parameter.dtype)) for parameter, value in pairs)
    except UserError as error:
        is_equal, what = False, str(error)
    if not is_equal:
        raise UserError(
            f"{folder}: read back, the adapter is not the one that was trained; check the disk, and run the same "
            f"command again, which writes it from the last checkpoint\n  {what}"
        )
    split = run.splits["validation"]
    few = split.examples[: run.config.train.per_device_eval_batch_size]
    loss = score(run.model, few, None, len(few)).loss
    _check_finite(run, run.state.step, "loss of the adapter read back", loss)


def _finish(run: Run, final: Path) -> Path:
    """Writes the final folder, from the best checkpoint if so configured, and the plot."""
    train = run.config.train
    step = run.state.step
    if train.load_best_model_at_end and run.state.best_step != step:
        step = run.state.best_step
        _load_best(run)
    after = _test(run, "test after training") if train.do_predict else None
    results = {
        "step": step,
        "validation": {run.best_by: run.state.best_metric, "step": run.state.best_step},
        "test_before": run.state.test_before,
        "test": after,
        "data_sha256": run.state.data_sha256,
        "model_sha256": run.state.model_sha256,
    }
    temporary = begin_folder(final)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[train.save_dtype]
    save_adapter(run.model, temporary, adapter_config(run.config), train.save_format, dtype)
    _check_saved(run, temporary, dtype)
    write_json(temporary / "training_args.json", run.config.to_dict())
    write_json(temporary / "metrics.json", results)
    card = render_model_card(run.config.to_dict(), results, run.splits["train"].labelled)
    (temporary / "README.md").write_text(card, "utf-8", newline="\n")
    plot = plot_metrics(run.directory)
    replace_folder(temporary, final)
    if after is not None:
        print(f"test after training:  {_in_words(after)}")
    print(f"final adapter (step {step}): {final}" + (f"; plot: {plot}" if plot else ""))
    return final

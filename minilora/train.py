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

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minilora.adapter import load_adapter_weights, save_adapter
from minilora.build import Examples, adapter_config
from minilora.checkpoint import prune_checkpoints, replace_folder, save_checkpoint, write_json
from minilora.config import Config
from minilora.evaluate import score
from minilora.load import read_json
from minilora.memory import peak_memory_bytes
from minilora.metrics import classification_metrics
from minilora.modelcard import render_model_card
from minilora.optim import lr_at
from minilora.run import Run, hash_inputs, iter_micro_batches, open_run, refuse_another_run
from minilora.runlog import RunLog, plot_metrics
from minilora.step import train_step


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
    hashes = hash_inputs(config, model_folder)
    if final.is_dir():
        refuse_another_run(read_json(final / "training_args.json"), config, directory)
        print(f"{final}: this run is finished; --restart begins anew")
        return final

    run = open_run(config, directory, model_folder, *hashes)
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
    shutil.rmtree(temporary, ignore_errors=True)
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

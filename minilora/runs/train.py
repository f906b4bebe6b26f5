"""`fit()`: the only training loop.

    for step in the steps that are left:
        micro-batches of the step -> train_step -> validate? -> log -> save?

The run is a function of its configuration, its data and its base model. What `fit` finds in the output folder
decides where it begins: nothing, a checkpoint to go on from, or a finished run to leave alone.

Several ranks go through it in step (`distributed.py`). The first alone touches the output folder; what one of them
cannot do without the others knowing stands within `ranks.barrier()` or is done `ranks.run_on_rank_0()`.

    outputs/
        metrics.jsonl, loss.png, report.html
        checkpoints/step-000100/    see checkpoint.py
        checkpoints/final/          see final.py
"""

import math
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.attach import adapter_disabled, lora_parameters
from minilora.build import adapter_config, choose_dtype
from minilora.config import Config
from minilora.errors import UserError
from minilora.planning.plan import estimate_run_memory
from minilora.qlora.optim import lr_at
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.runs.checkpoint import list_checkpoints, prune_checkpoints, save_checkpoint, state_digests, step_of
from minilora.runs.finish import check_finished, finish, format_metrics, score_split, score_test_set
from minilora.runs.metrics_log import NoLog, RunLog, read_metrics
from minilora.runs.provenance import current_provenance
from minilora.runs.setup import (
    RESTARTING,
    Run,
    iter_micro_batches,
    open_run,
    set_run_aside,
    step_examples,
    step_indices,
)
from minilora.runs.trackers import Tracker, check_tracker, open_tracker
from minilora.system.cli import Interrupted, SafePoints
from minilora.system.console import info
from minilora.system.distributed import SINGLE_RANK, LostRankError, Ranks
from minilora.system.files import StorageError, lock_folder, make_folder
from minilora.system.manifest import recover_folders
from minilora.system.memory import is_out_of_memory, peak_memory_bytes


def fit(config: Config, model_folder: Path, restart: bool = False, ranks: Ranks = SINGLE_RANK) -> Path:
    """Trains, or goes on training, or finds it done.

    Args:
        config: the resolved configuration; `data.dir` holds the three splits.
        model_folder: the base model's files.
        restart: sets an earlier run in the output folder aside and begins anew.
        ranks: that train together.

    Returns:
        The folder of the final adapter.

    Raises:
        UserError: the output folder belongs to another run, is in use or cannot be written, something in the input is
            wrong, too many steps in a row were no number, memory or disk ran out, a rank is lost, or the final adapter
            cannot be read back as it was.
        Interrupted: a signal came; what was done by then is saved.
    """
    directory = Path(config.train.output_dir)
    final = directory / "checkpoints" / "final"
    with ExitStack() as lock:
        if not ranks.run_on_rank_0(lambda: _claim(directory, final, restart, config, lock)):
            ranks.run_on_rank_0(lambda: check_finished(final, config, model_folder, ranks.size))
            info(f"{final}: this run is finished; --restart begins anew")
            return final
        run = None
        process_bytes = peak_memory_bytes(torch.device("cpu"))
        try:
            origin = current_provenance(config, model_folder, ranks.size)
            run = open_run(config, directory, model_folder, origin, ranks)
            _train(run)
            return finish(run, final, process_bytes)
        except Interrupted as stop:
            if stop.is_explained or run is None:
                raise
            newest = run.newest_checkpoint
            where = "nothing done" if newest == "none" else f"the same command goes on from {newest}"
            raise Interrupted(stop.signum, f"{stop}: {where}") from None
        except StorageError as error:
            newest = "none" if run is None else run.newest_checkpoint
            raise StorageError(f"{error}\n  what is saved is intact; the newest checkpoint: {newest}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(_out_of_memory(config, run, process_bytes, error)) from error


def _claim(directory: Path, final: Path, restart: bool, config: Config, lock: ExitStack) -> bool:
    """Locks the output folder and clears up what an earlier run left; False where that one is finished."""
    restart = restart or (directory / RESTARTING).is_dir()  # one that was killed is ended first
    if final.is_dir() and not restart:
        return False
    make_folder(directory / "checkpoints", "train.output_dir")
    lock.enter_context(lock_folder(directory, "train.output_dir"))
    if final.is_dir() and not restart:  # another process finished it while this one waited
        return False
    if restart:
        set_run_aside(directory)
    recover_folders(directory / "checkpoints")
    steps = map(step_of, list_checkpoints(directory / "checkpoints"))
    # What `RunLog` and the tracker would refuse shows here, before the first hour and not after it.
    read_metrics(directory, max(steps, default=0))
    check_tracker(config.train.report_to)
    return True


def _train(run: Run) -> None:
    """All steps that are left, with their validations and checkpoints."""
    limit = run.config.train.save_total_limit
    run.ranks.run_on_rank_0(lambda: prune_checkpoints(run.checkpoints, limit))  # what a killed one left to do
    done = run.state.step - (run.state.pending_entry is not None)
    report_to, is_rank_0 = run.config.train.report_to, run.ranks.is_rank_0
    with ExitStack() as stack:
        with run.ranks.barrier():
            tracker = open_tracker(report_to, run.directory, done, run.config.to_dict()) if is_rank_0 else Tracker()
            stack.enter_context(tracker)
        if run.config.train.do_predict and run.state.test_before is None:
            with adapter_disabled(run.model):  # a run that was begun without do_predict may have an adapter by now
                run.state = replace(run.state, test_before=score_test_set(run, "test before training")[0])
        if run.state.test_before is not None:
            info(f"test before training: {format_metrics(run.state.test_before)}")
        with run.ranks.barrier():
            log = RunLog(run.directory, run.total_steps, done, tracker) if is_rank_0 else NoLog()
            stack.callback(log.close)
        with SafePoints() as safe_points:
            _take_steps(run, log, safe_points)
    if _has_stalled(run):
        info(f"no better validation in {run.state.evals_without_improvement} tries: stopped early")


def _take_steps(run: Run, log: RunLog, safe_points: SafePoints) -> None:
    """The loop. However it ends, what was done is saved, unless it was the saving that failed."""
    saved = run.state
    try:
        while run.state.pending_entry is not None or not (_is_at_the_end(run) or _has_stalled(run)):
            improved = _advance(run, log, safe_points)
            if improved or _has_stalled(run) or _is_save_due(run, saved.step):
                _save(run, log)
                saved = run.state
            with run.ranks.barrier():
                safe_points.check()
    except (Interrupted, LostRankError, OSError) as stop:
        if not isinstance(stop, Interrupted):  # which all ranks agree on
            run.ranks = run.ranks.detached()
        if run.state is not saved:
            _save(run, log)
        step = run.state.step
        if isinstance(stop, LostRankError):
            raise LostRankError(
                f"step {step} is saved; {stop}" if step and run.ranks.is_rank_0 else str(stop)
            ) from None
        if isinstance(stop, OSError):  # whoever read the output has gone, or the output's disk is full
            raise
        where = f"saved step {step}; the same command goes on from there" if step else "nothing done"
        raise Interrupted(stop.signum, f"{stop}: {where}") from None


def _advance(run: Run, log: RunLog, safe_points: SafePoints) -> bool:
    """One step, or the validation that is left of one, into the log; says whether it is the best so far."""
    row = run.state.pending_entry
    must_validate = row is not None
    if row is None:
        row = _take_step(run, run.state.step + 1, log, safe_points)
    improved = False
    if must_validate or _is_due(run, run.config.train.eval_steps):
        # A signal within the validation leaves a state that begins with it again.
        run.state = replace(run.state, pending_entry=row)
        improved = _validate(run, row, safe_points)
    if row["step"] % run.config.train.logging_steps == 0 or "eval_loss" in row or "skipped" in row:
        log.write(row)
    log.advance(row)
    if "eval_loss" in row:
        log.info(f"step {row['step']}: {format_metrics(row)}{'  best so far' if improved else ''}")
    return improved


def _is_save_due(run: Run, saved_step: int) -> bool:
    """Whether `save_steps` have passed; after a skipped step the next good one is saved in its place."""
    every, step = run.config.train.save_steps, run.state.step
    return _is_at_the_end(run) or (step // every > saved_step // every and not run.state.skipped_in_a_row)


def _save(run: Run, log: RunLog) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for parameter in lora_parameters(run.model)):
        raise UserError(
            f"step {run.state.step}: the adapter's weights are no longer numbers, so they are not saved; begin anew "
            f"with --restart and a lower train.learning_rate (it is {run.config.train.learning_rate:g}). The newest "
            f"checkpoint: {run.newest_checkpoint}"
        )
    if run.ranks.size > 1:
        remedy = f"run the same command on machines that are alike, it goes on from {run.newest_checkpoint}"
        run.ranks.require_same(state_digests(run.model, run.optimizer), f"step {run.state.step} is not saved; {remedy}")
    run.ranks.run_on_rank_0(lambda: _write_checkpoint(run, log))


def _write_checkpoint(run: Run, log: RunLog) -> None:
    log.sync()
    save_checkpoint(run.checkpoints, run.model, adapter_config(run.config), run.optimizer, run.state)
    prune_checkpoints(run.checkpoints, run.config.train.save_total_limit)


def _out_of_memory(config: Config, run: Run | None, process_bytes: int | None, error: BaseException) -> str:
    """What the configuration takes, and what would make it less."""
    train, rows = config.train, config.train.max_tokens_per_micro_batch
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if run is None:
        return (
            f"{config.model.name_or_path}: memory ran out while the model was loaded ({reason}); --dry-run says what "
            "it takes; choose a smaller model or model.quantization=nf4"
        )
    knobs = [
        f"train.max_tokens_per_micro_batch={max((rows or 640) // 2, 16)}",
        f"data.max_length={config.data.max_length // 2}",
    ]
    if config.model.quantization == "none":
        knobs.append("model.quantization=nf4")
    if train.optim == "adamw_torch_fused" and config.lora.r >= 32:
        knobs.append("train.optim=adamw_bnb_8bit")
    harmless = [
        key
        for key, is_set in (
            ("train.gradient_checkpointing=true", train.gradient_checkpointing),
            ("model.cache_dequantized=false", not config.model.cache_dequantized),
        )
        if not is_set
    ]
    folder, examples = run.prompt.tokenizer.folder, run.splits["train"].examples
    dtype = choose_dtype(config, run.device)
    ledger = estimate_run_memory(config, folder, examples, dtype=dtype, process_bytes=process_bytes)
    now = (
        f"set {', '.join(harmless)} and run it again (newest checkpoint: {run.newest_checkpoint}); or "
        if harmless
        else ""
    )
    return (
        f"after step {run.state.step}: memory ran out ({reason}); {now}begin anew with --restart and, what helps most "
        f"first, {', '.join(knobs)}\n  what this configuration takes, by the largest micro-batch of an epoch:\n{ledger}"
    )


def _take_step(run: Run, step: int, log: RunLog, safe_points: SafePoints) -> dict[str, Any]:
    """One optimizer step; returns the row for the log and moves the run's state on."""
    train = run.config.train
    started = time.perf_counter()
    examples = step_examples(run, step)
    micro_batches = list(iter_micro_batches(run, examples))
    rate = lr_at(step, run.total_steps, train.learning_rate, train.lr_scheduler_type, train.warmup_ratio)
    run.model.train()
    num_supervised = sum(sum(example.supervised) for example in examples)
    result = train_step(
        TrainState(run.model, run.optimizer, run.dropout_seed, run.scaler, run.ranks),
        micro_batches,
        StepSettings(step, rate, train.max_grad_norm, train.seed, num_supervised=num_supervised),
        safe_points.anywhere,
    )
    num_real_tokens = sum(len(example.input_ids) for example in examples)
    row: dict[str, Any] = {
        "step": step,
        "epoch": 0.0,
        "train_loss": result.loss if math.isfinite(result.loss) else None,
        "learning_rate": rate,
        "grad_norm": result.grad_norm if result.updated else None,
        "tokens_per_s": round(num_real_tokens / (time.perf_counter() - started), 1),
    }
    skipped, in_a_row = run.state.skipped_steps, 0
    if not result.updated:
        # With float16 an overflow of the gradient alone is how the loss scale is found.
        is_search = run.scaler is not None and math.isfinite(result.loss)
        skipped, in_a_row = skipped + 1, run.state.skipped_in_a_row + (not is_search)
        rows = [run.splits["train"].records[place].where for place in step_indices(run, step)]
        row |= {"skipped": True, "rows": rows}
        log.info(
            f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}: skipped, it changed nothing "
            f"({skipped} skipped so far)"
        )
        if in_a_row >= train.max_skipped_steps:
            log.write(row)
            raise UserError(_too_many_skipped(run, step, in_a_row, rows))
    samples = run.state.samples_seen + len(examples)
    row["epoch"] = round(samples / len(run.splits["train"].examples), 4)
    run.state = replace(
        run.state,
        step=step,
        samples_seen=samples,
        scaler=run.scaler.state_dict() if run.scaler is not None else {},
        skipped_steps=skipped,
        skipped_in_a_row=in_a_row,
    )
    peak = peak_memory_bytes(run.device)
    return row if peak is None else {**row, "peak_memory_bytes": peak}


def _too_many_skipped(run: Run, step: int, in_a_row: int, rows: list[str]) -> str:
    train, model = run.config.train, run.config.model
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return (
        f"step {step}: the loss or its gradient is no number, {in_a_row} steps in a row (the last one's rows: "
        f"{shown}); begin anew with --restart and a lower train.learning_rate (it is {train.learning_rate:g}) or "
        f"another model.compute_dtype (it is {model.compute_dtype}), or raise train.max_skipped_steps (it is "
        f"{train.max_skipped_steps}). The newest checkpoint, from before: {run.newest_checkpoint}"
    )


def _is_at_the_end(run: Run) -> bool:
    return run.state.step >= run.total_steps


def _is_due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or _is_at_the_end(run)


def _validate(run: Run, row: dict[str, Any], safe_points: SafePoints) -> bool:
    """Adds the validation metrics to `row`; says whether they are the best so far and keeps count of it."""
    metrics, _ = score_split(run, "validation", interruptible=safe_points.anywhere)
    row |= {f"eval_{name}": metrics[name] for name in ("loss", "accuracy", "f1") if name in metrics}
    value, best = row[run.best_by], run.state.best_metric
    improved = best is None or (value > best if run.best_by == "eval_f1" else value < best)
    run.state = replace(run.state, pending_entry=None, validated_step=row["step"])
    if improved:
        run.state = replace(run.state, best_step=row["step"], best_metric=value, evals_without_improvement=0)
    else:
        run.state = replace(run.state, evals_without_improvement=run.state.evals_without_improvement + 1)
    return improved


def _has_stalled(run: Run) -> bool:
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.state.evals_without_improvement >= patience

"""`fit()`: the training loop.

    while steps are left:
        batches -> train_step -> validate? -> log -> save?

A run is a function of its configuration, its data and its base model. What `fit` finds in the output folder decides
where it begins: nothing, a checkpoint to resume from, or a finished run, which it leaves as it is.

Two context managers keep the rest out of the loop. `run_folder` locks the folder and says of every error what is saved
and what to do. `saving_on_exit` saves the steps done, whatever ends the loop, and delays signals while state changes.

Several ranks go through the loop in step (`system/distributed.py`). Only rank 0 writes to the output folder; work that
one rank can fail in is within `ranks.barrier()` or `ranks.run_on_rank_0()`, so that all ranks stop together.
"""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.attach import adapter_disabled, lora_parameters
from minilora.build import SharedBase, take_adapter, with_model_system
from minilora.config import Config
from minilora.errors import UserError
from minilora.evaluation.metrics import only_answer
from minilora.evaluation.score import Scores
from minilora.qlora.step import StepResult, train_step
from minilora.runs.advice import NonFiniteError, non_finite, too_many_skipped
from minilora.runs.checkpoint import prune_checkpoints, save_checkpoint, state_digests
from minilora.runs.finish import check_finished, finish
from minilora.runs.folder import run_folder
from minilora.runs.metrics_log import VALIDATED, RunLog, format_metrics
from minilora.runs.run import Run, StepBatch, batches
from minilora.runs.run_report import complete_report
from minilora.runs.scoring import score_split, score_test_set
from minilora.system.console import info, warn
from minilora.system.distributed import SINGLE_RANK, LostRankError, Ranks
from minilora.system.memory import is_out_of_memory, peak_memory_bytes, reserved_memory_bytes
from minilora.system.signals import Interrupted, SafePoints


def fit(
    config: Config,
    model_folder: Path,
    restart: bool = False,
    ranks: Ranks = SINGLE_RANK,
    base: SharedBase | None = None,
) -> Path:
    """Trains, resumes training, or finds it done; returns the final adapter's folder. `restart` sets an old run aside.

    `base` spares a sweep from loading the same model for each of its runs.

    Raises:
        UserError: the output folder is another run's, in use or not writable, something in the input is wrong, losses
            are non-finite, memory, disk or a rank is lost, or the final adapter cannot be read back as it was.
        Interrupted: a signal came; the steps done by then are saved.
    """
    with ranks.rank_0_first():
        config = with_model_system(take_adapter(config), model_folder)
    with run_folder(config, model_folder, restart, ranks, base=base) as run:
        if run is None:
            final = Path(config.train.output_dir) / "checkpoints" / "final"
            ranks.run_on_rank_0(lambda: check_finished(final, config, model_folder, ranks.size))
            complete_report(config, model_folder, ranks)
            info(f"{final}: this run is finished; --restart begins anew")
            return final
        score_before_training(run)
        with saving_on_exit(run) as (log, safe_points):
            while not run.is_done:
                entry, improved = run.state.pending_entry, False
                if entry is None:  # otherwise that of a step whose validation or log was interrupted
                    started = time.perf_counter()
                    batch = batches(run, run.state.step + 1)
                    run.model.train()
                    result = train_step(run.train_state, batch.micro_batches, batch.settings, safe_points.anywhere)
                    entry = count_step(run, batch, result, time.perf_counter() - started, log=log)
                if run.is_validation_due:
                    improved = validate(run, entry, log, safe_points)
                if run.is_logging_due(entry):
                    log.write(entry)
                run.state = replace(run.state, pending_entry=None)
                log.show(entry, improved)
                if improved or run.is_save_due:
                    save(run, log)
                with run.ranks.barrier():  # a signal to one rank stops all of them after the same step
                    safe_points.check()
        return finish(run)


def count_step(run: Run, batch: StepBatch, result: StepResult, seconds: float, log: RunLog) -> dict[str, Any]:
    """Counts a step, which may have been skipped, into the run's state; returns its entry for the log.

    UserError after `train.max_skipped_steps` non-finite steps in a row.
    """
    state, step = run.state, batch.settings.step
    samples, skipped, in_a_row = state.samples_seen + len(batch.examples), state.skipped_steps, 0
    entry: dict[str, Any] = {
        "step": step,
        "epoch": round(samples / len(run.splits["train"].examples), 4),
        "train_loss": result.loss if math.isfinite(result.loss) else None,
        "learning_rate": batch.settings.learning_rate,
        "grad_norm": result.grad_norm if result.updated else None,
        "tokens_per_s": round(sum(len(example.input_ids) for example in batch.examples) / seconds, 1),
    }
    if not result.updated:
        # With float16 an overflow of only the gradient is how the loss scale is found.
        is_search = run.scaler is not None and math.isfinite(result.loss)
        skipped, in_a_row = skipped + 1, state.skipped_in_a_row + (not is_search)
        entry |= {"skipped": True, "rows": batch.records}
        log.info(
            f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}: skipped, it changed nothing "
            f"({skipped} skipped so far)"
        )
        if in_a_row >= run.config.train.max_skipped_steps:
            log.write(entry)
            raise too_many_skipped(run, batch, in_a_row)
    peaks = {"peak_memory_bytes": peak_memory_bytes(run.device), "reserved_bytes": reserved_memory_bytes(run.device)}
    entry |= {name: peak for name, peak in peaks.items() if peak is not None}
    run.state = replace(
        state,
        step=step,
        samples_seen=samples,
        pending_entry=entry,
        scaler=run.scaler.state_dict() if run.scaler is not None else {},
        skipped_steps=skipped,
        skipped_in_a_row=in_a_row,
    )
    return entry


def score_before_training(run: Run) -> None:
    """The test set on what training begins with, once in a run: the base model, or the adapter that it goes on from."""
    has_adapter = run.config.model.adapter is not None
    is_trained = has_adapter and run.state.step > 0  # by now, as in a run that began without do_predict
    if run.config.train.do_predict and run.state.test_before is None and not is_trained:
        with nullcontext() if has_adapter else adapter_disabled(run.model):
            run.state = replace(run.state, test_before=score_test_set(run, "test before training")[0])
    if run.state.test_before is not None:
        info(f"test before training: {format_metrics(run.state.test_before)}")


def validate(run: Run, entry: dict[str, Any], log: RunLog, safe_points: SafePoints) -> bool:
    """Adds the validation metrics to `entry`; says whether they are the best so far, and keeps count of it.

    Of equal scores the lower loss is better, so one that cannot rise (the F1 of a class that has no example there is 0)
    leaves the choice to the loss.
    """
    metrics, probabilities = score_split(run, "validation", interruptible=safe_points.anywhere)
    entry |= {f"eval_{name}": metrics[name] for name in VALIDATED if name in metrics}
    for text in only_answer("validation", metrics):
        log.info(f"step {entry['step']}: {text}")
    value, loss, best = entry[run.best_by], entry["eval_loss"], run.state.best_metric
    sign = -1 if run.best_by == "eval_loss" else 1
    best_loss = -math.inf if run.state.best_loss is None else run.state.best_loss  # None in an earlier version's state
    improved = best is None or (sign * value, -loss) > (sign * best, -best_loss)
    run.state = replace(run.state, validated_step=run.state.step)
    if improved:
        run.state = replace(
            run.state, best_step=run.state.step, best_metric=value, best_loss=loss, evals_without_improvement=0
        )
    else:
        run.state = replace(run.state, evals_without_improvement=run.state.evals_without_improvement + 1)
    known = {**run.validated, run.state.step: Scores(loss, probabilities)}
    run.validated = {step: known[step] for step in {run.state.best_step, run.state.step} if step in known}
    return improved


def save(run: Run, log: RunLog) -> None:
    """Writes a checkpoint and removes those that are no longer kept.

    UserError if the adapter is non-finite, or the ranks no longer have the same one.
    """
    run.saved = run.state  # also where it fails: it is not tried again
    if not all(bool(torch.isfinite(parameter).all()) for parameter in lora_parameters(run.model)):
        raise non_finite(run, run.state.step, "the adapter holds non-finite values (NaN or inf), so it is not saved;")
    if run.ranks.size > 1:
        remedy = f"step {run.state.step} is not saved; run the same command on machines that are alike"
        run.ranks.require_same(state_digests(run.model, run.optimizer), remedy)

    def write() -> None:
        log.sync()
        save_checkpoint(run.checkpoints, run.model, run.adapter, optimizer=run.optimizer, state=run.state)
        prune_checkpoints(run.checkpoints, run.config.train.save_total_limit)

    run.ranks.run_on_rank_0(write)


@contextmanager
def saving_on_exit(run: Run) -> Iterator[tuple[RunLog, SafePoints]]:
    """Opens the log, and saves what was done whatever ends the block, unless it was the saving that failed.

    Within it a signal waits for the next safe point. Interrupted and LostRankError then name the step that is saved.
    """
    with ExitStack() as stack:
        with run.ranks.barrier():
            directory = run.directory if run.ranks.is_rank_0 else None
            log = RunLog(directory, run.total_steps, run.logged_steps, run.tracker)
            stack.callback(log.close)
        safe_points = stack.enter_context(SafePoints())
        run.saved = run.state
        try:
            yield log, safe_points
        except Interrupted as stop:  # which all ranks agree on
            if run.state is not run.saved:
                save(run, log)
            step = run.state.step
            where = f"saved step {step}; the same command resumes there" if step else "nothing done"
            raise Interrupted(stop.signum, f"{stop}: {where}") from None
        except BaseException as stop:
            is_saved = _save_after(stop, run, log)
            if isinstance(stop, LostRankError):
                raise LostRankError(f"step {run.state.step} is saved; {stop}" if is_saved else str(stop)) from None
            if is_saved and not isinstance(stop, OSError | NonFiniteError):  # no output; a message that says it
                warn(f"note: step {run.state.step} is saved; the same command resumes there")
            raise


def _save_after(error: BaseException, run: Run, log: RunLog) -> bool:
    """Saves what was done before `error`, which stays the one that is shown; returns whether rank 0 has saved it."""
    run.ranks = run.ranks.detached()  # the others are gone, or elsewhere in the program
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # the activations in them: saving takes memory too
    is_lost = isinstance(error, LostRankError)  # perhaps in a save, before anything was written
    if not run.state.step or (run.state is run.saved and not is_lost):
        return False
    try:
        if not is_between_updates(run):
            raise UserError("its update was cut short")
        save(run, log)
    except Exception as another:
        warn(f"note: step {run.state.step} cannot be saved: {another}")
        return False
    return run.ranks.is_rank_0


def is_between_updates(run: Run) -> bool:
    """Whether weights and moments are those of the last step in the state: AdamW counts the updates of each tensor."""
    updates = {int(count) for name, count in run.optimizer.tensors().items() if name.endswith(".step")}
    return updates <= {run.state.step - run.state.skipped_steps}

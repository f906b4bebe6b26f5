"""What went wrong in a run, and the mildest remedy: the messages that need the run's own figures."""

import math

from minilora.build import choose_dtype
from minilora.config import Config
from minilora.errors import UserError
from minilora.planning.plan import estimate_run_memory
from minilora.runs.run import Run, StepBatch

SHOWN_RECORDS = 8
SHORTEST_MICRO_BATCH_TOKENS = 16


def out_of_memory(config: Config, run: Run | None, error: BaseException) -> str:
    """What the configuration takes, and what would make it less; first what changes no result."""
    train, tokens = config.train, config.train.max_tokens_per_micro_batch
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if run is None:
        return (
            f"{config.model.name_or_path}: memory ran out while the model was loaded ({reason}); --dry-run says what "
            "it takes; choose a smaller model or model.quantization=nf4"
        )
    keys = [
        f"train.max_tokens_per_micro_batch={max((tokens or 640) // 2, SHORTEST_MICRO_BATCH_TOKENS)}",
        f"data.max_length={config.data.max_length // 2}",
    ]
    if config.model.quantization == "none":
        keys.append("model.quantization=nf4")
    if train.optim == "adamw_torch_fused" and config.lora.r >= 32:
        keys.append("train.optim=adamw_bnb_8bit")
    harmless = [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    if config.model.cache_dequantized:
        harmless.append("model.cache_dequantized=false")
    resuming = (
        f"set {', '.join(harmless)} and run the same command to resume from {run.newest_checkpoint}; or "
        if harmless
        else ""
    )
    folder, examples = run.prompt.tokenizer.folder, run.splits["train"].examples
    estimate = estimate_run_memory(config, folder, examples, choose_dtype(config, run.device), run.process_bytes)
    return (
        f"after step {run.state.step}: memory ran out ({reason}); {resuming}begin anew with --restart and, what helps "
        f"most first, {', '.join(keys)}\n  what this configuration takes, by the largest micro-batch of an epoch:\n"
        f"{estimate}"
    )


def too_many_skipped(run: Run, batch: StepBatch, in_a_row: int) -> str:
    """Which records the last step had, and which keys may help."""
    train, records = run.config.train, batch.records
    shown = ", ".join(records[:SHOWN_RECORDS])
    if len(records) > SHOWN_RECORDS:
        shown += f" and {len(records) - SHOWN_RECORDS} more"
    return (
        f"step {batch.step}: the loss or its gradient is non-finite (NaN or inf), {in_a_row} steps in a row (records "
        f"of the last one: {shown}); {_begin_anew(run)}, or raise train.max_skipped_steps (it is "
        f"{train.max_skipped_steps}). The newest checkpoint, from before: {run.newest_checkpoint}"
    )


def non_finite_adapter(run: Run) -> str:
    """Why nothing is saved: a checkpoint that no run can resume from would push out one that it can."""
    return (
        f"step {run.state.step}: the adapter holds non-finite values (NaN or inf), so it is not saved; begin anew with "
        f"--restart and a lower train.learning_rate (it is {run.config.train.learning_rate:g}). The newest checkpoint: "
        f"{run.newest_checkpoint}"
    )


def check_finite(run: Run, what: str, value: float) -> None:
    """Raises UserError for a non-finite loss of a whole split: no single record does that, the adapter is ruined."""
    if not math.isfinite(value):
        raise UserError(
            f"step {run.state.step}: the {what} is {value}, expected a finite number; {_begin_anew(run)}. The newest "
            f"checkpoint that stays: {run.newest_checkpoint}"
        )


def _begin_anew(run: Run) -> str:
    train, model = run.config.train, run.config.model
    return (
        f"begin anew with --restart and a lower train.learning_rate (it is {train.learning_rate:g}) or another "
        f"model.compute_dtype (it is {model.compute_dtype})"
    )

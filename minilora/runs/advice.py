"""What went wrong in a run, and the mildest remedy: the messages that need the run's own figures."""

from minilora.config import Config
from minilora.errors import UserError
from minilora.runs.checkpoint import newest_checkpoint
from minilora.runs.run import Run, StepBatch

SHOWN_RECORDS = 8
SHORTEST_MICRO_BATCH_TOKENS = 16


class NonFiniteError(UserError):
    """Losses or weights are NaN or infinite."""


def out_of_memory(config: Config, run: Run | None, error: BaseException) -> UserError:
    """What the configuration takes, and what would make it less; first what changes no result."""
    train, tokens = config.train, config.train.max_tokens_per_micro_batch
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if run is None:
        return UserError(
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
        f"set {', '.join(harmless)} and run the same command to resume from {newest_checkpoint(run.checkpoints)}; or "
        if harmless
        else ""
    )
    return UserError(
        f"after step {run.state.step}: memory ran out ({reason}); {resuming}begin anew with --restart and, what helps "
        f"most first, {', '.join(keys)}\n  what this configuration takes, by the largest micro-batch of an epoch:\n"
        f"{run.memory_estimate}"
    )


def too_many_skipped(run: Run, batch: StepBatch, in_a_row: int) -> NonFiniteError:
    """Names the records of the last step."""
    shown, more = batch.records[:SHOWN_RECORDS], len(batch.records) - SHOWN_RECORDS
    records = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    what = f"the loss or its gradient is non-finite (NaN or inf), {in_a_row} steps in a row"
    advice = f"raise train.max_skipped_steps (it is {run.config.train.max_skipped_steps}) and resume to pass them, or"
    return non_finite(run, batch.settings.step, f"{what} (records of the last one: {records}); {advice}")


def non_finite(run: Run, step: int, what: str) -> NonFiniteError:
    """Why the run stops. Such weights are not saved: they would push out a checkpoint that can be resumed."""
    train, model = run.config.train, run.config.model
    return NonFiniteError(
        f"step {step}: {what} begin anew with --restart and a lower train.learning_rate (it is "
        f"{train.learning_rate:g}) or another model.compute_dtype (it is {model.compute_dtype})"
    )

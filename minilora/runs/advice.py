"""What went wrong in a run, and the mildest remedy: the messages that need the run's own figures."""

from minilora.config import Config
from minilora.errors import UserError
from minilora.evaluation.score import LabelWords, ScoringOptions, iter_batches
from minilora.planning.budget import SHORTEST_TOKENS
from minilora.planning.memory import scoring_tokens
from minilora.qlora.batch import round_up_tokens
from minilora.runs.checkpoint import checkpoint_path, newest_checkpoint
from minilora.runs.run import Run, StepBatch

SHOWN_RECORDS = 8


class NonFiniteError(UserError):
    """Losses or weights are NaN or infinite."""


def out_of_memory(config: Config, run: Run | None, error: BaseException) -> UserError:
    """What the configuration takes, and what would make it less: first what resumes, then what needs a new run."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if run is None:
        return UserError(
            f"{config.model.name_or_path}: memory ran out while the model was loaded ({reason}); --dry-run says what "
            "it takes; choose a smaller model or model.quantization=nf4"
        )
    newest = newest_checkpoint(run.checkpoints)
    if not run.ranks.is_rank_0 and run.state.step:  # which rank 0 saves meanwhile
        newest = checkpoint_path(run.checkpoints, run.state.step)
    place, first, *others = _resuming_keys(run)
    resuming = "run the same command" if newest == "none" else f"to resume from {newest}, run the same command"
    further = f" (and, if need be, {', '.join(others)})" if others else ""
    resuming = f"{resuming} with {first}{further}; or " if first else ""
    anew = "with" if newest == "none" else "begin anew with --restart and"
    return UserError(
        f"after step {run.state.step}: memory ran out {place} ({reason}); {resuming}{anew}, what helps most first, "
        f"{', '.join(_other_keys(config))}\n  what this configuration takes, by the largest micro-batch of an epoch:\n"
        f"{run.memory_estimate}"
    )


def _resuming_keys(run: Run) -> list[str]:
    """Where memory ran out, and the keys that take less there in the same run, the mildest first; "" for none."""
    model, train = run.config.model, run.config.train
    keys = []
    if run.scoring is not None:
        split, tokens = run.splits[run.scoring], scoring_tokens(run.config)
        of_words = LabelWords.of(run.prompt.scored_ids, tokens).num_tokens if split.labelled else 0
        lengths = split.examples.lengths + of_words
        passes = iter_batches(lengths, ScoringOptions(train.per_device_eval_batch_size, tokens))
        if (size := len(next(passes))) > 1:
            keys.append(f"train.per_device_eval_batch_size={size // 2}")
    else:
        one_example = round_up_tokens(run.batch_shape.longest)
        if run.batch_shape.tokens > one_example:
            tokens = max(run.batch_shape.tokens // 2, one_example, SHORTEST_TOKENS)
            keys.append(f"train.max_tokens_per_micro_batch={tokens}")
        if not train.gradient_checkpointing:
            keys.append("train.gradient_checkpointing=true")
        elif run.device.type == "cuda" and not train.offload_checkpoints:
            keys.append("train.offload_checkpoints=true")
    if model.cache_dequantized:
        keys.append("model.cache_dequantized=false")
    return [f"in scoring the {run.scoring} set" if run.scoring else "in training", *(keys or [""])]


def _other_keys(config: Config) -> list[str]:
    """The keys that take less and make another run."""
    keys = [f"data.max_length={config.data.max_length // 2}"]
    if config.model.quantization == "none":
        keys.append("model.quantization=nf4")
    if config.train.optim == "adamw_torch_fused" and config.lora.r >= 32:
        keys.append("train.optim=adamw_bnb_8bit")
    return keys


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

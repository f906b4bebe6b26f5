"""How a run ends: scored on the test set, its adapter in a folder of its own, read back before anybody relies on it.

checkpoints/final/
    adapter_config.json, adapter_model.safetensors    as peft reads them
    training_args.json                                the resolved configuration
    metrics.json                                      test set before and after, best validation, what made it
    README.md, manifest.json                          a model card; size and SHA-256 of each file
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora.adapters.attach import DEFAULT, iter_lora_weights, remove_adapter, set_adapter
from minilora.adapters.peft_files import adapter_files, damage_of_adapter, load_adapter, load_adapter_weights
from minilora.build import Examples, adapter_config, choose_dtype
from minilora.config import LENGTHS, Config
from minilora.errors import UserError
from minilora.evaluation.metrics import classification_metrics
from minilora.evaluation.score import Scores, score
from minilora.planning.plan import estimate_run_memory
from minilora.qlora.batch import pack
from minilora.reports import plots
from minilora.reports.answers import ScoredExamples
from minilora.reports.model_card import render_model_card
from minilora.reports.report import Report, render_report
from minilora.runs.checkpoint import checkpoint_path
from minilora.runs.metrics_log import read_metrics
from minilora.runs.provenance import current_provenance, read_provenance, refuse_another_run
from minilora.runs.setup import Run, check_best, share_adapter
from minilora.system.console import info, progress, warn
from minilora.system.files import StorageError, json_bytes, replace_file
from minilora.system.manifest import write_folder

CHECKED_EXAMPLES = 8  # whose hidden states the adapter that was written has to give
# Keys that change nothing in the course of a run, and yet what is in its final folder.
FINAL_KEYS = ("do_predict", "load_best_model_at_end", "save_format", "save_dtype", "portable")


def check_finished(final: Path, config: Config, model_folder: Path, ranks: int = 1) -> None:
    """Raises UserError where a finished run is not the one that is asked for, or not as it was written."""
    problem = damage_of_adapter(final)
    if problem is not None:
        raise UserError(
            f"{final}: is damaged ({problem}); move that folder away to have it written again from the checkpoints"
        )
    before, now = read_provenance(final), current_provenance(config, model_folder, ranks)
    refuse_another_run(before, now, config, final.parent.parent)
    for name in (*FINAL_KEYS, *LENGTHS):
        old, new = before.config["train"].get(name), now.config["train"][name]
        if old != new:
            raise UserError(
                f"train.{name}: {new!r} comes too late, {final} was written with {old!r}; move that folder away to "
                "have it written again from the checkpoints, or put the key back"
            )


def finish(run: Run, final: Path, process_bytes: int | None = None) -> Path:
    """Writes the final folder, from the best checkpoint if so configured, and beside the log its plot and the report.

    Args:
        run: with all its steps behind it.
        final: the folder.
        process_bytes: what the process took before anything was loaded; None where it cannot be measured.
    """
    train = run.config.train
    step = run.state.step
    if train.load_best_model_at_end and run.state.best_step != step:
        step = run.state.best_step
        run.ranks.run_on_rank_0(lambda: _load_best(run))
        share_adapter(run.model, run.ranks)
    after, probabilities = score_test_set(run, "test after training") if train.do_predict else (None, None)
    run.ranks.run_on_rank_0(lambda: _write_final(run, final, step, after, probabilities, process_bytes))
    return final


def _load_best(run: Run) -> None:
    check_best(run.config, run.checkpoints, run.state)
    load_adapter_weights(run.model, checkpoint_path(run.checkpoints, run.state.best_step))


def _write_final(
    run: Run,
    final: Path,
    step: int,
    after: dict[str, Any] | None,
    probabilities: np.ndarray | None,
    process_bytes: int | None,
) -> None:
    """The final folder, the report and the plot.

    Args:
        run: at its end.
        final: the folder.
        step: whose adapter the model has.
        after: metrics of the test set with it.
        probabilities: (N, labels) behind them.
        process_bytes: see `finish`.
    """
    train = run.config.train
    base = run.prompt.tokenizer.folder
    results = {
        "step": step,
        "skipped_steps": run.state.skipped_steps,
        "validation": {run.best_by: run.state.best_metric, "step": run.state.best_step},
        "test_before": run.state.test_before,
        "test": after,
        "data_sha256": run.state.data_sha256,
        "model_sha256": run.state.model_sha256,
        "model_bytes": {name: (base / name).stat().st_size for name in run.state.model_sha256},
        "machine": run.state.machine,
        "model_revision": base.name if base.parent.name == "snapshots" else None,  # the commit, in the hub's cache
    }
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[train.save_dtype]

    def files() -> Iterator[tuple[str, bytes]]:
        yield from adapter_files(run.model, adapter_config(run.config), train.save_format, dtype, train.portable)
        yield "training_args.json", json_bytes(run.config.to_dict())
        yield "metrics.json", json_bytes(results)
        yield "README.md", render_model_card(run.config.to_dict(), results, run.splits["train"].labelled).encode()

    write_folder(final, files(), {"step": step}, lambda folder: _check_saved(run, folder, dtype))
    if after is not None:
        print(f"test after training:  {format_metrics(after)}")
    print(f"final adapter (step {step}): {final}")
    log = read_metrics(run.directory)
    report = render_report(_report_of(run, results, probabilities, log, process_bytes))
    _write_if_possible(run.directory / "report.html", lambda path: replace_file(path, report.encode()))
    if plots.is_available():
        _write_if_possible(run.directory / "loss.png", lambda path: plots.save_loss_png(path, log))
    else:
        info("loss.png and the report's curves are left out, because matplotlib is not installed")


def _write_if_possible(path: Path, write: Callable[[Path], None]) -> None:
    """Writes what the run can do without: it is done, and all that is shown there stands in other files too."""
    try:
        write(path)
    except (StorageError, OSError) as error:
        warn(f"note: {path} cannot be written ({getattr(error.__cause__ or error, 'strerror', None) or error})")
    else:
        info(f"written: {path}")


def _report_of(
    run: Run,
    results: dict[str, Any],
    probabilities: np.ndarray | None,
    log: list[dict[str, Any]],
    process_bytes: int | None,
) -> Report:
    """What the report of a run shows.

    Args:
        run: with all its steps behind it.
        results: content of metrics.json.
        probabilities: (N, labels) of the test set; None where it has no labels or was not scored.
        log: rows of metrics.jsonl.
        process_bytes: see `finish`.
    """
    config, splits, folder = run.config, run.splits, run.prompt.tokenizer.folder
    test = splits["test"]
    scored = {"before training": results["test_before"], "after training": results["test"]}
    remark = f"Test set: {len(test.examples):,} records, {test.num_truncated:,} cut to {config.data.max_length} tokens."
    if results["test"] is None:
        scored, remark = {}, "The test set was not scored (train.do_predict=false), so there are no figures of it."
    elif probabilities is None:
        remark += " Conversations have no labels to be right in: the loss is all there is."
    dtype = choose_dtype(config, run.device)
    return Report(
        title="Training report",
        remark=remark,
        results={title: metrics for title, metrics in scored.items() if metrics is not None},
        answers=None
        if probabilities is None
        else ScoredExamples(test.records, np.array(test.labels), probabilities, run.prompt.labels),
        log=log,
        ledger=estimate_run_memory(
            config, folder, splits["train"].examples, dtype=dtype, process_bytes=process_bytes
        ).parts,
        peak_bytes=max((row["peak_memory_bytes"] for row in log if "peak_memory_bytes" in row), default=None),
        config=config.to_dict(),
        defaults=Config().to_dict(),
        facts={
            "adapter": {"step": results["step"], "steps that were skipped": results["skipped_steps"]},
            "best validation": results["validation"],
            "base model": {"name": config.model.name_or_path, "folder": folder},
            "data": {
                "folder": config.data.dir,
                **{name: f"{len(split.examples):,} ({split.num_truncated:,} cut)" for name, split in splits.items()},
            },
            "computed with": run.state.machine,
            "SHA-256 of the data": run.state.data_sha256,
            "SHA-256 of the base model": run.state.model_sha256,
        },
    )


def _check_saved(run: Run, folder: Path, dtype: torch.dtype) -> None:
    """Reads the written adapter as a second one over the base: it has to give the hidden states of the trained one.

    Nobody looks at the file before it is used elsewhere, where a damaged one is only a model that does worse. The
    trained values are rounded to `dtype` first, as in the file; then both agree to the bit, but for a portable
    adapter, whose B has the scale in it.
    """
    for _, w in iter_lora_weights(run.model):
        for tensor in (*w.parameters(), *w.buffers()):
            tensor.data.copy_(tensor.to(dtype))
    expected, what = _hidden_states(run), "its values differ"
    tolerance = 0.02 * expected.abs().max() if run.config.train.portable else 0.0
    try:
        load_adapter(run.model, folder, allow_bin=True, name="read back")  # just written by this process
        found = _hidden_states(run)
        if not torch.isfinite(found).all():
            what = "its hidden states are no numbers"
        is_equal = bool(((found - expected).abs() <= tolerance).all())
    except UserError as error:
        is_equal, what = False, str(error)
    finally:
        remove_adapter(run.model, "read back")
        set_adapter(run.model, DEFAULT)
    if not is_equal:
        raise UserError(
            f"{folder}: read back, the adapter is not the one that was trained; check the disk, and run the same "
            f"command again, which writes it from the last checkpoint\n  {what}"
        )


@torch.inference_mode()
def _hidden_states(run: Run) -> torch.Tensor:
    """(S, C) of the answers to a few validation examples; they decide the logits."""
    batch = pack(run.splits["validation"].examples[:CHECKED_EXAMPLES]).to(run.device)
    hidden: torch.Tensor = run.model.eval()(batch)
    return hidden.float()


def score_split(
    run: Run,
    name: str,
    on_progress: Callable[[int], object] | None = None,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Loss of a split, with its metrics and the (N, labels) probabilities behind them where it is labelled.

    The ranks share the work.
    """
    split = run.splits[name]
    prompt = run.prompt if split.labelled else None
    size = run.config.train.per_device_eval_batch_size
    scores = score(run.model, split.examples, prompt, size, on_progress, run.ranks, interruptible)
    check_finite(run, f"{name} loss", scores.loss)
    # Computed once: what decides which checkpoint is best has to be one number.
    return run.ranks.run_on_rank_0(lambda: _metrics(run, split, scores)), scores.probabilities


def _metrics(run: Run, split: Examples, scores: Scores) -> dict[str, Any]:
    metrics: dict[str, Any] = {"loss": scores.loss, "num_examples": len(split.examples)}
    if scores.probabilities is not None:
        labels = np.array(split.labels)
        metrics |= classification_metrics(labels, scores.probabilities, run.prompt.labels, run.config.prompt.positive)
    return metrics


def score_test_set(run: Run, title: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """`score_split` of the test set, behind a progress bar of its own."""
    with progress(title, len(run.splits["test"].examples), "review") as bar:
        return score_split(run, "test", bar.update)


def check_finite(run: Run, what: str, value: float) -> None:
    """Raises UserError for a loss that is no number; here it is not one row's fault, the adapter is ruined."""
    if math.isfinite(value):
        return
    train, model = run.config.train, run.config.model
    raise UserError(
        f"step {run.state.step}: the {what} is {value}, expected a number; begin anew with --restart and a lower "
        f"train.learning_rate (it is {train.learning_rate:g}) or with another model.compute_dtype (it is "
        f"{model.compute_dtype}). The newest checkpoint that stays: {run.newest_checkpoint}"
    )


def format_metrics(metrics: dict[str, Any]) -> str:
    """The few numbers that a line on the screen has room for."""
    names = ("loss", "accuracy", "f1")
    shown = ((name, metrics.get(name, metrics.get(f"eval_{name}"))) for name in names)
    return "  ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)

"""The end of a run: the test set scored, the adapter in a folder of its own, read back before anybody relies on it.

checkpoints/final/
    adapter_config.json, adapter_model.safetensors    as peft reads them
    training_args.json                                the resolved configuration
    metrics.json                                      test set before and after, best validation, what made it
    calibration.json                                  temperature of the label probabilities, for labelled data
    README.md, manifest.json                          a model card; size and SHA-256 of each file
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora.adapters.peft_config import to_peft
from minilora.adapters.peft_files import (
    CALIBRATION,
    adapter_files,
    adapter_tensors,
    damage_of_adapter,
    load_adapter_weights,
    read_adapter_tensors,
)
from minilora.build import DTYPES
from minilora.config import Config
from minilora.data.examples import Examples, lacking_classes
from minilora.data.split_files import prepared_columns
from minilora.errors import UserError
from minilora.evaluation.calibration import TemperatureFit, fit_temperature
from minilora.evaluation.metrics import classification_metrics, final_metrics, only_answer
from minilora.evaluation.score import Scores, ScoringOptions, score
from minilora.planning.memory import scoring_tokens
from minilora.reports import plots
from minilora.reports.model_card import language_of, render_model_card
from minilora.reports.report import Report, ScoredExamples, render_report
from minilora.runs.advice import non_finite
from minilora.runs.calibration_file import Calibration, read_calibration
from minilora.runs.checkpoint import list_checkpoints
from minilora.runs.metrics_log import format_metrics, read_metrics
from minilora.runs.predictions import PREDICTIONS, prediction_bytes
from minilora.runs.provenance import LENGTHS, current_provenance, read_provenance, refuse_other_run
from minilora.runs.run import Run
from minilora.runs.setup import check_best, open_run, share_adapter
from minilora.system.console import info, progress, warn
from minilora.system.distributed import Ranks
from minilora.system.files import StorageError, json_bytes, read_json, replace_file
from minilora.system.manifest import write_folder
from minilora.system.optional import MissingPackageError
from minilora.weights.hf_config import licence_metadata

LANGUAGE_TEXTS = 1000  # that are read for their language, spread over all
# Keys that do not change the course of a run, but the content of its final folder.
FINAL_KEYS = ("do_predict", "load_best_model_at_end", "save_format", "save_dtype", "portable")


def check_finished(final: Path, config: Config, model_folder: Path, ranks: int = 1) -> None:
    """Raises UserError where a finished run is not the requested one, or not as it was written."""
    problem = damage_of_adapter(final)
    if problem is not None:
        raise UserError(
            f"{final}: is damaged ({problem}); move that folder away to have it written again from the checkpoints"
        )
    before, now = read_provenance(final), current_provenance(config, model_folder, {"ranks": ranks})
    refuse_other_run(before, now, config, final.parent.parent)
    for name in (*FINAL_KEYS, *LENGTHS):
        old, new = before.config["train"].get(name), now.config["train"][name]
        if old != new:
            raise UserError(
                f"train.{name}: {new!r} comes too late, {final} was written with {old!r}; move that folder away to "
                "have it written again from the checkpoints, or put the key back"
            )


def finish(run: Run) -> Path:
    """Writes the final folder, of the best checkpoint if so configured, and beside the log its plot and the report."""
    if run.has_stalled:
        info(f"no better validation in {run.state.evals_without_improvement} tries: stopped early")
    step = run.ranks.run_on_rank_0(lambda: _load_best(run))
    share_adapter(run.model, run.ranks)
    validation = _validation_scores(run, step)
    fit = _fit_temperature(run, validation)
    tested = _score_after(run, None if fit is None else fit.temperature)

    def write() -> None:
        content = prediction_bytes(run.splits["validation"], run.state.data_sha256["validation.jsonl"], validation)
        replace_file(run.directory / PREDICTIONS, content)
        _write_final(run, step, fit, tested)

    run.ranks.run_on_rank_0(write)
    return run.final


@dataclass(frozen=True)
class Tested:
    """The test set after training; None where it has no labels, or was not scored."""

    metrics: dict[str, Any] | None = None
    probabilities: np.ndarray | None = None  # (N, labels), at the temperature
    uncalibrated: np.ndarray | None = None  # the model's own, where there is a temperature


def _validation_scores(run: Run, step: int) -> Scores:
    """The validation split with the adapter of `step`: at hand, unless the run was resumed since that validation."""
    if step not in run.validated:
        with progress("validation", len(run.splits["validation"].examples), "record") as bar:
            metrics, probabilities = score_split(run, "validation", bar.update)
        run.validated = {step: Scores(metrics["loss"], probabilities)}
    return run.validated[step]


def _fit_temperature(run: Run, validation: Scores) -> TemperatureFit | None:
    """The temperature of the final adapter, by the validation split; None for conversations."""
    if validation.probabilities is None:
        return None
    return fit_temperature(run.splits["validation"].labels, validation.probabilities)


def _score_after(run: Run, temperature: float | None) -> Tested:
    """The test set with the final adapter, its probabilities at a temperature."""
    if not run.config.train.do_predict:
        return Tested()
    metrics, uncalibrated = score_test_set(run, "test after training")
    if uncalibrated is None:
        return Tested(metrics)
    names, positive = run.prompt.labels, run.config.prompt.positive
    final, probabilities = final_metrics(
        run.splits["test"].labels, uncalibrated, temperature, label_names=names, positive=positive
    )
    return Tested({**metrics, **final}, probabilities, None if temperature is None else uncalibrated)


def _load_best(run: Run) -> int:
    """Loads the best checkpoint's adapter if so configured; returns the step whose adapter the model has."""
    best = check_best(run.config, run.checkpoints, run.state)
    if best is None:
        return run.state.step
    load_adapter_weights(run.model, best, is_verified=True)
    return run.state.best_step


def _write_final(run: Run, step: int, fit: TemperatureFit | None, tested: Tested) -> None:
    """The final folder, the report and the plot; `step` is the one whose adapter the model has."""
    train, after = run.config.train, tested.metrics
    base = run.prompt.tokenizer.folder
    columns = prepared_columns(run.config.data.dir)
    results = {
        "step": step,
        "skipped_steps": run.state.skipped_steps,
        "validation": {run.best_by: run.state.best_metric, "step": run.state.best_step},
        **({"class_weights": run.class_weights} if run.class_weights else {}),
        "test_before": run.state.test_before,
        "test": after,
        "labelled": run.splits["train"].labelled,
        "data_sha256": run.state.data_sha256,
        **({"data_columns": columns} if columns else {}),
        "model_sha256": run.state.model_sha256,
        "model_bytes": {name: (base / name).stat().st_size for name in run.state.model_sha256},
        **({"adapter_sha256": run.state.adapter_sha256} if run.state.adapter_sha256 else {}),
        "machine": run.state.machine,
        "model_revision": base.name if base.parent.name == "snapshots" else None,  # the commit, in the hub's cache
    }
    dtype = DTYPES[train.save_dtype]

    def files() -> Iterator[tuple[str, bytes]]:
        for name, content in adapter_files(
            run.model, *run.adapter, save_format=train.save_format, save_dtype=dtype, portable=train.portable
        ):
            yield name, content
            if fit is not None and name.startswith("adapter_model."):
                yield CALIBRATION, _calibration(run, fit, content).to_bytes()
        yield "training_args.json", json_bytes(run.config.to_dict())
        yield "metrics.json", json_bytes(results)
        labelled = run.splits["train"].labelled
        yield "README.md", render_model_card(run.config.to_dict(), results, labelled, _known_of(run)).encode()

    write_folder(run.final, files(), {"step": step}, lambda folder: _check_saved(run, folder, dtype))
    if after is not None:
        print(f"test after training:  {format_metrics(after)}")
        for text in only_answer("test after training", after):
            warn(f"warning: {text}")
    if fit is not None:
        info(f"temperature of the label probabilities: {fit.temperature:.4g}{f'; {fit.note}' if fit.note else ''}")
    print(f"final adapter (step {step}): {run.final}")
    _write_report(run, results, tested)
    _write_plot(run.directory)


def _known_of(run: Run) -> dict[str, str]:
    """The base's licence and the language of the training texts, for the model card."""
    records = run.splits["train"].records
    language = language_of(
        records[index].content for index in range(0, len(records), len(records) // LANGUAGE_TEXTS + 1)
    )
    return {**licence_metadata(run.prompt.tokenizer.folder), **({"language": language} if language else {})}


def _calibration(run: Run, fit: TemperatureFit, weights: bytes) -> Calibration:
    """Content of calibration.json, for the adapter's file of tensors."""
    name = "validation.jsonl"
    return Calibration.of(
        fit,
        run.prompt,
        weights=hashlib.sha256(weights).hexdigest(),
        model=run.state.model_sha256,
        data={name: run.state.data_sha256[name]},
    )


def complete_report(config: Config, model_folder: Path, ranks: Ranks) -> None:
    """Writes report.html and loss.png of a finished run that lacks them, because it was killed or a disk was full.

    The report's test set is scored again, with the checkpoint of which the final adapter is.
    """
    directory = Path(config.train.output_dir)
    checkpoints, path = directory / "checkpoints", directory / "report.html"
    try:
        if not ranks.run_on_rank_0(path.is_file):
            results = ranks.run_on_rank_0(lambda: read_json(checkpoints / "final" / "metrics.json"))
            gone = UserError("the checkpoint of its adapter is gone; evaluate.py --output_dir writes one of a test set")
            if not ranks.run_on_rank_0(lambda: bool(list_checkpoints(checkpoints))):
                raise gone
            run = open_run(config, model_folder, ranks)
            if ranks.run_on_rank_0(lambda: _load_best(run)) != results["step"]:
                raise gone
            share_adapter(run.model, ranks)
            temperature = ranks.run_on_rank_0(lambda: getattr(read_calibration(run.final), "temperature", None))
            tested = _score_after(run, temperature)
            ranks.run_on_rank_0(lambda: _write_report(run, results, tested))
    except UserError as error:
        warn(f"note: {path} is missing and cannot be written: {error}")
    if ranks.is_rank_0 and not (directory / "loss.png").is_file():
        _write_plot(directory)


def _write_report(run: Run, results: dict[str, Any], tested: Tested) -> None:
    report = render_report(_report_of(run, results, tested, read_metrics(run.directory)))
    _write_if_possible(run.directory / "report.html", report.encode())


def _write_plot(directory: Path) -> None:
    try:
        png = plots.loss_png(read_metrics(directory))
    except MissingPackageError as error:
        info(f"loss.png and the report's curves are left out: {error}")
    else:
        _write_if_possible(directory / "loss.png", png)


def _write_if_possible(path: Path, content: bytes) -> None:
    """Writes what the run can do without: its content is in other files too."""
    try:
        replace_file(path, content)
    except (StorageError, OSError) as error:
        warn(f"note: {path} cannot be written ({getattr(error.__cause__ or error, 'strerror', None) or error})")
    else:
        info(f"written: {path}")


def _report_of(run: Run, results: dict[str, Any], tested: Tested, log: list[dict[str, Any]]) -> Report:
    """What the report of a run shows; `results` is the content of metrics.json, `log` that of metrics.jsonl."""
    config, splits, folder = run.config, run.splits, run.prompt.tokenizer.folder
    test, calibration = splits["test"], read_calibration(run.final)
    scored = {"before training": results["test_before"], "after training": results["test"]}
    remark = f"Test set: {len(test.examples):,} records, {test.describe()}."
    if results["test"] is None:
        scored, remark = {}, "The test set was not scored (train.do_predict=false), so there are no figures of it."
    elif tested.probabilities is None:
        remark += " Conversations have no labels to be right in: the loss is all there is."
    return Report(
        title="Training report",
        remark=remark,
        results={title: metrics for title, metrics in scored.items() if metrics is not None},
        examples=None
        if tested.probabilities is None
        else ScoredExamples(
            test.records,
            test.labels,
            tested.probabilities,
            run.prompt.labels,
            positive=config.prompt.positive,
            uncalibrated=tested.uncalibrated,
            calibration="" if calibration is None else calibration.describe(),
        ),
        log=log,
        memory_estimate=run.memory_estimate.parts,
        peak_bytes=max((entry["peak_memory_bytes"] for entry in log if "peak_memory_bytes" in entry), default=None),
        config=config.to_dict(),
        defaults=Config().to_dict(),
        facts={
            "adapter": {
                "step": results["step"],
                "steps that were skipped": results["skipped_steps"],
                "examples a step, of all ranks": run.samples_per_step,
            },
            "best validation": results["validation"],
            **({"class weights in the loss": run.class_weights} if run.class_weights else {}),
            "base model": {"name": config.model.name_or_path, "folder": folder},
            "data": {
                "folder": config.data.dir,
                **{name: f"{len(split.examples):,} ({split.describe()})" for name, split in splits.items()},
            },
            "computed with": run.state.machine,
            "SHA-256 of the data": run.state.data_sha256,
            "SHA-256 of the base model": run.state.model_sha256,
            **({"SHA-256 of the adapter before training": sha} if (sha := run.state.adapter_sha256) else {}),
        },
        warnings=[
            *lacking_classes({f"{name}.jsonl": split for name, split in splits.items()}, run.prompt.labels),
            *only_answer("test.jsonl", results["test"] or {}),
        ],
    )


def _check_saved(run: Run, folder: Path, dtype: torch.dtype) -> None:
    """Reads the adapter's files back; UserError if one bit is not as in memory, rounded to `dtype`.

    Used elsewhere, a damaged adapter would only be a model that does worse.
    """
    train = run.config.train
    expected_config = to_peft(*run.adapter, model=run.model, portable=train.portable)
    _, found = read_adapter_tensors(folder, allow_bin=True, is_verified=True)  # just written by this process
    expected = adapter_tensors(run.model, dtype, expected_config["lora_alpha"] if train.portable else None)
    different = [name for name in sorted({*found, *expected}) if not _is_same(found.get(name), expected.get(name))]
    if read_json(folder / "adapter_config.json") != json.loads(json_bytes(expected_config)):
        different.append("adapter_config.json")
    if different:
        raise UserError(
            f"{folder}: read back, the adapter is not the one that was trained; check the disk, and run the same "
            f"command again, which writes it from the last checkpoint\n  what differs: {', '.join(different[:8])}"
        )


def _is_same(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if found is None or expected is None:
        return False
    return found.dtype == expected.dtype and torch.equal(found, expected)


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
    options = ScoringOptions(
        run.config.train.per_device_eval_batch_size,
        scoring_tokens(run.config),
        on_progress=on_progress,
        ranks=run.ranks,
        interruptible=interruptible,
    )
    run.scoring = name
    scores = score(run.model, split.examples, prompt, options)
    run.scoring = None
    if not math.isfinite(scores.loss):  # no single record does that: the adapter is ruined
        run.saved = run.state
        raise non_finite(run, run.state.step, f"the {name} loss is {scores.loss}, expected a finite number;")
    # On rank 0 only: all ranks have to agree on which checkpoint is best.
    return run.ranks.run_on_rank_0(lambda: _metrics(run, split, scores)), scores.probabilities


def _metrics(run: Run, split: Examples, scores: Scores) -> dict[str, Any]:
    metrics: dict[str, Any] = {"loss": scores.loss, "num_examples": len(split.examples)}
    if scores.probabilities is not None:
        labels = split.labels
        metrics |= classification_metrics(labels, scores.probabilities, run.prompt.labels, run.config.prompt.positive)
    return metrics


def score_test_set(run: Run, title: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """`score_split` of the test set, with a progress bar."""
    with progress(title, len(run.splits["test"].examples), "record") as bar:
        return score_split(run, "test", bar.update)

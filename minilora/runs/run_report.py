"""report.html and loss.png of a run: written at its end, and where they are missing, later."""

from pathlib import Path
from typing import Any

from minilora.config import Config
from minilora.data.examples import lacking_classes
from minilora.errors import UserError
from minilora.evaluation.metrics import only_answer
from minilora.reports import plots
from minilora.reports.report import Report, ScoredExamples, render_report
from minilora.runs.calibration_file import read_calibration
from minilora.runs.checkpoint import list_checkpoints
from minilora.runs.metrics_log import read_metrics
from minilora.runs.run import Run
from minilora.runs.scoring import Tested, score_after_training
from minilora.runs.setup import load_best, open_run, share_adapter
from minilora.system.console import info, warn
from minilora.system.distributed import Ranks
from minilora.system.files import StorageError, read_json, replace_file
from minilora.system.optional import MissingPackageError


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
            if ranks.run_on_rank_0(lambda: load_best(run)) != results["step"]:
                raise gone
            share_adapter(run.model, ranks)
            tested = score_after_training(run, (results["test"] or {}).get("temperature"))
            ranks.run_on_rank_0(lambda: write_report(run, results, tested))
    except UserError as error:
        warn(f"note: {path} is missing and cannot be written: {error}")
    if ranks.is_rank_0 and not (directory / "loss.png").is_file():
        write_plot(directory)


def write_report(run: Run, results: dict[str, Any], tested: Tested) -> None:
    report = render_report(_report_of(run, results, tested, read_metrics(run.directory)))
    _write_if_possible(run.directory / "report.html", report.encode())


def write_plot(directory: Path) -> None:
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
    test = splits["test"]
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
            calibration=_calibration(run.final, results["test"].get("temperature")),
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


def _calibration(final: Path, temperature: float | None) -> str:
    """What the final folder says of the temperature that the test set was scored at, unless that was fitted anew."""
    if temperature is None:
        return ""
    calibration = read_calibration(final)
    if calibration is None or calibration.temperature != temperature:
        return f"Temperature {temperature:.4g}, fitted at the end of training."
    return calibration.describe()

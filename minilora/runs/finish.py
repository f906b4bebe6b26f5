"""The end of a run: the adapter in a folder of its own, read back before anybody relies on it.

checkpoints/final/
    adapter_config.json, adapter_model.safetensors    as peft reads them
    training_args.json                                the resolved configuration
    metrics.json                                      test set before and after, best validation, what made it
    calibration.json                                  temperature of the label probabilities, for labelled data
    README.md, manifest.json                          a model card; size and SHA-256 of each file
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from minilora.adapters.peft_config import to_peft
from minilora.adapters.peft_files import (
    CALIBRATION,
    adapter_files,
    adapter_tensors,
    damage_of_adapter,
    read_adapter_tensors,
)
from minilora.build import DTYPES
from minilora.config import Config
from minilora.data.split_files import prepared_columns
from minilora.errors import UserError
from minilora.evaluation.calibration import TemperatureFit, fit_temperature
from minilora.evaluation.metrics import only_answer
from minilora.evaluation.score import Scores
from minilora.reports.model_card import language_of, render_model_card
from minilora.runs.calibration_file import Calibration
from minilora.runs.metrics_log import format_metrics
from minilora.runs.predictions import PREDICTIONS, prediction_bytes
from minilora.runs.provenance import LENGTHS, current_provenance, read_provenance, refuse_other_run
from minilora.runs.run import Run
from minilora.runs.run_report import write_plot, write_report
from minilora.runs.scoring import Tested, score_after_training, validation_scores
from minilora.runs.setup import load_best, share_adapter
from minilora.system.console import info, warn
from minilora.system.files import json_bytes, read_json, replace_file
from minilora.system.manifest import write_folder
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
    step = run.ranks.run_on_rank_0(lambda: load_best(run))
    share_adapter(run.model, run.ranks)
    validation = validation_scores(run, step)
    fit = _fit_temperature(run, validation)
    tested = score_after_training(run, None if fit is None else fit.temperature)

    def write() -> None:
        content = prediction_bytes(run.splits["validation"], run.state.data_sha256["validation.jsonl"], validation)
        replace_file(run.directory / PREDICTIONS, content)
        _write_final(run, step, fit, tested)

    run.ranks.run_on_rank_0(write)
    return run.final


def _fit_temperature(run: Run, validation: Scores) -> TemperatureFit | None:
    """The temperature of the final adapter, by the validation split; None for conversations."""
    if validation.probabilities is None:
        return None
    return fit_temperature(run.splits["validation"].labels, validation.probabilities)


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
    write_report(run, results, tested)
    write_plot(run.directory)


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
        quantization=run.config.model.quantization,
        weights=hashlib.sha256(weights).hexdigest(),
        model=run.state.model_sha256,
        data={name: run.state.data_sha256[name]},
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

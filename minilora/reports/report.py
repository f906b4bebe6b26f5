"""report.html: a run or an evaluation on one page, in one file.

    results   curves   classes   calibration   thresholds   worst mistakes   memory   skipped steps   configuration
    provenance

This module computes plain values, `templates/report.html` lays them out. Style and pictures are in the file, and its
policy forbids it to load or run anything. What comes from data and configuration is escaped. Words of the data's
language are in tables and never in pictures (`plots.py`). A part that has nothing to show is left out, or says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora import __version__
from minilora.data.records import Record
from minilora.evaluation.calibration import NUM_BINS, calibration_bins, error_by_chance
from minilora.evaluation.metrics import averages, most_confused
from minilora.evaluation.thresholds import (
    WANTED,
    answered_by_confidence,
    at_shares,
    bar_for_precision,
    bar_for_recall,
    bars,
)
from minilora.reports import plots
from minilora.reports.render import render
from minilora.system.optional import MissingPackageError

# The metrics in reading order, and their names on the page.
NAMES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "roc_auc": "ROC AUC",
    "log_loss": "log loss, nats",
    "expected_calibration_error": "calibration error",
    "loss": "loss, nats a token",
}
HEADLINES = ("accuracy", "f1", "loss")
MAX_MISTAKES = 20
FEW_CLASSES = 12  # most that are shown in the labels' order; of more the worst come first
MAX_PAIRS = 20
RARE_REVIEWS = 10  # a class with fewer is marked: one review more or less moves its recall by 0.1
Values = Mapping[str, Any]


@dataclass(frozen=True)
class ScoredExamples:
    """N labelled texts and a model's probabilities for them."""

    records: Sequence[Record]
    labels: np.ndarray  # (N,) int, the true classes
    probabilities: np.ndarray  # (N, K) float64, rows sum to one
    names: Sequence[str]  # the K label words
    positive: int | None = None  # the class that precision and recall are about
    uncalibrated: np.ndarray | None = None  # (N, K), before the temperature, where there is one
    calibration: str = ""  # a sentence on the temperature


@dataclass(frozen=True)
class Report:
    """All that a page shows."""

    title: str
    remark: str  # a sentence on the results, or on why there are none
    results: Mapping[
        str, Values
    ]  # metrics by what was scored; the last are the headline, with `final_metrics`' figures
    examples: ScoredExamples | None  # behind the last results; None for conversations, and where nothing was scored
    log: Sequence[dict[str, Any]]  # lines of metrics.jsonl; none for an evaluation
    memory_estimate: Mapping[str, int] | None  # predicted bytes by part, None where nothing was trained
    peak_bytes: int | None  # measured, None where it cannot be
    config: Mapping[str, Values]  # values by section and key
    defaults: Mapping[str, Values]  # the same of the default configuration
    facts: Values  # its provenance by name; a value may itself be a mapping
    warnings: Sequence[str] = ()  # why the figures may say little


def render_report(report: Report) -> str:
    """The page as HTML."""
    last = list(report.results.values())[-1] if report.results else {}
    curves, pictures, no_pictures = _pictures(report)
    examples = report.examples
    return render(
        "report.html",
        report=report,
        names=NAMES,
        last=last,
        headlines=[name for name in HEADLINES if name in last],
        metric_names=[name for name in NAMES if last.get(name) is not None],
        curves=curves,
        pictures=pictures,
        no_pictures=no_pictures,
        skipped=[line for line in report.log if line.get("skipped")],
        num_keys=sum(map(len, report.config.values())),
        num_changed=sum(
            value != report.defaults[section][name]
            for section, keys in report.config.items()
            for name, value in keys.items()
        ),
        version=__version__,
        **({} if examples is None else _of_examples(examples, last)),
    )


def _of_examples(examples: ScoredExamples, metrics: Values) -> dict[str, Any]:
    """What the page shows of single reviews and of classes."""
    classes = _classes(metrics, examples.names)
    return {**classes, **_calibration(examples), **_thresholds(examples), **_mistakes(examples)}


def _classes(metrics: Values, names: Sequence[str]) -> dict[str, Any]:
    """Tables of the classes: in the labels' order, and of many the worst first.

    Of more than `FEW_CLASSES`, the matrix has those of the most confused pairs, and a column for all other answers.
    """
    confusion = np.array(metrics["confusion_matrix"])
    pairs, support = most_confused(confusion, MAX_PAIRS), confusion.sum(axis=1)
    order, shown = list(range(len(names))), list(range(len(names)))
    if len(names) > FEW_CLASSES:
        order.sort(key=lambda index: (support[index] == 0, metrics["per_class"][names[index]]["f1"]))
        shown = list(dict.fromkeys(index for label, answer, _ in pairs for index in (label, answer)))[:FEW_CLASSES]
    matrix = [(names[index], confusion[index, shown].tolist(), int(support[index])) for index in shown]
    return {
        "matrix_names": [names[index] for index in shown],
        "matrix": [(name, [*counts, *_others(counts, total, names)], total) for name, counts, total in matrix],
        "pairs": [(names[label], names[answer], count, count / support[label]) for label, answer, count in pairs],
        "num_errors": int(support.sum() - np.trace(confusion)),
        "class_names": [names[index] for index in order],
        "absent": [names[index] for index in order if support[index] == 0],
        "rare_reviews": RARE_REVIEWS,
        "averages": averages(confusion),
    }


def _others(counts: Sequence[int], total: int, names: Sequence[str]) -> list[int]:
    """The answers that a matrix without all classes has no column for."""
    return [total - sum(counts)] if len(names) > FEW_CLASSES else []


def _pictures(report: Report) -> tuple[list[plots.Picture], dict[str, plots.Picture], str | None]:
    """The curves, those of the examples by what they show, and why there are none; all of them or none."""
    try:
        curves = _curves(report.log) if report.log else []
        return curves, {} if report.examples is None else _pictures_of(report.examples), None
    except MissingPackageError as error:
        return [], {}, str(error)


def _pictures_of(examples: ScoredExamples) -> dict[str, plots.Picture]:
    """ "after", "before" (where there is a temperature): reliability; "answered": accuracy by the share answered."""
    sets = {"after": examples.probabilities, "before": examples.uncalibrated}
    titles = {"after": "Reliability diagram", "before": "Reliability diagram without the temperature"}
    found = {
        name: plots.reliability_picture(titles[name], *_bins(examples.labels, probabilities))
        for name, probabilities in sets.items()
        if probabilities is not None
    }
    table = answered_by_confidence(examples.labels, examples.probabilities)
    return found | {"answered": plots.answered_picture(table)}


def _bins(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reviews, accuracy and mean confidence of each bin of confidence, as `plots.reliability_picture` takes them."""
    counts, correct, confidence = calibration_bins(labels, probabilities)
    return counts, correct / np.maximum(counts, 1), confidence / np.maximum(counts, 1)


def _calibration(examples: ScoredExamples) -> dict[str, Any]:
    """The bins that are not empty, after and before the temperature; figures and intervals are among the metrics."""
    sets = {"after": examples.probabilities, "before": examples.uncalibrated}
    return {
        "bins": {name: _filled_bins(examples.labels, one) for name, one in sets.items() if one is not None},
        "num_bins": NUM_BINS,
        "by_chance": error_by_chance(examples.probabilities),
    }


def _filled_bins(labels: np.ndarray, probabilities: np.ndarray) -> list[tuple[float, ...]]:
    """Of each bin that is not empty: low, high, count, confidence, accuracy."""
    counts, accuracy, confidence = _bins(labels, probabilities)
    return [
        (index / NUM_BINS, (index + 1) / NUM_BINS, counts[index], confidence[index], accuracy[index])
        for index in np.flatnonzero(counts)
    ]


def _thresholds(examples: ScoredExamples) -> dict[str, Any]:
    """What is answered from each confidence on, and the bars of two classes by the precision or recall wanted."""
    answered = at_shares(answered_by_confidence(examples.labels, examples.probabilities))
    wanted = []
    if examples.positive is not None and len(examples.names) == 2:
        table = bars(examples.labels == examples.positive, examples.probabilities[:, examples.positive])
        wanted = [("precision", value, bar_for_precision(table, value)) for value in WANTED]
        wanted += [("recall", value, bar_for_recall(table, value)) for value in WANTED]
    return {"answered": answered, "bars": wanted}


def _mistakes(examples: ScoredExamples) -> dict[str, Any]:
    """The wrong predictions with the highest confidence, the first of equals first, and how many there are in all.

    Each as (label, prediction, its probability, record).
    """
    predictions, confidence = examples.probabilities.argmax(axis=1), examples.probabilities.max(axis=1)
    wrong = np.flatnonzero(predictions != examples.labels)
    shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:MAX_MISTAKES]
    names, records = examples.names, examples.records
    mistakes = [
        (names[examples.labels[index]], names[predictions[index]], confidence[index], records[index]) for index in shown
    ]
    return {"mistakes": mistakes, "num_mistakes": len(wrong)}


def _curves(log: Sequence[dict[str, Any]]) -> list[plots.Picture]:
    """Loss, validation scores and learning rate over the steps, each with its first and last value in words."""

    def course(name: str) -> str:
        steps, values = plots.points(log, name)
        return f"{values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}" if steps else "none"

    losses = f"training {course('train_loss')}; validation {course('eval_loss')}"
    pictures = [plots.curve_picture("Loss of training and validation", plots.draw_loss, log, losses)]
    if plots.points(log, "eval_accuracy")[0]:
        scores = f"accuracy {course('eval_accuracy')}; F1 {course('eval_f1')}"
        pictures.append(plots.curve_picture("Accuracy and F1 of validation", plots.draw_scores, log, scores))
    pictures.append(plots.curve_picture("Learning rate", plots.draw_rate, log, course("learning_rate")))
    return pictures

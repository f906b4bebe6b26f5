"""What a model said to labelled texts, as parts of a page: confusion matrix, calibration, the worst mistakes.

Words of the data's language stand in tables and never in pictures, see `plots.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.data.records import Record
from minilora.evaluation.metrics import calibration_bins
from minilora.reports import plots
from minilora.reports.markup import Markup, element, joined, table

MOST_MISTAKES = 20
CLIPPED_AT = 120  # characters of a text that are shown unasked


@dataclass(frozen=True)
class ScoredExamples:
    """What a model said to N labelled texts.

    Attributes:
        rows: the texts, and where each stands.
        labels: (N,) int, the true classes.
        probabilities: (N, K) float64, rows sum to one.
        names: the K label words.
    """

    records: Sequence[Record]
    labels: np.ndarray
    probabilities: np.ndarray
    names: Sequence[str]


def iter_answer_parts(answers: ScoredExamples, metrics: Mapping[str, Any]) -> Iterator[tuple[str, Markup]]:
    """Title and content of each part.

    Args:
        answers: what was said.
        metrics: what `classification_metrics` makes of it.
    """
    yield "Classes", _classes(metrics, answers.names)
    yield "Calibration", _calibration(metrics, answers)
    yield "Worst mistakes", _mistakes(answers)


def _classes(metrics: Mapping[str, Any], names: Sequence[str]) -> Markup:
    """The confusion matrix, shaded by the share of its row, and precision, recall and F1 of each class."""
    matrix = metrics["confusion_matrix"]
    cells = [
        (name, *(_shaded(count, count / max(sum(counts), 1)) for count in counts))
        for name, counts in zip(names, matrix, strict=True)
    ]
    rows = [
        (name, *(f"{metrics['per_class'][name][key]:.4f}" for key in ("precision", "recall", "f1")), sum(counts))
        for name, counts in zip(names, matrix, strict=True)
    ]
    return element(
        "div",
        table("Confusion matrix: rows are labels", ("label", *names), cells),
        table("Each class", ("label", "precision", "recall", "F1", "reviews"), rows),
        class_="beside",
    )


def _shaded(value: object, share: float) -> Markup:
    """A cell's content on a ground as deep as `share` of 1."""
    return element("span", value, class_="shaded", style=f"--share: {share:.3f}")


def _calibration(metrics: Mapping[str, Any], answers: ScoredExamples) -> Markup:
    """How far the model may be believed, as a reliability diagram and its numbers."""
    counts, correct, confidence = calibration_bins(answers.labels, answers.probabilities)
    accuracy, sure = (sums / np.maximum(counts, 1) for sums in (correct, confidence))
    error = f"Expected calibration error {metrics['expected_calibration_error']:.4f}"
    text = element(
        "p",
        f"{error}: the mean distance between how sure the model is and how often it is right, in {len(counts)} bins.",
    )
    rows = [
        (f"{place / len(counts):.3f} to {(place + 1) / len(counts):.3f}", count, f"{mean:.3f}", f"{right:.3f}")
        for place, (count, mean, right) in enumerate(zip(counts, sure, accuracy, strict=True))
        if count
    ]
    bins = table("The bins that are not empty", ("confidence", "reviews", "mean", "right"), rows)
    if not plots.is_available():
        return joined(text, bins)
    picture = plots.reliability_picture(counts, accuracy, sure, f"{error}; the table has its numbers")
    return joined(text, element("div", picture, bins, class_="beside"))


def _mistakes(answers: ScoredExamples) -> Markup:
    """The wrong answers that the model was most sure of."""
    said = answers.probabilities.argmax(axis=1)
    sure = answers.probabilities.max(axis=1)
    wrong = np.flatnonzero(said != answers.labels)
    if not wrong.size:
        return element("p", f"None: all {len(said)} reviews are answered right.")
    shown = wrong[np.argsort(-sure[wrong], kind="stable")][:MOST_MISTAKES]
    items = [
        element(
            "li",
            element(
                "p",
                element("span", "label ", element("b", answers.names[answers.labels[place]])),
                element("span", "answer ", element("b", answers.names[said[place]])),
                element("span", "probability ", element("b", f"{sure[place]:.4f}")),
                class_="verdict",
            ),
            _clipped(answers.records[place].content),
            element("p", answers.records[place].where, class_="place"),
        )
        for place in shown
    ]
    which = f"the {len(shown)} that the model was most sure of" if len(shown) < len(wrong) else "the surest first"
    return joined(
        element("p", f"{len(wrong)} of {len(said)} reviews are answered wrong; {which}."),
        element("ol", *items, class_="mistakes"),
    )


def _clipped(text: str) -> Markup:
    """A text, of which the rest opens where it is long."""
    if len(text) <= CLIPPED_AT:
        return element("p", text, class_="review", dir="auto")
    start = element("span", f"{text[:CLIPPED_AT]}… ", class_="review", dir="auto")
    summary = element("summary", start, element("small", f"all {len(text):,} characters"))
    return element("details", summary, element("p", text, class_="review", dir="auto"))

"""Two models' probabilities for the same reviews in, how far they are apart out: what a merge, or anything else that
should not change a model, does change.

Rounding moves every probability a little. What counts is how often that changes an answer, and what it does to the
accuracy; the largest change says how near it came to that elsewhere.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def drift(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """How far `after` is from `before`.

    Args:
        labels: (N,) int, the true classes; N at least 1.
        before: (N, K) float64, rows sum to one.
        after: (N, K) float64, of the same reviews.

    Returns:
        `num_correct` and `accuracy` of `after`; `mean_change` and `largest_change`, absolute, of the probability of
        the true class; `num_flipped` and `flipped`, reviews with another prediction and their share.

    Raises:
        ValueError: the arrays are not of the same reviews.
    """
    if before.shape != after.shape or len(labels) != len(before):
        raise ValueError(f"drift: {labels.shape}, {before.shape} and {after.shape} are not of the same reviews")
    rows = np.arange(len(labels))
    change = np.abs(after[rows, labels] - before[rows, labels])
    correct = after.argmax(1) == labels
    flipped = after.argmax(1) != before.argmax(1)
    return {
        "num_correct": int(correct.sum()),
        "accuracy": float(correct.mean()),
        "mean_change": float(change.mean()),
        "largest_change": float(change.max()),
        "num_flipped": int(flipped.sum()),
        "flipped": float(flipped.mean()),
    }


def render_drift(rows: Mapping[str, Mapping[str, Any]], num_reviews: int) -> str:
    """A table with a line for each model; the first one is what the others are compared with.

    Args:
        rows: what `drift` returned, by a name of the model.
        num_reviews: N.
    """
    width = max(map(len, rows)) + 2
    lines = [f"{'':{width}}{'accuracy':>18}{'mean change':>13}{'largest':>9}{'flipped':>16}"]
    for place, (name, row) in enumerate(rows.items()):
        line = f"{name:{width}}{row['accuracy']:>9.4f} {'({num_correct}/{n})'.format(**row, n=num_reviews):>8}"
        if place:
            flipped = f"{row['flipped']:.2%} ({row['num_flipped']})"
            line += f"{row['mean_change']:>13.4f}{row['largest_change']:>9.4f}{flipped:>16}"
        lines.append(line)
    return "\n".join(lines)

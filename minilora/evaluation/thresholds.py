"""Labels and probabilities in; out, what it costs to answer only where the model is confident, and where to set a bar.

Both tables are read off the reviews in the order of one score: all that reach a threshold are answered, or called
positive. A threshold is a score rounded down to DECIMALS, so that it can be typed in; the counts beside it are of the
reviews that reach it as it is typed.

Intervals are Wilson's, of a share of n reviews with z = 1.96:

    (s + z^2 / 2) / (n + z^2)  -+  z / (n + z^2) * sqrt(s (n - s) / n + z^2 / 4)

They hold for a threshold that was chosen without these reviews. One chosen on them does a little worse on others.

Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference"; for accuracy against the
share that is answered El-Yaniv and Wiener 2010, "On the foundations of noise-free selective classification".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DECIMALS = 4
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25)
WANTED = (0.8, 0.9, 0.95, 0.99)  # of precision or recall
Interval = tuple[float, float]


@dataclass(frozen=True)
class Share:
    """A share of `count` in `of` reviews; None where there are none."""

    count: int
    of: int

    @property
    def value(self) -> float | None:
        return self.count / self.of if self.of else None

    @property
    def interval(self) -> Interval:
        """Of 95 %; 0..1 where there are no reviews."""
        n, s, z = self.of, self.count, 1.96
        if n == 0:
            return 0.0, 1.0
        middle, width = s + z * z / 2, z * math.sqrt(s * (n - s) / n + z * z / 4)
        return max(0.0, (middle - width) / (n + z * z)), min(1.0, (middle + width) / (n + z * z))


@dataclass(frozen=True)
class Answered:
    """What is answered with --min_probability `threshold`, and how much of it is right."""

    threshold: float
    answered: Share  # of all reviews
    right: Share  # of those that are answered


@dataclass(frozen=True)
class Bar:
    """The reviews whose probability of the positive class reaches `threshold`, taken as positive."""

    threshold: float
    precision: Share
    recall: Share


def answered_by_confidence(labels: np.ndarray, probabilities: np.ndarray) -> list[Answered]:
    """One entry for each threshold that answers another number of reviews, the lowest threshold first."""
    thresholds, above, right = _counts(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
    return [
        Answered(threshold, Share(count, len(labels)), Share(hits, count))
        for threshold, count, hits in zip(thresholds, above, right, strict=True)
    ]


def at_shares(table: Sequence[Answered], shares: Sequence[float] = SHARES) -> list[Answered]:
    """Of `answered_by_confidence`, the highest threshold at which at least each of the shares is answered."""
    found = [
        max((row for row in table if row.answered.count >= share * row.answered.of), key=_threshold) for share in shares
    ]
    return list(dict.fromkeys(found))


def bars(is_positive: np.ndarray, scores: np.ndarray) -> list[Bar]:
    """One entry for each threshold on the (N,) `scores` that changes what is called positive, the lowest first."""
    thresholds, above, true = _counts(scores, is_positive)
    positives = int(is_positive.sum())
    return [
        Bar(threshold, Share(hits, count), Share(hits, positives))
        for threshold, count, hits in zip(thresholds, above, true, strict=True)
    ]


def bar_for_precision(table: Sequence[Bar], wanted: float) -> Bar | None:
    """The bar with the highest recall of those that reach this precision; None where none does."""
    reached = [bar for bar in table if bar.precision.count >= wanted * bar.precision.of]
    return max(reached, key=lambda bar: (bar.recall.count, bar.threshold), default=None)


def bar_for_recall(table: Sequence[Bar], wanted: float) -> Bar | None:
    """The highest bar that reaches this recall; None where there is no positive review."""
    reached = [bar for bar in table if bar.recall.of and bar.recall.count >= wanted * bar.recall.of]
    return max(reached, key=_threshold, default=None)


def _threshold(row: Answered | Bar) -> float:
    return row.threshold


def _counts(scores: np.ndarray, hits: np.ndarray) -> tuple[list[float], list[int], list[int]]:
    """Thresholds, lowest first; how many scores reach each; how many of those are `hits`."""
    scale = 10**DECIMALS
    steps = np.floor(scores * scale)
    steps -= steps / scale > scores  # the product may be rounded up
    thresholds = np.unique(steps) / scale
    order = np.sort(scores)
    above = len(scores) - np.searchsorted(order, thresholds, side="left")
    hit = np.sort(scores[hits])
    hits_above = len(hit) - np.searchsorted(hit, thresholds, side="left")
    return thresholds.tolist(), above.tolist(), hits_above.tolist()

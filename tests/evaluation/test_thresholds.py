"""Thresholds against counting by hand, Wilson's intervals against scipy."""

import numpy as np
import pytest
from scipy.stats import binomtest

from minilora.evaluation.thresholds import (
    Share,
    answered_by_confidence,
    at_shares,
    bar_for_precision,
    bar_for_recall,
    bars,
)
from tests.evaluation.test_metrics import ROUNDING, random_evaluation


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (3, 7), (50, 100), (999, 1000), (0, 40)])
def test_an_interval_is_wilsons(count: int, of: int) -> None:
    interval = binomtest(count, of).proportion_ci(0.95, method="wilson")
    # scipy's z is 1.959964
    assert Share(count, of).interval == pytest.approx((interval.low, interval.high), abs=2e-5)


def test_a_share_of_nothing_is_unknown() -> None:
    assert (Share(0, 0).value, Share(0, 0).interval) == (None, (0.0, 1.0))


@pytest.mark.parametrize("seed", range(24))
def test_every_threshold_answers_what_reaches_it_as_it_is_typed(seed: int) -> None:
    labels, probabilities = random_evaluation(seed)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    table = answered_by_confidence(labels, probabilities)
    assert table[0].answered.count == len(labels)
    assert [row.threshold for row in table] == sorted({row.threshold for row in table})
    for row in table:
        reached = confidence >= float(f"{row.threshold:.4f}")
        assert (row.answered.count, row.answered.of) == (reached.sum(), len(labels))
        assert (row.right.count, row.right.of) == (correct[reached].sum(), reached.sum())
        assert row.right.of > 0


def test_a_share_is_answered_at_the_highest_threshold_that_answers_so_many() -> None:
    labels = np.array([0, 1, 1, 0])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.6, 0.4]])
    rows = at_shares(answered_by_confidence(labels, probabilities), shares=(1.0, 0.9, 0.5, 0.3, 0.25))
    assert [(row.threshold, row.answered.count, row.right.count) for row in rows] == [
        (0.6, 4, 3),
        (0.8, 2, 2),
        (0.9, 1, 1),
    ]


def test_a_product_that_is_rounded_up_loses_no_review() -> None:
    below = np.nextafter(0.5679, 0)  # times 10^4 that is 5679 exactly
    table = answered_by_confidence(np.array([0]), np.array([[below, 1 - below]]))
    assert table[0].threshold <= below
    assert table[0].answered.count == 1


@pytest.mark.parametrize("seed", range(0, 24, 2))
@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 1.0])
def test_a_bar_reaches_what_is_wanted_at_the_least_cost(seed: int, wanted: float) -> None:
    labels, probabilities = random_evaluation(seed)
    is_positive, scores = labels == 1, probabilities[:, 1]
    table = bars(is_positive, scores)
    found = {}
    for threshold in np.unique(np.floor(scores * 10_000) / 10_000):
        called = scores >= threshold
        if called.any() and is_positive.any():
            found[threshold] = (is_positive[called].mean(), is_positive[called].sum() / is_positive.sum())
    precise = [recall for precision, recall in found.values() if precision >= wanted - ROUNDING]
    bar = bar_for_precision(table, wanted)
    assert (bar is None) == (not precise)
    if bar is not None and precise:
        assert bar.precision.value is not None
        assert bar.precision.value >= wanted - ROUNDING
        assert bar.recall.value == pytest.approx(max(precise), abs=ROUNDING)
    high = [threshold for threshold, (_, recall) in found.items() if recall >= wanted - ROUNDING]
    bar = bar_for_recall(table, wanted)
    assert (bar is None) == (not high)
    if bar is not None:
        assert bar.threshold == pytest.approx(max(high), abs=ROUNDING)


def test_without_a_positive_review_no_bar_is_found() -> None:
    table = bars(np.array([False, False]), np.array([0.2, 0.7]))
    assert bar_for_precision(table, 0.5) is None
    assert bar_for_recall(table, 0.5) is None

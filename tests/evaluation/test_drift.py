"""Drift counts what changed between two models, and the table shows all of it."""

import numpy as np
import pytest

from minilora.evaluation.drift import drift, render_drift

LABELS = np.array([0, 1, 1, 0])
BEFORE = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.6, 0.4]])
AFTER = np.array([[0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.3, 0.7]])


def test_figures_by_hand() -> None:
    found = drift(LABELS, BEFORE, AFTER)
    assert found == {
        "num_correct": 1,  # of four; three before
        "accuracy": 0.25,
        "mean_change": pytest.approx((0.1 + 0.2 + 0 + 0.3) / 4),
        "largest_change": pytest.approx(0.3),
        "num_flipped": 2,
        "flipped": 0.5,
    }


def test_nothing_changes_from_a_model_to_itself() -> None:
    found = drift(LABELS, BEFORE, BEFORE)
    assert (found["num_correct"], found["accuracy"]) == (3, 0.75)
    assert found["mean_change"] == found["largest_change"] == found["num_flipped"] == found["flipped"] == 0


def test_it_is_the_true_labels_probability_that_counts() -> None:
    before, after = np.array([[0.2, 0.5, 0.3]]), np.array([[0.2, 0.1, 0.7]])
    assert [drift(np.array([label]), before, after)["mean_change"] for label in (0, 1, 2)] == [
        0.0,
        pytest.approx(0.4),
        pytest.approx(0.4),
    ]


@pytest.mark.parametrize("cut", [(LABELS[1:], BEFORE, AFTER), (LABELS, BEFORE[1:], AFTER), (LABELS, BEFORE, AFTER[1:])])
def test_other_reviews_are_not_compared(cut: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(ValueError, match="are not of the same reviews"):
        drift(*cut)


def test_the_table_has_a_line_for_each_model_and_no_change_for_the_first() -> None:
    rows = {"adapter on nf4": drift(LABELS, BEFORE, BEFORE), "merged": drift(LABELS, BEFORE, AFTER)}
    assert render_drift(rows, 4).splitlines() == [
        "                          accuracy  mean change  largest         flipped",
        "adapter on nf4     0.7500    (3/4)",
        "merged             0.2500    (1/4)       0.1500   0.3000      50.00% (2)",
    ]

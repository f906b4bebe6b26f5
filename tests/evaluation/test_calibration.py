"""Bins and calibration error: hand-worked cases, and the definition as it is printed."""

from itertools import pairwise

import numpy as np
import pytest

from minilora.evaluation.calibration import calibration_bins, expected_calibration_error
from tests.evaluation.test_metrics import ROUNDING, random_evaluation


def test_calibration_bins_count_every_review_once() -> None:
    # confidences 0.5 | 0.6, 0.9, 0.9: an edge belongs to the bin below it
    labels = np.array([0, 0, 1, 0])
    probabilities = np.array([[0.5, 0.5], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    counts, correct, confidence = calibration_bins(labels, probabilities, num_bins=2)
    assert (counts.tolist(), correct.tolist()) == ([1, 3], [1, 2])
    assert confidence == pytest.approx([0.5, 2.4])


def test_calibration_error_of_hand_worked_bins() -> None:
    # Two bins over 0..1. Confidences 0.5 | 0.6, 0.9, 0.9, where 0.5 lies on the edge and belongs below it.
    # Lower: right once, |1 - 0.5| = 0.5. Upper: right twice of three, |2 - 2.4| = 0.4.
    # (0.5 + 0.4) / 4 = 0.225
    labels = np.array([0, 0, 1, 0])
    probabilities = np.array([[0.5, 0.5], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    assert expected_calibration_error(labels, probabilities, num_bins=2) == pytest.approx(0.225, abs=ROUNDING)


def test_calibration_error_does_not_cancel_between_bins() -> None:
    # Right at 0.6 (gap 0.4) and wrong at 1.0 (gap 1.0): (0.4 + 1.0) / 2 = 0.7 in two bins, and in one bin
    # |1 - 1.6| / 2 = 0.3.
    labels, probabilities = np.array([0, 0]), np.array([[0.6, 0.4], [0.0, 1.0]])
    assert expected_calibration_error(labels, probabilities) == pytest.approx(0.7, abs=ROUNDING)
    assert expected_calibration_error(labels, probabilities, num_bins=1) == pytest.approx(0.3, abs=ROUNDING)


def naive_calibration_error(labels: np.ndarray, probabilities: np.ndarray, num_bins: int) -> float:
    """Guo et al.'s equation 3, bin by bin as it is printed."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for low, high in pairwise(np.linspace(0, 1, num_bins + 1)):
        inside = (low < confidence) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("seed", range(40))
def test_calibration_error_equals_its_printed_definition(seed: int) -> None:
    labels, probabilities = random_evaluation(seed)
    for num_bins in (1, 10, 15):
        ours = expected_calibration_error(labels, probabilities, num_bins)
        assert ours == pytest.approx(naive_calibration_error(labels, probabilities, num_bins), abs=ROUNDING)

"""Labels (N,) and probabilities (N, K) in; out, how far confidence is from accuracy.

Confidence is the probability of the prediction. A model is calibrated where, of the reviews with confidence c, a share
of c is right. Measured here, corrected nowhere.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
"""

import numpy as np


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reviews by confidence, in the bins ((m - 1) / num_bins, m / num_bins].

    Returns:
        Three arrays (num_bins,): int64 reviews, int64 of them right, float64 sum of their confidences.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    bins = np.searchsorted(inner_edges, confidence, side="left")
    return (
        np.bincount(bins, minlength=num_bins),
        np.bincount(bins[correct], minlength=num_bins),
        np.bincount(bins, weights=confidence, minlength=num_bins),
    )


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15) -> float:
    """How far confidence is from accuracy, averaged over reviews of similar confidence; 0 where calibrated.

        ECE = sum_m |bin m| / N * |accuracy of bin m - mean confidence of bin m|        (equation 3)

    |bin| * |accuracy - confidence| is the difference of two sums, so no bin is divided by its size.
    """
    _, correct, confidence = calibration_bins(labels, probabilities, num_bins)
    return float(np.abs(correct - confidence).sum() / len(labels))

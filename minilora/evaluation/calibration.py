"""Labels and probabilities in; out, how far confidence is from accuracy.

Confidence is the probability of the prediction. A model is calibrated where, of the reviews with confidence c, a share
of c is right. Measured here, corrected nowhere.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
"""

import numpy as np


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reviews of similar confidence: how many they are, how many are right, how sure the model was of them.

    Confidence is the largest probability of a row. The bins are ((m - 1) / num_bins, m / num_bins].

    Args:
        labels: (N,) int, N at least 1.
        probabilities: (N, K) float64, rows sum to one.
        num_bins: B, bins of equal width over 0..1.

    Returns:
        Three arrays (B,): int64 reviews, int64 of them right, float64 sum of their confidences.
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
    """How far confidence is from accuracy, averaged over reviews of similar confidence.

        ECE = sum_m |bin m| / N * |accuracy of bin m - mean confidence of bin m|

    Args:
        labels: (N,) int, N at least 1.
        probabilities: (N, K) float64, rows sum to one.
        num_bins: see `calibration_bins`.

    Returns:
        The error in 0..1; 0 for perfect calibration.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    _, correct, confidence = calibration_bins(labels, probabilities, num_bins)
    # |bin| * |accuracy - confidence| is the absolute value of two sums' difference, so no bin is divided by its size.
    return float(np.abs(correct - confidence).sum() / len(labels))

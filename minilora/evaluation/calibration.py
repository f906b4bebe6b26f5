"""Labels (N,) and probabilities (N, K) in; out, how far confidence is from accuracy, and a temperature that mends it.

Confidence is the probability of the prediction. A model is calibrated where, of the reviews with confidence c, a share
of c is right. A temperature T is one number that divides the logarithms of the probabilities:

    p_k(T) = p_k^(1/T) / sum_j p_j^(1/T)

Above 1 it makes a model less confident, below 1 more; no prediction changes. It is fitted by log loss, on examples that
were not trained on. With z_nk = log p_nk, b = 1/T and q the probabilities at T:

    L(b)   = mean_n [ log sum_k exp(b z_nk) - b z_ny ]        y the true class of n
    L'(b)  = mean_n [ sum_k q_nk z_nk - z_ny ]                mean of z under q, less that of the truth
    L''(b) = mean_n [ variance of z_n under q_n ]  >= 0

so L is convex in b and has one minimum at most, where L' changes its sign. Newton's method finds it in log b.

A logarithm of a probability is exact to rounding, also beside a probability of exactly 1, because the others keep their
own exponents. A float64 that is exactly 0 counts as the smallest one there is, exp(-744): in fitting as in use.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
Left out: a temperature for each class and isotonic regression, which need more examples than a validation set has.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_BINS = 15  # of confidence
COLDEST, HOTTEST = 0.05, 20.0  # temperatures that a fit may give
MAX_SPREAD = 2.0  # of the interval's ends, beyond which a fit is said to be vague
SMALLEST = np.nextafter(0.0, 1.0)
RESAMPLES = 1000  # of every bootstrap
BLOCK = 1 << 22  # numbers of a bootstrap's resamples in memory at once


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature with the lowest log loss of some examples."""

    temperature: float
    interval_95: tuple[float, float] | None  # how well the examples fix it; None where they have no such minimum
    num_examples: int
    log_loss_before: float  # nats, at temperature 1
    log_loss_after: float
    note: str | None = None  # why it says little


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """(N, K) float64 probabilities at a temperature; at 1 they are the same bits."""
    if temperature == 1:
        return probabilities
    return _softmax(_logarithms(probabilities) / temperature)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> TemperatureFit:
    """The temperature that minimises log loss, within COLDEST..HOTTEST.

    Where log loss falls down to COLDEST, as it does where every prediction is right, the examples say that the model
    could be more confident and not how much: the temperature stays 1. So it does where log loss is the same at all of
    them. The interval is that of maximum likelihood in log T, whose information at the minimum is N b^2 L''(b).
    """
    z, count = _logarithms(probabilities), len(labels)
    before = _log_loss(z, labels, 1.0)
    right = f"{int((probabilities.argmax(axis=1) == labels).sum()):,} of {count:,} examples are right"
    if _slope(z, labels, 1 / COLDEST)[0] <= 0:
        note = f"{right}, and no temperature has the lowest log loss: it stays 1"
        return TemperatureFit(1.0, None, count, log_loss_before=before, log_loss_after=before, note=note)
    if _slope(z, labels, 1 / HOTTEST)[0] >= 0:
        after = _log_loss(z, labels, 1 / HOTTEST)
        note = f"{right}, and log loss falls up to {HOTTEST:g}, the highest: confidence says nothing of the mistakes"
        return TemperatureFit(HOTTEST, None, count, log_loss_before=before, log_loss_after=after, note=note)
    inverse, curvature = _minimum(z, labels)
    error = 1.96 / math.sqrt(count * inverse**2 * curvature)
    limit = math.log(HOTTEST)
    low, high = (math.exp(min(max(side * error - math.log(inverse), -limit), limit)) for side in (-1, 1))
    vague = f"{count:,} examples leave it open between {low:.2f} and {high:.2f}: more of them say more"
    after = _log_loss(z, labels, inverse)
    doubt = vague if high / low > MAX_SPREAD else None
    return TemperatureFit(1 / inverse, (low, high), count, log_loss_before=before, log_loss_after=after, note=doubt)


def _minimum(z: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """b where L' is 0, and L'' there; L' has both signs between 1 / HOTTEST and 1 / COLDEST.

    A step of Newton's that would leave the interval that holds the minimum is replaced by its middle.
    """
    low, high, point = -math.log(HOTTEST), -math.log(COLDEST), 0.0  # all log b, where dL'/dlog b = b L''
    for _ in range(100):
        slope, curvature = _slope(z, labels, math.exp(point))
        low, high = (point, high) if slope < 0 else (low, point)
        newton = point - slope / (curvature * math.exp(point)) if curvature > 0 else math.inf
        last, point = point, newton if low <= newton <= high else (low + high) / 2
        if abs(point - last) <= 1e-14:
            break
    return math.exp(point), _slope(z, labels, math.exp(point))[1]


def _logarithms(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, SMALLEST, dtype=np.float64))


def _softmax(z: np.ndarray) -> np.ndarray:
    exponentials = np.exp(z - z.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _log_loss(z: np.ndarray, labels: np.ndarray, inverse: float) -> float:
    """L at b = `inverse`."""
    scaled = inverse * z
    largest = scaled.max(axis=1)
    normalizers = largest + np.log(np.exp(scaled - largest[:, None]).sum(axis=1))
    return float((normalizers - scaled[np.arange(len(labels)), labels]).mean())


def _slope(z: np.ndarray, labels: np.ndarray, inverse: float) -> tuple[float, float]:
    """L' and L'' at b = `inverse`."""
    q = _softmax(inverse * z)
    means = (q * z).sum(axis=1, keepdims=True)
    slope = means[:, 0] - z[np.arange(len(labels)), labels]
    return float(slope.mean()), float((q * (z - means) ** 2).sum(axis=1).mean())


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reviews by confidence, in the bins ((m - 1) / num_bins, m / num_bins].

    Returns:
        Three arrays (num_bins,): int64 reviews, int64 of them right, float64 sum of their confidences.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = _bins_of(confidence, num_bins)
    return (
        np.bincount(bins, minlength=num_bins),
        np.bincount(bins[correct], minlength=num_bins),
        np.bincount(bins, weights=confidence, minlength=num_bins),
    )


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """How far confidence is from accuracy, averaged over reviews of similar confidence; 0 where calibrated.

        ECE = sum_m |bin m| / N * |accuracy of bin m - mean confidence of bin m|        (equation 3)

    |bin| * |accuracy - confidence| is the difference of two sums, so no bin is divided by its size.
    """
    _, correct, confidence = calibration_bins(labels, probabilities, num_bins)
    return float(np.abs(correct - confidence).sum() / len(labels))


def _bins_of(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    return np.searchsorted(inner_edges, confidence, side="left")


def error_by_chance(probabilities: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """What the calibration error of a calibrated model with these confidences comes to, of so many reviews.

    Each review is right with probability c, so a bin's sum of (right - c) is nearly normal with variance sum c (1 - c),
    and the mean absolute value of a normal is sqrt(2 / pi) of its deviation.
    """
    confidence = probabilities.max(axis=1)
    variance = np.bincount(_bins_of(confidence, num_bins), weights=confidence * (1 - confidence), minlength=num_bins)
    return float(np.sqrt(2 / np.pi * np.maximum(variance, 0)).sum() / len(confidence))


def truth_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(N,) negative natural logarithms of the true class's probability, in nats.

    Probabilities are clipped to [eps, 1 - eps] of float64, as scikit-learn clips them: one confident mistake
    costs 36.04 and not infinity.
    """
    eps = np.finfo(np.float64).eps
    losses: np.ndarray = -np.log(np.clip(probabilities[np.arange(len(labels)), labels], eps, 1 - eps))
    return losses


def calibration_figures(
    labels: np.ndarray, probabilities: np.ndarray, uncalibrated: np.ndarray | None = None, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """`log_loss` and `expected_calibration_error` with 95 % bootstrap intervals, by the keys of an evaluation.

    With `uncalibrated`, of the same reviews before a temperature, theirs are under "uncalibrated", and what the
    temperature changes is under "change", drawn from the same resamples.

    The interval is the basic one, 2 estimate - (quantiles of the resamples), cut at 0 and widened to hold the estimate.
    A resample has noise of its own, which adds to a sum of absolute values: its calibration error is too high by about
    as much as the estimate. Percentiles double that error, and never held the truth in 300 draws of 1,000 reviews from
    a calibrated model.

    Source: Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 5.2.
    """
    sets = [probabilities] if uncalibrated is None else [probabilities, uncalibrated]
    tables = [_summands(labels, one) for one in sets]
    count = len(labels)
    estimates = [_from_sums(table.sum(axis=0, keepdims=True), count) for table in tables]
    generator, size = np.random.default_rng(0), max(1, BLOCK // count)
    blocks: list[list[np.ndarray]] = []
    for start in range(0, resamples, size):
        weights = generator.multinomial(count, np.full(count, 1 / count), size=min(size, resamples - start))
        blocks.append([_from_sums(weights @ table, count) for table in tables])
    draws = [np.concatenate(of_set) for of_set in zip(*blocks, strict=True)]
    figures = _described(estimates[0], draws[0], lowest=0.0)
    if uncalibrated is not None:
        figures["uncalibrated"] = _described(estimates[1], draws[1], lowest=0.0)
        figures["change"] = _described(estimates[0] - estimates[1], draws[0] - draws[1], lowest=-np.inf)
    return figures


def _summands(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """(N, num_bins + 1): what each review adds to the gap of its bin, zeros at the others, and its loss."""
    confidence = probabilities.max(axis=1)
    table = np.zeros((len(labels), num_bins + 1))
    correct = probabilities.argmax(axis=1) == labels
    table[np.arange(len(labels)), _bins_of(confidence, num_bins)] = correct - confidence
    table[:, -1] = truth_losses(labels, probabilities)
    return table


def _from_sums(sums: np.ndarray, count: int) -> np.ndarray:
    """(R, 2) log loss and calibration error of R resamples of `count` reviews, from the sums of `_summands`."""
    return np.stack([sums[:, -1], np.abs(sums[:, :-1]).sum(axis=1)], axis=1) / count


def _described(estimate: np.ndarray, draws: np.ndarray, lowest: float) -> dict[str, Any]:
    """Both figures and their basic intervals: (1, 2) estimates, (R, 2) resamples."""
    high, low = np.maximum(2 * estimate - np.quantile(draws, [0.025, 0.975], axis=0), lowest)
    low, high = np.minimum(low, estimate[0]), np.maximum(high, estimate[0])
    names = ("log_loss", "expected_calibration_error")
    return {
        **dict(zip(names, estimate[0].tolist(), strict=True)),
        "confidence_intervals_95": dict(zip(names, np.stack([low, high], axis=1).tolist(), strict=True)),
    }

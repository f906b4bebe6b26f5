"""Labels and predicted probabilities in, every number of an evaluation out, and how far to trust it.

Nearly everything is read from one table, the confusion matrix M: M[i, j] counts the reviews of class i that
were given class j.

                    predicted 0   predicted 1        precision_k = M[k, k] / sum_i M[i, k]   (column)
        true 0          M00           M01            recall_k    = M[k, k] / sum_j M[k, j]   (row)
        true 1          M10           M11            f1_k        = 2 M[k, k] / (row sum + column sum)

Accuracy is trace / sum. Only ROC AUC, log loss and calibration error need the probabilities themselves. A
bootstrap interval needs no reviews either: resampling them is a multinomial draw over the cells of M.

Where a denominator is zero, precision, recall and F1 of such a class are 0.0, and it counts in a macro average,
as in scikit-learn with `labels=range(K), zero_division=0`. ROC AUC is None.

In all functions labels are (N,) int in 0..K-1, and probabilities (N, K) float64 whose rows sum to one; N is 1 at least.

Source: scikit-learn's definitions, against which the tests compare; others are named at their functions.
Left out: sample weights and several labels per review, which nothing here asks for, and ROC AUC of more than
two classes, because there is no single one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minilora.evaluation.calibration import (
    BLOCK,
    RESAMPLES,
    at_temperature,
    calibration_figures,
    expected_calibration_error,
    truth_losses,
)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64: how often each true class (row) was given each class (column)."""
    cells = labels.astype(np.int64) * num_classes + predictions.astype(np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def precision_recall_f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, (..., K) float64; leading axes of `confusion` are separate tables.

    F1 comes from counts, not from precision and recall, so that it needs no rule of its own for 0 + 0.
    """
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted, actual = confusion.sum(axis=-2), confusion.sum(axis=-1)

    def divide_or_zero(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)

    return (
        divide_or_zero(correct, predicted),
        divide_or_zero(correct, actual),
        divide_or_zero(2 * correct, predicted + actual),
    )


def averages(confusion: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Precision, recall and F1: `macro`, every class alike, and `weighted`, each by its share of the reviews.

    A class without a review counts as 0 in the first and not at all in the second.
    """
    by_class, support = precision_recall_f1(confusion), confusion.sum(axis=1)
    macro, weighted = ([float(np.average(x, weights=w)) for x in by_class] for w in (None, support))
    return {"macro": (macro[0], macro[1], macro[2]), "weighted": (weighted[0], weighted[1], weighted[2])}


def most_confused(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Class, prediction and reviews of the most frequent errors, the first of equals first."""
    errors = confusion - np.diag(np.diagonal(confusion))
    cells = np.argsort(-errors, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(cells, errors.shape), strict=True)
    return [(int(label), int(answer), int(errors[label, answer])) for label, answer in pairs if errors[label, answer]]


def roc_auc(positive: np.ndarray, scores: np.ndarray) -> float | None:
    """The probability that a random positive scores above a random negative, a tie counting one half.

    The area under the ROC curve is that probability (the Mann-Whitney statistic), so no curve is drawn: each
    distinct score wins against the negatives below it and ties with those on it. Twice the number of wins is
    an integer, hence exact.

    Args:
        positive: (N,) bool, true where the review is of the positive class.
        scores: (N,) float, larger for more positive.

    Returns:
        The area in 0..1; None where there are no positives or no negatives.

    Source: Fawcett 2006, "An introduction to ROC analysis", section 7.
    """
    levels, level_of = np.unique(scores, return_inverse=True)
    positives = np.bincount(level_of[positive], minlength=levels.size).astype(np.int64)
    negatives = np.bincount(level_of[~positive], minlength=levels.size).astype(np.int64)
    pairs = int(positives.sum()) * int(negatives.sum())
    if pairs == 0:
        return None
    negatives_below = np.cumsum(negatives) - negatives
    twice_wins = int((positives * (2 * negatives_below + negatives)).sum())
    return twice_wins / (2 * pairs)


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative natural logarithm of the true class's probability, in nats; see `truth_losses`."""
    return float(truth_losses(labels, probabilities).mean())


def bootstrap_intervals(
    confusion: np.ndarray, positive: int | None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals (low, high) of `accuracy`, `precision`, `recall` and `f1`.

    A resample draws N reviews with replacement. Each draw falls into cell (i, j) with probability
    M[i, j] / N, independently of the other draws, so the resampled table is Multinomial(N, M / N): the
    reviews themselves are not needed. A block of tables is in memory at once: 1,000 of 400 classes are 1.3 GB.

    The interval covers only the choice of test reviews, not another training seed.

    Args:
        confusion: (K, K) counts, rows true, columns predicted.
        positive: the class whose precision, recall and F1 are meant; None for macro averages.
        resamples: how many tables are drawn.
        seed: of the draws; equal seeds give equal intervals.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    total = int(confusion.sum())
    # Only observed cells are drawn, so that rounding cannot put a review into a cell of probability 0.
    observed = np.flatnonzero(confusion)
    generator, size = np.random.default_rng(seed), max(1, BLOCK // confusion.size)
    blocks: list[dict[str, np.ndarray]] = []
    for start in range(0, resamples, size):
        draws = generator.multinomial(total, confusion.ravel()[observed] / total, size=min(size, resamples - start))
        tables = np.zeros((len(draws), confusion.size), dtype=np.int64)
        tables[:, observed] = draws
        blocks.append(headline_scores(tables.reshape(-1, *confusion.shape), positive, confusion))
    return {name: percentiles(np.concatenate([block[name] for block in blocks])) for name in blocks[0]}


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a figure's resamples."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def mcnemar_test(correct_a: np.ndarray, correct_b: np.ndarray) -> dict[str, float]:
    """Whether two models that saw the same reviews differ in accuracy.

    Reviews that both get right or both get wrong say nothing about it. If the models are equally good, each
    of the other n = b + c favours either side with probability 1/2, and

        p = min(1, 2 * sum_{k <= min(b, c)} C(n, k) / 2^n).

    Summed in whole numbers and divided once: exact to the last bit, and no n overflows.

    Args:
        correct_a: (N,) bool, where model a is right.
        correct_b: (N,) bool, where model b is right, on the same reviews.

    Returns:
        `b`: int, reviews that only a gets right; `c`: int, those that only b gets right; `p_value`: float,
        two-sided, 1.0 where b + c is 0.

    Source: McNemar 1947, in the exact binomial form.
    """
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    n, ways, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)  # C(n, k + 1) from C(n, k); the division leaves no remainder
    return {"b": only_a, "c": only_b, "p_value": min(2 * tail, 2**n) / 2**n}


def drift(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """How far the probabilities `after` are from `before`, of the same reviews.

    Returns:
        `num_correct` and `accuracy` of `after`; `mean_change` and `largest_change`, absolute, of the probability of
        the true class; `num_flipped` and `flipped`, reviews with another prediction and their share.
    """
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


def classification_metrics(
    labels: np.ndarray, probabilities: np.ndarray, label_names: Sequence[str], positive: int | None
) -> dict[str, Any]:
    """All metrics of one evaluation, in plain Python values that `json.dumps` takes.

    The prediction is the most probable class, the first of equals.

    Args:
        labels: (N,) int, the true classes.
        probabilities: (N, K) float64.
        label_names: the K names, in the order of the classes.
        positive: the class that `precision`, `recall`, `f1` and `roc_auc` are about. None, the choice for
            more than two classes, makes the first three macro averages and `roc_auc` None.

    Returns:
        `num_examples`, `accuracy`, `precision`, `recall`, `f1`, `macro_precision`, `macro_recall`, `macro_f1`,
        `weighted_precision`, `weighted_recall`, `weighted_f1` (see `averages`), `per_class` (by name: `precision`,
        `recall`, `f1`, `support`), `confusion_matrix` (K lists of K), `roc_auc`, `log_loss` (nats),
        `expected_calibration_error`, `confidence_intervals_95` ([low, high] of `accuracy`, `precision`, `recall` and
        `f1`).

    Raises:
        ValueError: a row holds no probabilities. A diverged model gives NaN, whose argmax is a class like any other.
    """
    # 1e-3 lets rows through that were normalised in float16.
    unfit = ~((np.abs(probabilities.sum(axis=1) - 1) <= 1e-3) & (probabilities >= 0).all(axis=1))
    if unfit.any():
        row = int(unfit.argmax())
        raise ValueError(f"row {row} is {probabilities[row].tolist()}, expected probabilities, sum 1")
    confusion = confusion_matrix(labels, probabilities.argmax(axis=1), len(label_names))
    intervals, fields = bootstrap_intervals(confusion, positive), ("precision", "recall", "f1")
    columns = (*precision_recall_f1(confusion), confusion.sum(axis=1))
    per_class = {
        name: dict(zip((*fields, "support"), row, strict=True))
        for name, *row in zip(label_names, *(column.tolist() for column in columns), strict=True)
    }
    return {
        "num_examples": len(labels),
        **{name: float(score) for name, score in headline_scores(confusion, positive).items()},
        **{
            f"{kind}_{field}": score
            for kind, scores in averages(confusion).items()
            for field, score in zip(fields, scores, strict=True)
        },
        "per_class": per_class,
        "confusion_matrix": confusion.tolist(),
        "roc_auc": None if positive is None else roc_auc(labels == positive, probabilities[:, positive]),
        "log_loss": log_loss(labels, probabilities),
        "expected_calibration_error": expected_calibration_error(labels, probabilities),
        "confidence_intervals_95": {name: list(bounds) for name, bounds in intervals.items()},
    }


def final_metrics(
    labels: np.ndarray,
    uncalibrated: np.ndarray,
    temperature: float | None,
    label_names: Sequence[str],
    positive: int | None,
) -> tuple[dict[str, Any], np.ndarray]:
    """`classification_metrics` at a temperature, or of the probabilities as they are; and the (N, K) behind them.

    Beside them are `temperature` and what `calibration_figures` adds: intervals of log loss and calibration error, and
    where there is a temperature the same before it.
    """
    probabilities = uncalibrated if temperature is None else at_temperature(uncalibrated, temperature)
    metrics = classification_metrics(labels, probabilities, label_names, positive)
    figures = calibration_figures(labels, probabilities, None if temperature is None else uncalibrated)
    metrics["confidence_intervals_95"] |= figures.pop("confidence_intervals_95")
    return {**metrics, **figures, "temperature": temperature}, probabilities


def only_answer(where: str, metrics: Mapping[str, Any]) -> list[str]:
    """A sentence if `classification_metrics` has one and the same prediction for all reviews, of two at least."""
    table = np.array(metrics.get("confusion_matrix", [[]]))
    answers = np.flatnonzero(table.sum(axis=0))
    if len(answers) != 1 or metrics["num_examples"] < 2:
        return []
    return [f"{where}: all {metrics['num_examples']:,} predictions are {list(metrics['per_class'])[answers[0]]}"]


def headline_scores(
    confusion: np.ndarray, positive: int | None, drawn_from: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The four scores of one (K, K) table, or of many (..., K, K).

    A resample gives the table that it was `drawn_from`: a class that it happens to leave out is not in its macro
    average. As 0 it would pull a hundred classes of three reviews each below the estimate in all resamples.
    """
    trace = np.trace(confusion, axis1=-2, axis2=-1)
    scores = {"accuracy": trace / confusion.sum(axis=(-2, -1))}
    is_left_out = np.zeros(confusion.shape[:-1], dtype=bool)
    if drawn_from is not None:
        is_left_out = (confusion.sum(axis=-1) == 0) & (drawn_from.sum(axis=-1) > 0)
    for name, by_class in zip(("precision", "recall", "f1"), precision_recall_f1(confusion), strict=True):
        scores[name] = by_class.mean(axis=-1, where=~is_left_out) if positive is None else by_class[..., positive]
    return scores

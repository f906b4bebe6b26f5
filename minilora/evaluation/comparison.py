"""Several trained models and one validation set in, which of them is better out, and how sure that is.

A setting is run with several seeds. Its score is the mean over its runs of one metric. Two things make that uncertain,
and they are told apart:

    spread     how far its runs are from each other: the standard deviation over them, none of a single run
    interval   how far other validation records would have moved it: a bootstrap over the records

The comparison is paired. A resample draws N records with replacement, the same ones for all runs, so that a record that
all of them get wrong says nothing about a difference. With b such resamples of score(a) - score(b),

    interval = their 2.5 % and 97.5 % quantiles,       p = min(1, 2 min(share <= 0, share >= 0)),

where no share is below 1 / b: more than that cannot be said from b of them.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", sections 13.3 and 15.4.
Left out: corrections for having compared many settings with the best; the table says how many there are.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minilora.evaluation.calibration import BLOCK, RESAMPLES, truth_losses
from minilora.evaluation.metrics import confusion_matrix, headline_scores, percentiles

LOWER_IS_BETTER = ("loss", "log_loss")


@dataclass(frozen=True)
class Predictions:
    """What one run says of its validation set."""

    data: str  # the set's SHA-256: runs with the same one saw the same records
    loss: float  # nats per supervised token
    labels: np.ndarray  # (N,) int, the true classes; empty for conversations
    probabilities: np.ndarray  # (N, K) float64

    @property
    def is_labelled(self) -> bool:
        """Otherwise the loss is all there is."""
        return bool(len(self.labels))

    def score(self, metric: str, positive: int | None) -> float:
        """The value of one metric, as `compare` takes them."""
        if metric == "loss":
            return self.loss
        return float(self._scores([np.arange(len(self.labels))], metric, positive)[0])

    def resampled(self, metric: str, positive: int | None) -> np.ndarray:
        """(RESAMPLES,) the metric, not the loss, of records that are drawn; the same for all runs on the same data."""
        generator = np.random.default_rng(int(self.data[:15], 16))
        size = len(self.labels)
        return self._scores((generator.integers(size, size=size) for _ in range(RESAMPLES)), metric, positive)

    def _scores(self, draws: Iterable[np.ndarray], metric: str, positive: int | None) -> np.ndarray:
        """The metric of each of several choices of records, given as indices."""
        if metric == "log_loss":
            losses = truth_losses(self.labels, self.probabilities)
            return np.array([losses[drawn].mean() for drawn in draws])
        predictions, classes = self.probabilities.argmax(axis=1), self.probabilities.shape[1]
        name, positive = ("f1", None) if metric == "macro_f1" else (metric, positive)
        observed = confusion_matrix(self.labels, predictions, classes)
        tables = (confusion_matrix(self.labels[drawn], predictions[drawn], classes) for drawn in draws)
        scores = []
        while block := list(itertools.islice(tables, max(1, BLOCK // classes**2))):
            scores.append(headline_scores(np.stack(block), positive, observed)[name])
        return np.concatenate(scores)


@dataclass(frozen=True)
class Comparison:
    """One setting beside the best one."""

    scores: list[float]  # of its runs
    interval: tuple[float, float] | None = None  # 95 %, of their mean; None without labels
    difference: float | None = None  # its mean less the best's; None for the best, and where the records are others
    difference_interval: tuple[float, float] | None = None
    p_value: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs, None of one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


def compare(settings: Mapping[str, Sequence[Predictions]], metric: str, positive: int | None) -> dict[str, Comparison]:
    """Each setting's scores, in the order given, beside those of the best: the highest mean, or the lowest loss.

    Args:
        settings: the runs of each setting, one at least.
        metric: accuracy, f1, macro_f1 or log_loss, nats per record; or loss, for which there are no intervals.
        positive: the class that f1 is about; None for the macro average.
    """
    scores = {name: [run.score(metric, positive) for run in runs] for name, runs in settings.items()}
    best = best_of(scores, metric)
    data = {name: {run.data for run in runs} for name, runs in settings.items()}
    resampled = {}
    if metric != "loss":
        resampled = {
            name: np.mean([run.resampled(metric, positive) for run in runs], axis=0) for name, runs in settings.items()
        }

    def beside_best(name: str) -> Comparison:
        if name not in resampled:
            return Comparison(scores[name])
        interval = percentiles(resampled[name])
        if name == best or data[name] != data[best]:
            return Comparison(scores[name], interval)
        differences = resampled[name] - resampled[best]
        difference = float(np.mean(scores[name]) - np.mean(scores[best]))
        shares = (differences <= 0).mean(), (differences >= 0).mean()
        p_value = min(1.0, 2 * max(float(min(shares)), 1 / len(differences)))
        return Comparison(scores[name], interval, difference, percentiles(differences), p_value=p_value)

    return {name: beside_best(name) for name in settings}


def best_of(scores: Mapping[str, Sequence[float]], metric: str) -> str:
    """The name with the best mean, the first of equals."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(scores, key=lambda name: sign * float(np.mean(scores[name])))

"""Settings are compared on the same records, with the uncertainty of both told apart."""

import tracemalloc

import numpy as np
import pytest

from minilora.evaluation.calibration import RESAMPLES
from minilora.evaluation.comparison import Predictions, best_of, compare
from minilora.evaluation.metrics import classification_metrics


def predictions(right: list[bool] | np.ndarray, data: str = "ab" * 32, loss: float = 0.5) -> Predictions:
    """Of records of alternating classes, with these answers right."""
    right = np.asarray(right)
    labels = np.arange(len(right)) % 2
    chosen = np.where(right, labels, 1 - labels)
    return Predictions(data, loss, labels, np.eye(2)[chosen] * 0.8 + 0.1)


@pytest.mark.parametrize(
    ("metric", "positive"), [("accuracy", 1), ("f1", 1), ("f1", None), ("macro_f1", 1), ("log_loss", 1)]
)
def test_a_score_is_that_of_the_metrics(metric: str, positive: int | None) -> None:
    run = predictions(np.random.default_rng(0).random(101) < 0.7)
    expected = classification_metrics(run.labels, run.probabilities, ("a", "b"), positive)[metric]
    assert run.score(metric, positive) == pytest.approx(expected, rel=1e-15)


def test_what_both_get_wrong_says_nothing_of_their_difference() -> None:
    """200 records: 100 that both get wrong, 4 that only a gets right. Unpaired, 4 of 200 would be noise."""
    right = np.arange(200) >= 100
    better, worse = right.copy(), right.copy()
    worse[100:104] = False
    found = compare({"worse": [predictions(worse)], "better": [predictions(better)]}, "accuracy", 1)
    assert found["better"].difference is None
    assert found["worse"].difference == pytest.approx(-0.02)
    low, high = found["worse"].difference_interval or (0, 0)
    assert -0.045 <= low <= -0.035
    assert -0.006 <= high <= 0  # each of the four is missing from a resample with a chance of 1/e
    assert (found["worse"].p_value or 0) < 0.06
    low, high = found["better"].interval or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 200), rel=0.15)


def test_a_difference_by_chance_is_said_to_be_one() -> None:
    generator = np.random.default_rng(1)
    settings = {name: [predictions(generator.random(300) < 0.8)] for name in ("a", "b")}
    (p_value,) = [one.p_value for one in compare(settings, "f1", 1).values() if one.p_value is not None]
    assert p_value > 0.05


def test_p_is_never_smaller_than_the_resamples_can_say() -> None:
    settings = {"all": [predictions([True] * 50)], "none": [predictions([False] * 50)]}
    assert compare(settings, "accuracy", 1)["none"].p_value == 2 / RESAMPLES


def test_seeds_give_the_mean_and_the_spread() -> None:
    runs = [predictions(np.arange(10) < count) for count in (6, 8, 10)]
    (one,) = compare({"a": runs}, "accuracy", 1).values()
    assert (one.mean, one.spread) == (pytest.approx(0.8), pytest.approx(0.2))
    (single,) = compare({"a": runs[:1]}, "accuracy", 1).values()
    assert single.spread is None


def test_the_order_of_seeds_and_settings_changes_nothing() -> None:
    generator = np.random.default_rng(2)
    runs = {name: [predictions(generator.random(60) < 0.7) for _ in range(2)] for name in ("a", "b")}
    turned = {name: runs[name][::-1] for name in ("b", "a")}
    one, other = compare(runs, "accuracy", 1), compare(turned, "accuracy", 1)
    assert one["a"].interval == pytest.approx(other["a"].interval)
    assert one["a"].p_value == other["a"].p_value


def test_settings_on_other_records_have_no_difference() -> None:
    found = compare(
        {"a": [predictions([True] * 9)], "b": [predictions([True, False] * 5, data="cd" * 32)]}, "accuracy", 1
    )
    assert found["b"].difference is None
    assert found["b"].interval is not None


def test_the_lowest_log_loss_is_best_and_has_intervals() -> None:
    sure, unsure = predictions([True] * 40), predictions([True] * 39 + [False])
    found = compare({"unsure": [unsure], "sure": [sure]}, "log_loss", None)
    assert found["sure"].difference is None
    assert found["unsure"].difference == pytest.approx((np.log(0.9) - np.log(0.1)) / 40)
    assert (found["unsure"].difference_interval or (-1,))[0] == 0


def test_the_lowest_loss_is_best() -> None:
    settings = {name: [predictions([True], loss=loss)] for name, loss in (("a", 0.7), ("b", 0.3))}
    found = compare(settings, "loss", None)
    assert best_of({name: one.scores for name, one in found.items()}, "loss") == "b"
    assert found["a"].interval is None


def test_many_classes_are_compared_a_block_of_tables_at_a_time() -> None:
    """All tables of 300 classes at once would take 720 MB."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 300, 100)
    run = Predictions("ab" * 32, 1.0, labels, generator.dirichlet([1] * 300, size=100))
    tracemalloc.start()
    assert run.resampled("macro_f1", None).shape == (RESAMPLES,)
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()


def test_the_interval_of_a_macro_average_of_small_classes_holds_it() -> None:
    """A class that a resample leaves out is not one with a score of 0."""
    labels = np.repeat(np.arange(100), 3)
    answers = np.where(np.arange(300) % 10 == 0, (labels + 1) % 100, labels)
    found = Predictions("abcdef0123456789", 0.1, labels, np.eye(100)[answers])
    low, high = np.quantile(found.resampled("macro_f1", None), [0.025, 0.975])
    assert low < found.score("macro_f1", None) < high

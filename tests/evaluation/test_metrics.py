"""Hand-worked cases, scikit-learn on random ones, invariants, and the bootstrap against its naive form."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from minilora.evaluation import metrics as evaluation_metrics
from minilora.evaluation.metrics import (
    bootstrap_intervals,
    classification_metrics,
    confusion_matrix,
    drift,
    log_loss,
    mcnemar_test,
    most_confused,
    only_answer,
    precision_recall_f1,
    roc_auc,
)

# Both sides add at most a few hundred float64 terms of size 40 at most, in different orders.
ROUNDING = 1e-12

NAMES = ("a", "b", "c")


def random_evaluation(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and probabilities (N, K) of one random evaluation, K 2 or 3.

    Every third is rounded to halves and tenths, so that scores tie; class frequencies are drawn as well, and
    every fourth evaluation lacks a class altogether.
    """
    generator = np.random.default_rng(seed)
    num_classes = 2 + seed % 2
    frequencies = generator.dirichlet(np.full(num_classes, 0.5))
    if seed % 4 == 3:
        frequencies[generator.integers(num_classes)] = 0
        frequencies /= frequencies.sum()
    labels = generator.choice(num_classes, size=generator.integers(2, 200), p=frequencies)
    logits = generator.normal(size=(labels.size, num_classes)) * generator.uniform(0.1, 30)
    logits[np.arange(labels.size), labels] += generator.uniform(-1, 2)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if seed % 3 == 0:
        first = np.round(probabilities[:, :1], 1)
        probabilities = np.hstack([first, np.repeat((1 - first) / (num_classes - 1), num_classes - 1, axis=1)])
    return labels, probabilities


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Small evaluations whose probabilities are multiples of 1/8: many ties, and sums without rounding."""
    num_classes = draw(st.integers(2, 3))
    row = st.lists(st.integers(0, 8), min_size=num_classes - 1, max_size=num_classes - 1).map(
        lambda cuts: np.diff([0, *sorted(cuts), 8]) / 8
    )
    examples = draw(st.lists(st.tuples(st.integers(0, num_classes - 1), row), min_size=1, max_size=30))
    return np.array([label for label, _ in examples]), np.stack([row for _, row in examples])


# --- confusion matrix, precision, recall, F1


def test_confusion_matrix_has_true_classes_in_rows() -> None:
    # (true, predicted): (0,0) (0,1) (0,1) (1,1) (2,0); class 2 is never predicted.
    matrix = confusion_matrix(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0]), 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert matrix.dtype == np.int64


def test_the_most_frequent_errors_come_first_and_the_first_of_equals() -> None:
    matrix = np.array([[9, 0, 2], [3, 9, 2], [0, 1, 9]])
    assert most_confused(matrix, 3) == [(1, 0, 3), (0, 2, 2), (1, 2, 2)]
    assert most_confused(matrix, 99)[3:] == [(2, 1, 1)]
    assert most_confused(np.eye(3, dtype=int), 3) == []


def test_confusion_matrix_of_no_reviews_is_zero() -> None:
    nothing = np.array([], dtype=np.int64)
    assert confusion_matrix(nothing, nothing, 2).tolist() == [[0, 0], [0, 0]]


def test_precision_recall_f1_of_a_hand_worked_table() -> None:
    # Class 0: predicted 50 + 5 = 55, actual 50 + 10 = 60.
    # Class 1: predicted 10 + 35 = 45, actual 5 + 35 = 40.
    precision, recall, f1 = precision_recall_f1(np.array([[50, 10], [5, 35]]))
    assert precision.tolist() == [50 / 55, 35 / 45]
    assert recall.tolist() == [50 / 60, 35 / 40]
    assert f1.tolist() == [2 * 50 / (55 + 60), 2 * 35 / (45 + 40)]


def test_empty_classes_score_zero() -> None:
    # Class 0 is predicted 3 times, twice rightly, and occurs twice: precision 2/3, recall 1, F1 4/5.
    # Class 1 occurs but is never predicted; class 2 does neither. Warnings are errors: 0/0 would fail here.
    precision, recall, f1 = precision_recall_f1(np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]]))
    assert precision.tolist() == [2 / 3, 0, 0]
    assert recall.tolist() == [1, 0, 0]
    assert f1.tolist() == [4 / 5, 0, 0]


def test_leading_axes_are_separate_tables() -> None:
    tables = np.random.default_rng(0).integers(0, 9, size=(5, 3, 3))
    together = precision_recall_f1(tables)
    for index, table in enumerate(tables):
        for of_all, of_one in zip(together, precision_recall_f1(table), strict=True):
            np.testing.assert_array_equal(of_all[index], of_one)


# --- ROC AUC, log loss


def test_roc_auc_counts_a_tie_as_one_half() -> None:
    # Positives 0.8, 0.5; negatives 0.5, 0.2, 0.9. Pairs won: 0.8 beats 0.5 and 0.2 (2), 0.5 ties with 0.5
    # (1/2) and beats 0.2 (1). 3.5 of 6.
    positive = np.array([True, True, False, False, False])
    assert roc_auc(positive, np.array([0.8, 0.5, 0.5, 0.2, 0.9])) == 3.5 / 6


def test_roc_auc_without_one_of_the_classes_is_none() -> None:
    assert roc_auc(np.array([True, True]), np.array([0.1, 0.9])) is None
    assert roc_auc(np.array([False, False]), np.array([0.1, 0.9])) is None


def test_log_loss_of_hand_worked_rows() -> None:
    # The true classes were given 1/2 and 1/8: (ln 2 + ln 8) / 2 = 2 ln 2.
    assert log_loss(np.array([0, 1]), np.array([[0.5, 0.5], [0.875, 0.125]])) == pytest.approx(2 * math.log(2))


def test_log_loss_of_a_certain_mistake_is_finite() -> None:
    # -ln(2^-52) = 52 ln 2 = 36.04
    assert log_loss(np.array([1]), np.array([[1.0, 0.0]])) == pytest.approx(52 * math.log(2))


def test_log_loss_of_certainty_is_clipped_as_well() -> None:
    # -ln(1 - 2^-52): never 0, and never below it where rounding left a probability above 1.
    for certain in (1.0, 1.0 + 1e-9):
        # numpy's and C's logarithm may differ in the last bit.
        loss = log_loss(np.array([0]), np.array([[certain, 0.0]]))
        assert loss == pytest.approx(-math.log(1 - 2**-52), rel=1e-14, abs=0)


# --- the whole, against scikit-learn


@pytest.mark.parametrize("seed", range(240))
def test_metrics_equal_scikit_learn(seed: int) -> None:
    labels, probabilities = random_evaluation(seed)
    classes = list(range(probabilities.shape[1]))
    positive = seed // 2 % 2 if len(classes) == 2 else None
    ours = classification_metrics(labels, probabilities, NAMES[: len(classes)], positive)

    predictions = probabilities.argmax(axis=1)
    by_class = sklearn_metrics.precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    macro, weighted = (
        sklearn_metrics.precision_recall_fscore_support(
            labels, predictions, labels=classes, zero_division=0, average=average
        )
        for average in ("macro", "weighted")
    )
    fields = ("precision", "recall", "f1", "support")
    for index, name in enumerate(NAMES[: len(classes)]):
        theirs = dict(zip(fields, (column[index] for column in by_class), strict=True))
        assert ours["per_class"][name] == pytest.approx(theirs, abs=ROUNDING)
    for index, name in enumerate(fields[:3]):
        assert ours[f"macro_{name}"] == pytest.approx(macro[index], abs=ROUNDING)
        assert ours[f"weighted_{name}"] == pytest.approx(weighted[index], abs=ROUNDING)
        headline = macro[index] if positive is None else by_class[index][positive]
        assert ours[name] == pytest.approx(headline, abs=ROUNDING)

    assert ours["num_examples"] == labels.size
    assert ours["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions), abs=ROUNDING)
    theirs = sklearn_metrics.confusion_matrix(labels, predictions, labels=classes)
    assert ours["confusion_matrix"] == theirs.tolist()
    assert ours["log_loss"] == pytest.approx(
        sklearn_metrics.log_loss(labels, probabilities, labels=classes), abs=ROUNDING
    )
    if positive is None or len(set(labels.tolist())) < 2:
        assert ours["roc_auc"] is None
    else:
        area = sklearn_metrics.roc_auc_score(labels == positive, probabilities[:, positive])
        assert ours["roc_auc"] == pytest.approx(area, abs=ROUNDING)


def test_random_evaluations_reach_the_hard_cases() -> None:
    # The comparison above is only as good as its cases: say that ties, missing classes and imbalance occur.
    ties = missing = never_predicted = imbalanced = 0
    for seed in range(240):
        labels, probabilities = random_evaluation(seed)
        counts = np.bincount(labels, minlength=probabilities.shape[1])
        ties += np.unique(probabilities[:, 0]).size < labels.size / 2
        missing += bool((counts == 0).any())
        never_predicted += np.unique(probabilities.argmax(axis=1)).size < probabilities.shape[1]
        imbalanced += 0 < counts.min() < labels.size / 10
    assert min(ties, missing, never_predicted, imbalanced) >= 10


def test_everything_is_plain_json() -> None:
    for seed in range(4):
        labels, probabilities = random_evaluation(seed)
        metrics = classification_metrics(labels, probabilities, NAMES[: probabilities.shape[1]], 1 - seed % 2 or None)
        # numpy's float64 is a float and passes json.dumps, so types are looked at one by one as well.
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
        pending = [metrics]
        while pending:
            value = pending.pop()
            assert type(value) in (dict, list, float, int, type(None))
            pending.extend(value.values() if type(value) is dict else value if type(value) is list else ())


def test_keys_are_those_that_the_evaluation_promises() -> None:
    metrics = classification_metrics(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]), ("负面", "正面"), 1)
    assert set(metrics) == {
        "num_examples", "accuracy", "precision", "recall", "f1", "macro_precision", "macro_recall",
        "macro_f1", "weighted_precision", "weighted_recall", "weighted_f1",
        "per_class", "confusion_matrix", "roc_auc", "log_loss", "expected_calibration_error",
        "confidence_intervals_95",
    }  # fmt: skip
    assert set(metrics["per_class"]) == {"负面", "正面"}
    assert set(metrics["confidence_intervals_95"]) == {"accuracy", "precision", "recall", "f1"}


@pytest.mark.parametrize("positive", [None, 0, 1])
def test_intervals_are_those_of_the_positive_class(positive: int | None) -> None:
    labels, probabilities = random_evaluation(0)
    metrics = classification_metrics(labels, probabilities, NAMES[:2], positive)
    expected = bootstrap_intervals(np.array(metrics["confusion_matrix"]), positive)
    assert metrics["confidence_intervals_95"] == {name: list(bounds) for name, bounds in expected.items()}


def test_the_first_of_equal_probabilities_is_predicted() -> None:
    metrics = classification_metrics(np.array([0, 1]), np.full((2, 2), 0.5), NAMES[:2], 1)
    assert metrics["confusion_matrix"] == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    "labels, probabilities, message",
    [
        ([0, 0], [[0.5, 0.5], [math.nan, 0.5]], r"row 1 is \[nan, 0\.5\]"),
        ([0], [[-0.5, 1.5]], r"row 0 is \[-0\.5, 1\.5\]"),
        ([0], [[0.1, 0.2]], r"row 0 is \[0\.1, 0\.2\]"),
    ],
)
def test_what_is_no_probability_is_refused(labels: list[int], probabilities: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(labels), np.array(probabilities), "ab", 1)


# --- bootstrap


def test_interval_contains_the_estimate_and_narrows_with_more_reviews() -> None:
    table = np.array([[45, 5], [8, 42]])
    point = classification_scores(table, 1)
    widths = []
    for factor in (1, 4, 16):
        intervals = bootstrap_intervals(table * factor, 1)
        assert all(low < score < high for score, (low, high) in zip(point, intervals.values(), strict=True))
        widths.append([high - low for low, high in intervals.values()])
    # Four times the reviews halve the width; 1,000 resamples place a width within about 10 %.
    np.testing.assert_allclose(np.divide(widths[:-1], widths[1:]), 2, rtol=0.25)


@pytest.mark.parametrize(("classes", "reviews"), [(100, 3), (100, 1), (10, 4)])
def test_intervals_of_macro_averages_of_small_classes_hold_the_estimate(classes: int, reviews: int) -> None:
    """A resample leaves many of them out, and a class that is left out is not one with a score of 0."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), reviews)
    for _ in range(5):
        guesses = generator.integers(classes, size=len(labels))
        table = confusion_matrix(labels, np.where(generator.random(len(labels)) < 0.8, labels, guesses), classes)
        scores, intervals = classification_scores(table, None), bootstrap_intervals(table, None)
        assert all(low < score < high for score, (low, high) in zip(scores, intervals.values(), strict=True))


def test_a_class_without_reviews_counts_in_resamples_of_a_macro_average_as_in_the_estimate() -> None:
    table = np.array([[60, 40, 0], [40, 60, 0], [0, 0, 0]])
    low, high = bootstrap_intervals(table, None)["f1"]
    assert low < classification_scores(table, None)[3] < high < 0.5


def classification_scores(table: np.ndarray, positive: int | None) -> list[float]:
    """Accuracy, precision, recall and F1 of one table."""
    accuracy = np.trace(table) / table.sum()
    scores = precision_recall_f1(table)
    return [accuracy, *(column.mean() if positive is None else column[positive] for column in scores)]


@pytest.mark.parametrize("positive", [None, 2])
def test_interval_equals_resampling_of_the_reviews_themselves(positive: int | None) -> None:
    generator = np.random.default_rng(0)
    labels = generator.choice(3, size=300, p=[0.6, 0.3, 0.1])
    predictions = np.where(generator.random(300) < 0.7, labels, generator.integers(0, 3, size=300))
    resamples = 10_000
    drawn = generator.integers(0, 300, size=(resamples, 300))
    naive = np.array(
        [
            classification_scores(
                np.bincount(labels[rows] * 3 + predictions[rows], minlength=9).reshape(3, 3), positive
            )
            for rows in drawn
        ]
    )
    ours = bootstrap_intervals(confusion_matrix(labels, predictions, 3), positive, resamples=resamples)
    # The standard error of a 2.5 % quantile is sqrt(0.025 * 0.975 / resamples) / density; the density of a
    # normal with deviation s there is 0.058 / s, which gives 0.027 s. Two independent draws differ by 0.038 s
    # in deviation; four of those, rounded up, are 0.16 s.
    for bounds, values in zip(ours.values(), naive.T, strict=True):
        np.testing.assert_allclose(bounds, np.quantile(values, [0.025, 0.975]), rtol=0, atol=0.16 * values.std())


def test_interval_of_accuracy_agrees_with_the_normal_approximation() -> None:
    # 80 % of 1,200: deviation sqrt(0.8 * 0.2 / 1200) = 0.01155, so 0.8 -+ 1.96 * 0.01155.
    low, high = bootstrap_intervals(np.array([[480, 120], [120, 480]]), 1, resamples=20_000)["accuracy"]
    # 0.0015: one review is 0.0008, and 20,000 resamples place a bound within 4 * 0.019 deviations = 0.0009.
    assert (low, high) == pytest.approx((0.77737, 0.82263), abs=0.0015)


def test_interval_depends_only_on_the_seed() -> None:
    table = np.array([[45, 5], [8, 42]])
    assert bootstrap_intervals(table, 1, seed=3) == bootstrap_intervals(table, 1, seed=3)
    assert bootstrap_intervals(table, 1, seed=3) != bootstrap_intervals(table, 1, seed=4)


def test_blocks_of_tables_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.array([[45, 5], [8, 42]])
    whole = bootstrap_intervals(table, 1, resamples=7)
    monkeypatch.setattr(evaluation_metrics, "BLOCK", 8)  # two tables at once
    assert bootstrap_intervals(table, 1, resamples=7) == whole


def test_interval_of_a_perfect_model_is_a_point() -> None:
    assert set(bootstrap_intervals(np.array([[600, 0], [0, 600]]), None).values()) == {(1.0, 1.0)}


def test_interval_of_an_absent_class_is_zero() -> None:
    intervals = bootstrap_intervals(np.array([[10, 0], [0, 0]]), 1)
    assert intervals == {"accuracy": (1, 1), "precision": (0, 0), "recall": (0, 0), "f1": (0, 0)}


# --- McNemar


def test_mcnemar_of_a_hand_worked_case() -> None:
    # Both right 2, only a right 3, only b right 1, both wrong 1.
    correct_a = np.array([1, 1, 1, 1, 1, 0, 0], dtype=bool)
    correct_b = np.array([1, 1, 0, 0, 0, 1, 0], dtype=bool)
    # 2 * (C(4, 0) + C(4, 1)) / 2^4 = 10 / 16
    assert mcnemar_test(correct_a, correct_b) == {"b": 3, "c": 1, "p_value": 0.625}
    assert mcnemar_test(correct_b, correct_a) == {"b": 1, "c": 3, "p_value": 0.625}


def test_mcnemar_of_models_that_agree_is_one() -> None:
    correct = np.array([True, False, True])
    assert mcnemar_test(correct, correct) == {"b": 0, "c": 0, "p_value": 1.0}
    assert mcnemar_test(correct[:0], correct[:0])["p_value"] == 1.0


@pytest.mark.parametrize(
    "b, c",
    [(b, c) for b in range(7) for c in range(7) if b + c]
    + [(180, 240), (2500, 2500), (2600, 2400), (100, 400), (0, 5000)],
)
def test_mcnemar_equals_the_exact_binomial_test(b: int, c: int) -> None:
    correct_a = np.repeat([True, False, True], [b, c, 5])
    correct_b = np.repeat([False, True, True], [b, c, 5])
    result = mcnemar_test(correct_a, correct_b)
    assert (result["b"], result["c"]) == (b, c)
    # Ours is exact; scipy's incomplete beta function is off by up to 3e-14 in these cases.
    # abs=0, because approx would otherwise let every p below 1e-12 through.
    assert result["p_value"] == pytest.approx(binomtest(b, b + c).pvalue, rel=1e-11, abs=0)


# --- invariants


def comparable(metrics: dict) -> dict:
    """The numbers of `metrics` in one flat dictionary, for approximate comparison."""
    flat = {}
    pending = list(metrics.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            pending.extend((f"{name}.{key}", item) for key, item in inner)
        else:
            flat[name] = value
    return flat


@settings(deadline=None, max_examples=50)
@given(evaluations(), st.randoms(use_true_random=False))
def test_order_of_reviews_changes_nothing(evaluation, random) -> None:
    labels, probabilities = evaluation
    order = random.sample(range(labels.size), labels.size)
    names, positive = NAMES[: probabilities.shape[1]], random.choice([None, 0, 1])
    before = classification_metrics(labels, probabilities, names, positive)
    after = classification_metrics(labels[order], probabilities[order], names, positive)
    assert comparable(before) == pytest.approx(comparable(after), abs=ROUNDING)


@settings(deadline=None, max_examples=50)
@given(evaluations().filter(lambda evaluation: evaluation[1].shape[1] == 2))
def test_swapping_two_classes_mirrors_everything(evaluation) -> None:
    labels, probabilities = evaluation
    # Equal probabilities go to the first class, which is another one after the swap: they are left out.
    decided = probabilities[:, 0] != probabilities[:, 1]
    labels, probabilities = labels[decided], probabilities[decided]
    assume(labels.size > 0)
    straight = classification_metrics(labels, probabilities, ("a", "b"), 1)
    mirrored = classification_metrics(1 - labels, probabilities[:, ::-1], ("b", "a"), 0)
    assert np.array_equal(np.array(straight["confusion_matrix"])[::-1, ::-1], mirrored["confusion_matrix"])
    for result in (straight, mirrored):
        # Intervals are drawn cell by cell, in the order of the cells, so they are not mirrored bit for bit.
        del result["confusion_matrix"], result["confidence_intervals_95"]
    assert comparable(straight) == pytest.approx(comparable(mirrored), abs=ROUNDING)


@settings(deadline=None, max_examples=50)
@given(evaluations())
def test_accuracy_is_trace_over_sum_and_every_score_lies_in_its_range(evaluation) -> None:
    labels, probabilities = evaluation
    metrics = classification_metrics(labels, probabilities, NAMES[: probabilities.shape[1]], None)
    table = np.array(metrics["confusion_matrix"])
    assert metrics["accuracy"] == np.trace(table) / table.sum()
    assert table.sum() == metrics["num_examples"] == labels.size
    for name in ("accuracy", "precision", "recall", "f1", "expected_calibration_error"):
        assert 0 <= metrics[name] <= 1
    assert metrics["log_loss"] >= 0
    assert all(0 <= low <= high <= 1 for low, high in metrics["confidence_intervals_95"].values())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_roc_auc_depends_on_the_order_of_scores_alone(examples) -> None:
    positive = np.array([is_positive for is_positive, _ in examples])
    scores = np.array([score for _, score in examples])
    area = roc_auc(positive, scores)
    assert roc_auc(positive, np.exp(scores)) == area
    if area is not None:
        assert roc_auc(~positive, scores) == pytest.approx(1 - area, abs=ROUNDING)


# --- drift

LABELS = np.array([0, 1, 1, 0])
BEFORE = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.6, 0.4]])
AFTER = np.array([[0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.3, 0.7]])


def test_drift_of_a_hand_worked_case() -> None:
    found = drift(LABELS, BEFORE, AFTER)
    assert found == {
        "num_correct": 1,  # of four; three before
        "accuracy": 0.25,
        "mean_change": pytest.approx((0.1 + 0.2 + 0 + 0.3) / 4),
        "largest_change": pytest.approx(0.3),
        "num_flipped": 2,
        "flipped": 0.5,
    }


def test_a_model_does_not_drift_from_itself() -> None:
    found = drift(LABELS, BEFORE, BEFORE)
    assert (found["num_correct"], found["accuracy"]) == (3, 0.75)
    assert found["mean_change"] == found["largest_change"] == found["num_flipped"] == found["flipped"] == 0


def test_drift_is_about_the_probability_of_the_true_label() -> None:
    before, after = np.array([[0.2, 0.5, 0.3]]), np.array([[0.2, 0.1, 0.7]])
    assert [drift(np.array([label]), before, after)["mean_change"] for label in (0, 1, 2)] == [
        0.0,
        pytest.approx(0.4),
        pytest.approx(0.4),
    ]


@pytest.mark.parametrize(
    ("labels", "predictions", "said"),
    [
        ([0, 1, 1], [1, 1, 1], ["a.tsv: all 3 predictions are 正面"]),
        ([0, 0], [0, 0], ["a.tsv: all 2 predictions are 负面"]),
        ([0, 1], [0, 1], []),
        ([1], [1], []),
    ],
)
def test_that_all_predictions_are_one_is_said(labels: list[int], predictions: list[int], said: list[str]) -> None:
    metrics = classification_metrics(np.array(labels), np.eye(2)[predictions], ["负面", "正面"], 1)
    assert only_answer("a.tsv", metrics) == said
    assert only_answer("a.tsv", {"loss": 1.0, "num_examples": 3}) == []  # conversations

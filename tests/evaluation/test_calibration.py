"""Calibration error: hand-worked cases and its printed definition; the temperature against a fine grid."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import log_softmax

from minilora.evaluation import calibration
from minilora.evaluation.calibration import (
    COLDEST,
    HOTTEST,
    at_temperature,
    calibration_bins,
    calibration_figures,
    error_by_chance,
    expected_calibration_error,
    fit_temperature,
)
from minilora.evaluation.metrics import log_loss
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


# --- the temperature

GRID = np.exp(np.linspace(math.log(COLDEST), math.log(HOTTEST), 2_001))


def drawn(seed: int, temperature: float, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from probabilities, and these at 1 / `temperature`: a model that is calibrated at `temperature`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (count, 2 + seed % 4))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (truth.cumsum(axis=1) < generator.random((count, 1))).sum(axis=1)
    return labels, at_temperature(truth, 1 / temperature)


def naive_log_loss(labels: np.ndarray, probabilities: np.ndarray, temperature: float) -> float:
    return float(-log_softmax(np.log(probabilities) / temperature, axis=1)[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("seed", range(12))
def test_a_fitted_temperature_is_the_best_of_a_fine_grid(seed: int) -> None:
    labels, probabilities = drawn(seed, temperature=(0.3, 1.0, 2.5)[seed % 3])
    losses = [naive_log_loss(labels, probabilities, temperature) for temperature in GRID]
    best = int(np.argmin(losses))
    fit = fit_temperature(labels, probabilities)
    assert GRID[best - 1] < fit.temperature < GRID[best + 1]
    assert fit.log_loss_after <= losses[best]
    assert fit.log_loss_after == pytest.approx(naive_log_loss(labels, probabilities, fit.temperature), abs=ROUNDING)
    assert fit.log_loss_before == pytest.approx(naive_log_loss(labels, probabilities, 1), abs=ROUNDING)
    assert (fit.num_examples, fit.note) == (400, None)


def test_the_slope_is_zero_there_to_rounding() -> None:
    labels, probabilities = drawn(3, temperature=2.5)
    fit, logarithms = fit_temperature(labels, probabilities), np.log(probabilities)
    slope, curvature = calibration._slope(logarithms, labels, 1 / fit.temperature)
    assert abs(slope / curvature) < 1e-12  # how far 1 / T is from the minimum


@pytest.mark.parametrize("inverse", [0.1, 0.7, 1.0, 3.0])
def test_both_derivatives_are_those_of_the_loss(inverse: float) -> None:
    labels, probabilities = drawn(1, temperature=1.0)
    logarithms, step = np.log(probabilities), 1e-4
    low, middle, high = (calibration._log_loss(logarithms, labels, inverse + shift * step) for shift in (-1, 0, 1))
    slope, curvature = calibration._slope(logarithms, labels, inverse)
    # central differences: errors of step^2, and of 1e-16 / step^2 for the second
    assert slope == pytest.approx((high - low) / (2 * step), abs=1e-6)
    assert curvature == pytest.approx((high - 2 * middle + low) / step**2, abs=1e-5)


def test_the_interval_holds_the_true_temperature_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        interval = fit_temperature(*drawn(seed, temperature=2.0, count=200)).interval_95
        assert interval is not None
        held += interval[0] <= 2.0 <= interval[1]
    assert 180 <= held <= 198  # 190 of 200, within 2.6 standard deviations


def test_a_temperature_changes_no_prediction_and_one_changes_no_bit() -> None:
    _, probabilities = drawn(3, temperature=1.0)
    for temperature in (COLDEST, 0.5, 3.0, HOTTEST):
        changed = at_temperature(probabilities, temperature)
        assert (changed.argmax(axis=1) == probabilities.argmax(axis=1)).all()
        assert changed.sum(axis=1) == pytest.approx(1, abs=ROUNDING)
        assert at_temperature(changed, 1 / temperature) == pytest.approx(probabilities, abs=1e-9)
    assert at_temperature(probabilities, 1.0) is probabilities


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        ([0, 1, 0], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]),
        ([0, 0], [[1.0, 0.0], [1.0, 0.0]]),
        ([1], [[0.4, 0.6]]),
        ([1, 0], [[0.5, 0.5], [0.5, 0.5]]),  # any temperature gives the same
    ],
    ids=["all right", "one class, certain", "one example", "no confidence"],
)
def test_where_no_temperature_is_best_it_stays_one_and_the_note_says_so(
    labels: list[int], probabilities: list[list[float]]
) -> None:
    fit = fit_temperature(np.array(labels), np.array(probabilities))
    assert (fit.temperature, fit.interval_95, fit.log_loss_after) == (1.0, None, fit.log_loss_before)
    assert "it stays 1" in (fit.note or "")


@pytest.mark.parametrize("wrong", [[[0.9, 0.1]], [[1.0, 0.0]], [[0.9, 0.1], [0.8, 0.2]]])
def test_where_all_are_wrong_it_stops_at_the_highest(wrong: list[list[float]]) -> None:
    fit = fit_temperature(np.ones(len(wrong), dtype=int), np.array(wrong))
    assert fit.temperature == HOTTEST
    assert fit.log_loss_after < fit.log_loss_before < math.inf
    assert f"0 of {len(wrong)} examples are right" in (fit.note or "")


def test_a_certain_mistake_has_a_finite_temperature() -> None:
    """Probabilities of exactly 0 and 1: half of the predictions right, and as sure as the others."""
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.3, 0.7]] * 20)
    fit = fit_temperature(np.array([0, 0, 0, 1] * 20), probabilities)
    assert 1 < fit.temperature <= HOTTEST
    assert np.isfinite([fit.log_loss_before, fit.log_loss_after]).all()
    assert np.isfinite(at_temperature(probabilities, fit.temperature)).all()


def test_a_few_examples_are_said_to_say_little() -> None:
    labels, probabilities = drawn(0, temperature=1.5, count=12)
    fit = fit_temperature(labels, probabilities)
    assert fit.interval_95 is not None
    assert "12 examples leave it open" in (fit.note or "")


# --- intervals


def test_figures_are_those_of_the_metrics_and_their_change_is_paired() -> None:
    labels, over = drawn(2, temperature=2.5)
    temperature = fit_temperature(labels, over).temperature
    figures = calibration_figures(labels, at_temperature(over, temperature), over)
    for name, metric in (("log_loss", log_loss), ("expected_calibration_error", expected_calibration_error)):
        after, before = metric(labels, at_temperature(over, temperature)), metric(labels, over)
        assert figures[name] == pytest.approx(after, abs=ROUNDING)
        assert figures["uncalibrated"][name] == pytest.approx(before, abs=ROUNDING)
        assert figures["change"][name] == pytest.approx(after - before, abs=ROUNDING)
        for part in (figures, figures["uncalibrated"], figures["change"]):
            low, high = part["confidence_intervals_95"][name]
            assert low <= part[name] <= high
        assert figures["change"]["confidence_intervals_95"][name][1] < 0  # it is better for sure
    widths = [
        np.subtract(*reversed(part["confidence_intervals_95"]["log_loss"]))
        for part in (figures["uncalibrated"], figures["change"])
    ]
    assert widths[1] < widths[0]
    assert figures == calibration_figures(labels, at_temperature(over, temperature), over)
    assert "change" not in calibration_figures(labels, over)


def test_intervals_hold_the_calibration_error_of_a_model_that_is_not_calibrated() -> None:
    # 100,000 reviews say it to 0.002
    truth = expected_calibration_error(*drawn(0, temperature=2.5, count=100_000))
    held = 0
    for seed in range(0, 160, 4):  # two classes each
        figures = calibration_figures(*drawn(seed, temperature=2.5), resamples=200)
        low, high = figures["confidence_intervals_95"]["expected_calibration_error"]
        held += low <= truth <= high
    assert held >= 34  # of 40


def test_blocks_of_resamples_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, probabilities = drawn(0, temperature=1.0, count=50)
    whole = calibration_figures(labels, probabilities, resamples=7)
    monkeypatch.setattr(calibration, "BLOCK", 100)
    assert calibration_figures(labels, probabilities, resamples=7) == whole


def test_the_error_by_chance_is_that_of_labels_drawn_from_the_probabilities() -> None:
    errors = [expected_calibration_error(*drawn(seed, temperature=1.0)) for seed in range(0, 400, 4)]
    expected = np.mean([error_by_chance(drawn(seed, temperature=1.0)[1]) for seed in range(0, 400, 4)])
    assert np.mean(errors) == pytest.approx(expected, rel=0.05)

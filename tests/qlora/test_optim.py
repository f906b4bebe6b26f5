"""Learning rates worked out by hand."""

import math

import pytest

from minilora.qlora.optim import lr_at


def rates(total: int, schedule: str, warmup_ratio: float) -> list[float]:
    return [lr_at(step, total, peak=1.0, schedule=schedule, warmup_ratio=warmup_ratio) for step in range(1, total + 1)]


def test_linear_by_hand() -> None:
    assert rates(10, "linear", 0.2) == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_by_hand() -> None:
    expected = [1 / 2, 1, *((1 + math.cos(math.pi * place / 4)) / 2 for place in range(4))]
    assert rates(6, "cosine", 0.3) == pytest.approx(expected)  # ceil(1.8) = 2 steps of warm-up


def test_constant_by_hand() -> None:
    assert rates(5, "constant", 0.4) == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_the_rate_rises_to_its_peak_then_never_rises_and_is_never_zero(
    schedule: str, warmup_ratio: float, total: int
) -> None:
    warmup = math.ceil(warmup_ratio * total)
    found = rates(total, schedule, warmup_ratio)
    assert all(0 < rate <= 1 for rate in found)
    assert max(found) == 1
    assert found[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert all(later <= earlier for earlier, later in zip(found[warmup:], found[warmup + 1 :], strict=False))


def test_the_rate_scales_with_the_peak() -> None:
    assert lr_at(3, 10, peak=2e-4, schedule="linear") == pytest.approx(2e-4 * 0.8)

"""Learning rates worked out by hand, and moments that survive a file."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.optim import AdamW, build_optimizer, lr_at


def rates(total: int, schedule: str, warmup_ratio: float) -> list[float]:
    return [lr_at(step, total, 1.0, schedule, warmup_ratio) for step in range(1, total + 1)]


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
    assert lr_at(3, 10, 2e-4, "linear", 0.0) == pytest.approx(2e-4 * 0.8)


def stepped(steps: int) -> tuple[list[torch.nn.Parameter], AdamW]:
    """Two parameters after some steps of AdamW with a gradient that differs from step to step."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = build_optimizer(parameters, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(1, steps + 1):
        take_step(parameters, optimizer, step)
    return parameters, optimizer


def take_step(parameters: list[torch.nn.Parameter], optimizer: AdamW, step: int) -> None:
    for parameter in parameters:
        parameter.grad = torch.sin(parameter.detach() * step)
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()


def test_the_update_is_adamw_by_hand() -> None:
    parameters, optimizer = stepped(0)
    mean = torch.zeros(3, 4)
    square = torch.zeros(3, 4)
    value = parameters[0].detach().clone()
    for step in range(1, 4):
        gradient = torch.sin(parameters[0].detach() * step)
        take_step(parameters, optimizer, step)
        value -= 0.01 * 0.1 * value
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        value -= 0.01 * (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-6)
        # float32 rounding of a handful of operations in another order
        torch.testing.assert_close(parameters[0].detach(), value, rtol=1e-6, atol=1e-7)


def test_moments_come_back_from_a_file_and_the_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    parameters, optimizer = stepped(3)
    save_file(optimizer.tensors(), tmp_path / "optimizer.safetensors")
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    restored = build_optimizer(copies, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    restored.load_tensors(load_file(tmp_path / "optimizer.safetensors"))
    for step in (4, 5):
        take_step(parameters, optimizer, step)
        take_step(copies, restored, step)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    first, second = optimizer.tensors(), restored.tensors()
    assert first.keys() == second.keys() == {f"{i}.{n}" for i in (0, 1) for n in ("exp_avg", "exp_avg_sq", "step")}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["0.step"].item() == 5


def test_before_the_first_step_there_are_no_moments() -> None:
    _, optimizer = stepped(0)
    assert optimizer.tensors() == {}
    optimizer.load_tensors({})
    assert optimizer.tensors() == {}

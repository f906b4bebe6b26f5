"""Every hand-derived gradient against finite differences, every function against its reference."""

import math

import pytest
import torch
from torch._decomp import decomposition_table

from minilora.qlora import ops
from minilora.qlora.ops import DropoutMask


def random(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_rms_norm_equals_its_reference() -> None:
    x, weight = random(5, 8), random(8)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), ops.rms_norm_reference(x, weight, 1e-6))


def test_rms_norm_gradient() -> None:
    inputs = (random(5, 8), random(8))  # y always has a gradient: it is the only result that can have one
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), inputs, check_undefined_grad=False)


def test_rms_norm_gradient_is_what_pytorch_defines_its_operator_of_a_gpu_as() -> None:
    """A CPU has no kernel for the operator, only its definition."""
    x, dy = torch.randn(2, 5, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    exact = torch.autograd.functional.vjp(lambda x, w: ops.rms_norm_reference(x, w, 1e-6), (x, weight), dy)[1]
    define = decomposition_table[torch.ops.aten._fused_rms_norm_backward.default]
    _, scale = ops.rms_norm_and_scale(x, weight, 1e-6)
    torch.testing.assert_close(define(dy, x, x.shape[-1:], scale, weight, [True, True]), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rms_norm_from_the_kept_scale_has_the_same_bits(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(size) * 30 for size in ((70, 96), (96,)))
    y, inverse_rms = ops.rms_norm_and_scale(x.to(dtype), weight.to(dtype), 1e-6)
    assert inverse_rms.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(ops.recompute_rms_norm(x.to(dtype), weight.to(dtype), inverse_rms, eps=1e-6), y)


def test_rms_norm_of_large_float16_values_is_finite() -> None:
    x = torch.full((2, 64), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_swiglu_equals_its_reference_and_gradient() -> None:
    gate, up = random(5, 6), random(5, 6)
    torch.testing.assert_close(ops.swiglu(gate, up), ops.swiglu_reference(gate, up))
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))


def test_rotary_turns_each_pair_by_its_angle() -> None:
    positions = torch.tensor([0, 1, 7])
    x = random(3, 2, 4)
    cos, sin = ops.rotary_table(positions, 4, 100.0, torch.float64)
    as_complex = torch.complex(x[..., :2], x[..., 2:])
    angle = positions[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    expected = as_complex * torch.polar(torch.ones_like(angle), angle)[:, None]
    # The table's angles are float32.
    torch.testing.assert_close(
        ops.rotary(x, cos, sin), torch.cat((expected.real, expected.imag), -1), rtol=1e-6, atol=1e-6
    )


def test_rotary_equals_its_reference_and_gradient() -> None:
    cos, sin = ops.rotary_table(torch.tensor([0, 3, 9]), 4, 100.0, torch.float64)
    x = random(3, 2, 4)
    torch.testing.assert_close(ops.rotary(x, cos, sin), ops.rotary_reference(x, cos, sin))
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, cos, sin), (random(3, 2, 4),))


def test_a_dropout_mask_is_a_function_of_its_seed() -> None:
    shape, device = torch.Size((30, 41)), torch.device("cpu")
    first, same, other = (DropoutMask(0.3, seed).draw(shape, device) for seed in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_dropout_mask_is_the_same_on_every_machine() -> None:
    """These entries are written down: a run that moves to another device or version draws them again."""
    mask = DropoutMask(0.5, 12345 * 4096 + 7).draw(torch.Size((2, 7)), torch.device("cpu"))
    assert mask.int().tolist() == [[0, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0]]


@pytest.mark.parametrize("lag", [1, 2, 3, 896, 4864, 65536])
def test_entries_of_a_dropout_mask_are_unrelated(lag: int) -> None:
    count, probability = 2_000_000, 0.1
    for seed in range(3):
        mask = DropoutMask(probability, seed * 4096 + lag).draw(torch.Size((count,)), torch.device("cpu"))
        both = (mask[lag:] & mask[:-lag]).sum().item()
        expected = (count - lag) * probability**2
        assert abs(both - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_meets_its_probability_and_keeps_the_mean(probability: float) -> None:
    count = 400_000
    mask = DropoutMask(probability, 3)
    share = mask.draw(torch.Size((count,)), torch.device("cpu")).double().mean().item()
    # Five standard deviations of a mean of `count` draws.
    assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / count)
    assert mask.dropout(torch.ones(count)).mean().item() == pytest.approx((1 - share) / (1 - probability), rel=1e-4)

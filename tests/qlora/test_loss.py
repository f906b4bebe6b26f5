"""The chunked loss against cross-entropy on full logits."""

import pytest
import torch

from minilora.qlora import loss


@pytest.mark.parametrize("rows", [1, 64, 65, 150])
def test_sum_and_gradient_equal_full_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "LOGITS_BYTES", {"cpu": 64 * 4 * 30})  # chunks of 64 positions
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(30, 8, dtype=torch.float64)
    targets = torch.randint(30, (rows,))
    total, count = loss.next_token_nll(hidden, targets, head)
    (total / 7).backward()
    reference = hidden.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(reference @ head.T, targets, reduction="sum")
    (expected / 7).backward()
    assert count == rows
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(hidden.grad, reference.grad)


@pytest.mark.parametrize("rows", [1, 64, 65, 150])
def test_weighted_mean_and_gradient_equal_weighted_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "LOGITS_BYTES", {"cpu": 64 * 4 * 30})  # chunks of 64 positions
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    head, of_token = torch.randn(30, 8, dtype=torch.float64), torch.rand(30, dtype=torch.float64) * 100 + 0.01
    targets = torch.randint(30, (rows,))
    weights = of_token[targets]
    mean = loss.next_token_nll(hidden, targets, head, weights)[0] / weights.sum()
    mean.backward()
    reference = hidden.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(reference @ head.T, targets, weight=of_token, reduction="mean")
    expected.backward()
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, reference.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 7.0, 1.0], dtype=torch.float64)])
def test_gradient_equals_finite_differences(weights: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    head, targets = torch.randn(9, 4, dtype=torch.float64), torch.tensor([3, 0, 8])
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: loss.next_token_nll(h, targets, head, weights)[0], (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_power_of_two_weighs_exactly_and_no_weights_are_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head, targets = torch.randn(30, 8).to(dtype), torch.tensor([1, 2, 3])

    def take(weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.ones(3, 8, dtype=dtype, requires_grad=True)
        total, _ = loss.next_token_nll(hidden, targets, head, weights)
        return total, torch.autograd.grad(total, hidden)[0]

    for factor, found in ((1, take(torch.ones(3))), (4, take(torch.full((3,), 4.0)))):
        assert all(torch.equal(ours, plain * factor) for ours, plain in zip(found, take(None), strict=True))


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    targets = torch.tensor([1, 2, 3, 4, 5])
    total, _ = loss.next_token_nll(hidden, targets, head)
    expected = torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected)


# At 40 the answers have probability 1 - 1e-8; 5e4 is the balanced weight of one example in 100,000.
@pytest.mark.parametrize(("certainty", "weight"), [(0, 1.0), (40, 1.0), (0, 5e4)])
def test_float16_gradients_survive_a_large_loss_scale_a_confident_model_and_a_rare_class(
    certainty: float, weight: float
) -> None:
    torch.manual_seed(0)
    head, targets, weights = torch.randn(30, 64).half() / 8, torch.tensor([1, 2, 3]), torch.tensor([weight, 1, 1])
    hidden = (torch.randn(3, 64) / 8 + certainty * head[targets].float()).half()

    def gradient(hidden: torch.Tensor) -> torch.Tensor:
        total, _ = loss.next_token_nll(hidden, targets, head.to(hidden.dtype), weights)
        return torch.autograd.grad(total / weight * 2.0**17, hidden)[0].double()

    found, exact = gradient(hidden.clone().requires_grad_()), gradient(hidden.double().requires_grad_())
    assert ((found - exact).norm() / exact.norm()).item() < 0.02  # logits near 40 are rounded by 1 / 64


def test_a_vocabulary_decides_how_many_positions_are_a_chunk() -> None:
    assert loss.chunk_positions(151936, "cpu") == 65
    assert loss.chunk_positions(151936, "cuda") == 526
    assert loss.chunk_positions(10**9, "cpu") == 1

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


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    head, targets = torch.randn(9, 4, dtype=torch.float64), torch.tensor([3, 0, 8])
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: loss.next_token_nll(h, targets, head)[0], (hidden,))


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    targets = torch.tensor([1, 2, 3, 4, 5])
    total, _ = loss.next_token_nll(hidden, targets, head)
    expected = torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("certainty", [0, 40])  # at 40 the answers have probability 1 - 1e-8
def test_float16_gradients_survive_a_large_loss_scale_and_a_confident_model(certainty: float) -> None:
    torch.manual_seed(0)
    head, targets = torch.randn(30, 64).half() / 8, torch.tensor([1, 2, 3])
    hidden = (torch.randn(3, 64) / 8 + certainty * head[targets].float()).half()
    found, exact = (
        torch.autograd.grad(loss.next_token_nll(h, targets, head.to(h.dtype))[0] * 2.0**17, h)[0]
        for h in (hidden.clone().requires_grad_(), hidden.double().requires_grad_())
    )
    assert ((found.double() - exact).norm() / exact.norm()).item() < 0.02  # logits near 40 are rounded by 1 / 64


def test_a_vocabulary_decides_how_many_positions_are_a_chunk() -> None:
    assert loss.chunk_positions(151936, "cpu") == 65
    assert loss.chunk_positions(151936, "cuda") == 526
    assert loss.chunk_positions(10**9, "cpu") == 1

"""The chunked loss against cross-entropy on full logits."""

import pytest
import torch

from minilora.qlora import loss


@pytest.mark.parametrize("rows", [1, 64, 65, 150])
def test_sum_and_gradient_equal_full_cross_entropy(rows: int) -> None:
    torch.manual_seed(0)
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


def test_token_log_probabilities_equal_log_softmax() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(70, 8), torch.randn(30, 8)
    targets = torch.randint(30, (70,))
    expected = (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(loss.token_log_probabilities(hidden, targets, head), expected)

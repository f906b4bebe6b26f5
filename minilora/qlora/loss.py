"""Hidden states at the supervised positions in, summed negative log-likelihood out.

    nll = sum over positions of  w (logsumexp(z) - z[target]),     z = W h
    dz  = w (softmax(z) - onehot(target)),                         dh = W^T dz

w is a constant, 1 unless the micro-batch has weights. dh is kept without it: a rare class's w of thousands would
overflow a float16, and the gradient from above, with which it is multiplied, is float32.
The head is frozen, so dh is all the gradient there is. It is computed in forward, chunk by chunk, while the chunk's
logits are there: the (S, V) logits never exist as a whole. In Qwen2.5 one position has 152k logits, 0.6 MB in float32,
and a chat has thousands of positions.

Source: the idea of cut cross-entropy (arXiv 2411.09009) and of trl's chunked loss, in plain PyTorch.
"""

from typing import Any

import torch

# float32 logits of a chunk: 65 positions of a Qwen2.5 on a CPU, where more are no faster, 526 on a GPU, where fewer
# kernels are.
LOGITS_BYTES = {"cpu": 40_000_000, "cuda": 320_000_000}
# float16 ends at 6e-8, and a confident model's dz is smaller than that: dz and dh are held this many times as large, a
# power of 2, until the gradient from above, which holds the loss scale, is multiplied with in float32.
FLOAT16_SCALE = 1024


def chunk_positions(size: int, device_type: str) -> int:
    """Positions of a chunk, whose float32 logits are `size` each."""
    return max(1, LOGITS_BYTES.get(device_type, LOGITS_BYTES["cpu"]) // (4 * size))


def head_logits(hidden: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """(S, C) compute dtype x (V, C) -> (S, V) float32 or wider, multiplied in the compute dtype."""
    logits = hidden @ head_weight.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _NextTokenNLL(torch.autograd.Function):
    """The module docstring's formulas; keeps dh / w, (S, C), and w."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head_weight: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ctx.scale = FLOAT16_SCALE if hidden.dtype == torch.float16 else 1
        size = chunk_positions(len(head_weight), hidden.device.type)
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, start + size)
            log_p, chosen = head_logits(hidden[chunk], head_weight).log_softmax(-1), targets[chunk, None]
            nll = -log_p.gather(1, chosen)
            total += (nll if weights is None else nll * weights[chunk, None]).sum()
            if dhidden is not None:
                dlogits = log_p.exp_()
                dlogits.scatter_add_(1, chosen, -torch.ones_like(nll))
                if ctx.scale != 1:
                    dlogits.mul_(ctx.scale)
                dhidden[chunk] = dlogits.to(hidden.dtype) @ head_weight
                del dlogits  # the logits' memory: free before the next chunk's are computed
            del log_p
        ctx.save_for_backward(dhidden, weights)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        dhidden, weights = ctx.saved_tensors
        factor = grads[0] / ctx.scale
        if weights is not None:
            factor = factor * weights[:, None].to(factor.dtype)
        return (dhidden.to(factor.dtype) * factor).to(dhidden.dtype), None, None, None


def next_token_nll(
    hidden: torch.Tensor, targets: torch.Tensor, head_weight: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """Loss summed over the S supervised positions, in nats, float32 or wider; and S.

    Hidden states (S, C) predict targets (S,) int64, each of which counts `weights` (S,) times, None: 1; the head's
    weight (V, C) is frozen. A sum, not a mean: the caller divides once a step, however that is cut.
    """
    return _NextTokenNLL.apply(hidden, targets, head_weight, weights), targets.shape[0]

"""The model's elementary functions and their backward passes, derived by hand.

PyTorch's autograd would get every one of them right. They are written out because it would keep more than
is needed (float32 copies, rotated halves, attention weights) and read it more often, and because fine-tuning
a frozen model is the place to see what a backward pass costs. Each function states what it computes, its
gradient, and what it keeps. tests/test_ops.py checks every gradient in float64 (`gradcheck`) and the
results against the formulas spelled out in plain PyTorch.

Upper-case sizes are explained in `model.py`. dy means the gradient of the loss with respect to y.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from minilora.batch import Places, SegmentGroup


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), with rms(x) = sqrt(mean(x^2) + eps).

    With n = x / rms(x) and g = w * dy:  dx = (g - n * mean(g * n)) / rms(x),  dw = sum over rows of n * dy.
    The mean is over the C entries of a row: it is what the common divisor sends back to each of them.
    Keeps x and one number a row, in float32 whatever the compute type: the sum of squares overflows float16.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * (wide * inverse_rms).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            g = (dy * weight).to(normed.dtype)
            mean = (g * normed).mean(-1, keepdim=True)
            dx = g.addcmul_(normed, mean, value=-1).mul_(inverse_rms).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy * normed).sum(0).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows of x at root mean square 1, times a learned weight.

    Args:
        x: (T, C) compute dtype.
        weight: (C,) compute dtype.
        eps: added to the mean square; 1e-6 or 1e-5 in Qwen2.5, by size.

    Returns:
        (T, C) dtype of x. Source: arXiv 1910.07467; rounding as in transformers' Qwen2RMSNorm.
    """
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) * up, with silu(z) = z * s(z) and s the logistic function.

    dup = dh * silu(gate);  dgate = dh * up * s * (1 + gate * (1 - s)), which is PyTorch's silu_backward.
    Keeps gate and up; silu(gate) is cheaper to compute again than to keep.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (dh,) = grads
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        return dgate, F.silu(gate).mul_(dh)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all (T, F) compute dtype. Source: arXiv 2002.05202."""
    return _SwiGLU.apply(gate, up)


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each row's rotation angles, both (T, 1, D) `dtype`.

    Pair i of the D / 2 turns by position * theta^(-2i / D); both members of a pair get the same angle, so the
    table repeats itself once. Angles are computed in float32: bfloat16 cannot count past 256.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angle = position_ids.to(torch.float32)[:, None] * (1 / theta**exponent)
    table = torch.cat((angle, angle), dim=-1)[:, None, :]
    return table.cos().to(dtype), table.sin().to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos).add_(turned.mul_(sin))


class _Rotary(torch.autograd.Function):
    """Each pair (x_i, x_{i + D/2}) turned by its angle.

    A rotation's transpose is the rotation by the opposite angle, so dx = rotate(dy, cos, -sin) and nothing of
    x needs to be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x with its position turned into it.

    Args:
        x: (T, heads, D) compute dtype.
        cos: (T, 1, D) from `rotary_table`.
        sin: (T, 1, D) from `rotary_table`.

    Returns:
        (T, heads, D). Source: arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints.
    """
    return _Rotary.apply(x, cos, sin)


class _Attention(torch.autograd.Function):
    """O = A V with A = softmax(Q K^T / sqrt(D)), row by row over the keys that a row may see.

    dV = A^T dO,  dA = dO V^T,  dS = A * (dA - rowsum(A * dA)),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D).

    A group of n segments, padded to L rows, sees P prefix keys and its own L. Padding stands behind the real
    rows, so the causal mask alone hides it from them, and since its dO is zero it sends nothing back. The
    G = H / K query heads that share a key/value head are folded into rows: one batched product of n * K
    matrices with G * Q rows, in place of n * H small ones.

    Keeps q, k and v; A is computed again in backward, so memory grows with T and not with L^2. Two products
    and a softmax beat PyTorch's fused attention on the CPU at these lengths.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[SegmentGroup]
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.groups = groups
        out = torch.empty_like(q)
        for group in groups:
            mixed = torch.bmm(_weights(q, k, group), _keys(v, group))
            out.index_copy_(0, group.queries.real_rows, _unfold(mixed, q, group.queries))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dout,) = grads
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = q.shape[-1] ** -0.5
        for group in ctx.groups:
            weights = _weights(q, k, group)
            dmixed = _fold(dout, k.shape[1], group.queries, zero_padding=True)
            _add_keys(dv, torch.bmm(weights.mT, dmixed), group)
            dscores = torch.bmm(dmixed, _keys(v, group).mT)
            dscores = torch._softmax_backward_data(dscores, weights, -1, weights.dtype).mul_(scale)
            dq.index_copy_(0, group.queries.real_rows, _unfold(torch.bmm(dscores, _keys(k, group)), q, group.queries))
            _add_keys(dk, torch.bmm(dscores.mT, _fold(q, k.shape[1], group.queries)), group)
        return dq, dk, dv, None


def _fold(x: torch.Tensor, kv_heads: int, places: Places, zero_padding: bool = False) -> torch.Tensor:
    """Rows of a group's queries: (T, H, D) -> (n * K, G * Q, D)."""
    n, length = places.rows.shape
    gathered = x.index_select(0, places.rows.flatten())
    if zero_padding and gathered.shape[0] != places.real_places.shape[0]:
        kept = torch.zeros_like(gathered)
        gathered = kept.index_copy_(0, places.real_places, gathered.index_select(0, places.real_places))
    heads, dim = x.shape[1:]
    folded = gathered.view(n, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    return folded.reshape(n * kv_heads, heads // kv_heads * length, dim)


def _unfold(folded: torch.Tensor, like: torch.Tensor, places: Places) -> torch.Tensor:
    """The inverse of `_fold` without padding: (n * K, G * Q, D) -> (M, H, D)."""
    n, length = places.rows.shape
    heads, dim = like.shape[1:]
    kv_heads = folded.shape[0] // n
    rows = folded.view(n, kv_heads, heads // kv_heads, length, dim).permute(0, 3, 1, 2, 4)
    return rows.reshape(n * length, heads, dim).index_select(0, places.real_places)


def _keys(x: torch.Tensor, group: SegmentGroup) -> torch.Tensor:
    """What a group's rows may see, prefix first: (T, K, D) -> (n * K, P + L, D)."""
    n, length = group.keys.rows.shape
    kv_heads, dim = x.shape[1:]
    own = x.index_select(0, group.keys.rows.flatten()).view(n, length, kv_heads, dim)
    if group.prefix:
        own = torch.cat((x[: group.prefix].expand(n, -1, -1, -1), own), dim=1)
    return own.transpose(1, 2).reshape(n * kv_heads, group.prefix + length, dim)


def _add_keys(total: torch.Tensor, dkeys: torch.Tensor, group: SegmentGroup) -> None:
    """Adds a gradient of `_keys` to `total` (T, K, D); the prefix gets the sum over the segments."""
    n, length = group.keys.rows.shape
    kv_heads, dim = total.shape[1:]
    by_segment = dkeys.view(n, kv_heads, group.prefix + length, dim).transpose(1, 2)
    if group.prefix:
        total[: group.prefix] += by_segment[:, : group.prefix].sum(0)
    own = by_segment[:, group.prefix :].reshape(n * length, kv_heads, dim)
    total.index_add_(0, group.keys.real_rows, own.index_select(0, group.keys.real_places))


def _weights(q: torch.Tensor, k: torch.Tensor, group: SegmentGroup) -> torch.Tensor:
    """A of a group: (n * K, G * Q, P + L) in the dtype of q, each row summing to 1.

    The mask is the start value that the product is added to, 0 or -inf: one pass in place of three. The softmax
    computes in float32 whatever the dtype, and rounds its result once.
    """
    folded, keys = _fold(q, k.shape[1], group.queries), _keys(k, group)
    masked = torch.zeros(group.hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(group.hidden, -torch.inf)
    n, (query_rows, seen) = group.keys.rows.shape[0], masked.shape[1:]
    by_head = q.new_empty(n, k.shape[1], q.shape[1] // k.shape[1], query_rows, seen)
    scores = by_head.copy_(masked[:, None, None]).view(*folded.shape[:2], seen)
    return torch.softmax(scores.baddbmm_(folded, keys.mT, alpha=q.shape[-1] ** -0.5), dim=-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[SegmentGroup]) -> torch.Tensor:
    """Causal grouped-query attention within the segments of a packed micro-batch.

    Args:
        q: (T, H, D) compute dtype, or (S, H, D) with the micro-batch's `last_groups`.
        k: (T, K, D) compute dtype.
        v: (T, K, D) compute dtype.
        groups: which rows see which; every row of q stands in exactly one group.

    Returns:
        The shape and dtype of q. Source: arXiv 1706.03762, grouped queries arXiv 2305.13245.
    """
    return _Attention.apply(q, k, v, groups)

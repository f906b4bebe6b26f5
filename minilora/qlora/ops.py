"""The model's elementary functions: each as a reference of a few lines, then with its backward pass derived by hand.

PyTorch's autograd gets every reference right. The derived forms exist because it keeps more than is needed (float32
copies, rotated halves, attention weights) and reads it more often, and because fine-tuning a frozen model is the place
to see what a backward pass costs. Each states what it computes, its gradient, and what it keeps. `test_ops.py` checks
every gradient in float64 (`gradcheck`) and every result against its reference.

Upper-case sizes are explained in `model.py`. dy means the gradient of the loss with respect to y.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from minilora.qlora.batch import AttentionGroup, FusedGroup, HeadGroup

# ---- RMSNorm


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Each token's x, (T, C), at root mean square 1, times a learned weight (C,)."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), with rms(x) = sqrt(mean(x^2) + eps).

    With n = x / rms(x) and g = w * dy:  dx = (g - n * mean(g * n)) / rms(x),  dw = sum over tokens of n * dy.
    The mean is over the C entries of a token: it is what the common divisor sends back to each of them.
    Keeps x and 1 / rms, one float32 a token; the mean is in float32 too, because a sum of squares overflows float16.
    Forward is PyTorch's fused kernel, one launch in place of nine and half the time; its backward has none on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, inverse_rms = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms  # in float32, as 1 / rms is
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            g = dy * weight.to(normed.dtype)
            mean = (g * normed).mean(-1, keepdim=True)
            dx = g.addcmul_(normed, mean, value=-1).mul_(inverse_rms).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy * normed).sum(0).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm_reference` of x (T, C) and weight (C,), compute dtype; eps is 1e-6 or 1e-5 in Qwen2.5, by size.

    Source: arXiv 1910.07467. Rounds once, where transformers' Qwen2RMSNorm does twice.
    """
    return _RMSNorm.apply(x, weight, eps)


# ---- SwiGLU


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, with silu(z) = z * s(z) and s the logistic function."""
    return gate * torch.sigmoid(gate) * up


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) * up.

    dup = dh * silu(gate);  dgate = dh * up * s * (1 + gate * (1 - s)), which is PyTorch's silu_backward.
    Keeps gate and up; silu(gate) is cheaper to recompute than to keep. dgate is written over dh, which nobody else
    reads: two buffers of (T, F) in backward, and not three.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (dh,) = grads
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(dh)
        return torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dh), dup


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu_reference`, all (T, F) compute dtype. Source: arXiv 2002.05202."""
    return _SwiGLU.apply(gate, up)


# ---- Rotary embedding


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine of each token's rotation angles, both (T, 1, D) `dtype`: cos, cos and -sin, sin.

    Pair i of the D / 2 turns by position * theta^(-2i / D), and both members of a pair by the same angle. Angles are
    computed in float32: bfloat16 cannot count past 256.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angle = position_ids.to(torch.float32)[:, None, None] * (1 / theta**exponent)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (x_i, x_{i + D/2}) turned by its angle: x_i cos - x_{i + D/2} sin, and x_{i + D/2} cos + x_i sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


class _Rotary(torch.autograd.Function):
    """A rotation's transpose is the rotation by the opposite angle: dx = rotate(dy, cos, -sin). Keeps nothing of x.

    The halves are exchanged by `roll`, and the second product is added before it is rounded.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        cos, sin = ctx.saved_tensors
        return (dy * cos).addcmul_(dy.roll(dy.shape[-1] // 2, -1), sin, value=-1), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotary_reference` of x (T, heads, D) compute dtype with cos and sin (T, 1, D) from `rotary_table`.

    Source: arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints.
    """
    return _Rotary.apply(x, cos, sin)


# ---- Attention


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention of q (Tq, H, D) over k and v (Tk, K, D); mask (Tq, Tk), True = masked."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # G query heads share each
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


class _Attention(torch.autograd.Function):
    """O = A V with A = softmax(Q K^T / sqrt(D)), each query over the keys that it may attend to.

    dV = A^T dO,  dA = dO V^T,  dS = A * (dA - rowsum(A * dA)),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D).

    A group of n segments, padded to L tokens, sees P prefix keys and its own L. Padding is behind the real tokens, so
    the causal mask hides it from them, and since its dO is zero it sends nothing back. The G = H / K query heads that
    share a key/value head are folded into the queries: one batched product of n * K matrices with G * Q queries, in
    place of n * H small ones.

    Keeps q, k and v; A is recomputed in backward, so memory grows with T and not with L^2. For short segments only:
    there two products and a softmax beat PyTorch's fused attention on a CPU, from 512 keys on they do not.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[HeadGroup]
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.groups = groups
        out = _with_spare_entry(q)
        for group in groups:
            queries, keys, values = _gather_group(q, k, v, group)
            mixed = torch.bmm(_attention_weights(queries, keys, group), values)
            out.index_copy_(0, group.outputs, mixed.view(-1, q.shape[-1]))
        return out[:-1].view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dout,) = grads
        q, k, v = ctx.saved_tensors
        dq, dkv = _with_spare_entry(q), k.new_zeros(2, *k.shape)
        scale = q.shape[-1] ** -0.5
        for group in ctx.groups:
            queries, keys, values = _gather_group(q, k, v, group)
            weights = _attention_weights(queries, keys, group)
            dmixed = _gather(dout, group.queries, group)
            if len(group.padding):
                dmixed.view(-1, q.shape[-1]).index_fill_(0, group.padding, 0)
            of_group = keys.new_empty(2, *keys.shape)
            torch.bmm(weights.mT, dmixed, out=of_group[1])
            dscores = torch._softmax_backward_data(torch.bmm(dmixed, values.mT), weights, -1, weights.dtype)
            of_group[0].baddbmm_(dscores.mT, queries, beta=0, alpha=scale)
            dqueries = queries.new_empty(queries.shape).baddbmm_(dscores, keys, beta=0, alpha=scale)
            dq.index_copy_(0, group.outputs, dqueries.view(-1, q.shape[-1]))
            _scatter_add(dkv, of_group, group)
        return dq[:-1].view(q.shape), dkv[0], dkv[1], None


def _attention_weights(queries: torch.Tensor, keys: torch.Tensor, group: HeadGroup) -> torch.Tensor:
    """A of a group: (n * K, G * Q, P + L) in the dtype of q, each query's weights summing to 1.

    The mask is the start value that the product is added to, 0 or -inf: one pass in place of three. The softmax
    computes in float32 whatever the dtype, and rounds its result once.
    """
    scores = queries.new_empty(group.shape).copy_(group.additive_mask(queries.dtype))
    scores = scores.view(*queries.shape[:2], -1).baddbmm_(queries, keys.mT, alpha=queries.shape[-1] ** -0.5)
    return torch.softmax(scores, dim=-1)


def _with_spare_entry(q: torch.Tensor) -> torch.Tensor:
    """(T * H + 1, D) zeros: the result of tokens in no group, and one entry more that a group's padding goes to."""
    return q.new_zeros(q.shape[0] * q.shape[1] + 1, q.shape[2])


def _gather_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: HeadGroup) -> tuple[torch.Tensor, ...]:
    return _gather(q, group.queries, group), _gather(k, group.keys, group), _gather(v, group.keys, group)


def _gather(x: torch.Tensor, indices: torch.Tensor, group: HeadGroup) -> torch.Tensor:
    """Tokens of a group, folded: (T, H or K, D) -> (n * K, G * Q or P + L, D)."""
    n, kv_heads = group.shape[:2]
    return x.reshape(-1, x.shape[-1]).index_select(0, indices).view(n * kv_heads, -1, x.shape[-1])


def _scatter_add(total: torch.Tensor, of_group: torch.Tensor, group: HeadGroup) -> None:
    """Adds the gradients of a group's keys and values to `total` (2, T, K, D); the prefix gets the segments' sum."""
    n, kv_heads = group.shape[:2]
    by_segment = of_group.view(2, n, kv_heads, -1, total.shape[-1])
    if group.prefix:
        total[:, : group.prefix] += by_segment[:, :, :, : group.prefix].sum(1).transpose(1, 2)
    own = by_segment[:, :, :, group.prefix :].reshape(2, -1, total.shape[-1])
    total.view(2, -1, total.shape[-1]).index_add_(1, group.own, own)


def _fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: FusedGroup) -> torch.Tensor:
    """The results of a group's queries, (M, H, D), by PyTorch's fused kernel: scores exist in blocks of its own."""
    n, num_keys = group.shape
    entries = group.entries
    if group.queries is not None and group.keys is not None and entries is not None:
        q, k, v = q.index_select(0, group.queries), k.index_select(0, group.keys), v.index_select(0, group.keys)
        q = q.new_zeros(n * num_keys, *q.shape[1:]).index_copy(0, entries, q)
    q, k, v = (x.view(n, num_keys, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mixed = mixed.transpose(1, 2).flatten(0, 1)
    return mixed if entries is None else mixed.index_select(0, entries)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[AttentionGroup]) -> torch.Tensor:
    """`attention_reference` within the segments of a packed micro-batch, causal.

    Args:
        q: (T, H, D) compute dtype, or (S, H, D) with the micro-batch's `last_groups`.
        k: (T, K, D) compute dtype.
        v: (T, K, D) compute dtype.
        groups: which queries attend to which keys, from `batch.split_heads`.

    The softmax does not change when one vector c is subtracted from all keys, because q (k - c) = q k - q c moves all
    scores of a query alike; dk does not change either, and dq = dS (k - c), since the rows of dS sum to 0. With c = the
    first key, scores are tens and not the hundreds that Qwen2.5's key biases of up to 145 make of them, where
    bfloat16's steps are 2 to 8: on layer 0 of the 0.5B the output is 0.8 % off in place of 16 %, dk 1 % and not 34 %.

    Returns:
        The shape and dtype of q. Source: arXiv 1706.03762, grouped queries 2305.13245, the subtraction 2410.02367.
    """
    k = k - k[:1].detach()
    short = [group for group in groups if isinstance(group, HeadGroup)]
    out: torch.Tensor = _Attention.apply(q, k, v, short) if short else torch.zeros_like(q)
    for group in groups:
        if isinstance(group, FusedGroup):
            mixed = _fused_attention(q, k, v, group)
            out = mixed if group.queries is None else out.index_copy(0, group.queries, mixed)
    return out


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention of one token to all keys, for decoding, where no gradient is asked for.

    The G query heads of a key/value head are PyTorch's queries: its fused kernel then reads each key once, not G times.

    Args:
        q: (1, H, D) compute dtype.
        k: (T, K, D) compute dtype.
        v: (T, K, D) compute dtype.

    Returns:
        (1, H, D) dtype of q.
    """
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    queries = q.view(len(keys), -1, q.shape[-1])
    return F.scaled_dot_product_attention(queries[None], keys[None], values[None]).view(q.shape)

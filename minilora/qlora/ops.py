"""The model's elementary functions and their backward passes, derived by hand.

PyTorch's autograd would get every one of them right. They are written out because it would keep more than
is needed (float32 copies, rotated halves, attention weights) and read it more often, and because fine-tuning
a frozen model is the place to see what a backward pass costs. Each function states what it computes, its
gradient, and what it keeps. tests/test_ops.py checks every gradient in float64 (`gradcheck`) and the
results against the formulas spelled out in plain PyTorch.

Upper-case sizes are storage_errors in `model.py`. dy means the gradient of the loss with respect to y.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from minilora.qlora.batch import SegmentGroup


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x), with rms(x) = sqrt(mean(x^2) + eps).

    With n = x / rms(x) and g = w * dy:  dx = (g - n * mean(g * n)) / rms(x),  dw = sum over rows of n * dy.
    The mean is over the C entries of a row: it is what the common divisor sends back to each of them.
    Keeps x and one number a row, in float32 whatever the compute type: the sum of squares overflows float16.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * (x.to(wide) * inverse_rms).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.to(inverse_rms.dtype) * inverse_rms
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


def _swiglu_gradients(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup, by four passes over the numbers."""
    return torch.ops.aten.silu_backward(dh * up, gate), F.silu(gate).mul_(dh)


def _swiglu_gradients_in_one_pass(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same spelled out, for the compiler to make one loop of: rounded once, at the end."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    z, d = gate.to(wide), dh.to(wide)
    logistic = torch.sigmoid(z)
    dgate = d * up.to(wide) * logistic * (1 + z * (1 - logistic))
    return dgate.to(gate.dtype), (d * z * logistic).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    """h = silu(gate) * up, with silu(z) = z * s(z) and s the logistic function.

    dup = dh * silu(gate);  dgate = dh * up * s * (1 + gate * (1 - s)), which is PyTorch's silu_backward.
    Keeps gate and up; silu(gate) is cheaper to compute again than to keep.
    """

    gradients: Callable[..., tuple[torch.Tensor, torch.Tensor]] = staticmethod(_swiglu_gradients)

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _SwiGLU.gradients(*grads, *ctx.saved_tensors)


def compile_swiglu(wanted: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    """Has SwiGLU's backward pass compiled in this process, or not; None, or why it cannot be and is not.

    On a CPU it takes half of the time then, for 4 to 20 seconds and 150 MB at the start: 1 or 2 % of a training step on
    a Zen 4, 9 % on a Zen 5 (AMD). On Zen 4 its forward pass and the other functions gained nothing.
    """
    _SwiGLU.gradients = staticmethod(_swiglu_gradients)
    if not wanted:
        return None
    try:
        compiled = torch.compile(_swiglu_gradients_in_one_pass, dynamic=True)
        with torch.no_grad():  # as in backward: with gradients on it would be compiled a second time there
            compiled(*(torch.ones(3, 64, dtype=dtype, device=device) for _ in range(3)))
    except Exception as error:  # no C++ compiler, no Triton, a PyTorch without its compiler: whatever it raises
        return str(error).strip().split("\n")[0] or type(error).__name__
    _SwiGLU.gradients = staticmethod(compiled)
    return None


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


@dataclass(frozen=True)
class HeadGroup:
    """A `SegmentGroup` for n segments, as places in q, k and v with rows and heads flattened together.

    Attributes:
        prefix: P.
        shape: n, K, G, Q, P + L.
        queries: (n * K * G * Q,) int64, places in (T * H, D); padding repeats the segment's first query.
        outputs: the same, but padding points behind the end.
        padding: int64, which of `queries` are padding.
        keys: (n * K * (P + L),) int64, places in (T * K, D), prefix first; padding repeats the segment's first row.
        own: (n * K * L,) int64, those of the segment itself.
        hidden: (n or 1, 1, 1, Q, P + L) bool, True where a query must not look.
    """

    prefix: int
    shape: tuple[int, int, int, int, int]
    queries: torch.Tensor
    outputs: torch.Tensor
    padding: torch.Tensor
    keys: torch.Tensor
    own: torch.Tensor
    hidden: torch.Tensor


def split_heads(groups: Sequence[SegmentGroup], heads: int, kv_heads: int, num_queries: int) -> tuple[HeadGroup, ...]:
    """What all layers' attention needs to know of a micro-batch, computed once.

    Args:
        groups: every query that is no padding stands in exactly one of them.
        heads: H.
        kv_heads: K.
        num_queries: rows of q.
    """
    return tuple(_split_group(group, heads, kv_heads, num_queries) for group in groups)


def _split_group(group: SegmentGroup, heads: int, kv_heads: int, num_queries: int) -> HeadGroup:
    query_rows, key_rows, device = group.queries.rows, group.keys.rows, group.keys.rows.device
    n, num_seen = len(key_rows), group.prefix + key_rows.shape[1]
    head = torch.arange(heads, device=device)
    queries = query_rows[:, None, None, :] * heads + head.view(1, kv_heads, -1, 1)
    segment, place = group.queries.padding.T[:, :, None]
    padding = ((segment * heads + head) * query_rows.shape[1] + place).flatten()
    seen = torch.cat((torch.arange(group.prefix, device=device).expand(n, -1), key_rows), dim=1)
    keys = seen[:, None, :] * kv_heads + torch.arange(kv_heads, device=device)[:, None]
    return HeadGroup(
        prefix=group.prefix,
        shape=(n, kv_heads, heads // kv_heads, query_rows.shape[1], num_seen),
        queries=queries.flatten(),
        outputs=queries.flatten().index_fill(0, padding, num_queries * heads),
        padding=padding,
        keys=keys.flatten(),
        own=keys[:, :, group.prefix :].flatten(),
        hidden=group.hidden[:, None, None],
    )


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
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[HeadGroup]
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.groups = groups
        out = _with_spare_row(q)
        for group in groups:
            mixed = torch.bmm(_weights(q, k, group), _take(v, group.keys, group))
            out.index_copy_(0, group.outputs, mixed.view(-1, q.shape[-1]))
        return out[:-1].view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dout,) = grads
        q, k, v = ctx.saved_tensors
        dq, dk, dv = _with_spare_row(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = q.shape[-1] ** -0.5
        for group in ctx.groups:
            weights = _weights(q, k, group)
            dmixed = _take(dout, group.queries, group)
            dmixed.view(-1, q.shape[-1]).index_fill_(0, group.padding, 0)
            _add_keys(dv, torch.bmm(weights.mT, dmixed), group)
            dscores = torch.bmm(dmixed, _take(v, group.keys, group).mT)
            dscores = torch._softmax_backward_data(dscores, weights, -1, weights.dtype).mul_(scale)
            dqueries = torch.bmm(dscores, _take(k, group.keys, group))
            dq.index_copy_(0, group.outputs, dqueries.view(-1, q.shape[-1]))
            _add_keys(dk, torch.bmm(dscores.mT, _take(q, group.queries, group)), group)
        return dq[:-1].view(q.shape), dk, dv, None


def _with_spare_row(q: torch.Tensor) -> torch.Tensor:
    """(T * H + 1, D) zeros: the result of rows in no group, and one more row that a group's padding goes to."""
    return q.new_zeros(q.shape[0] * q.shape[1] + 1, q.shape[2])


def _take(x: torch.Tensor, places: torch.Tensor, group: HeadGroup) -> torch.Tensor:
    """Rows of a group, folded: (T, H or K, D) -> (n * K, G * Q or P + L, D)."""
    n, kv_heads = group.shape[:2]
    return x.reshape(-1, x.shape[-1]).index_select(0, places).view(n * kv_heads, -1, x.shape[-1])


def _add_keys(total: torch.Tensor, dkeys: torch.Tensor, group: HeadGroup) -> None:
    """Adds a gradient of a group's keys to `total` (T, K, D); the prefix gets the sum over the segments."""
    n, kv_heads = group.shape[:2]
    by_segment = dkeys.view(n, kv_heads, -1, dkeys.shape[-1])
    if group.prefix:
        total[: group.prefix] += by_segment[:, :, : group.prefix].sum(0).transpose(0, 1)
    own = by_segment[:, :, group.prefix :].reshape(-1, dkeys.shape[-1])
    total.view(-1, dkeys.shape[-1]).index_add_(0, group.own, own)


def _weights(q: torch.Tensor, k: torch.Tensor, group: HeadGroup) -> torch.Tensor:
    """A of a group: (n * K, G * Q, P + L) in the dtype of q, each row summing to 1.

    The mask is the start value that the product is added to, 0 or -inf: one pass in place of three. The softmax
    computes in float32 whatever the dtype, and rounds its result once.
    """
    n, kv_heads, per_kv_head, num_queries, num_seen = group.shape
    mask = q.new_zeros(group.hidden.shape).masked_fill_(group.hidden, -torch.inf)
    scores = q.new_empty(group.shape).copy_(mask).view(n * kv_heads, per_kv_head * num_queries, num_seen)
    queries, keys = _take(q, group.queries, group), _take(k, group.keys, group)
    return torch.softmax(scores.baddbmm_(queries, keys.mT, alpha=q.shape[-1] ** -0.5), dim=-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[HeadGroup]) -> torch.Tensor:
    """Causal grouped-query attention within the segments of a packed micro-batch.

    Args:
        q: (T, H, D) compute dtype, or (S, H, D) with the micro-batch's `last_groups`.
        k: (T, K, D) compute dtype.
        v: (T, K, D) compute dtype.
        groups: which rows see which, from `split_heads`.

    Returns:
        The shape and dtype of q. Source: arXiv 1706.03762, grouped queries arXiv 2305.13245.
    """
    return _Attention.apply(q, k, v, groups)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention of one row that sees all keys; for generating, where no gradient is asked for.

    The G query heads of a key/value head are PyTorch's rows: its fused kernel then reads each key once and not G times.

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

"""Causal grouped-query attention within the segments of a packed micro-batch.

First the reference, four lines. Then two ways to compute the same: two products and a softmax over padded groups of
short segments, with the gradient derived, and PyTorch's fused kernel for long ones. Which tokens belong together
(`batch.SegmentGroup`) becomes tables of indices once a micro-batch, in `split_heads`, for all layers.

Upper-case sizes are explained in `model.py`. Source: arXiv 1706.03762, grouped queries 2305.13245.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from minilora.qlora.batch import SegmentGroup, move_together

# Largest scores of one attention call, n * H * Q * (P + L) of them; a larger group is cut along n, then along Q.
MAX_SCORES_BYTES = 120_000_000
# Elements of an attention mask that is made once for all layers; a larger one is made in each layer.
MAX_MASK = 1 << 20


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention of q (Tq, H, D) over k and v (Tk, K, D); mask (Tq, Tk), True = masked."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # G query heads share each
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


# ---- Tables of indices


@dataclass(frozen=True)
class HeadGroup:
    """A `SegmentGroup` as indices into q, k and v with tokens and heads flattened together: what a gather takes."""

    prefix: int  # P
    shape: tuple[int, int, int, int, int]  # n, K, G, Q, P + L
    queries: torch.Tensor  # (n * K * G * Q,) int64, indices into (T * H, D)
    outputs: torch.Tensor  # the same, except that padding points behind the end
    padding: torch.Tensor  # int64, which of `queries` are padding
    keys: torch.Tensor  # (n * K * (P + L),) int64, indices into (T * K, D), prefix first
    own: torch.Tensor  # (n * K * L,) int64, those of the segment itself
    last_key: torch.Tensor  # (1 or n, 1, 1, Q, 1) int64, as in `SegmentGroup`
    mask: torch.Tensor | None = None  # `additive_mask` of a small group, made once for all layers

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """(1 or n, 1, 1, Q, P + L) of 0 and -inf, where a query does not attend to a key."""
        if self.mask is not None:
            return self.mask
        masked = torch.arange(self.shape[-1], device=self.last_key.device) > self.last_key
        return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)


@dataclass(frozen=True)
class FusedGroup:
    """A `SegmentGroup` for fused attention: a padded batch of n sequences of P + L tokens, each causal.

    The prefix's tokens take part as queries too, whose result nothing reads: so the mask stays causal. Without indices
    it is all T tokens in their order, the micro-batch's padding behind them, which nothing reads either.
    """

    shape: tuple[int, int]  # n, P + L
    keys: torch.Tensor | None = None  # (n * (P + L),) int64, tokens of k and v
    queries: torch.Tensor | None = None  # (M,) int64, tokens of q, without padding
    entries: torch.Tensor | None = None  # (M,) int64, where these are in the batch of n * (P + L)


AttentionGroup = HeadGroup | FusedGroup


def split_heads(
    groups: Sequence[SegmentGroup], heads: int, kv_heads: int, *, num_queries: int, like: torch.Tensor
) -> tuple[AttentionGroup, ...]:
    """What all layers' attention needs to know of a micro-batch, computed once, on the CPU.

    Args:
        groups: every query that is no padding is in exactly one of them.
        heads: H.
        kv_heads: K.
        num_queries: tokens of q.
        like: q's dtype and the device that the tables go to.
    """
    max_scores = MAX_SCORES_BYTES // (heads * like.element_size())
    split: list[AttentionGroup] = []
    for group in groups:
        if group.is_fused:
            whole = len(groups) == 1 and group.prefix == 0 and group.queries.numel() == group.num_keys
            split.append(FusedGroup((1, num_queries)) if whole else _fuse(group))
        else:
            split += [_split_group(piece, heads, kv_heads, num_queries) for piece in group.cut(max_scores)]
    tables = [{name: x for name, x in vars(group).items() if isinstance(x, torch.Tensor)} for group in split]
    tensors = [tensor for table in tables for tensor in table.values()]
    moved = iter(move_together(tensors, like.device) if tensors else [])
    on_device: list[Any] = [{name: next(moved) for name in table} for table in tables]
    split = [replace(group, **table) for group, table in zip(split, on_device, strict=True)]
    return tuple(_keep_mask(group, like.dtype) if isinstance(group, HeadGroup) else group for group in split)


def _keep_mask(group: HeadGroup, dtype: torch.dtype) -> HeadGroup:
    small = group.last_key.numel() * group.shape[-1] <= MAX_MASK
    return replace(group, mask=group.additive_mask(dtype)) if small else group


def _fuse(group: SegmentGroup) -> FusedGroup:
    n, num_keys = len(group.keys), group.num_keys
    entries = (torch.arange(n)[:, None] * num_keys + group.last_key)[~group.padding]
    return FusedGroup((n, num_keys), group.seen().flatten(), group.queries[~group.padding], entries)


def _split_group(group: SegmentGroup, heads: int, kv_heads: int, num_queries: int) -> HeadGroup:
    n, per_segment = group.queries.shape
    head = torch.arange(heads)
    queries = (group.queries[:, None, None, :] * heads + head.view(1, kv_heads, -1, 1)).flatten()
    padding = group.padding[:, None].expand(n, heads, per_segment).flatten().nonzero().flatten()
    keys = group.seen()[:, None, :] * kv_heads + torch.arange(kv_heads)[:, None]
    return HeadGroup(
        prefix=group.prefix,
        shape=(n, kv_heads, heads // kv_heads, per_segment, group.num_keys),
        queries=queries,
        outputs=queries.index_fill(0, padding, num_queries * heads),
        padding=padding,
        keys=keys.flatten(),
        own=keys[:, :, group.prefix :].flatten(),
        last_key=group.last_key[:, None, None, :, None],
    )


# ---- Short segments: two products and a softmax


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
    by_segment = of_group.view((2, n, kv_heads, -1, total.shape[-1]))
    if group.prefix:
        total[:, : group.prefix] += by_segment[:, :, :, : group.prefix].sum(1).transpose(1, 2)
    own = by_segment[:, :, :, group.prefix :].reshape(2, -1, total.shape[-1])
    total.view(2, -1, total.shape[-1]).index_add_(1, group.own, own)


# ---- Long segments: PyTorch's fused attention


def _fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: FusedGroup) -> torch.Tensor:
    """The results of a group's queries, (M, H, D), by PyTorch's fused kernel: scores exist in blocks of its own."""
    n, num_keys = group.shape
    entries = group.entries
    if group.queries is not None and group.keys is not None and entries is not None:
        q, k, v = q.index_select(0, group.queries), k.index_select(0, group.keys), v.index_select(0, group.keys)
        q = q.new_zeros(n * num_keys, *q.shape[1:]).index_copy(0, entries, q)
    # Where every token is supervised the last layer's queries are without the padding that its keys have.
    q, k, v = (x[: n * num_keys].view(n, num_keys, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if mixed.is_cuda and mixed.grad_fn is not None:
        _sum_in_one_order(mixed.grad_fn)
    mixed = mixed.transpose(1, 2).flatten(0, 1)
    return mixed if entries is None else mixed.index_select(0, entries)


def _sum_in_one_order(node: Any) -> None:
    """Lets a backward pass of PyTorch's be deterministic on a GPU, where the fused one else adds dq by atomics.

    A resumed run needs the bits of an unbroken one. Only around this node: elsewhere PyTorch would take slow ways, for
    `index_add_` too, which here adds nothing but zeros where indices meet.
    """
    before = torch.are_deterministic_algorithms_enabled()
    node.register_prehook(lambda _: torch.use_deterministic_algorithms(True, warn_only=True))
    node.register_hook(lambda *_: torch.use_deterministic_algorithms(before))


# ---- All of them


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[AttentionGroup]) -> torch.Tensor:
    """`attention_reference` within the segments of a packed micro-batch, causal.

    Args:
        q: (T, H, D) compute dtype, or (S, H, D) with the micro-batch's `last_groups`.
        k: (T, K, D) compute dtype.
        v: (T, K, D) compute dtype.
        groups: which queries attend to which keys, from `split_heads`.

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

"""Causal grouped-query attention within the segments of a packed micro-batch.

First the reference, four lines. Then two ways to compute the same: two products and a softmax over padded groups of
short segments, with the gradient derived, and PyTorch's fused kernel for long ones. Where a GPU has it, one call of
flash attention takes all segments (`flash.py`). Which tokens belong together (`batch.SegmentGroup`) becomes tables of
indices once a micro-batch, in `split_heads`, for all layers.

Upper-case sizes are explained in `model.py`. Source: arXiv 1706.03762, grouped queries 2305.13245.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minilora.qlora.batch import SegmentGroup, move_together
from minilora.qlora.flash import MAX_COPIES, FlashSegments, flash_attention, lay_out, summed_in_one_order

# Largest scores of one attention call, n * H * Q * (P + L) of them; a larger group is cut along n, then along Q.
MAX_SCORES_BYTES = 120_000_000
# Elements of an attention mask that is made once for all layers; a larger one, as of a piece, is made in each layer.
MAX_MASK = 1 << 19
# PyTorch's kernels, the last with T x T scores, where the others cannot: bfloat16 before sm80. Without cuDNN's, which
# has no mode that sums in one order, and builds a graph for each new length.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention of q (Tq, H, D) over k and v (Tk, K, D); mask (Tq, Tk), True = masked."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # G query heads share each
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


# ---- Tables of indices


@dataclass(frozen=True)
class HeadGroup:
    """The attention mask of a `SegmentGroup`, and the sizes of its products."""

    prefix: int  # P
    shape: tuple[int, int, int, int, int]  # n, K, G, Q, P + L
    last_key: torch.Tensor  # (1 or n, 1, 1, Q, 1) int64, as in `SegmentGroup`
    last_query: torch.Tensor | None = None  # (n, 1, 1, 1, P + L) int64, likewise
    mask: torch.Tensor | None = None  # `additive_mask` of a small group, made once for all layers

    def with_mask(self, dtype: torch.dtype) -> "HeadGroup":
        is_small = self.last_key.numel() * self.shape[-1] <= MAX_MASK
        return replace(self, mask=self.additive_mask(dtype)) if is_small else self

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """(1 or n, 1, 1, Q, P + L) of 0 and -inf, where a query does not attend to a key."""
        if self.mask is not None:
            return self.mask
        masked = torch.arange(self.shape[-1], device=self.last_key.device) > self.last_key
        if self.last_query is not None:
            masked = masked | (self.last_key > self.last_query)
        return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)


@dataclass(frozen=True)
class HeadGroups:
    """Groups of short segments as indices into q, k and v with tokens and heads flattened together.

    The groups follow each other in every table, so that one gather serves all of them.
    """

    groups: tuple[HeadGroup, ...]
    queries: torch.Tensor  # (sum of n * K * G * Q,) int64, indices into (T * H, D)
    outputs: torch.Tensor  # the same, except that padding points behind the end
    padding: torch.Tensor  # int64, which of `queries` are padding
    keys: torch.Tensor  # (sum of n * K * (P + L),) int64, indices into (T * K, D), each segment's prefix first
    own: torch.Tensor  # the same counted from 1, except that the prefix points to 0
    sums: list[int]  # sizes of the parts of `own` that are added one by one: a segment in pieces has a key in several

    def fold(self, gathered: torch.Tensor, is_keys: bool = False) -> list[torch.Tensor]:
        """What was gathered by `queries` or by `keys`, by group: (n * K, G * Q or P + L, D)."""
        sizes = [(n * k, keys if is_keys else g * q) for n, k, g, q, keys in (group.shape for group in self.groups)]
        parts = gathered.split([heads * tokens for heads, tokens in sizes], dim=-2)
        return [part.unflatten(-2, size) for part, size in zip(parts, sizes, strict=True)]


@dataclass(frozen=True)
class FusedGroup:
    """A `SegmentGroup` for fused attention: a padded batch of n sequences of P + L tokens, each causal.

    The prefix's tokens take part as queries too, and in the last layer unsupervised ones, whose results nothing reads:
    so the mask stays causal. Without indices it is all T tokens in order, with the padding, which nothing reads either.
    """

    shape: tuple[int, int]  # n, P + L
    prefix: int = 0  # P
    keys: torch.Tensor | None = None  # (n * L,) int64, tokens of k and v behind the prefix
    queries: torch.Tensor | None = None  # (M,) int64, tokens of q, without padding
    entries: torch.Tensor | None = None  # (M,) int64, where these are in the batch of n * (P + L)


AttentionGroup = HeadGroups | FusedGroup | FlashSegments


def split_heads(
    groups: Sequence[SegmentGroup],
    heads: int,
    kv_heads: int,
    *,
    num_queries: int,
    like: torch.Tensor,
    flash: bool = False,
) -> tuple[AttentionGroup, ...]:
    """What all layers' attention needs to know of a micro-batch, computed once, on the CPU.

    Every query that is no padding is in exactly one of `groups`. `heads` is H and `kv_heads` K, `num_queries` the
    tokens of q, `like` has q's dtype and the device that the tables go to. `flash`: all tokens are queries, and the
    device has flash attention.
    """
    copies = sum(len(group.keys) * group.prefix for group in groups)
    if flash and copies <= MAX_COPIES * num_queries and all(group.last_query is None for group in groups):
        return (lay_out(groups, num_queries).to(like.device),)
    max_scores = MAX_SCORES_BYTES // (heads * like.element_size())
    short = [piece for group in groups if not group.is_fused for piece in group.cut(max_scores)]
    split: list[Any] = [_split_short(short, heads, kv_heads, num_queries)] if short else []
    for group in groups:
        if group.is_fused:
            whole = len(groups) == 1 and group.prefix == 0 and group.queries.numel() == group.num_keys
            split.append(FusedGroup((1, num_queries)) if whole else _fuse(group))
    parts = [*split, *(split[0].groups if short else ())]
    tables = [{name: x for name, x in vars(part).items() if isinstance(x, torch.Tensor)} for part in parts]
    tensors = [tensor for table in tables for tensor in table.values()]
    moved = iter(move_together(tensors, like.device) if tensors else [])
    parts = [replace(part, **{name: next(moved) for name in table}) for part, table in zip(parts, tables, strict=True)]
    if short:
        parts[0] = replace(parts[0], groups=tuple(group.with_mask(like.dtype) for group in parts[len(split) :]))
    return tuple(parts[: len(split)])


def _fuse(group: SegmentGroup) -> FusedGroup:
    n, num_keys = len(group.keys), group.num_keys
    entries = (torch.arange(n)[:, None] * num_keys + group.last_key)[~group.padding]
    return FusedGroup((n, num_keys), group.prefix, group.keys.flatten(), group.queries[~group.padding], entries=entries)


def _split_short(pieces: Sequence[SegmentGroup], heads: int, kv_heads: int, num_queries: int) -> HeadGroups:
    head, kv_head = torch.arange(heads).view(1, kv_heads, -1, 1), torch.arange(kv_heads)[:, None]
    groups, queries, padded, keys, own = [], [], [], [], []
    for piece in pieces:
        n, per_segment = piece.queries.shape
        shape = (n, kv_heads, heads // kv_heads, per_segment, piece.num_keys)
        last_query = None if piece.last_query is None else piece.last_query[:, None, None, None]
        groups.append(HeadGroup(piece.prefix, shape, piece.last_key[:, None, None, :, None], last_query))
        queries.append((piece.queries[:, None, None] * heads + head).flatten())
        padded.append(piece.padding[:, None].expand(n, heads, per_segment).flatten())
        of_piece = piece.seen()[:, None] * kv_heads + kv_head
        keys.append(of_piece.flatten())
        own.append((of_piece + 1).index_fill(2, torch.arange(piece.prefix), 0).flatten())
    padding, all_queries = torch.cat(padded).nonzero().flatten(), torch.cat(queries)
    outputs = all_queries.index_fill(0, padding, num_queries * heads)
    sums = [*map(len, own)] if len({int(piece.keys[0, 0]) for piece in pieces}) < len(pieces) else [sum(map(len, own))]
    return HeadGroups(tuple(groups), all_queries, outputs, padding, keys=torch.cat(keys), own=torch.cat(own), sums=sums)


# ---- Short segments: two products and a softmax


class _Attention(torch.autograd.Function):
    """O = A V with A = softmax(Q K^T / sqrt(D)), each query over the keys that it may attend to.

    dV = A^T dO,  dA = dO V^T,  dS = A * (dA - rowsum(A * dA)),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D).

    A group of n segments, padded to L tokens, sees P prefix keys and its own L. Padding is behind the real tokens, so
    the causal mask hides it from them, and since its dO is zero it sends nothing back. The G = H / K query heads that
    share a key/value head are folded into the queries: one batched product of n * K matrices with G * Q queries, in
    place of n * H small ones.

    Keeps q, k and v; A is recomputed in backward, so memory grows with T and not with L^2.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, short: HeadGroups) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.short = short
        queries, keys, values = _gather(q, short.queries), _gather(k, short.keys), _gather(v, short.keys)
        mixed = torch.empty_like(queries)
        parts = (short.fold(queries), *(short.fold(x, is_keys=True) for x in (keys, values)), short.fold(mixed))
        for group, of_queries, of_keys, of_values, of_mixed in zip(short.groups, *parts, strict=True):
            torch.bmm(_attention_weights(of_queries, of_keys, group), of_values, out=of_mixed)
        out = q.new_zeros(q.shape[0] * q.shape[1] + 1, q.shape[2])  # one entry more, that padding goes to
        return out.index_copy_(0, short.outputs, mixed)[:-1].view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dout,) = grads
        q, k, v = ctx.saved_tensors
        short: HeadGroups = ctx.short
        queries, keys, values = _gather(q, short.queries), _gather(k, short.keys), _gather(v, short.keys)
        dmixed = _gather(dout, short.queries)
        dqueries, dkeys = torch.empty_like(queries), keys.new_empty(2, *keys.shape)
        dmixed.index_fill_(0, short.padding, 0)
        inputs = (short.fold(queries), *(short.fold(x, is_keys=True) for x in (keys, values)))
        outputs = (short.fold(dmixed), short.fold(dqueries), short.fold(dkeys, is_keys=True))
        scale = q.shape[-1] ** -0.5
        for group, of_q, of_k, of_v, of_dmixed, of_dq, of_dkv in zip(short.groups, *inputs, *outputs, strict=True):
            weights = _attention_weights(of_q, of_k, group)
            torch.bmm(weights.mT, of_dmixed, out=of_dkv[1])
            dscores = torch._softmax_backward_data(torch.bmm(of_dmixed, of_v.mT), weights, -1, weights.dtype)
            of_dkv[0].baddbmm_(dscores.mT, of_q, beta=0, alpha=scale)
            of_dq.baddbmm_(dscores, of_k, beta=0, alpha=scale)
        dq = q.new_zeros(q.shape[0] * q.shape[1] + 1, q.shape[2]).index_copy_(0, short.outputs, dqueries)
        wide = k.dtype if len(short.sums) == 1 else torch.promote_types(k.dtype, torch.float32)  # for sums of many
        dkv = k.new_zeros(2, 1 + k.shape[0] * k.shape[1], k.shape[2], dtype=wide)
        for own, part in zip(short.own.split(short.sums), dkeys.split(short.sums, dim=1), strict=True):
            dkv.index_add_(1, own, part.to(wide))  # by a GPU in any order: but in entry 0, dropped, only zeros meet
        dkv = dkv[:, 1:].unflatten(1, k.shape[:2])
        for group, of_dkv in zip(short.groups, short.fold(dkeys, is_keys=True), strict=True):
            if group.prefix:  # which gets the segments' sum
                by_segment = of_dkv.unflatten(1, group.shape[:2])[:, :, :, : group.prefix]
                dkv[:, : group.prefix].add_(by_segment.sum(1).transpose(1, 2))  # `+=` would copy the slice to itself
        return dq[:-1].view(q.shape), *dkv.to(k.dtype), None


def _attention_weights(queries: torch.Tensor, keys: torch.Tensor, group: HeadGroup) -> torch.Tensor:
    """A of a group: (n * K, G * Q, P + L) in the dtype of q, each query's weights summing to 1.

    The mask is the start value that the product is added to, 0 or -inf: one pass in place of three. The softmax
    computes in float32 whatever the dtype, and rounds its result once.
    """
    scores = queries.new_empty(group.shape).copy_(group.additive_mask(queries.dtype))
    scores = scores.view(*queries.shape[:2], -1).baddbmm_(queries, keys.mT, alpha=queries.shape[-1] ** -0.5)
    return torch.softmax(scores, dim=-1)


def _gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(T, H or K, D) -> (len(indices), D)."""
    return x.reshape(-1, x.shape[-1]).index_select(0, indices)


# ---- Long segments: PyTorch's fused attention


def _fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: FusedGroup) -> torch.Tensor:
    """The results of a group's queries, (M, H, D), by PyTorch's fused kernel: scores exist in blocks of its own."""
    (n, num_keys), entries = group.shape, group.entries
    if group.queries is not None and group.keys is not None and entries is not None:
        q = q.new_zeros(n * num_keys, *q.shape[1:]).index_copy(0, entries, q.index_select(0, group.queries))
        # The prefix is expanded, whose backward pass sums the segments, and not gathered, which would by atomics.
        own = (x.index_select(0, group.keys).unflatten(0, (n, -1)) for x in (k, v))
        prefixes = (x[: group.prefix].expand(n, -1, -1, -1) for x in (k, v))
        k, v = (torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(prefixes, own, strict=True))
    # Where every token is supervised the last layer's queries are without the padding that its keys have.
    q, k, v = (x[: n * num_keys].view(n, num_keys, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    is_grouped = _takes_groups(q, k, v)
    if not is_grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(KERNELS):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    if mixed.is_cuda and mixed.grad_fn is not None:
        _sum_in_one_order(mixed.grad_fn)
    mixed = mixed.transpose(1, 2).flatten(0, 1)
    return mixed if entries is None else mixed.index_select(0, entries)


def _takes_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a fused kernel takes fewer key/value heads than query heads: before sm80 and in float32 no GPU's does."""
    return not q.is_cuda or can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, True, True))


def _sum_in_one_order(node: Any) -> None:
    mode = ExitStack()
    node.register_prehook(lambda _: mode.enter_context(summed_in_one_order()))
    node.register_hook(lambda *_: mode.close())


# ---- All of them


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Sequence[AttentionGroup]) -> torch.Tensor:
    """`attention_reference` within the segments of a packed micro-batch, causal, in the shape and dtype of q.

    q is (T, H, D), or (S, H, D) with the micro-batch's `last_groups`, and k and v are (T, K, D), all in the compute
    dtype; `split_heads` says which queries attend to which keys.

    The softmax does not change when one vector c is subtracted from all keys, because q (k - c) = q k - q c moves all
    scores of a query alike; dk does not change either, and dq = dS (k - c), since the rows of dS sum to 0. With c = the
    first key, scores are tens and not the hundreds that Qwen2.5's key biases of up to 145 make of them, where
    bfloat16's steps are 2 to 8: on layer 0 of the 0.5B the output is 0.8 % off in place of 16 %, dk 1 % and not 34 %.
    Source: arXiv 2410.02367.
    """
    k = k - k[:1].detach()
    if isinstance(groups[0], FlashSegments):
        return flash_attention(q, k, v, groups[0])
    short = [group for group in groups if isinstance(group, HeadGroups)]
    out: torch.Tensor = _Attention.apply(q, k, v, *short) if short else torch.zeros_like(q)
    for group in groups:
        if isinstance(group, FusedGroup):
            mixed = _fused_attention(q, k, v, group)
            out = mixed if group.queries is None else out.index_copy(0, group.queries, mixed)
    return out


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention of one token, q (1, H, D), to all of k and v, (T, K, D): decoding, without a gradient.

    The G query heads of a key/value head are PyTorch's queries: its fused kernel then reads each key once, not G times.
    """
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    queries = q.view(len(keys), -1, q.shape[-1])
    return F.scaled_dot_product_attention(queries[None], keys[None], values[None]).view(q.shape)

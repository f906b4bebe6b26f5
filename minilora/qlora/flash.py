"""All segments of a micro-batch in one call of flash attention, on a GPU that has it.

    queries   P P P | a a a a       | b b           the packed tokens, as they are
    keys      P P P | P P P a a a a | P P P b b     each segment's own behind a copy of the prefix

The kernel takes sequences of any length one behind the other, and is told where each begins. Its causal mask ends at
the last key, so the first query of a segment sees the prefix and itself. There are no scores in memory, no masks and no
padding, and a layer's attention is one launch, where groups of similar length take a dozen each. The gradient of the
prefix is the sum over its copies, by a reduction: atomics would add them in another order each time.

Source: arXiv 2307.08691. The operator is what `torch.nn.attention.varlen` calls in Python, from PyTorch 2.10 on.
Left out: queries at some tokens only, as the last layer has, and trees of tokens; `attention.py` computes these.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from minilora.qlora.batch import SegmentGroup, move_together, pack_segments


@dataclass(frozen=True)
class FlashSegments:
    """Where the sequences of a micro-batch are: n segments, the prefix and the padding behind all of them."""

    keys: torch.Tensor  # int64, tokens of k and v: of each sequence the prefix's and its own
    own: torch.Tensor  # (T,) int64, the entry of `keys` that is a token's own; of a cached prefix its first copy's
    copies: torch.Tensor  # int64, all entries that are the prefix's, P by P
    starts: torch.Tensor  # (2, sequences + 1) int32, where each begins and the last one ends: in queries, in keys
    longest: tuple[int, int]  # queries and keys of the longest
    prefix: int  # P

    def to(self, device: torch.device) -> "FlashSegments":
        keys, own, copies, starts = move_together([self.keys, self.own, self.copies, self.starts], device)
        return replace(self, keys=keys, own=own, copies=copies, starts=starts.to(torch.int32))


def lay_out(groups: Sequence[SegmentGroup], num_queries: int) -> FlashSegments:
    """The segments of all groups in their order in the micro-batch; `num_queries` counts the padding too."""
    spans = sorted(
        (first, group.keys.shape[1] - padded, group.prefix)
        for group in groups
        for first, padded in zip(group.keys[:, 0].tolist(), group.padding.sum(1).tolist(), strict=True)
    )
    cached, end, prefix = spans[0][0], sum(spans[-1][:2]), max(span[2] for span in spans)
    if end < cached + num_queries:
        spans.append((end, cached + num_queries - end, 0))
    keys, own, copies, starts = [], [torch.arange(cached)], [], [(0, 0)]
    for first, length, seen in spans:
        queries_before, keys_before = starts[-1]
        entries = torch.arange(keys_before, keys_before + seen + length)
        keys += [torch.arange(seen), torch.arange(first, first + length)]
        own.append(entries[seen:])
        copies.append(entries[:prefix] if first < prefix or seen else entries[:0])
        starts.append((queries_before + length, keys_before + seen + length))
    table = torch.tensor(starts).T.contiguous()
    queries, in_all = (int(count) for count in table.diff().amax(dim=1))
    return FlashSegments(torch.cat(keys), torch.cat(own), torch.cat(copies), table, (queries, in_all), prefix)


class _LayOut(torch.autograd.Function):
    """k or v, (T, K, D), at `keys`. dx: the gradient of a token's own entry, of the prefix the sum over its copies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, segments: FlashSegments) -> torch.Tensor:
        ctx.segments = segments
        return x.index_select(0, segments.keys)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        segments: FlashSegments = ctx.segments
        dx = grads[0].index_select(0, segments.own)
        if segments.prefix:
            copies = grads[0].index_select(0, segments.copies).unflatten(0, (-1, segments.prefix))
            torch.sum(copies, 0, out=dx[: segments.prefix])
        return dx, None


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: FlashSegments) -> torch.Tensor:
    """The results of all queries, (T, H, D), in the dtype of q. RuntimeError where there is no kernel for them."""
    return _kernel(q, _LayOut.apply(k, segments), _LayOut.apply(v, segments), segments)


def _kernel(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: FlashSegments) -> torch.Tensor:
    kind = {"dropout_p": 0.0, "is_causal": True, "return_debug_mask": False}
    flash = torch.ops.aten._flash_attention_forward.default
    mixed: torch.Tensor = flash(q, keys, values, *segments.starts, *segments.longest, **kind)[0]
    return mixed


@functools.cache
def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has flash attention: in half precision from sm80 on, and not in PyTorch for Windows."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _is_right(device, dtype)


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel exists and gives what its definition does, for three queries behind two cached tokens."""
    draws = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.randn(n, h, 64, generator=draws).requires_grad_() for n, h in ((3, 4), (5, 2), (5, 2))]
        q, k, v = (x.transpose(0, 1)[None] for x in inputs)
        mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        q, k, v = (x.detach().to(device, dtype).requires_grad_() for x in inputs)
        try:
            mixed = flash_attention(q, k, v, lay_out(pack_segments([3], 2), 3).to(device))
            found = [mixed, *torch.autograd.grad(mixed.sum(), (q, k, v))]
        except RuntimeError:  # PyTorch's, where it is compiled without the kernel or the GPU is too old
            return False
        expected = [exact, *torch.autograd.grad(exact.sum(), inputs)]
    # bfloat16's errors are some 1 %, those of a mask that is aligned at the first key several 10 %.
    return all((a.cpu() - b).norm().item() < 0.05 * b.norm().item() for a, b in zip(found, expected, strict=True))

"""All segments of a micro-batch in one call of flash attention, on a GPU that has it.

    queries   P P P | a a a a       | b b           the packed tokens, as they are
    keys      P P P | P P P a a a a | P P P b b     each segment's own behind a copy of the prefix

The kernel takes sequences of any length one behind the other, and is told where each begins. Its causal mask ends at
the last key, so the first query of a segment sees the prefix and itself. There are no scores and no masks in memory. A
layer's attention is four operators and six in backward, where a group of similar lengths takes a dozen. The gradient of
the prefix is the sum over its copies, by a reduction: atomics would add them in another order each time.

Source: arXiv 2307.08691; `torch.nn.attention.varlen`, which calls these operators in Python, from PyTorch 2.10 on.
Left out: queries at some tokens only, as the last layer has, and trees of tokens; `attention.py` computes these.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from minilora.qlora.batch import SegmentGroup, move_together

MAX_COPIES = 2  # tokens of a prefix's copies for each packed one; more would take more memory in backward than the MLP


@dataclass(frozen=True)
class FlashSegments:
    """Where the sequences of a micro-batch are: the prefix, n segments, and the padding behind all of them."""

    keys: torch.Tensor  # int64, tokens of k and v: of each sequence the prefix's and its own
    own: torch.Tensor  # int64, the entry of `keys` that is the own of each token of k and v; any for a cached prefix
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


class _Flash(torch.autograd.Function):
    """Keeps q, k, v and the result; in backward the keys are laid out once more.

    dk and dv: the gradient of each token's own entry, of the prefix the sum over its copies.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: FlashSegments) -> torch.Tensor:
        kv = torch.cat((k, v), dim=1)
        keys, values = kv.index_select(0, segments.keys).chunk(2, dim=1)
        mixed, *of_kernel = _kernel(q, keys, values, segments)
        ctx.segments = segments
        ctx.save_for_backward(q, kv, mixed, *of_kernel)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (q, kv, *of_kernel), segments = ctx.saved_tensors, ctx.segments
        keys, values = kv.index_select(0, segments.keys).chunk(2, dim=1)
        with summed_in_one_order():
            dq, dkeys, dvalues = _kernel_backward((grads[0], q, keys, values, *of_kernel), segments)
        entries = torch.cat((dkeys, dvalues), dim=1)
        dkv = entries.index_select(0, segments.own)
        if segments.prefix:
            copies = entries.index_select(0, segments.copies).unflatten(0, (-1, segments.prefix))
            torch.sum(copies, 0, out=dkv[: segments.prefix])
        return dq, *dkv.chunk(2, dim=1), None


def _kernel(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: FlashSegments) -> Any:
    """The result, and for backward its scores' logsumexp and the state of a dropout that is off."""
    forward, dropout, is_causal = torch.ops.aten._flash_attention_forward.default, 0.0, True
    return forward(q, keys, values, *segments.starts, *segments.longest, dropout, is_causal, False)[:4]


def _kernel_backward(given: tuple[torch.Tensor, ...], segments: FlashSegments) -> Any:
    backward, dropout, is_causal = torch.ops.aten._flash_attention_backward.default, 0.0, True
    return backward(*given[:6], *segments.starts, *segments.longest, dropout, is_causal, *given[6:])


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: FlashSegments) -> torch.Tensor:
    """The results of all queries, (T, H, D), in the dtype of q. RuntimeError where there is no kernel for them."""
    return _Flash.apply(q, k, v, segments)


@contextmanager
def summed_in_one_order() -> Iterator[None]:
    """Lets PyTorch's fused backward passes be deterministic on a GPU, where they else add dq by atomics.

    A resumed run needs the bits of an unbroken one, and a mere warning leaves the atomics. Only around these, for
    PyTorch would take slow ways elsewhere too; and buffers are not filled with NaN before.
    """
    filling: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode("error")
        filling.fill_uninitialized_memory = False
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        filling.fill_uninitialized_memory = fills

"""Examples in, one packed micro-batch out: no padding, and the shared prefix only once (packing).

    examples   P P P a a a a      P P P b b        P P P c c c        P: the ids that all of them begin with
    tokens     P P P a a a a b b c c c                                T = P + sum of the segments' lengths
    positions  0 1 2 3 4 5 6 3 4 3 4 5

A token attends to the prefix and to the earlier tokens of its own segment, which is exactly what it would see in a
batch of its own: keys and values of the prefix do not depend on what follows it. Its gradient is the sum of what all
segments send back, as it would be if each had its own copy.

Cost: a padded batch of N examples computes N * (longest example) tokens, this one P + sum(length - P). On short reviews
behind a 40-token instruction that is about a quarter.

T is rounded up to one of sixteen numbers between a power of two and the next, by padding that belongs to no segment:
3 % more tokens on average. Matrix products are compiled for each shape that comes along, and with a new one in every
step that costs more than the padding does.

An example's last token is a target and never an input, so it is not computed at all. Only positions that predict a
supervised token reach the head (`supervised_positions`), and of the others the last layer needs only keys and values
(`last_groups`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from minilora.qlora.prompt import Example

# Segments of one attention call are padded to the longest of them. A new group starts where more than this share of
# the scores would be padding: fewer groups mean fewer small kernels, more padding means more work.
MAX_PADDED_SCORES = 0.5
# PyTorch's fused attention from here on (`attention.py`): slower at 512 keys on a CPU, faster at 768, and more exact.
FUSED_KEYS = 600

Span = tuple[int, int]  # first token of a segment and the one behind its last


@dataclass(frozen=True)
class SegmentGroup:
    """n segments of similar length that attention computes together, padded to the longest; all tensors on the CPU.

    Attributes:
        prefix: P, the tokens 0..P-1 that every segment of the group attends to.
        keys: (n, L) int64, packed tokens of the segments; padding repeats a segment's first.
        queries: (n, Q) int64, tokens that attend to them; `keys` itself where every token of a segment does. Counted
            from the first token of a forward pass; keys from that of a cached prefix, if there is one.
        padding: (n, Q) bool, which queries are padding.
        last_key: (1 or n, Q) int64, the last of the P + L keys that a query attends to, which is itself. All behind it
            are masked: that is the whole attention mask of sequences.
        last_query: (n, P + L) int64, for tokens that form a tree, in depth-first order: the `last_key` of the last
            query that attends to a key. It is masked for all behind that.
    """

    prefix: int
    keys: torch.Tensor
    queries: torch.Tensor
    padding: torch.Tensor
    last_key: torch.Tensor
    last_query: torch.Tensor | None = None

    @property
    def num_keys(self) -> int:
        """P + L."""
        return self.prefix + self.keys.shape[1]

    @property
    def is_fused(self) -> bool:
        """Whether fused attention computes it: long segments, which it gives queries at all keys, so not for a few."""
        is_long = FUSED_KEYS <= self.num_keys < 2 * self.keys.shape[1]  # and longer than the prefix
        return is_long and self.last_query is None and 2 * self.queries.shape[1] * self.num_keys >= FUSED_KEYS**2

    def seen(self) -> torch.Tensor:
        """(n, P + L) int64, the keys of each segment as tokens, prefix first."""
        return torch.cat((torch.arange(self.prefix).expand(len(self.keys), -1), self.keys), dim=1)

    def cut(self, max_scores: int) -> Iterator["SegmentGroup"]:
        """The group in pieces of at most `max_scores` queries * keys, or of one query."""
        block = max(1, max_scores // self.num_keys)  # queries
        segments = max(1, block // self.queries.shape[1])
        for first in range(0, len(self.keys), segments):
            rows = slice(first, first + segments)
            for start in range(0, self.queries.shape[1], block):
                columns = slice(start, start + block)
                last_key = self.last_key[rows if len(self.last_key) > 1 else slice(None), columns]
                end = int(last_key.max()) + 1 - self.prefix  # what is behind a piece's last query is not attended to
                keys, queries, padding = self.keys[rows, :end], self.queries[rows, columns], self.padding[rows, columns]
                last_query = None if self.last_query is None else self.last_query[rows, : self.prefix + end]
                yield SegmentGroup(self.prefix, keys, queries, padding, last_key=last_key, last_query=last_query)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs.

    Attributes:
        input_ids: (T,) int64; the last few may be padding, which no segment attends to and which sends nothing back.
        position_ids: (T,) int64, each segment counting on from the prefix.
        groups: which tokens attend to which, for `attention.py`.
        last_groups: the same with only the supervised positions as queries, numbered 0..S-1: the last layer's.
        supervised_positions: (S,) int64, where the hidden state predicts a supervised token.
        targets: (S,) int64, those tokens.
        example_indices: (S,) int64, the example that each of them belongs to.
        weights: (S,) float32, the weight of each of them in the loss; None: 1.
        num_examples: examples packed.
        num_real_tokens: tokens of the examples, each with its own prefix: the unit of tokens/s.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    groups: tuple[SegmentGroup, ...]
    last_groups: tuple[SegmentGroup, ...]
    supervised_positions: torch.Tensor
    targets: torch.Tensor
    example_indices: torch.Tensor
    num_examples: int
    num_real_tokens: int
    weights: torch.Tensor | None = None

    @property
    def num_supervised(self) -> int:
        """S, known without asking the device."""
        return int(self.targets.shape[0])

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`; groups stay on the CPU, where `split_heads` makes tables of them."""
        names = ("input_ids", "position_ids", "supervised_positions", "targets", "example_indices")
        tensors = move_together([getattr(self, name) for name in names], device)
        moved: dict[str, Any] = dict(zip(names, tensors, strict=True))
        moved["weights"] = None if self.weights is None else move_together([self.weights], device)[0]
        return replace(self, **moved)


def move_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one dtype to a device: as one pinned buffer, so that one copy runs beside the processor's work."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    buffer = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = buffer.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def pack(
    examples: Sequence[Example], share_prefix: bool = True, cached_prefix: int = 0, weights: Sequence[float] = ()
) -> MicroBatch:
    """One micro-batch of all examples, in their order.

    Args:
        examples: at least one, each with a supervised token that is not its first.
        share_prefix: compute the ids that all examples begin with once. The result is the same either way;
            with dropout the examples then share the prefix's mask.
        cached_prefix: length of a common prefix that is in the KV cache (`model.build_prefix_cache`) and not computed.
        weights: of each example, that of its supervised tokens in the loss; none: 1.
    """
    prefix = cached_prefix or (common_prefix(examples) if share_prefix else 0)
    segments = [example.input_ids[prefix:-1] for example in examples]
    starts = list(accumulate(map(len, segments), initial=prefix))
    input_ids = examples[0].input_ids[cached_prefix:prefix]
    position_ids = list(range(cached_prefix, prefix))
    supervised_positions, targets, example_indices = [], [], []
    for index, (example, segment, start) in enumerate(zip(examples, segments, starts, strict=False)):
        input_ids = input_ids + segment
        position_ids += range(prefix, prefix + len(segment))
        own = [position for position, supervised in enumerate(example.supervised) if supervised]
        supervised_positions += [start + position - 1 - prefix for position in own]
        targets += [example.input_ids[position] for position in own]
        example_indices += [index] * len(own)
    spans = _group_spans(list(pairwise(starts)), prefix)
    padding = [0] * (round_up_tokens(len(input_ids)) - len(input_ids))
    return MicroBatch(
        input_ids=torch.tensor(input_ids + padding),
        position_ids=torch.tensor(position_ids + padding),
        groups=_build_groups(prefix, spans, cached_prefix),
        last_groups=tuple(_build_last_group(prefix, group, supervised_positions) for group in spans),
        supervised_positions=torch.tensor(supervised_positions) - cached_prefix,
        targets=torch.tensor(targets),
        example_indices=torch.tensor(example_indices),
        num_examples=len(examples),
        num_real_tokens=sum(len(example.input_ids) for example in examples),
        weights=torch.tensor(weights)[example_indices] if weights else None,
    )


def count_packed_tokens(examples: Sequence[Example]) -> int:
    """T of `pack(examples)`."""
    prefix = common_prefix(examples)
    return round_up_tokens(prefix + sum(len(example.input_ids) - 1 - prefix for example in examples))


def count_packed_scores(examples: Sequence[Example]) -> int:
    """Queries * keys of the largest group of `pack(examples)`, with padding, as attention has them at a time."""
    prefix = common_prefix(examples)
    groups = _group_spans([(prefix, len(example.input_ids) - 1) for example in examples], prefix)
    return max(len(group) * _scores(group[-1], prefix) for group in groups)


def round_up_tokens(tokens: int) -> int:
    """T of a micro-batch of `tokens`: the next number of five significant bits."""
    step = 1 << max(tokens.bit_length() - 5, 0)
    return -(-tokens // step) * step


def pack_segments(lengths: Sequence[int], cached_prefix: int = 0) -> tuple[SegmentGroup, ...]:
    """Attention groups of segments of these lengths, one after another, behind `cached_prefix` tokens of a KV cache."""
    starts = accumulate(lengths, initial=cached_prefix)
    return _build_groups(cached_prefix, _group_spans(list(pairwise(starts)), cached_prefix), cached_prefix)


def common_prefix(examples: Sequence[Example]) -> int:
    """Length of the ids that all examples share, short enough to leave each a token that predicts its answer."""
    if len(examples) <= 1:
        return 0
    limit = min(example.answer_start for example in examples) - 1
    first, last = (choose((e.input_ids for e in examples), key=lambda ids: ids[:limit]) for choose in (min, max))
    return next((position for position in range(limit) if first[position] != last[position]), max(limit, 0))


def _scores(span: Span, prefix: int) -> int:
    length = span[1] - span[0]
    return length * (prefix + length)


def _group_spans(spans: Sequence[Span], prefix: int) -> list[list[Span]]:
    """The segments by similar length."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span[1] - span[0]):
        grown = [*(groups.pop() if groups else []), span]
        padded = len(grown) * _scores(span, prefix)
        is_even = sum(_scores(own, prefix) for own in grown) >= (1 - MAX_PADDED_SCORES) * padded
        groups += [grown] if is_even else [grown[:-1], [span]]
    return groups


def _build_groups(prefix: int, spans: Sequence[Sequence[Span]], cached: int = 0) -> tuple[SegmentGroup, ...]:
    """The prefix as a group of its own, unless it is cached, then the others, all of their tokens as queries."""
    groups = []
    prefixes = [(0, [(0, prefix)])] if prefix > cached else []
    for seen, group in [*prefixes, *((prefix, group) for group in spans)]:
        keys, padding = pad_segments([range(*span) for span in group])
        queries = keys - cached if cached else keys
        last_key = torch.arange(seen, seen + keys.shape[1])[None]
        groups.append(SegmentGroup(seen, keys, queries, padding, last_key=last_key))
    return tuple(groups)


def _build_last_group(prefix: int, spans: Sequence[Span], supervised_positions: Sequence[int]) -> SegmentGroup:
    """A group whose queries are the supervised positions of its segments, by their index in `supervised_positions`."""
    chosen = [[i for i, token in enumerate(supervised_positions) if start <= token < end] for start, end in spans]
    queries, padding = pad_segments(chosen)
    keys, _ = pad_segments([range(*span) for span in spans])
    last_key = torch.tensor(supervised_positions)[queries] + prefix - torch.tensor([[start] for start, _ in spans])
    return SegmentGroup(prefix, keys, queries, padding, last_key=last_key)


def pad_segments(segments: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments of one token or more side by side, (n, L), padded with their first token; where padding is, (n, L)."""
    longest = max(map(len, segments))
    padded = torch.tensor([[*segment, *[segment[0]] * (longest - len(segment))] for segment in segments])
    return padded, torch.arange(longest) >= torch.tensor([[len(segment)] for segment in segments])

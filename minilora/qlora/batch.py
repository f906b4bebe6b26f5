"""Examples in, one packed micro-batch out: no padding, and the common prefix only once.

    examples   P P P a a a a      P P P b b        P P P c c c        P: the ids that all of them begin with
    rows       P P P a a a a b b c c c                                T = P + sum of the segments' lengths
    positions  0 1 2 3 4 5 6 3 4 3 4 5

A row attends to the prefix and to the earlier rows of its own segment, which is exactly what it would see
in a batch of its own: keys and values of the prefix do not depend on what follows it. Its gradient is the
sum of what all segments send back, as it would be if each had its own copy.

Cost: a padded batch of N examples computes N * (longest example) rows, this one P + sum(length - P). On
short reviews behind a 40-token instruction that is about a quarter.

The rows are rounded up to one of sixteen numbers between a power of two and the next, by padding that belongs to no
segment: 3 % more of them on average. Matrix products are compiled for each shape that comes along, and with a new one
in every step that costs more than the padding does.

An example's last token is a target and never an input, so it is not computed at all. Only positions that predict a
supervised token reach the head (`supervised_positions`), and nothing but their keys and values is needed of the others
in the last layer (`last_groups`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from minilora.qlora.prompt import Example

# Segments of one attention call are padded to the longest of them. A new group starts where that padding
# would exceed this share of the group: fewer groups mean fewer small kernels, more padding means more work.
MAX_GROUP_PADDING = 0.25
# Largest number of rows * keys of one attention call: times H heads these are the scores, 120 MB in bfloat16 for
# H = 14. A longer segment is cut into blocks of queries.
MAX_GROUP_SCORES = 1 << 22

Span = tuple[int, int]  # first row of a segment and the row behind its last


@dataclass(frozen=True)
class Places:
    """The rows of n segments, laid out side by side and padded to the longest.

    Attributes:
        rows: (n, L) int64, the row of each place; padding repeats the segment's first row.
        padding: (M, 2) int64, the places that are padding: segment, and place in it.
    """

    rows: torch.Tensor
    padding: torch.Tensor

    def to(self, device: torch.device) -> "Places":
        """The same places on `device`."""
        return Places(_move(self.rows, device), _move(self.padding, device))


@dataclass(frozen=True)
class SegmentGroup:
    """n segments of similar length that attention computes together.

    Attributes:
        prefix: P, the rows 0..P-1 that every segment of the group sees.
        keys: (n, L) packed rows of the segments, that keys and values are taken from.
        queries: (n, Q) rows that look at them; `keys` itself where every row of a segment does. Rows of a forward pass
            are counted from its own first one, keys from that of a cached prefix, if there is one.
        hidden: (1, Q, P + L) or (n, Q, P + L) bool, True where a query must not look: what stands behind it.
    """

    prefix: int
    keys: Places
    queries: Places
    hidden: torch.Tensor

    def to(self, device: torch.device) -> "SegmentGroup":
        """The same group on `device`."""
        keys = self.keys.to(device)
        queries = keys if self.queries is self.keys else self.queries.to(device)
        return SegmentGroup(self.prefix, keys, queries, _move(self.hidden, device))


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs.

    Attributes:
        input_ids: (T,) int64; the last few may be padding, which nothing attends to and which sends nothing back.
        position_ids: (T,) int64, each segment counting on from the prefix.
        groups: which rows attend to which, for `ops.attention`.
        last_groups: the same with the supervised rows alone as queries, numbered 0..S-1: the last layer's.
        supervised_positions: (S,) int64, rows whose hidden state predicts a supervised token.
        targets: (S,) int64, those tokens.
        example_indices: (S,) int64, the example (its place in the batch) that each of them belongs to.
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

    @property
    def num_supervised(self) -> int:
        """S, known without asking the device."""
        return int(self.targets.shape[0])

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`."""
        return MicroBatch(
            input_ids=_move(self.input_ids, device),
            position_ids=_move(self.position_ids, device),
            groups=tuple(group.to(device) for group in self.groups),
            last_groups=tuple(group.to(device) for group in self.last_groups),
            supervised_positions=_move(self.supervised_positions, device),
            targets=_move(self.targets, device),
            example_indices=_move(self.example_indices, device),
            num_examples=self.num_examples,
            num_real_tokens=self.num_real_tokens,
        )


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a GPU from pinned memory, so that the processor prepares the next micro-batch and does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pack(examples: Sequence[Example], share_prefix: bool = True, cached_prefix: int = 0) -> MicroBatch:
    """One micro-batch of all examples, in their order.

    Args:
        examples: at least one, each with a supervised token that is not its first.
        share_prefix: compute the ids that all examples begin with once. The result is the same either way;
            with dropout the examples then share the prefix's mask.
        cached_prefix: so many ids that all of them begin with have no rows here, because their keys and values are at
            hand (`model.build_prefix_cache`); at most `common_prefix`.
    """
    prefix = cached_prefix or (common_prefix(examples) if share_prefix else 0)
    segments = [example.input_ids[prefix:-1] for example in examples]
    starts = [prefix]
    for segment in segments:
        starts.append(starts[-1] + len(segment))

    input_ids = examples[0].input_ids[cached_prefix:prefix]
    position_ids = list(range(cached_prefix, prefix))
    supervised_positions, targets, example_indices = [], [], []
    for owner, (example, segment, start) in enumerate(zip(examples, segments, starts, strict=False)):
        input_ids = input_ids + segment
        position_ids += range(prefix, prefix + len(segment))
        for position, supervised in enumerate(example.supervised):
            if supervised:
                supervised_positions.append(start + position - 1 - prefix)
                targets.append(example.input_ids[position])
                example_indices.append(owner)
    spans = _group_spans(prefix, list(pairwise(starts)))
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
    )


def count_packed_tokens(examples: Sequence[Example]) -> int:
    """T of `pack(examples)`."""
    prefix = common_prefix(examples)
    return round_up_tokens(prefix + sum(len(example.input_ids) - 1 - prefix for example in examples))


def round_up_tokens(rows: int) -> int:
    """T of a micro-batch with so many rows: the next number of five significant bits."""
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


def split_into_micro_batches(
    examples: Sequence[Example], size: int, max_rows: int | None = None
) -> list[list[Example]]:
    """The examples of a step as micro-batches; how they are cut changes its result by rounding alone,
    and the dropout masks.

    Args:
        examples: of one optimizer step.
        size: examples in a micro-batch; the last may have fewer.
        max_rows: cuts by rows instead: as few micro-batches as hold at most so many each, and even ones, since the
            largest decides how much memory a run takes. An example that is longer has one to itself.
    """
    if max_rows is None:
        return [list(examples[start : start + size]) for start in range(0, len(examples), size)]
    prefix = common_prefix(examples)
    bins: list[list[Example]] = []
    for count in range(1, len(examples) + 1):
        bins = _even_bins(examples, prefix, count, len(examples))
        shared = [chosen for chosen in bins if len(chosen) > 1]
        if all(round_up_tokens(prefix + _own_rows(chosen, prefix)) <= max_rows for chosen in shared):
            break
    return bins


def split_across_ranks(examples: Sequence[Example], count: int, size: int) -> list[list[Example]]:
    """The examples of a step for `count` ranks, even in rows: the slowest of them decides how long a step takes.

    Args:
        examples: of one optimizer step, at most count * size.
        count: shares; where there are fewer examples, some are empty.
        size: most examples in a share.
    """
    return _even_bins(examples, common_prefix(examples), count, size)


def _even_bins(examples: Sequence[Example], prefix: int, count: int, size: int) -> list[list[Example]]:
    """`count` bins of up to `size` examples, in their order: the longest first, each into the bin of fewest rows."""
    bins: list[list[int]] = [[] for _ in range(count)]
    rows = [0] * count
    for place in sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids)):
        chosen = min((i for i in range(count) if len(bins[i]) < size), key=rows.__getitem__)
        bins[chosen].append(place)
        rows[chosen] += _own_rows([examples[place]], prefix)
    return [[examples[place] for place in sorted(chosen)] for chosen in bins]


def _own_rows(examples: Sequence[Example], prefix: int) -> int:
    """Rows of examples behind their common prefix."""
    return sum(len(example.input_ids) - 1 - prefix for example in examples)


def pack_segments(lengths: Sequence[int], cached_prefix: int = 0) -> tuple[SegmentGroup, ...]:
    """Attention groups of segments that stand one after another and share no prefix but one that is cached.

    Args:
        lengths: of the segments.
        cached_prefix: rows that all of them see, whose keys and values are at hand.
    """
    starts = [cached_prefix]
    for length in lengths:
        starts.append(starts[-1] + length)
    return _build_groups(cached_prefix, _group_spans(cached_prefix, list(pairwise(starts))), cached_prefix)


def common_prefix(examples: Sequence[Example]) -> int:
    """Length of the ids that all examples share, short enough to leave each a row that predicts its answer."""
    if len(examples) <= 1:
        return 0
    limit = min(example.answer_start for example in examples) - 1
    first, last = (choose((e.input_ids for e in examples), key=lambda ids: ids[:limit]) for choose in (min, max))
    for position in range(limit):
        if first[position] != last[position]:
            return position
    return max(limit, 0)


def _group_spans(prefix: int, spans: Sequence[Span]) -> list[list[Span]]:
    """The segments' (first row, end) by similar length."""
    groups: list[list[Span]] = []
    pending: list[Span] = []
    for span in sorted(spans, key=lambda span: span[1] - span[0]):
        length = span[1] - span[0]
        count = len(pending) + 1
        real = sum(end - start for start, end in pending) + length
        too_padded = real < (1 - MAX_GROUP_PADDING) * count * length
        too_large = count * length * (prefix + length) > MAX_GROUP_SCORES
        if pending and (too_padded or too_large):
            groups.append(pending)
            pending = []
        pending.append(span)
    return [*groups, pending] if pending else groups


def _build_groups(prefix: int, spans: Sequence[Sequence[Span]], cached: int = 0) -> tuple[SegmentGroup, ...]:
    """The prefix as a group of its own, unless it is cached, then the others, all of their rows as queries."""
    groups = []
    prefixes = [(0, [(0, prefix)])] if prefix > cached else []
    for seen, group in [*prefixes, *((prefix, group) for group in spans)]:
        longest = max(end - start for start, end in group)
        block = longest if len(group) > 1 else max(1, MAX_GROUP_SCORES // (seen + longest))
        for begin in range(0, longest, block):
            end = min(begin + block, longest)  # what stands behind a block's last query need not be looked at
            keys = _lay_out([range(start, min(stop, start + end)) for start, stop in group])
            queries = keys
            if block < longest:
                queries = _lay_out([range(group[0][0] + begin, group[0][0] + end)])
            if cached:
                queries = Places(queries.rows - cached, queries.padding)
            hidden = torch.ones(1, end - begin, seen + end, dtype=torch.bool).triu(seen + begin + 1)
            groups.append(SegmentGroup(seen, keys, queries, hidden))
    return tuple(groups)


def _build_last_group(prefix: int, spans: Sequence[Span], supervised_positions: Sequence[int]) -> SegmentGroup:
    """A group whose queries are the supervised rows of its segments, by their place in `supervised_positions`."""
    chosen = [[i for i, row in enumerate(supervised_positions) if start <= row < end] for start, end in spans]
    queries, keys = _lay_out(chosen), _lay_out([range(*span) for span in spans])
    own_place = torch.tensor(supervised_positions)[queries.rows] - torch.tensor([[start] for start, _ in spans])
    key_place = torch.arange(keys.rows.shape[1])
    behind = key_place > own_place[:, :, None]
    seen = torch.zeros(len(spans), queries.rows.shape[1], prefix, dtype=torch.bool)
    return SegmentGroup(prefix, keys, queries, torch.cat((seen, behind), dim=2))


def _lay_out(segments: Sequence[Sequence[int]]) -> Places:
    """Rows of segments, one or more each, side by side."""
    longest = max(map(len, segments))
    rows = torch.tensor([[*segment, *[segment[0]] * (longest - len(segment))] for segment in segments])
    return Places(rows, (torch.arange(longest) >= torch.tensor([[len(segment)] for segment in segments])).nonzero())

"""Which examples an optimizer step takes, and how they become micro-batches of each rank.

How a step is cut changes its result only by rounding, and the dropout masks: `step.py` divides once, by the supervised
tokens of the whole step.
"""

from collections.abc import Sequence

from minilora.qlora.batch import common_prefix, round_up_tokens
from minilora.qlora.prompt import Example


def split_into_micro_batches(
    examples: Sequence[Example], size: int, max_tokens: int | None = None
) -> list[list[Example]]:
    """The examples of a step as micro-batches of `size`, of which the last may have fewer.

    With `max_tokens`, by tokens instead: as few micro-batches as hold at most that many packed tokens each, and even
    ones, since the largest decides how much memory a run takes. A longer example has one to itself.
    """
    if max_tokens is None:
        return [list(examples[start : start + size]) for start in range(0, len(examples), size)]
    prefix = common_prefix(examples)
    bins: list[list[Example]] = []
    for count in range(1, len(examples) + 1):
        bins = _even_bins(examples, prefix, count, len(examples))
        shared = [chosen for chosen in bins if len(chosen) > 1]
        if all(round_up_tokens(prefix + _own_tokens(chosen, prefix)) <= max_tokens for chosen in shared):
            break
    return bins


def split_across_ranks(examples: Sequence[Example], count: int, size: int) -> list[list[Example]]:
    """The examples of a step for `count` ranks, even in tokens: the slowest of them decides how long a step takes.

    A share has at most `size` examples; where there are fewer than ranks, some are empty.
    """
    return _even_bins(examples, common_prefix(examples), count, size)


def _even_bins(examples: Sequence[Example], prefix: int, count: int, size: int) -> list[list[Example]]:
    """`count` bins of up to `size` examples, in their order: the longest first, each into the bin of fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids)):
        chosen = min((i for i in range(count) if len(bins[i]) < size), key=tokens.__getitem__)
        bins[chosen].append(index)
        tokens[chosen] += _own_tokens([examples[index]], prefix)
    return [[examples[index] for index in sorted(chosen)] for chosen in bins]


def _own_tokens(examples: Sequence[Example], prefix: int) -> int:
    """Tokens of examples behind their common prefix."""
    return sum(len(example.input_ids) - 1 - prefix for example in examples)

"""Which records of a file a limit takes, the order of an epoch, and each rank's micro-batches of an optimizer step.

How a step is cut changes its result only by rounding, and the dropout masks: `step.py` divides once, by the supervised
tokens of the whole step.
"""

import functools
import random
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minilora.qlora.batch import common_prefix, round_up_tokens
from minilora.qlora.prompt import Example

SAMPLE_SEED = 42  # a limit takes the same records in every run, whatever the seed of its training


def stratified_sample(labels: Iterable[Any], limit: int) -> Sequence[int]:
    """Indices of `limit` records, in their order: of each label its share, and one of each label at least.

    A label's n records are shuffled; the first is at 0, the second at 1/n, and so on, and the sample is what comes
    first over all labels. So a smaller sample is part of a larger one. A file may be sorted by label: its first records
    would be of one class. A record takes 4 bytes, and some 30 more where it may be in the sample.
    """
    groups: dict[Any, array[int]] = defaultdict(lambda: array("I"))
    for index, label in enumerate(labels):
        groups[label].append(index)
    for label, group in groups.items():
        random.Random(f"{SAMPLE_SEED}-{label}").shuffle(group)
    if not groups:
        return array("I")
    indices = np.concatenate([np.frombuffer(group, np.uint32)[:limit] for group in groups.values()])
    places = np.concatenate([np.arange(min(len(group), limit)) / len(group) for group in groups.values()])
    chosen = indices[np.lexsort((indices, places))[:limit]]
    return array("I", np.sort(chosen).tobytes())


@functools.lru_cache(maxsize=1)  # every step of an epoch asks for it
def epoch_order(num_examples: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of an epoch's examples: a permutation that is a function of (seed, epoch), in 4 bytes each.

    Python's generator, seeded with text (hashed by SHA-512), shuffles equally on every platform and version.
    """
    order = array("I", range(num_examples))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return memoryview(order).toreadonly()


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

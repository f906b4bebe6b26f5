"""What a limit takes of a file, and how a step is split: every example once, within the limit, even across ranks."""

import random
import tracemalloc
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.sampler import (
    SAMPLE_SEED,
    epoch_order,
    split_across_ranks,
    split_into_micro_batches,
    stratified_sample,
)
from minilora.qlora.batch import pack
from minilora.qlora.prompt import Example


def answered(ids: list[int], answer: int = 1) -> Example:
    """`ids` with the last `answer` of them supervised."""
    return Example(ids, [False] * (len(ids) - answer) + [True] * answer)


# A review of 2 tokens, one of 1, one of 3, behind the prefix 10 11 12; answers of 2 tokens.
EXAMPLES = [
    answered([10, 11, 12, 21, 22, 90, 99], 2),
    answered([10, 11, 12, 31, 91, 99], 2),
    answered([10, 11, 12, 41, 42, 43, 90, 99], 2),
]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=16), max_tokens=st.integers(16, 200))
@settings(deadline=None)
def test_micro_batches_by_tokens_hold_every_example_once_and_fit(lengths: list[int], max_tokens: int) -> None:
    examples = [answered([1, 2, 3, 100 + n, *[7] * (length - 1), 99]) for n, length in enumerate(lengths)]
    parts = split_into_micro_batches(examples, 8, max_tokens)
    assert sorted(id(example) for part in parts for example in part) == sorted(map(id, examples))
    for part in parts:
        assert len(part) == 1 or len(pack(part).input_ids) <= max_tokens


def test_an_example_beyond_the_limit_has_a_micro_batch_to_itself_and_the_others_share() -> None:
    examples = [answered([1, 2, 3, 100 + n, *[7] * length]) for n, length in enumerate([90, 20, 20, 10])]
    parts = split_into_micro_batches(examples, 8, 60)
    assert sorted(len(part) for part in parts) == [1, 3]


def test_micro_batches_by_tokens_are_few_and_even() -> None:
    examples = [answered([1, 2, 3, 100 + n, *[7] * length]) for n, length in enumerate([40, 30, 20, 10])]
    parts = split_into_micro_batches(examples, 1, 60)
    assert [[len(example.input_ids) - 4 for example in part] for part in parts] == [[40, 10], [30, 20]]
    assert split_into_micro_batches(examples, 1, 10**6) == [examples]


def test_micro_batches_by_examples_are_slices() -> None:
    assert split_into_micro_batches(EXAMPLES, 2) == [EXAMPLES[:2], EXAMPLES[2:]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=24), st.integers(1, 5), st.integers(0, 3))
def test_shares_hold_every_example_once_in_order_and_none_too_many(lengths: list[int], count: int, more: int) -> None:
    examples = [answered([10, 11, 20 + place, *[5] * length, 9]) for place, length in enumerate(lengths)]
    size = -(-len(examples) // count) + more
    shares = split_across_ranks(examples, count, size)
    assert len(shares) == count
    assert sorted(example.input_ids[2] - 20 for share in shares for example in share) == list(range(len(examples)))
    for share in shares:
        assert len(share) <= size
        assert [example.input_ids[2] for example in share] == sorted(example.input_ids[2] for example in share)
    assert len(examples) < count or all(shares)
    if count == 1:
        assert shares == [examples]


def test_shares_are_even_in_tokens() -> None:
    examples = [answered([7, *[place] * length, 9]) for place, length in enumerate((90, 10, 80, 20, 60, 40))]
    tokens = [sum(len(example.input_ids) for example in share) for share in split_across_ranks(examples, 3, 2)]
    assert tokens == [104, 104, 104]
    tokens = [sum(len(example.input_ids) for example in share) for share in split_across_ranks(examples, 2, 4)]
    assert max(tokens) - min(tokens) <= 20


def test_a_rank_without_an_example_has_no_micro_batch() -> None:
    assert split_across_ranks(EXAMPLES, 5, 1) == [[EXAMPLES[2]], [EXAMPLES[0]], [EXAMPLES[1]], [], []]
    assert split_into_micro_batches([], 2) == split_into_micro_batches([], 2, 100) == []


@given(labels=st.lists(st.sampled_from("aaaaabbc"), max_size=60), limit=st.integers(1, 70))
def test_a_sample_has_each_labels_share_in_the_files_order(labels: list[str], limit: int) -> None:
    chosen = list(stratified_sample(labels, limit))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(limit, len(labels))
    taken, counts = Counter(labels[index] for index in chosen), Counter(labels)
    for label, count in counts.items():
        assert abs(taken[label] - count * len(chosen) / len(labels)) < len(counts)
        assert taken[label] >= 1 or limit < len(counts)
    assert set(stratified_sample(labels, max(limit - 1, 1))) <= set(chosen)


@given(labels=st.lists(st.sampled_from([0, 1, 2, "1", "正面", None]), max_size=80), limit=st.integers(1, 90))
def test_a_sample_is_what_comes_first_of_the_shuffled_labels(labels: list[Any], limit: int) -> None:
    groups: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    places = []
    for label, group in groups.items():
        random.Random(f"{SAMPLE_SEED}-{label}").shuffle(group)
        places += [(rank / len(group), index) for rank, index in enumerate(group)]
    assert list(stratified_sample(iter(labels), limit)) == sorted(index for _, index in sorted(places)[:limit])


@pytest.mark.parametrize(("limit", "bytes_per_record"), [(100, 5), (200_000, 48)])
def test_a_sample_takes_a_few_bytes_a_record(limit: int, bytes_per_record: int) -> None:
    tracemalloc.start()
    try:
        assert len(stratified_sample((n % 2 for n in range(200_000)), limit)) == limit
        assert tracemalloc.get_traced_memory()[1] < 200_000 * bytes_per_record + 100_000
    finally:
        tracemalloc.stop()


def test_a_sample_is_the_same_in_every_run_and_not_the_first_of_each_label() -> None:
    assert list(stratified_sample([1] * 50 + [0] * 50, 6)) == [28, 29, 42, 65, 75, 93]
    assert list(stratified_sample([None] * 100, 4)) == [8, 44, 58, 71]


def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    orders = [epoch_order(50, 42, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(50, 42, 1) == orders[1] != epoch_order(50, 43, 1)
    assert len(epoch_order(0, 42, 0)) == 0
    assert epoch_order(50, 42, 1) is epoch_order(50, 42, 1)  # at every step of an epoch
    assert memoryview(epoch_order(50, 42, 1)).nbytes == 200  # type: ignore[arg-type]
    # python -c "import random; x = list(range(6)); random.Random('42-0').shuffle(x); print(x)"  (CPython 3.11)
    assert list(epoch_order(6, 42, 0)) == [0, 5, 3, 4, 1, 2]

"""The packed layout, worked out by hand, and what may never happen to a token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.qlora import batch
from minilora.qlora.attention import HeadGroups, split_heads
from minilora.qlora.batch import (
    MicroBatch,
    SegmentGroup,
    count_packed_tokens,
    pack,
    pack_segments,
    round_up_tokens,
)
from minilora.qlora.prompt import ChatTokenizer, Example, chat_example


def answered(ids: list[int], answer: int = 1) -> Example:
    """`ids` with the last `answer` of them supervised."""
    return Example(ids, [False] * (len(ids) - answer) + [True] * answer)


# A review of 2 tokens, one of 1, one of 3, behind the prefix 10 11 12; answers of 2 tokens.
EXAMPLES = [
    answered([10, 11, 12, 21, 22, 90, 99], 2),
    answered([10, 11, 12, 31, 91, 99], 2),
    answered([10, 11, 12, 41, 42, 43, 90, 99], 2),
]


def real_queries(group: SegmentGroup) -> list[tuple[int, int, int]]:
    """(segment, index, token) of all queries that are no padding."""
    padding = {tuple(index) for index in group.padding.nonzero().tolist()}
    everything = ((s, i, token) for s, tokens in enumerate(group.queries.tolist()) for i, token in enumerate(tokens))
    return [(s, i, token) for s, i, token in everything if (s, i) not in padding]


def seen_by_queries(group: SegmentGroup) -> dict[int, list[int]]:
    """For each query of a group, the packed tokens that it attends to."""
    found = {}
    for segment, query, token in real_queries(group):
        keys = [*range(group.prefix), *group.keys[segment].tolist()]
        found[token] = keys[: int(group.last_key.expand(len(group.keys), -1)[segment, query]) + 1]
    return found


def seen_tokens(packed: MicroBatch) -> list[list[int]]:
    """For each token, the tokens that it attends to, as `attention` reads the groups."""
    seen: dict[int, list[int]] = {}
    for group in packed.groups:
        assert not seen.keys() & seen_by_queries(group).keys()
        seen |= seen_by_queries(group)
    assert sorted(seen) == list(range(len(seen)))
    assert len(packed.input_ids) == round_up_tokens(len(seen))  # what is in no group is padding
    return [seen[token] for token in range(len(seen))]


def test_the_common_prefix_stands_once_and_the_segments_follow() -> None:
    packed = pack(EXAMPLES)
    assert packed.input_ids.tolist() == [10, 11, 12, 21, 22, 90, 31, 91, 41, 42, 43, 90]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5, 6]
    assert packed.supervised_positions.tolist() == [4, 5, 6, 7, 10, 11]
    assert packed.targets.tolist() == [90, 99, 91, 99, 90, 99]
    assert packed.example_indices.tolist() == [0, 0, 1, 1, 2, 2]
    assert (packed.num_examples, packed.num_real_tokens, packed.num_supervised) == (3, 21, 6)
    assert packed.input_ids.dtype == packed.position_ids.dtype == packed.targets.dtype == torch.int64


def test_the_tokens_of_an_answer_have_the_weight_of_their_example() -> None:
    assert pack(EXAMPLES).weights is None
    packed = pack(EXAMPLES, weights=[0.5, 3.0, 0.1])
    assert torch.equal(packed.weights, torch.tensor([0.5, 0.5, 3.0, 3.0, 0.1, 0.1]))
    assert packed.num_supervised == 6


def test_without_sharing_every_example_stands_alone() -> None:
    packed = pack(EXAMPLES, share_prefix=False)
    assert packed.input_ids.tolist() == [i for e in EXAMPLES for i in e.input_ids[:-1]]
    assert packed.position_ids.tolist() == [p for e in EXAMPLES for p in range(len(e.input_ids) - 1)]
    assert packed.supervised_positions.tolist() == [4, 5, 9, 10, 16, 17]
    assert packed.targets.tolist() == [90, 99, 91, 99, 90, 99]
    assert all(group.prefix == 0 for group in packed.groups)
    assert packed.num_real_tokens == 21


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_token_sees_what_it_would_see_alone(share_prefix: bool) -> None:
    packed = pack(EXAMPLES, share_prefix)
    seen = seen_tokens(packed)
    for token, target, owner in zip(packed.supervised_positions, packed.targets, packed.example_indices, strict=True):
        ids = packed.input_ids[seen[token]].tolist()
        assert [*ids, target] == EXAMPLES[owner].input_ids[: len(ids) + 1]
        assert packed.position_ids[seen[token]].tolist() == list(range(len(ids)))


def test_a_single_example_has_no_shared_prefix() -> None:
    packed = pack(EXAMPLES[:1])
    assert packed.input_ids.tolist() == [10, 11, 12, 21, 22, 90]
    assert packed.position_ids.tolist() == list(range(6))
    assert packed.supervised_positions.tolist() == [4, 5]
    assert [group.prefix for group in packed.groups] == [0]


def test_equal_examples_share_all_but_the_token_that_predicts_the_answer() -> None:
    packed = pack([EXAMPLES[0], EXAMPLES[0]])
    assert packed.input_ids.tolist() == [10, 11, 12, 21, 22, 90, 22, 90]
    assert packed.supervised_positions.tolist() == [4, 5, 6, 7]


def test_an_example_that_is_the_beginning_of_another_keeps_its_answer_token() -> None:
    short, long = answered([10, 11, 90]), answered([10, 11, 12, 90])
    packed = pack([short, long])
    assert packed.input_ids.tolist() == [10, 11, 11, 12]
    assert packed.supervised_positions.tolist() == [1, 3]
    assert packed.position_ids.tolist() == [0, 1, 1, 2]


def test_examples_with_nothing_in_common_share_nothing() -> None:
    packed = pack([answered([1, 2, 3]), answered([4, 5, 6])])
    assert packed.input_ids.tolist() == [1, 2, 4, 5]
    assert packed.position_ids.tolist() == [0, 1, 0, 1]


def test_a_chat_with_several_answers_is_supervised_in_all_of_them(chat_tokenizer: ChatTokenizer) -> None:
    chats = [
        [("user", "问一"), ("assistant", "答一"), ("user", "问二"), ("assistant", "答二")],
        [("user", "问三"), ("assistant", "长一点的回答")],
    ]
    examples = [
        chat_example(chat_tokenizer, messages, max_length=512, where="f:1", default_system="s") for messages in chats
    ]
    packed = pack(examples)
    seen = seen_tokens(packed)
    found: list[list[int]] = [[], []]
    for token, target, owner in zip(packed.supervised_positions, packed.targets, packed.example_indices, strict=True):
        ids = packed.input_ids[seen[token]].tolist()
        assert [*ids, target] == examples[owner].input_ids[: len(ids) + 1]
        found[owner].append(int(target))
    for example, targets in zip(examples, found, strict=True):
        assert targets == [i for i, counts in zip(example.input_ids, example.supervised, strict=True) if counts]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20), prefix=st.integers(0, 9))
@settings(deadline=None)
def test_groups_hold_every_token_once_and_little_padding(lengths: list[int], prefix: int) -> None:
    examples = [answered([*range(prefix), 100 + n, *[7] * (length - 1), 99]) for n, length in enumerate(lengths)]
    packed = pack(examples)
    tokens = [token for group in packed.groups for _, _, token in real_queries(group)]
    assert sorted(tokens) == list(range(prefix + sum(lengths)))
    for group in packed.groups:
        lengths = group.keys.shape[1] - group.padding.sum(1)
        scores, padded = (lengths * (group.prefix + lengths)).sum(), group.keys.numel() * group.num_keys
        assert scores >= (1 - batch.MAX_PADDED_SCORES) * padded
    seen_tokens(packed)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_last_layers_queries_are_the_supervised_tokens_and_see_what_they_saw(share_prefix: bool) -> None:
    packed = pack(EXAMPLES, share_prefix)
    seen = seen_tokens(packed)
    found = {token: tokens for group in packed.last_groups for token, tokens in seen_by_queries(group).items()}
    assert found == {place: seen[token] for place, token in enumerate(packed.supervised_positions.tolist())}


def test_a_group_of_too_many_scores_is_cut_along_its_segments() -> None:
    (group,) = pack_segments([10] * 8)
    assert [piece.keys.shape for piece in group.cut(10 * 10 * 4)] == [(4, 10)] * 2


@pytest.mark.parametrize("groups", [pack(EXAMPLES).groups, pack(EXAMPLES).last_groups, pack_segments([9, 3, 8])])
def test_a_segment_of_too_many_scores_is_cut_into_blocks_of_queries(groups: tuple[SegmentGroup, ...]) -> None:
    for group in groups:
        pieces = list(group.cut(12))
        assert all(piece.queries.numel() * piece.num_keys <= 12 or piece.queries.numel() == 1 for piece in pieces)
        found: dict[int, list[int]] = {}
        for piece in pieces:
            found |= seen_by_queries(piece)
        assert found == seen_by_queries(group)


@pytest.mark.parametrize(
    ("prefix", "length", "supervised", "is_fused"),
    [(0, 599, 1, False), (0, 600, 1, True), (100, 500, 1, True), (400, 200, 1, False)],
)
def test_long_groups_are_fused_unless_their_prefix_is_longer(
    prefix: int, length: int, supervised: int, is_fused: bool
) -> None:
    examples = [answered([*range(prefix), 1000 + n, *[7] * length], supervised) for n in range(2)]
    packed = pack(examples)
    assert [group.is_fused for group in packed.groups if group.prefix == prefix][-1] == is_fused
    assert not any(group.is_fused for group in packed.last_groups)  # one query


def test_tokens_behind_a_cached_prefix_see_what_they_saw_behind_a_computed_one() -> None:
    whole, behind = pack(EXAMPLES), pack(EXAMPLES, cached_prefix=3)
    assert behind.input_ids.tolist() == whole.input_ids.tolist()[3:]
    assert behind.position_ids.tolist() == whole.position_ids.tolist()[3:]
    assert behind.supervised_positions.tolist() == [token - 3 for token in whole.supervised_positions.tolist()]
    seen = seen_tokens(whole)
    found = {token: tokens for group in behind.groups for token, tokens in seen_by_queries(group).items()}
    assert found == {token - 3: seen[token] for token in range(3, len(whole.input_ids))}
    last, last_behind = ([seen_by_queries(group) for group in packed.last_groups] for packed in (whole, behind))
    assert last_behind == last


@pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES[:1], [EXAMPLES[0]] * 40, [answered([1, 2]), answered([3, 4])]])
def test_tokens_are_counted_as_they_are_packed(examples: list[Example]) -> None:
    assert count_packed_tokens(examples) == len(pack(examples).input_ids)


def test_token_counts_repeat_and_little_is_added() -> None:
    rounded = [round_up_tokens(tokens) for tokens in range(1, 4097)]
    assert rounded[:32] == list(range(1, 33))
    assert all(tokens <= found <= tokens * 17 / 16 for tokens, found in enumerate(rounded, start=1))
    assert sorted(set(rounded[512:1024])) == list(range(544, 1025, 32))


def test_padding_repeats_the_first_token_of_its_segment() -> None:
    (group,) = pack_segments([3, 4])
    assert group.keys.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]
    assert group.padding.nonzero().tolist() == [[0, 3]]


def test_moving_a_batch_moves_what_the_model_reads_and_keeps_every_number() -> None:
    packed = pack(EXAMPLES, weights=[0.5, 3.0, 0.1])
    moved = packed.to(torch.device("meta"))
    names = [name for name, value in vars(packed).items() if isinstance(value, torch.Tensor)]
    assert len(names) == 6
    assert pack(EXAMPLES).to(torch.device("meta")).weights is None
    assert all(getattr(moved, name).device.type == "meta" for name in names)
    assert (moved.num_examples, moved.num_real_tokens, moved.num_supervised) == (3, 21, 6)
    assert moved.groups is packed.groups
    split = split_heads(moved.groups, 4, 2, num_queries=12, like=torch.empty(0, device="meta"))
    parts = [*split, *(group for heads in split if isinstance(heads, HeadGroups) for group in heads.groups)]
    assert len(parts) > len(split)
    assert all(tensor.device.type == "meta" for g in parts for tensor in vars(g).values() if hasattr(tensor, "device"))

"""Attention over packed segments, by both ways, against its reference: results, gradients, and in half precision."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.qlora import attention as attention_module
from minilora.qlora import batch, ops
from minilora.qlora.attention import FusedGroup, HeadGroups, attention_reference, decode_attention, split_heads
from minilora.qlora.batch import SegmentGroup, pack, pack_segments
from minilora.qlora.prompt import Example


def random(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: tuple[SegmentGroup, ...]) -> torch.Tensor:
    return attention_module.attention(q, k, v, split_heads(groups, q.shape[1], k.shape[1], num_queries=len(q), like=q))


def attention_mask(segments: list[tuple[int, int]], prefix: int) -> torch.Tensor:
    """(T, T) True = masked: each token attends to the prefix and to its own segment's tokens up to itself."""
    total = segments[-1][1]
    mask = torch.ones(total, total, dtype=torch.bool)
    for start, end in [(0, prefix), *segments]:
        mask[start:end, start:end] = False
        mask[start:end, :prefix] = False
    return mask | torch.ones_like(mask).triu(1)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[tuple[int, int]], prefix: int
) -> torch.Tensor:
    return attention_reference(q, k, v, attention_mask(segments, prefix))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 7, 2, 4]])
def test_attention_over_segments_equals_one_segment_at_a_time(heads: int, kv_heads: int, lengths: list[int]) -> None:
    total = sum(lengths)
    q, k, v = random(total, heads, 4), random(total, kv_heads, 4), random(total, kv_heads, 4)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    expected = reference(q, k, v, segments, prefix=0)
    torch.testing.assert_close(attention(q, k, v, pack_segments(lengths)), expected)


def gradients(out: torch.Tensor, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, inputs, dout)


def test_attention_in_blocks_of_queries_equals_one_segment_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "MAX_SCORES_BYTES", 20 * 4 * 8)
    q, k, v = random(12, 4, 4), random(12, 2, 4), random(12, 2, 4)
    groups = pack_segments([9, 3])
    (split,) = split_heads(groups, 4, 2, num_queries=12, like=q)
    assert isinstance(split, HeadGroups)
    assert len(split.groups) > 2
    dout = random(12, 4, 4, requires_grad=False)
    found, expected = attention(q, k, v, groups), reference(q, k, v, [(0, 9), (9, 12)], prefix=0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, (q, k, v), dout), gradients(expected, (q, k, v), dout))


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("lengths", [[9], [8, 9], [9, 2, 1]])  # one segment; two padded; and some that stay short
def test_fused_attention_equals_one_segment_at_a_time(
    prefix: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FUSED_KEYS", 8)
    segments, groups = shared_prefix_batch(lengths, prefix) if prefix else ([], pack_segments(lengths))
    if not prefix:
        segments = list(pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    total = segments[-1][1] + 2  # padding behind them
    q, k, v = random(total, 4, 4), random(total, 2, 4), random(total, 2, 4)
    split = split_heads(groups, 4, 2, num_queries=total, like=q)
    assert any(isinstance(group, FusedGroup) for group in split)
    dout = random(total, 4, 4, requires_grad=False)
    dout[-2:] = 0
    found = attention_module.attention(q, k, v, split)
    expected = torch.cat((reference(q[:-2], k[:-2], v[:-2], segments, prefix), torch.zeros(2, 4, 4)))
    torch.testing.assert_close(found[:-2], expected[:-2])
    torch.testing.assert_close(gradients(found, (q, k, v), dout), gradients(expected, (q, k, v), dout))


@pytest.mark.parametrize("prefix", [0, 3])
def test_heads_are_repeated_where_no_fused_kernel_takes_groups(prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4, or in float32 on any GPU: with groups PyTorch would compute T x T scores there."""
    monkeypatch.setattr(batch, "FUSED_KEYS", 8)
    monkeypatch.setattr(attention_module, "_takes_groups", lambda *_: False)
    asked = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def look(*tensors: torch.Tensor, **kind: bool) -> torch.Tensor:
        asked.append((tensors[1].shape[1], tensors[2].shape[1], kind))
        return fused(*tensors, **kind)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    segments, groups = shared_prefix_batch([9, 8], prefix) if prefix else ([(0, 9)], pack_segments([9]))
    total = segments[-1][1]
    q, k, v = random(total, 4, 4), random(total, 2, 4), random(total, 2, 4)
    found, expected = attention(q, k, v, groups), reference(q, k, v, segments, prefix)
    assert asked == [(4, 4, {"is_causal": True, "enable_gqa": False})]
    torch.testing.assert_close(found, expected)
    dout = random(total, 4, 4, requires_grad=False)
    torch.testing.assert_close(gradients(found, (q, k, v), dout), gradients(expected, (q, k, v), dout))


def test_some_kernel_computes_long_segments_on_every_gpu_and_it_is_not_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 on a T4 neither fused kernel does; cuDNN's backward pass is another one each time."""
    monkeypatch.setattr(batch, "FUSED_KEYS", 8)
    asked = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def look(*tensors: torch.Tensor, **kind: bool) -> torch.Tensor:
        asked.append((torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return fused(*tensors, **kind)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    attention(random(9, 4, 4), random(9, 2, 4), random(9, 2, 4), pack_segments([9]))
    assert asked == [(True, False)]


@pytest.mark.parametrize(("supervised", "is_fused"), [(8, True), (4, True), (3, False)])
def test_supervised_queries_of_a_long_segment_are_fused_unless_they_are_few(
    supervised: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FUSED_KEYS", 8)
    packed = pack([Example(list(range(11)), [False] * (11 - supervised) + [True] * supervised)])
    q, k, v = random(supervised, 4, 4), random(10, 2, 4), random(10, 2, 4)
    split = split_heads(packed.last_groups, 4, 2, num_queries=supervised, like=q)
    assert [type(group) for group in split] == [FusedGroup if is_fused else HeadGroups]
    whole = torch.cat((torch.zeros(10 - supervised, 4, 4, dtype=q.dtype), q))
    found = attention_module.attention(q, k, v, split)
    expected = reference(whole, k, v, [(0, 10)], prefix=0)[10 - supervised :]
    torch.testing.assert_close(found, expected)
    dout = random(supervised, 4, 4, requires_grad=False)
    torch.testing.assert_close(gradients(found, (q, k, v), dout), gradients(expected, (q, k, v), dout))


def test_a_long_segment_of_which_every_token_is_supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FUSED_KEYS", 8)
    packed = pack([Example(list(range(38)), [False] + [True] * 37)])
    tokens = len(packed.input_ids)
    assert tokens > 37 == packed.num_supervised  # padding behind the keys, none behind the queries
    q, k, v = random(37, 4, 4), random(tokens, 2, 4), random(tokens, 2, 4)
    split = split_heads(packed.last_groups, 4, 2, num_queries=37, like=q)
    assert [type(group) for group in split] == [FusedGroup]
    found, expected = attention_module.attention(q, k, v, split), reference(q, k[:37], v[:37], [(0, 37)], prefix=0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cached", [1, 4])
def test_a_long_segment_behind_a_cached_prefix_attends_as_in_one_pass(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FUSED_KEYS", 8)
    q, k, v = random(13, 4, 4), random(13, 2, 4), random(13, 2, 4)
    split = split_heads(pack_segments([13 - cached], cached), 4, 2, num_queries=13 - cached, like=q)
    assert [type(group) for group in split] == [FusedGroup]
    found = attention_module.attention(q[cached:], k, v, split)
    torch.testing.assert_close(found, reference(q, k, v, [(0, 13)], prefix=0)[cached:])


# What bfloat16 and float16 make of q, k and v as Qwen2.5 has them, against float64 on the same values: relative errors
# of output and gradients. Rounding each of them once is 0.2 %, weights and scores rounded in between make the rest.
# Without the subtraction of the first key the largest are 35 % and 6 %.
LARGEST_ERROR = {torch.bfloat16: 0.02, torch.float16: 0.003}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "num_pieces"), [([76], 1), ([30, 50, 28, 90], 1), ([800], 1), ([500], 400)], ids=str
)
def test_attention_in_half_precision_on_keys_as_large_as_qwens(
    dtype: torch.dtype, lengths: list[int], num_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias of 145 in one key channel, one in the query that makes scores of some hundred, the rest of size 1."""
    if num_pieces > 1:  # as of a far longer segment: each adds to the first keys' gradient
        monkeypatch.setattr(attention_module, "MAX_SCORES_BYTES", 2 * 14 * lengths[0] ** 2 // num_pieces)
    total = sum(lengths)
    bias_q, bias_k = torch.zeros(64), torch.zeros(2, 64)
    bias_q[31], bias_k[0, 31], bias_k[1, 63] = 12, 145, -60  # the slowest rotating channels: 31 and 63 are a pair
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    cos, sin = ops.rotary_table(position_ids, 64, 1e6, torch.float32)
    q = ops.rotary(torch.randn(total, 14, 64) * 2 + bias_q, cos, sin).to(dtype)
    k = ops.rotary(torch.randn(total, 2, 64) + bias_k, cos, sin).to(dtype)
    v, dout = torch.randn(total, 2, 64).to(dtype), torch.randn(total, 14, 64).to(dtype)
    groups = pack_segments(lengths)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = tuple(x.to(dtype).requires_grad_() for x in (q, k, v))
        out = attention(*inputs, groups)
        return [x.detach().double() for x in (out, *gradients(out, inputs, dout.to(dtype)))]

    for name, found, exact in zip(("output", "dq", "dk", "dv"), run(dtype), run(torch.float64), strict=True):
        error = ((found - exact).norm() / exact.norm()).item()
        assert error < LARGEST_ERROR[dtype], f"{name}: {error:.2%}"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
def test_decode_attention_equals_the_last_token_of_a_whole_pass(heads: int, kv_heads: int) -> None:
    q, k, v = random(9, heads, 4), random(9, kv_heads, 4), random(9, kv_heads, 4)
    expected = reference(q, k, v, [(0, 9)], prefix=0)
    torch.testing.assert_close(decode_attention(q[-1:], k, v), expected[-1:])


@pytest.mark.parametrize("cached", [1, 4, 8])
def test_tokens_behind_a_cached_prefix_attend_as_in_one_pass(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(9, 4, 4), random(9, 2, 4), random(9, 2, 4)
    expected = reference(q, k, v, [(0, 9)], prefix=0)[cached:]
    groups = pack_segments([9 - cached], cached)
    torch.testing.assert_close(attention(q[cached:], k, v, groups), expected)
    monkeypatch.setattr(attention_module, "MAX_SCORES_BYTES", 18 * 4 * 8)
    torch.testing.assert_close(attention(q[cached:], k, v, groups), expected)


def shared_prefix_batch(lengths: list[int], prefix: int) -> tuple[list[tuple[int, int]], tuple[SegmentGroup, ...]]:
    examples = []
    for number, length in enumerate(lengths):
        ids = [*range(prefix), *range(100 * (number + 1), 100 * (number + 1) + length + 1)]
        examples.append(Example(ids, [False] * (len(ids) - 1) + [True]))
    packed = pack(examples)
    starts = [prefix]
    for length in lengths:
        starts.append(starts[-1] + length)
    return list(pairwise(starts)), packed.groups


@pytest.mark.parametrize("lengths", [[3, 3], [2, 6, 3, 12]])
def test_attention_with_a_shared_prefix_equals_one_segment_at_a_time(lengths: list[int]) -> None:
    segments, groups = shared_prefix_batch(lengths, prefix=4)
    total = segments[-1][1]
    q, k, v = random(total, 4, 4), random(total, 2, 4), random(total, 2, 4)
    torch.testing.assert_close(attention(q, k, v, groups), reference(q, k, v, segments, prefix=4))


def test_tokens_in_no_group_are_zero_and_send_nothing_back() -> None:
    q, k, v = random(9, 4, 4), random(9, 2, 4), random(9, 2, 4)
    groups = pack_segments([4, 3])  # two tokens of padding behind them
    out = attention(q, k, v, groups)
    torch.testing.assert_close(out[:7], reference(q[:7], k[:7], v[:7], [(0, 4), (4, 7)], prefix=0))
    assert torch.equal(out[7:], torch.zeros_like(out[7:]))
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert gradient[:7].abs().sum() > 0
        assert torch.equal(gradient[7:], torch.zeros_like(gradient[7:]))


@pytest.mark.parametrize("prefix", [0, 3])
def test_attention_gradient(prefix: int) -> None:
    if prefix:
        segments, groups = shared_prefix_batch([2, 5, 3], prefix)
    else:
        segments, groups = [(0, 4), (4, 6)], pack_segments([4, 2])
    total = segments[-1][1]
    inputs = (random(total, 4, 2), random(total, 2, 2), random(total, 2, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, groups), inputs)


def test_only_the_chosen_backward_pass_is_deterministic() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_deterministic_debug_mode())
            return grads[0]

    x = torch.ones(2, requires_grad=True)
    chosen = Look.apply(Look.apply(x))
    attention_module._sum_in_one_order(chosen.grad_fn)
    Look.apply(chosen).sum().backward()
    assert seen == [0, 2, 0]  # off, error, off; the last first
    assert torch.equal(x.grad, torch.ones(2))


def test_no_mask_of_a_long_segment_is_kept() -> None:
    """A long turn behind a cached conversation that is longer still, which is nothing for the fused kernel."""
    like = torch.empty(0, dtype=torch.bfloat16)
    (short,) = split_heads(pack_segments([1400], 1600), 14, 2, num_queries=1400, like=like)
    assert isinstance(short, HeadGroups)
    assert all(group.mask is None for group in short.groups)
    (few,) = split_heads(pack_segments([30, 40]), 14, 2, num_queries=70, like=like)
    assert isinstance(few, HeadGroups)
    assert all(group.mask is not None for group in few.groups)


class AnyOrder(TorchDispatchMode):
    """`index_add_` adds in a random order, as a GPU's atomics do."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.index_add.default, torch.ops.aten.index_add_.default):
            into, dim, index, source = args
            order = torch.randperm(len(index))
            args = (into, dim, index[order], source.index_select(dim, order))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("lengths", "prefix", "supervised"),
    [
        ([20, 17, 20, 19, 18], 6, 5),  # fused behind a prefix; the last layer's queries are few
        ([60], 0, 25),  # in the last layer more scores than MAX_SCORES_BYTES, so the segment is in pieces
        ([30, 28, 29], 40, 5),  # and in the others too
        ([3, 2, 3, 4, 3, 2], 5, 1),
    ],
)
def test_gradients_are_the_same_in_whatever_order_index_add_adds(
    lengths: list[int], prefix: int, supervised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a resumed run ends in to the bit, a GPU's included."""
    monkeypatch.setattr(batch, "FUSED_KEYS", 16)
    monkeypatch.setattr(attention_module, "MAX_SCORES_BYTES", 500 * 4 * 4)
    ids = [[*range(prefix), 90 + i, *[30] * length] for i, length in enumerate(lengths)]
    packed = pack([Example(x, [False] * (len(x) - supervised) + [True] * supervised) for x in ids])
    total, count = len(packed.input_ids), packed.num_supervised
    for queries, groups in ((total, packed.groups), (count, packed.last_groups)):
        inputs = tuple(random(tokens, heads, 4).float() for tokens, heads in ((queries, 4), (total, 2), (total, 2)))
        dout, found = torch.randn(queries, 4, 4), []
        for _ in range(3):
            q, k, v = (x.detach().requires_grad_() for x in inputs)
            with AnyOrder():
                found.append(gradients(attention(q, k, v, groups), (q, k, v), dout))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))

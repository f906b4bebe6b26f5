"""Every hand-derived gradient against finite differences, every function against its reference."""

from itertools import pairwise

import pytest
import torch

from minilora.qlora import batch, ops
from minilora.qlora.batch import SegmentGroup, pack, pack_segments, split_heads
from minilora.qlora.prompt import Example


def random(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: tuple[SegmentGroup, ...]) -> torch.Tensor:
    return ops.attention(q, k, v, split_heads(groups, q.shape[1], k.shape[1], num_queries=len(q)))


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
    return ops.attention_reference(q, k, v, attention_mask(segments, prefix))


def test_rms_norm_equals_its_reference() -> None:
    x, weight = random(5, 8), random(8)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), ops.rms_norm_reference(x, weight, 1e-6))


def test_rms_norm_gradient() -> None:
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), (random(5, 8), random(8)))


def test_rms_norm_of_large_float16_values_is_finite() -> None:
    x = torch.full((2, 64), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_swiglu_equals_its_reference_and_gradient() -> None:
    gate, up = random(5, 6), random(5, 6)
    torch.testing.assert_close(ops.swiglu(gate, up), ops.swiglu_reference(gate, up))
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))


def test_rotary_turns_each_pair_by_its_angle() -> None:
    positions = torch.tensor([0, 1, 7])
    x = random(3, 2, 4)
    cos, sin = ops.rotary_table(positions, 4, 100.0, torch.float64)
    as_complex = torch.complex(x[..., :2], x[..., 2:])
    angle = positions[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    expected = as_complex * torch.polar(torch.ones_like(angle), angle)[:, None]
    # The table's angles are float32.
    torch.testing.assert_close(
        ops.rotary(x, cos, sin), torch.cat((expected.real, expected.imag), -1), rtol=1e-6, atol=1e-6
    )


def test_rotary_equals_its_reference_and_gradient() -> None:
    cos, sin = ops.rotary_table(torch.tensor([0, 3, 9]), 4, 100.0, torch.float64)
    x = random(3, 2, 4)
    torch.testing.assert_close(ops.rotary(x, cos, sin), ops.rotary_reference(x, cos, sin))
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, cos, sin), (random(3, 2, 4),))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 7, 2, 4]])
def test_attention_over_segments_equals_one_segment_at_a_time(heads: int, kv_heads: int, lengths: list[int]) -> None:
    total = sum(lengths)
    q, k, v = random(total, heads, 4), random(total, kv_heads, 4), random(total, kv_heads, 4)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    expected = reference(q, k, v, segments, prefix=0)
    torch.testing.assert_close(attention(q, k, v, pack_segments(lengths)), expected)


def test_attention_in_blocks_of_queries_equals_one_segment_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_GROUP_SCORES", 20)
    q, k, v = random(12, 4, 4), random(12, 2, 4), random(12, 2, 4)
    groups = pack_segments([9, 3])
    assert len(groups) > 2
    dout = torch.randn(12, 4, 4, dtype=torch.float64)
    found, expected = attention(q, k, v, groups), reference(q, k, v, [(0, 9), (9, 12)], prefix=0)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
def test_decode_attention_equals_the_last_token_of_a_whole_pass(heads: int, kv_heads: int) -> None:
    q, k, v = random(9, heads, 4), random(9, kv_heads, 4), random(9, kv_heads, 4)
    expected = reference(q, k, v, [(0, 9)], prefix=0)
    torch.testing.assert_close(ops.decode_attention(q[-1:], k, v), expected[-1:])


@pytest.mark.parametrize("cached", [1, 4, 8])
def test_tokens_behind_a_cached_prefix_attend_as_in_one_pass(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(9, 4, 4), random(9, 2, 4), random(9, 2, 4)
    expected = reference(q, k, v, [(0, 9)], prefix=0)[cached:]
    groups = pack_segments([9 - cached], cached)
    torch.testing.assert_close(attention(q[cached:], k, v, groups), expected)
    monkeypatch.setattr(batch, "MAX_GROUP_SCORES", 18)
    blocks = pack_segments([9 - cached], cached)
    assert len(blocks) >= len(groups)
    torch.testing.assert_close(attention(q[cached:], k, v, blocks), expected)


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

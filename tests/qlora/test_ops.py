"""Every hand-derived gradient against finite differences, every function against its formula in plain PyTorch."""

import shutil
from itertools import pairwise

import pytest
import torch

from minilora.qlora import batch, ops
from minilora.qlora.batch import SegmentGroup, pack, pack_segments
from minilora.qlora.prompt import Example


def random(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: tuple[SegmentGroup, ...]) -> torch.Tensor:
    return ops.attention(q, k, v, ops.split_heads(groups, q.shape[1], k.shape[1], len(q)))


def attention_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[tuple[int, int]], prefix: int
) -> torch.Tensor:
    """One segment at a time, every query head with its own copy of keys and values."""
    repeats = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for start, end in ([(0, prefix)] if prefix else []) + segments:
        rows = list(range(start, end))
        seen = rows if start < prefix else [*range(prefix), *rows]
        keys, values = (x[seen].repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) / q.shape[-1] ** 0.5
        hidden = torch.ones(len(rows), len(seen), dtype=torch.bool).triu(len(seen) - len(rows) + 1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return out


def test_rms_norm_equals_its_formula() -> None:
    x, weight = random(5, 8), random(8)
    expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected)


def test_rms_norm_gradient() -> None:
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), (random(5, 8), random(8)))


def test_rms_norm_of_large_float16_rows_is_finite() -> None:
    x = torch.full((2, 64), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_swiglu_equals_its_formula_and_gradient() -> None:
    gate, up = random(5, 6), random(5, 6)
    torch.testing.assert_close(ops.swiglu(gate, up), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))


def test_swiglu_gradients_in_one_pass_are_the_same() -> None:
    dh, gate, up = (random(5, 6, requires_grad=False) for _ in range(3))
    found, expected = (f(dh, gate, up) for f in (ops._swiglu_gradients_in_one_pass, ops._swiglu_gradients))
    torch.testing.assert_close(found, expected)
    rounded = ops._swiglu_gradients_in_one_pass(*(x.bfloat16() for x in (dh, gate, up)))
    assert {x.dtype for x in rounded} == {torch.bfloat16}
    torch.testing.assert_close([x.double() for x in rounded], list(expected), rtol=0.05, atol=0.05)


def test_what_cannot_be_compiled_is_said_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def fail(*_: object) -> None:
            raise RuntimeError("no C++ compiler found\nsecond line")

        return fail

    before = ops._SwiGLU.gradients
    monkeypatch.setattr(torch, "compile", broken)
    assert ops.compile_swiglu(True, torch.float32, torch.device("cpu")) == "no C++ compiler found"
    assert ops._SwiGLU.gradients is before


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler deprecates parts of itself
def test_compiled_swiglu_gradient() -> None:
    before = ops._SwiGLU.gradients
    try:
        assert ops.compile_swiglu(True, torch.float64, torch.device("cpu")) is None
        assert ops._SwiGLU.gradients is not before
        assert torch.autograd.gradcheck(ops.swiglu, (random(5, 6), random(5, 6)))
    finally:
        assert ops.compile_swiglu(False, torch.float64, torch.device("cpu")) is None
    assert ops._SwiGLU.gradients is before


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


def test_rotary_gradient() -> None:
    cos, sin = ops.rotary_table(torch.tensor([0, 3, 9]), 4, 100.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, cos, sin), (random(3, 2, 4),))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 7, 2, 4]])
def test_attention_over_segments_equals_one_segment_at_a_time(heads: int, kv_heads: int, lengths: list[int]) -> None:
    rows = sum(lengths)
    q, k, v = random(rows, heads, 4), random(rows, kv_heads, 4), random(rows, kv_heads, 4)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    segments = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    expected = attention_by_hand(q, k, v, segments, prefix=0)
    torch.testing.assert_close(attention(q, k, v, pack_segments(lengths)), expected)


def test_attention_in_blocks_of_queries_equals_one_segment_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_GROUP_SCORES", 20)
    q, k, v = random(12, 4, 4), random(12, 2, 4), random(12, 2, 4)
    groups = pack_segments([9, 3])
    assert len(groups) > 2
    dout = torch.randn(12, 4, 4, dtype=torch.float64)
    found, expected = attention(q, k, v, groups), attention_by_hand(q, k, v, [(0, 9), (9, 12)], prefix=0)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (2, 2)])
def test_attention_of_the_last_row_equals_that_row_of_all(heads: int, kv_heads: int) -> None:
    q, k, v = random(9, heads, 4), random(9, kv_heads, 4), random(9, kv_heads, 4)
    expected = attention_by_hand(q, k, v, [(0, 9)], prefix=0)
    torch.testing.assert_close(ops.decode_attention(q[-1:], k, v), expected[-1:])


@pytest.mark.parametrize("cached", [1, 4, 8])
def test_rows_behind_a_cached_prefix_attend_as_in_one_pass(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(9, 4, 4), random(9, 2, 4), random(9, 2, 4)
    expected = attention_by_hand(q, k, v, [(0, 9)], prefix=0)[cached:]
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
    rows = segments[-1][1]
    q, k, v = random(rows, 4, 4), random(rows, 2, 4), random(rows, 2, 4)
    torch.testing.assert_close(attention(q, k, v, groups), attention_by_hand(q, k, v, segments, prefix=4))


def test_rows_in_no_group_are_zero_and_send_nothing_back() -> None:
    q, k, v = random(9, 4, 4), random(9, 2, 4), random(9, 2, 4)
    groups = pack_segments([4, 3])  # two rows of padding behind them
    out = attention(q, k, v, groups)
    torch.testing.assert_close(out[:7], attention_by_hand(q[:7], k[:7], v[:7], [(0, 4), (4, 7)], prefix=0))
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
    rows = segments[-1][1]
    inputs = (random(rows, 4, 2), random(rows, 2, 2), random(rows, 2, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, groups), inputs)

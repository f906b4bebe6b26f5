"""Sequences laid out for flash attention, whose kernel only a GPU has: here its definition takes its place."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.qlora import flash
from minilora.qlora.attention import attention, attention_reference, split_heads
from minilora.qlora.batch import SegmentGroup, pack, pack_segments
from minilora.qlora.flash import FlashSegments, lay_out
from minilora.qlora.prompt import Example
from minilora.weights import flash_probe

H, K, D = 4, 2, 8
OPERATORS = torch.ops.aten._flash_attention_forward.default, torch.ops.aten._flash_attention_backward.default


def by_definition(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: FlashSegments, *, first_key: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel documents: sequences by their starts, the causal mask ending at the last key."""
    of_queries, of_keys = (row.tolist() for row in segments.starts)
    assert (of_queries[-1], of_keys[-1]) == (len(q), len(keys))
    outs = []
    for i in range(len(of_queries) - 1):
        queries, seen = slice(of_queries[i], of_queries[i + 1]), slice(of_keys[i], of_keys[i + 1])
        size = len(q[queries]), len(keys[seen])
        assert size[0] <= segments.longest[0]
        assert size[1] <= segments.longest[1]
        mask = torch.ones(size, dtype=torch.bool).triu(1 if first_key else 1 + size[1] - size[0])
        outs.append(attention_reference(q[queries], keys[seen], values[seen], mask))
    return torch.cat(outs), q.new_empty(q.shape[:2])


def backward_by_definition(given: tuple[torch.Tensor, ...], segments: FlashSegments) -> tuple[torch.Tensor, ...]:
    dout, q, keys, values, mixed, logsumexp = given
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == (2, False)
    assert (mixed.shape, logsumexp.shape) == (q.shape, q.shape[:2])
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, keys, values)]
        (out, _) = by_definition(inputs[0], inputs[1], inputs[2], segments)
    return torch.autograd.grad(out, inputs, dout)


class Kernels(TorchDispatchMode):
    """PyTorch's two operators on the CPU, by their definition, with their arguments by the names in their schemas."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in OPERATORS:
            return func(*args, **(kwargs or {}))
        given = SimpleNamespace(**dict(zip((a.name for a in func._schema.arguments), args, strict=False)))
        with ThreadPoolExecutor(1) as pool:  # where autograd is on again
            return pool.submit(self.compute, func, given).result()

    def compute(self, func: Any, given: Any) -> tuple[torch.Tensor, ...]:
        assert (given.is_causal, given.dropout_p) == (True, 0)
        starts = torch.stack((given.cum_seq_q, given.cum_seq_k))
        segments: Any = SimpleNamespace(starts=starts, longest=(given.max_q, given.max_k))
        q, k, v = (x.detach().requires_grad_() for x in (given.query, given.key, given.value))
        out, _ = by_definition(q, k, v, segments)
        if func is OPERATORS[0]:
            return out.detach(), out.new_empty(H, len(out)), out.new_empty(2), out.new_empty(0), out.new_empty(0)
        assert torch.equal(given.out, out)
        assert [*map(len, (given.logsumexp, given.rng_state, given.unused))] == [H, 2, 0]
        return torch.autograd.grad(out, (q, k, v), given.grad_out)


def test_the_operators_are_given_what_their_schemas_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    real = 5 + 19
    with Kernels():
        found, expected = both(packed([9, 1, 3, 6], prefix=5), real, real, real)
    torch.testing.assert_close(found, expected)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(flash, "_kernel", by_definition)
    monkeypatch.setattr(flash, "_kernel_backward", backward_by_definition)


def packed(lengths: list[int], prefix: int) -> tuple[SegmentGroup, ...]:
    """Groups of examples of so many tokens behind a shared prefix."""
    ids = [[*range(prefix), 100 + i, *[7] * length] for i, length in enumerate(lengths)]
    return pack([Example(x, [False] * (len(x) - 1) + [True]) for x in ids]).groups


def both(groups: tuple[SegmentGroup, ...], queries: int, tokens: int, real: int) -> tuple[list[Any], list[Any]]:
    """Results and gradients by flash attention's layout, and by groups of padded segments."""
    inputs = [
        torch.randn(n, h, D, dtype=torch.float64, requires_grad=True) for n, h in ((queries, H), *[(tokens, K)] * 2)
    ]
    dout = torch.randn(queries, H, D, dtype=torch.float64)
    dout[real:] = 0
    found = []
    for way in ((lay_out(groups, queries),), split_heads(groups, H, K, num_queries=queries, like=inputs[0])):
        out = attention(*inputs, groups=way)  # type: ignore[misc]
        found.append([out[:real], *torch.autograd.grad(out, inputs, dout)])
    return found[0], found[1]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("lengths", [[4, 4], [9, 1, 3, 6], [2, 40, 3]])
def test_results_and_gradients_are_those_of_padded_groups(lengths: list[int], prefix: int, padding: int) -> None:
    real = prefix + sum(lengths)
    found, expected = both(packed(lengths, prefix), real + padding, real + padding, real)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("cached", [0, 4])
@pytest.mark.parametrize("lengths", [[5], [3, 6, 1]])
def test_so_they_are_without_a_prefix_and_behind_a_cached_one(lengths: list[int], cached: int, padding: int) -> None:
    real = sum(lengths)
    found, expected = both(pack_segments(lengths, cached), real + padding, cached + real + padding, real)
    torch.testing.assert_close(found, expected)


def test_the_prefix_is_laid_out_before_each_segment() -> None:
    segments = lay_out(packed([3, 1], prefix=2), 8)
    assert segments.keys.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
    assert segments.own.tolist() == [0, 1, 4, 5, 6, 9, 10, 11]
    assert segments.copies.tolist() == [0, 1, 2, 3, 7, 8]
    assert segments.starts.tolist() == [[0, 2, 5, 6, 8], [0, 2, 7, 10, 12]]
    assert (segments.longest, segments.prefix) == ((3, 5), 2)


def test_a_gpu_that_has_it_computes_all_layers_but_the_last_by_it() -> None:
    groups, like = packed([3, 700], prefix=2), torch.empty(0)
    (whole,) = split_heads(groups, H, K, num_queries=720, like=like, flash=True)
    assert isinstance(whole, FlashSegments)
    assert whole.starts.dtype == torch.int32


def test_a_tree_of_tokens_is_left_to_groups() -> None:
    (group,) = pack_segments([4])
    tree = replace(group, last_query=torch.tensor([[3, 1, 3, 3]]))
    assert isinstance(split_heads((group,), H, K, num_queries=4, like=torch.empty(0), flash=True)[0], FlashSegments)
    assert not isinstance(split_heads((tree,), H, K, num_queries=4, like=torch.empty(0), flash=True)[0], FlashSegments)


@pytest.mark.parametrize(("prefix", "is_flash"), [(2, True), (3, False)])
def test_many_copies_of_a_long_prefix_are_left_to_groups(prefix: int, is_flash: bool) -> None:
    groups = packed([1] * 10, prefix)
    split = split_heads(groups, H, K, num_queries=prefix + 10, like=torch.empty(0), flash=True)
    assert isinstance(split[0], FlashSegments) == is_flash


def test_the_copies_of_the_prefix_are_not_kept_for_backward() -> None:
    groups, kept = packed([2] * 30, prefix=8), list[torch.Tensor]()
    q, k, v = (torch.randn(68, heads, D, requires_grad=True) for heads in (H, K, K))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attention(q, k, v, groups=(lay_out(groups, 68),))
    assert {len(x) for x in kept} == {68}


def test_an_error_in_backward_leaves_no_mode_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(flash, "_kernel_backward", fail)
    q, k, v = (torch.randn(4, heads, D, requires_grad=True) for heads in (H, K, K))
    with pytest.raises(torch.OutOfMemoryError):
        attention(q, k, v, groups=(lay_out(pack_segments([4]), 4),)).sum().backward()
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_kernel_is_taken_if_it_gives_what_its_definition_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    def aligned_at_the_first_key(*given: Any) -> Any:
        return by_definition(*given, first_key=True)

    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.inference_mode():
            assert flash_probe.is_right(cpu, dtype, 64)

    def a_tenth_off(*given: Any) -> Any:
        out, logsumexp = by_definition(*given)
        return 1.1 * out, logsumexp

    def wrong_keys(*given: Any) -> Any:
        dq, dk, dv = backward_by_definition(*given)
        return dq, dk.roll(1, 0), dv

    with monkeypatch.context() as patch:
        patch.setattr(flash, "_kernel_backward", wrong_keys)
        assert not flash_probe.is_right(cpu, torch.bfloat16, 64)
    for kernel in (missing, aligned_at_the_first_key, a_tenth_off):
        monkeypatch.setattr(flash, "_kernel", kernel)
        assert not flash_probe.is_right(cpu, torch.bfloat16, 64)
    monkeypatch.setattr(flash, "_kernel", full)
    with pytest.raises(torch.OutOfMemoryError):
        flash_probe.is_right(cpu, torch.bfloat16, 64)


def test_only_a_gpu_in_half_precision_is_asked_and_for_head_sizes_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_probe, "is_right", lambda *_: True)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert flash_probe.has_flash(gpu, torch.bfloat16, 64)
    assert not flash_probe.has_flash(gpu, torch.float32, 64)
    assert not flash_probe.has_flash(gpu, torch.bfloat16, 4)
    assert not flash_probe.has_flash(gpu, torch.bfloat16, 264)
    assert not flash_probe.has_flash(cpu, torch.bfloat16, 64)
    flash_probe.has_flash.cache_clear()

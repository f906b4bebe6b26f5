"""The KV cache gives back what was appended, in order, and does not copy everything at every pass."""

from itertools import pairwise

import pytest
import torch

from minilora.qlora.kv_cache import KVCache

K, D = 2, 4


def tokens(count: int, first: int = 0) -> torch.Tensor:
    """(count, K, D), another number for each token."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None, None].expand(-1, K, D).contiguous()


@pytest.mark.parametrize("passes", [[1], [5, 1, 1, 1], [1] * 40, [3, 7, 1, 30, 2]])
def test_a_pass_sees_all_tokens_before_its_own(passes: list[int]) -> None:
    cache, total = KVCache(), 0
    for count in passes:
        keys, values = cache.append(tokens(count, total), -tokens(count, total))
        total += count
        assert cache.length == total
        assert torch.equal(keys, tokens(total))
        assert torch.equal(values, -tokens(total))


def test_a_token_is_copied_once_more_on_average() -> None:
    cache, capacities = KVCache(), []
    for index in range(1000):
        cache.append(tokens(1, index), tokens(1, index))
        assert cache._held is not None  # its capacity is what this test is about
        capacities.append(cache._held.shape[1])
    moves = [before for before, after in pairwise(capacities) if after != before]
    assert sum(moves) < 1.1 * 1000  # 1 + 2 + 4 + ... + 512
    assert capacities[-1] <= 2 * 1000


def test_a_frozen_cache_is_read_by_every_pass_and_does_not_grow() -> None:
    cache = KVCache()
    cache.append(tokens(3), tokens(3))
    cache.is_frozen = True
    for count in (2, 1, 4):
        keys, values = cache.append(tokens(count, 3), -tokens(count, 3))
        assert torch.equal(keys, tokens(3 + count))
        assert torch.equal(values, torch.cat((tokens(3), -tokens(count, 3))))
        assert cache.length == 3


def test_tokens_behind_a_truncation_are_overwritten() -> None:
    cache = KVCache()
    cache.append(tokens(5), tokens(5))
    cache.truncate(2)
    keys, _ = cache.append(tokens(2, 100), tokens(2, 100))
    assert torch.equal(keys, torch.cat((tokens(2), tokens(2, 100))))
    cache.truncate(9)  # more than there are
    assert cache.length == 4

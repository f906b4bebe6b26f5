"""Keys and values come back as they were put in, in their order, without being copied at every pass."""

from itertools import pairwise

import pytest
import torch

from minilora.qlora.kv_cache import KVCache

K, D = 2, 4


def rows(count: int, first: int = 0) -> torch.Tensor:
    """(count, K, D), each row another number."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None, None].expand(-1, K, D).contiguous()


@pytest.mark.parametrize("passes", [[1], [5, 1, 1, 1], [1] * 40, [3, 7, 1, 30, 2]])
def test_a_pass_sees_all_rows_before_its_own(passes: list[int]) -> None:
    past, total = KVCache(), 0
    for count in passes:
        keys, values = past.before(rows(count, total), -rows(count, total))
        total += count
        assert past.rows == total
        assert torch.equal(keys, rows(total))
        assert torch.equal(values, -rows(total))


def test_a_row_is_copied_once_more_on_average() -> None:
    past, rooms = KVCache(), []
    for place in range(1000):
        past.before(rows(1, place), rows(1, place))
        assert past._held is not None
        rooms.append(past._held.shape[1])
    moves = [before for before, after in pairwise(rooms) if after != before]
    assert sum(moves) < 1.1 * 1000  # 1 + 2 + 4 + ... + 512
    assert rooms[-1] <= 2 * 1000


def test_a_prefix_that_does_not_grow_stands_before_every_pass() -> None:
    past = KVCache()
    past.before(rows(3), rows(3))
    past.growing = False
    for count in (2, 1, 4):
        keys, values = past.before(rows(count, 3), -rows(count, 3))
        assert torch.equal(keys, rows(3 + count))
        assert torch.equal(values, torch.cat((rows(3), -rows(count, 3))))
        assert past.rows == 3


def test_rows_that_are_forgotten_are_written_anew() -> None:
    past = KVCache()
    past.before(rows(5), rows(5))
    past.keep(2)
    keys, _ = past.before(rows(2, 100), rows(2, 100))
    assert torch.equal(keys, torch.cat((rows(2), rows(2, 100))))
    past.keep(9)  # more than there are
    assert past.rows == 4

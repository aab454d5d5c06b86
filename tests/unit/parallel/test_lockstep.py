"""Every item is somebody's own exactly once, and with divided weights all ranks do as many."""

import pytest

from cogtune.parallel.lockstep import share_out


@pytest.mark.parametrize("num_items", [0, 1, 3, 4, 5, 8])
@pytest.mark.parametrize("even", [False, True])
def test_items_are_shared_out(num_items: int, even: bool) -> None:
    items = list(range(num_items))
    shares = [share_out(items, rank, 4, even=even) for rank in range(4)]
    assert sorted(item for mine, num_own in shares for item in mine[:num_own]) == items
    lengths = {len(mine) for mine, _ in shares}
    assert len(lengths) == 1 or not even
    assert even or all(len(mine) == num_own for mine, num_own in shares)

"""Which block keeps what, and whose activations leave: counts, order and spacing."""

import pytest

from cogtune.arrangement import ACTIVATIONS_FAST_TO_SLOW, arrange, keep_less


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 30, 42])
def test_counts_are_kept_and_those_that_keep_more_leave_first(num_blocks: int) -> None:
    for num_lean in range(num_blocks + 1):
        for num_offloaded in range(num_blocks + 1):
            found = arrange(num_blocks, num_lean=num_lean, num_offloaded=num_offloaded)
            assert len(found.lean) == num_lean and len(found.offloaded) == num_offloaded
            assert found.lean | found.offloaded <= set(range(num_blocks))
            lean_gone = found.lean & found.offloaded
            assert len(lean_gone) == max(0, num_offloaded - (num_blocks - num_lean))


def test_copies_are_spread_and_the_last_block_stays() -> None:
    for num_lean, num_offloaded in [(0, 21), (9, 33), (3, 33), (12, 20), (12, 36)]:
        found = arrange(42, num_lean=num_lean, num_offloaded=num_offloaded)
        assert 41 not in found.offloaded, "its copy would come back at once"
        for quarter in (range(10), range(10, 20), range(20, 30), range(30, 40)):
            assert len(found.offloaded & set(quarter)) == pytest.approx(num_offloaded * 10 / 42, abs=1.5)


def test_lean_blocks_keep_one_step_less() -> None:
    ways = [keep_less(way) for way in ACTIVATIONS_FAST_TO_SLOW]
    assert ways == [*ACTIVATIONS_FAST_TO_SLOW[1:], None]

"""The predicted time of a step: computing and both directions of the link, against schedules worked out by hand."""

from typing import Any

import pytest

from cogtune.arrangement import Activations
from cogtune.machine import Machine
from cogtune.memory import MemoryPlan
from cogtune.step_time import _BOTH_WAYS, _COPY_SHARE, BlockTimes, count_updated, predict_seconds

TIMES = BlockTimes(linear=1.0, attention_forward=2.0, attention_backward=4.0)
FORWARD = TIMES.forward_seconds()


def predict(num_layers: int, *, kept: float = 0.0, lean: float = 0.0, block: float = 0.0, **plan: Any) -> float:
    """Without the share of copies that is never hidden; `kept`, `lean` and `block`: seconds of a copy."""
    activations: Activations = plan.pop("activations", "keep_products")

    def kept_bytes(way: Activations) -> float:
        return 1e9 * (kept if way == activations else lean)

    rung = MemoryPlan(activations, 0, 0, 0, 0, **plan)
    seconds = predict_seconds(
        rung, TIMES, Machine(1e12, 1e9), num_layers=num_layers, block_bytes=int(block * 1e9), kept_bytes=kept_bytes,
        weight_gradients=False,
    )  # fmt: skip
    rich = min(rung.num_offloaded, num_layers - rung.num_lean)
    streamed = num_layers - (num_layers if rung.num_resident is None else rung.num_resident)
    copied = rich * kept + (rung.num_offloaded - rich) * lean + streamed * block
    return seconds - _COPY_SHARE * 2 * copied


def backward(way: Activations = "keep_products") -> float:
    return TIMES.backward_seconds(way, weight_gradients=False)


def test_without_copies_it_is_the_work() -> None:
    assert predict(6) == pytest.approx(6 * (FORWARD + backward()))
    mixed = predict(6, num_lean=2)
    assert mixed == pytest.approx(6 * FORWARD + 4 * backward() + 2 * backward("keep_attention"))


def test_short_copies_hide_behind_the_work() -> None:
    """But for the last ones of the forward pass, if they are still under way when memory for others is wanted."""
    assert predict(6, kept=0.9 * FORWARD, num_offloaded=5) == pytest.approx(6 * (FORWARD + backward()))
    assert predict(6, block=0.9 * FORWARD, num_resident=0) == pytest.approx(6 * (FORWARD + backward()))


def test_long_copies_are_waited_for_as_deep_as_memory_allows() -> None:
    """All of 6 blocks leave, 1.5 forward passes each: a block begins when all but `num_leaving` before it are gone.

    The last ones are still there for their backward passes.
    """
    copy = 1.5 * FORWARD
    gone = [FORWARD + (number + 1) * copy for number in range(6)]  # the link is never idle
    for num_leaving in (1, 2):
        now = 0.0
        for number in range(6):
            awaited = number - num_leaving - 1
            now = max(now, gone[awaited] if awaited >= 0 else 0.0) + FORWARD
        assert predict(6, kept=copy, num_offloaded=6, num_leaving=num_leaving) == pytest.approx(now + 6 * backward())


def test_what_comes_back_late_is_waited_for() -> None:
    """Blocks 0 and 1 of 3 leave. Block 2 waits for block 0's copy; block 1 is still there when its turn comes back."""
    copy = 3 * backward()
    second_begins = FORWARD + copy + FORWARD + backward()  # and block 0 is asked for
    seconds = predict(3, kept=copy, num_offloaded=2)
    assert seconds == pytest.approx(second_begins + copy + backward())


def test_two_on_their_way_keep_an_uneven_queue_from_stalling() -> None:
    """Four blocks of five leave, a copy takes a little less than five quarters of a block."""
    copy = 1.2 * FORWARD
    one, two = (predict(30, kept=copy, num_offloaded=24, num_leaving=count) for count in (1, 2))
    assert two < one and two == pytest.approx(30 * (FORWARD + backward()), rel=0.01)


def test_a_lean_block_costs_its_work_and_saves_the_link() -> None:
    copy = 1.5 * FORWARD
    alike = predict(30, kept=copy, lean=0.1, num_offloaded=30, num_leaving=2)
    mixed = predict(30, kept=copy, lean=0.1, num_lean=9, num_offloaded=21, num_leaving=2)
    bound = 30 * (FORWARD + backward()) + 9 * (backward("keep_attention") - backward())
    assert bound <= mixed < alike


def test_weights_that_take_longer_than_the_work_set_the_pace() -> None:
    """A block's copy begins when a slot is left: with two slots the link is never idle but for the first two."""
    copy = 3 * FORWARD
    seconds = predict(20, block=copy, num_resident=0)
    assert 2 * 17 * copy < seconds < 2 * 20 * copy + 20 * backward()
    assert predict(20, block=copy, num_resident=10) < seconds


def test_both_share_the_way_in() -> None:
    apart = [predict(20, kept=0.6 * backward(), num_offloaded=20), predict(20, block=0.6 * backward(), num_resident=0)]
    both = predict(20, kept=0.6 * backward(), block=0.6 * backward(), num_offloaded=20, num_resident=0)
    assert both > max(apart)


def test_updates_on_the_host_run_beside_the_forward_pass() -> None:
    """By the cores alone, by both, and bounded by the link where activations leave beside them."""
    cores, block, layers = 12, 1e9, 6
    on_cores = block * 14 / (cores * 4.75e9)  # 28 bytes a number, of which the device's copy has 2

    def follow(num_updated: int, *, link: float, leaving: int = 0) -> float:
        rung = MemoryPlan("keep_products", 0, 0, 0, 0, on_host=True, num_updated=num_updated, num_offloaded=leaving)
        quick = BlockTimes(linear=1e-6, attention_forward=1e-6, attention_backward=1e-6)
        return predict_seconds(
            rung, quick, Machine(1e12, link, cores), num_layers=layers, block_bytes=int(block),
            kept_bytes=lambda _way: 3e9, weight_gradients=True,
        )  # fmt: skip

    fast = 1e15
    assert follow(0, link=fast) == pytest.approx(layers * on_cores, rel=1e-3)
    assert follow(3, link=fast) == pytest.approx(layers * on_cores / 2, rel=1e-3)
    assert follow(6, link=fast) < 0.01
    slow = 30e9
    # 7 bytes each way for a byte of the copy, at 0.8 of the link's rate, and the blocks' own copies in both passes.
    moved, copied = block * (7 / 2 + 1) / (0.8 * slow), block / slow
    assert moved > on_cores / 2
    both = follow(3, link=slow)
    assert layers * moved < both < layers * (moved + 1.1 * copied)
    assert follow(3, link=slow, leaving=6) > both, "what leaves beside them takes the way back"
    assert follow(6, link=5e9) > follow(0, link=5e9), "over a slow link the cores are faster"


@pytest.mark.parametrize("link, expected", [(54e9, 28), (50e9, 28), (25e9, 14), (12e9, 0)])
def test_the_share_of_updates_follows_from_the_link(link: float, expected: int) -> None:
    """Not from cores or free memory, which differ from one start of a run to the next."""
    assert count_updated(42, Machine(800e12, link, 12)) == count_updated(42, Machine(1e12, link, 2)) == expected


def predict_trained(block: float, state: float, *, resident: int = 0, num_layers: int = 6) -> float:
    """Blocks that come, are updated and go back, their state with them; all in seconds of a copy, as above."""
    rung = MemoryPlan("keep_products", 0, 0, 0, 0, num_resident=resident, eight_bit=True, streams_trained=True)
    seconds = predict_seconds(
        rung, TIMES, Machine(1e12, 1e9), num_layers=num_layers, block_bytes=int(block * 1e9),
        kept_bytes=lambda _way: 0.0, state_bytes=state * 1e9, weight_gradients=False,
    )  # fmt: skip
    return seconds - _COPY_SHARE * (num_layers - resident) * (3 * block + 2 * state)


def test_trained_blocks_that_come_and_go_hide_behind_the_work() -> None:
    work = 6 * (FORWARD + backward())
    assert predict_trained(0.3 * FORWARD, 0.2 * FORWARD) == pytest.approx(work)
    assert predict_trained(0.3 * FORWARD, 0.2 * FORWARD, resident=2) == pytest.approx(work)


def test_a_block_comes_when_the_one_in_its_slot_is_back() -> None:
    """The backward pass alone is late: each block but the first two waits for a way out and a slower way in."""
    block, state = 0.9 * FORWARD, 2 * FORWARD
    out, way_in = block + state, (block + state) / _BOTH_WAYS
    now, ready = 6 * FORWARD, [0.0, 0.0]
    inward = 0.0
    for number in range(6):
        now = max(now, ready[number]) + backward()
        if number < 4:
            inward = max(inward, now + out) + way_in
            ready.append(inward)
    assert now > 6 * (FORWARD + backward())
    assert predict_trained(block, state) == pytest.approx(now)

"""Bytes that a strategy leaves on each device, against counting by hand for 5B's sizes."""

import pytest

from cogtune.parallel.footprint import Sizes, count_footprint
from cogtune.parallel.strategy import Strategy

FULL = Sizes(frozen=0, trained=5_570_000_000, block=130_000_000, num_blocks=42)
LORA = Sizes(frozen=5_570_000_000, trained=66_000_000, block=130_000_000, num_blocks=42)
OUTSIDE = 5_570_000_000 - 42 * 130_000_000


def test_fsdp2_divides_everything_and_gathers_two_blocks() -> None:
    found = count_footprint(Strategy("fsdp2", 4, 4), FULL, 2)
    assert found.weights == (OUTSIDE + 2 * 130_000_000) * 2
    assert found.trained == 5_570_000_000 * 16 // 4 + 130_000_000 * 8 and found.host == 0
    whole = count_footprint(Strategy("fsdp2", 4, 4, reshard=False), FULL, 2)
    assert whole.weights == 5_570_000_000 * 2
    away = count_footprint(Strategy("fsdp2", 4, 4, offload_weights=True), FULL, 2)
    assert away.host == 5_570_000_000 * 4 and away.trained == 130_000_000 * 8


def test_an_adapter_stays_whole_on_a_divided_base() -> None:
    found = count_footprint(Strategy("hsdp", 8, 4), LORA, 2)
    assert found.trained == 66_000_000 * 16
    assert found.weights == 5_570_000_000 * 2 // 4 + (OUTSIDE + 2 * 130_000_000) * 2


@pytest.mark.parametrize("sizes", [FULL, LORA])
def test_each_stage_of_zero_leaves_less(sizes: Sizes) -> None:
    totals = []
    for stage in ("zero1", "zero2", "zero3"):
        found = count_footprint(Strategy(stage, 4, 4), sizes, 2)  # pyright: ignore[reportArgumentType]
        totals.append(found.weights + found.trained)
    assert totals[0] > totals[1] > totals[2]


def test_an_optimizer_on_the_host_is_counted_there() -> None:
    near = count_footprint(Strategy("zero3", 4, 4), FULL, 2)
    away = count_footprint(Strategy("zero3", 4, 4, offload_weights=True, offload_optimizer=True), FULL, 2)
    assert away.host == near.trained + 5_570_000_000 * 2 // 4 and away.trained == 0

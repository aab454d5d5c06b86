"""Which rung of memory is chosen: the fastest that fits device and host, what was set by hand, and what is refused."""

from functools import partial

import pytest
import torch

from cogtune.arrangement import ACTIVATIONS_FAST_TO_SLOW, Activations, arrange, keep_less
from cogtune.config import MemorySettings
from cogtune.errors import UserError
from cogtune.ladder import (
    HOST_MARGIN,
    choose_rung,
    describe_rungs,
    fits,
    list_rungs,
)
from cogtune.machine import NOMINAL, Machine, measure_machine
from cogtune.memory import (
    EIGHT_BIT_STATE_BYTES,
    GIB,
    KEPT_UNITS,
    MARGIN,
    MemoryPlan,
    activation_bytes,
    predict,
    units_kept,
)
from cogtune.random_pipeline import make_architecture_facts
from cogtune.step_time import BlockTimes, predict_seconds

TOKENS, BLOCK = 17776, 132_000_000
FACTS = make_architecture_facts("cogvideox-5b")
HOST = 110 * GIB


def make_rungs(free_gib: float | None, machine: Machine = NOMINAL, **settings: object) -> list[MemoryPlan]:
    """The ladder of a LoRA of rank 64 on 5B, released size, batch 1."""
    count = partial(
        predict,
        FACTS,
        num_parameters=42 * BLOCK + 25_000_000,
        num_trainable=66_000_000,
        tokens=TOKENS,
        batch_size=1,
        dtype=torch.bfloat16,
        num_block_parameters=BLOCK,
    )
    times = BlockTimes.of(FACTS, TOKENS, 1, machine)
    unit = activation_bytes(FACTS, TOKENS, 1, torch.bfloat16)

    def time_of(plan: MemoryPlan) -> float:
        return predict_seconds(
            plan, times, machine, num_layers=42, block_bytes=2 * BLOCK,
            kept_bytes=lambda activations: KEPT_UNITS[activations] * unit, weight_gradients=False,
        )  # fmt: skip

    free = None if free_gib is None else int(free_gib * GIB)
    return list_rungs(
        count, time_of, MemorySettings.model_validate(settings), num_layers=42, free_bytes=free, streamable=True
    )


def ways_of_offloaded(rung: MemoryPlan) -> list[Activations]:
    """What the offloaded blocks keep, by the arrangement that runs."""
    arrangement = arrange(42, num_lean=rung.num_lean, num_offloaded=rung.num_offloaded)
    less = keep_less(rung.activations)
    return [less if less and number in arrangement.lean else rung.activations for number in arrangement.offloaded]


def choose(free_gib: float | None, free_host: int | None = HOST, **settings: object) -> MemoryPlan:
    free = None if free_gib is None else int(free_gib * GIB)
    rungs = make_rungs(free_gib, **settings)
    return choose_rung(rungs, MemorySettings.model_validate(settings), free, free_host)


@pytest.mark.parametrize("free_gib", [200, 78, 30, 22, 15, 11, 7.4, 5.5])
def test_the_fastest_rung_that_fits_is_chosen(free_gib: float) -> None:
    rungs, chosen = make_rungs(free_gib), choose(free_gib)
    assert chosen.total <= free_gib * GIB * MARGIN and chosen.host <= HOST * HOST_MARGIN
    assert all(rung.seconds >= chosen.seconds * 0.999 for rung in rungs if fits(rung, int(free_gib * GIB), HOST))


def test_what_fits_stays_on_the_device() -> None:
    chosen = choose(200)
    assert (chosen.num_resident, chosen.num_offloaded, chosen.host) == (None, 0, 0)


def test_less_memory_never_gives_a_faster_rung_and_small_cards_stay_near() -> None:
    seconds = [choose(free_gib).seconds for free_gib in (200, 78, 30, 22, 15, 11, 7.4, 5.5)]
    assert seconds == sorted(seconds)
    assert seconds[6] < 1.15 * seconds[0], "8 GB"


@pytest.mark.parametrize(("cap_gb", "relative"), [(24, 1.03), (16, 1.04), (12, 1.05), (8, 1.06), (6, 1.12)])
def test_each_cap_has_a_rung_near_the_uncapped_speed(cap_gb: float, relative: float) -> None:
    """By the prediction; without mixed blocks, 12 and 8 GB are a hundredth slower and more, 16 GB half of that."""
    free_gib = cap_gb * 1e9 / GIB
    chosen, uncapped = choose(free_gib), choose(78)
    alike = choose(free_gib, lean_blocks=0)
    print(f"{cap_gb} GB: {chosen.seconds:.3f} s, {chosen.seconds / uncapped.seconds:.3f}, {chosen.name()}")
    assert chosen.seconds < relative * uncapped.seconds and chosen.seconds <= alike.seconds
    if cap_gb in (16, 12, 8):
        assert chosen.num_lean and chosen.seconds < (0.995 if cap_gb == 16 else 0.99) * alike.seconds


def test_a_slow_link_is_asked_for_less() -> None:
    slow = Machine(NOMINAL.flops, 6e9)
    fast_rungs, slow_rungs = make_rungs(15), make_rungs(15, slow)
    free, settings = 15 * GIB, MemorySettings()
    fast, patient = (choose_rung(rungs, settings, free, HOST) for rungs in (fast_rungs, slow_rungs))

    def copied(rung: MemoryPlan) -> float:
        """Bytes over the link in a step: streamed weights in both passes, activations there and back."""
        unit = activation_bytes(FACTS, TOKENS, 1, torch.bfloat16)
        streamed = 0 if rung.num_resident is None else 42 - rung.num_resident
        kept = sum(KEPT_UNITS[way] for way in ways_of_offloaded(rung))
        return 2 * (streamed * 2 * BLOCK + kept * unit)

    assert copied(patient) < copied(fast)


def test_host_memory_is_a_limit_too() -> None:
    little = choose(15, free_host=14 * GIB)
    assert little.host <= 14 * GIB * HOST_MARGIN < choose(15).host
    with pytest.raises(UserError, match=r"would fit on the device, but 2\.0 GiB of host memory"):
        choose(7.4, free_host=2 * GIB)


def test_what_was_set_by_hand_is_taken() -> None:
    for mode in ACTIVATIONS_FAST_TO_SLOW:
        assert choose(3, mode=mode).activations == mode, "to try all the same"
    by_hand = choose(78, mode="recompute", resident_blocks=5, offloaded_blocks=7)
    assert (by_hand.activations, by_hand.num_resident, by_hand.num_offloaded) == ("recompute", 5, 7)
    assert choose(78, resident_blocks=42).num_resident is None
    assert choose(78, offloaded_blocks=99).num_offloaded == 42
    mixed = choose(78, mode="keep_products", lean_blocks=7, offloaded_blocks=3, leaving_blocks=4)
    assert (mixed.num_lean, mixed.num_offloaded, mixed.num_leaving) == (7, 3, 4)
    assert choose(78, lean_blocks=99).num_lean == 42
    assert {rung.activations for rung in make_rungs(78, lean_blocks=5)} == {*ACTIVATIONS_FAST_TO_SLOW} - {"recompute"}


def test_a_cpu_keeps_what_is_small_and_refuses_nothing() -> None:
    assert choose(None).activations == "recompute" and choose(None).num_resident is None
    small = [MemoryPlan(activations, GIB, 0, 0, 0) for activations in ACTIVATIONS_FAST_TO_SLOW]
    assert choose_rung(small, MemorySettings(), None, None).activations == "keep_all"
    assert measure_machine(torch.device("cpu"), torch.float32) == NOMINAL
    assert choose(None, resident_blocks=0, offloaded_blocks=42).num_resident == 0


def test_what_does_not_fit_is_refused_with_the_settings_to_turn() -> None:
    with pytest.raises(UserError) as caught:
        choose(3)
    for part in ("3.0 GiB are free", "train.batch_size", "adapter.rank", "memory.mode=recompute"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "recompute", "lean_blocks": 3}, "memory.lean_blocks=3"),
        ({"offloaded_blocks": 0, "leaving_blocks": 2}, "memory.leaving_blocks=2"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_rungs(78, **settings)


def test_the_table_marks_the_choice_and_says_what_does_not_fit() -> None:
    rungs, chosen = make_rungs(15), choose(15)
    table = describe_rungs(rungs, chosen, 15 * GIB, HOST)
    (line,) = [line for line in table.splitlines() if "<- fastest that fits" in line]
    assert chosen.name() in line and f"{chosen.total / GIB:.2f} GiB" in line
    assert "keep_all  does not fit" in table and " 1.00x" in table
    assert 8 <= len(table.splitlines()) <= 20


def test_times_are_near_the_measured_ones() -> None:
    """On an H100 (docs/benchmarks.md)."""
    seconds = {
        rung.activations: rung.seconds
        for rung in make_rungs(200)
        if rung.num_resident is None and not rung.num_offloaded and not rung.num_lean
    }
    measured = {"keep_all": 2.049, "keep_products": 2.082, "keep_attention": 2.259, "recompute": 2.69}
    assert seconds == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("activations", "num_lean", "num_resident", "num_offloaded", "num_leaving", "measured"),
    [
        ("keep_products", 0, None, 0, 1, 2.439),
        ("keep_products", 0, None, 36, 1, 2.537),
        ("keep_products", 9, 1, 21, 1, 2.506),
        ("keep_products", 18, 1, 21, 2, 2.560),
        ("keep_products", 21, 0, 39, 2, 2.578),
        ("keep_products", 9, 8, 42, 1, 2.709),
        ("keep_products", 33, 1, 33, 1, 2.668),
    ],
)
def test_times_of_full_fine_tuning_in_8_bits_are_near_the_measured_ones(
    activations: Activations, num_lean: int, num_resident: int | None, num_offloaded: int, num_leaving: int,
    measured: float,
) -> None:  # fmt: skip
    """On three H200s with cuDNN's attention (docs/memory.md); the product is a fourth one's."""
    machine = Machine(747e12, 53e9)
    plan = MemoryPlan(
        activations, 0, 0, 0, 0, num_lean=num_lean, num_resident=num_resident, num_offloaded=num_offloaded,
        num_leaving=num_leaving, eight_bit=True, streams_trained=num_resident is not None,
    )  # fmt: skip
    unit = activation_bytes(FACTS, TOKENS, 1, torch.bfloat16)
    seconds = predict_seconds(
        plan, BlockTimes.of(FACTS, TOKENS, 1, machine), machine, num_layers=42, block_bytes=2 * BLOCK,
        kept_bytes=lambda way: units_kept(way, full=True) * unit, state_bytes=BLOCK * EIGHT_BIT_STATE_BYTES,
        weight_gradients=True,
    )  # fmt: skip
    assert seconds == pytest.approx(measured, rel=0.07)

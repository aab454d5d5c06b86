"""The memory plan's arithmetic, and how near it comes to measured peaks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogtune.adapter import count_adapter_parameters
from cogtune.arrangement import ACTIVATIONS_FAST_TO_SLOW, Activations, arrange
from cogtune.config import AdapterSettings
from cogtune.eight_bit_adamw import CHUNK
from cogtune.memory import (
    EMA_STAGING_BYTES,
    ENCODER_UNITS,
    GIB,
    KEPT_UNITS,
    OFFLOADED_AT_ONCE,
    TRAINED_KEPT_UNITS,
    UPDATE_BYTES,
    WORKSPACE_UNITS,
    CodedWeights,
    MemoryPlan,
    explain_out_of_memory,
    free_device_bytes,
    predict,
)
from cogtune.models import count_image_encoder, make_meta_transformer, read_facts
from cogtune.parallel.strategy import Strategy
from cogtune.random_pipeline import make_architecture_facts


def predict_released(
    folder: Path, dtype: torch.dtype, activations: Activations, size: tuple[int, int, int], **way: int
) -> MemoryPlan:
    """A LoRA of rank 64 on a model of released size, batch 1."""
    facts = read_facts(folder)
    meta = make_meta_transformer(facts)
    return predict(
        facts,
        activations,
        num_parameters=sum(p.numel() for p in meta.parameters()),
        num_trainable=count_adapter_parameters(meta, AdapterSettings(rank=64)),
        num_block_parameters=sum(p.numel() for p in meta.transformer_blocks[0].parameters()),
        tokens=facts.num_tokens(*size),
        batch_size=1,
        dtype=dtype,
        **way,
    )


@pytest.mark.parametrize(
    "model, dtype, activations, measured_gib",
    [
        ("cogvideox-5b", torch.bfloat16, "recompute", 17.74),
        ("cogvideox-5b", torch.bfloat16, "keep_attention", 21.70),
        ("cogvideox-5b", torch.bfloat16, "keep_all", 69.06),
        ("cogvideox-2b", torch.float16, "recompute", 7.19),
        ("cogvideox-2b", torch.float16, "keep_all", 31.7),
    ],
)
def test_prediction_is_near_the_measured_peak(
    skeleton_folder: Callable[[str], Path],
    model: str,
    dtype: torch.dtype,
    activations: Activations,
    measured_gib: float,
) -> None:
    """Peaks measured on an H100: 49 frames of 720x480, compiled blocks, everything on the device."""
    plan = predict_released(skeleton_folder(model), dtype, activations, (49, 480, 720))
    assert plan.total / GIB == pytest.approx(measured_gib, rel=0.07)


@pytest.mark.parametrize(
    "model, activations, resident, lean, offloaded, leaving, measured_gib",
    [
        ("cogvideox-5b", "keep_products", 9, 0, 30, 2, 19.36),
        ("cogvideox-5b", "keep_products", 2, 3, 33, 2, 13.01),
        ("cogvideox-5b", "keep_products", 0, 3, 36, 2, 9.47),
        ("cogvideox-5b", "keep_products", 0, 9, 42, 2, 5.97),
        ("cogvideox-5b", "keep_attention", 1, 0, 39, 1, 4.53),
        ("cogvideox-2b", "keep_products", 1, 9, 21, 2, 4.54),
        ("cogvideox-1.5-5b-i2v", "keep_products", 3, 0, 39, 1, 17.82),
    ],
)
def test_prediction_is_near_the_measured_peak_of_rungs_under_caps(
    skeleton_folder: Callable[[str], Path],
    model: str,
    activations: Activations,
    resident: int,
    lean: int,
    offloaded: int,
    leaving: int,
    measured_gib: float,
) -> None:
    """Peaks of the rungs that `auto` took under 24, 16, 12, 8 and 6 GB, 2B under 6 GB, and 1.5 under 24 GB."""
    size = (81, 768, 1360) if "1.5" in model else (49, 480, 720)
    counts = {"num_resident": resident, "num_lean": lean, "num_offloaded": offloaded, "num_leaving": leaving}
    plan = predict_released(skeleton_folder(model), torch.bfloat16, activations, size, **counts)
    assert plan.total / GIB == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize(
    "resident, lean, offloaded, leaving, measured_gib",
    [
        (None, 0, 0, 1, 69.34),
        (None, 6, 30, 2, 33.84),
        (1, 9, 21, 1, 20.90),
        (1, 18, 21, 2, 13.54),
        (0, 21, 39, 2, 5.74),
    ],
)
def test_prediction_is_near_the_measured_peak_of_full_fine_tuning_in_8_bits(
    skeleton_folder: Callable[[str], Path],
    resident: int | None,
    lean: int,
    offloaded: int,
    leaving: int,
    measured_gib: float,
) -> None:
    """5B under 80, 40, 24, 16 and 8 GB, `keep_products`; the last three with trained blocks that come and go."""
    facts = read_facts(skeleton_folder("cogvideox-5b"))
    meta = make_meta_transformer(facts)
    plan = predict(
        facts, "keep_products", num_parameters=0, num_trainable=sum(p.numel() for p in meta.parameters()),
        tokens=facts.num_tokens(49, 480, 720), batch_size=1, dtype=torch.bfloat16, full=True, eight_bit=True,
        num_block_parameters=sum(p.numel() for p in meta.transformer_blocks[0].parameters()),
        num_resident=resident, num_lean=lean, num_offloaded=offloaded, num_leaving=leaving,
    )  # fmt: skip
    assert plan.total / GIB == pytest.approx(measured_gib, rel=0.07)


@pytest.mark.parametrize("activations", ACTIVATIONS_FAST_TO_SLOW)
def test_arithmetic(tiny_folder: Path, activations: Activations) -> None:
    facts = read_facts(tiny_folder)
    plan = predict(
        facts, activations, num_parameters=1000, num_trainable=10, tokens=100, batch_size=3, dtype=torch.bfloat16
    )
    unit = 3 * 100 * 32 * 2  # batch, tokens, width, bytes
    assert plan.weights == 2000
    assert plan.trainable == 160, "float32 weight, gradient and two moments"
    assert plan.kept == int(2 * KEPT_UNITS[activations] * unit)
    assert plan.workspace == int(WORKSPACE_UNITS[activations] * unit)
    assert plan.total == plan.weights + plan.trainable + plan.kept + plan.workspace
    assert f"{activations}: {plan.total / GIB:.1f} GiB" in plan.describe()


def test_float8_weights_are_kept_once_for_each_direction(tiny_folder: Path) -> None:
    """Two bytes a weight: nothing is saved beside 16 bits, half beside 32."""
    facts = read_facts(tiny_folder)
    sizes = {"num_parameters": 1000, "num_trainable": 10, "tokens": 100, "batch_size": 1}
    weights = {
        (dtype, count): predict(facts, "recompute", dtype=dtype, num_float8=count, **sizes).weights
        for dtype in (torch.bfloat16, torch.float32)
        for count in (0, 600)
    }
    assert weights[torch.bfloat16, 600] == weights[torch.bfloat16, 0] == 2000
    assert weights[torch.float32, 0] == 4000 and weights[torch.float32, 600] == 400 * 4 + 600 * 2


def test_weights_in_codes_take_their_bytes_and_one_decoded_layer(tiny_folder: Path) -> None:
    facts = replace(read_facts(tiny_folder), num_layers=10)
    sizes = {"num_parameters": 1100, "num_trainable": 10, "tokens": 100, "batch_size": 1, "dtype": torch.bfloat16}
    coded = CodedWeights("nf4", num_parameters=80, num_bytes=45, num_largest=30, size=2)
    exact, plan = (predict(facts, "recompute", **sizes, coded=way) for way in (None, coded))
    assert plan.weights == exact.weights - 10 * (80 * 2 - 45) and plan.workspace == exact.workspace + 30 * 2
    assert (plan.kept, plan.trainable, plan.host) == (exact.kept, exact.trainable, 0)
    assert plan.name() == "recompute, frozen base in nf4" and exact.name() == "recompute"
    streamed = predict(facts, "recompute", **sizes, num_block_parameters=100, num_resident=4, coded=coded)
    block = 100 * 2 - (80 * 2 - 45)
    assert streamed.host == 10 * block and streamed.weights == 100 * 2 + (4 + 2) * block


def test_faster_plans_need_more(tiny_folder: Path) -> None:
    units = [KEPT_UNITS[activations] for activations in ACTIVATIONS_FAST_TO_SLOW]
    assert units == sorted(units, reverse=True) and len(set(units)) == 4 == len(KEPT_UNITS)


def test_what_less_is_kept_of_is_made_again(tiny_folder: Path) -> None:
    """A block's own peak, what it keeps and what is made in its backward pass, falls with what it keeps."""
    facts = replace(read_facts(tiny_folder), num_layers=10)
    sizes = {"num_parameters": 1000, "num_trainable": 10, "tokens": 100, "batch_size": 3, "dtype": torch.bfloat16}
    unit = 3 * 100 * 32 * 2
    plans = [predict(facts, activations, **sizes) for activations in ACTIVATIONS_FAST_TO_SLOW]
    assert [plan.workspace for plan in plans] == sorted(plan.workspace for plan in plans)
    mixed = predict(facts, "keep_attention", **sizes, num_lean=4)
    assert mixed.workspace == int((WORKSPACE_UNITS["recompute"] - 1.0) * unit), "lean blocks', who keep 1 less"
    assert predict(facts, "keep_products", **sizes, num_lean=4).workspace == plans[1].workspace


def test_trained_blocks_keep_what_their_gates_multiply(tiny_folder: Path) -> None:
    facts = read_facts(tiny_folder)
    sizes = {"num_parameters": 0, "num_trainable": 1000, "tokens": 100, "batch_size": 1, "dtype": torch.bfloat16}
    for activations in ACTIVATIONS_FAST_TO_SLOW:
        frozen, trained = (predict(facts, activations, **sizes, full=full).kept for full in (False, True))
        more = facts.num_layers * TRAINED_KEPT_UNITS.get(activations, 0.0) * 100 * 32 * 2
        assert trained - frozen == pytest.approx(more, abs=1)


def count_trained(num_lean: int) -> float:
    """GiB of 5B with 8-bit state, 49 frames of 720x480."""
    facts = make_architecture_facts("cogvideox-5b")
    meta = make_meta_transformer(facts)
    plan = predict(
        facts,
        "keep_all",
        num_parameters=0,
        num_trainable=sum(p.numel() for p in meta.parameters()),
        num_block_parameters=sum(p.numel() for p in meta.transformer_blocks[0].parameters()),
        tokens=facts.num_tokens(49, 480, 720),
        batch_size=1,
        dtype=torch.bfloat16,
        full=True,
        eight_bit=True,
        num_lean=num_lean,
    )
    return plan.total / GIB


def test_prediction_is_near_the_measured_peaks_of_full_fine_tuning() -> None:
    """On an H100: `keep_products` throughout, and `keep_all` for 3 of 42 blocks."""
    assert count_trained(42) == pytest.approx(69.34, rel=0.02)
    assert count_trained(39) == pytest.approx(71.85, rel=0.02)
    assert count_trained(39) - count_trained(42) == pytest.approx(71.85 - 69.34, abs=0.2), "what keep_all adds"


def test_streamed_weights_and_offloaded_activations_leave_the_device(tiny_folder: Path) -> None:
    facts = replace(read_facts(tiny_folder), num_layers=10)
    sizes = {"num_parameters": 1100, "num_trainable": 10, "tokens": 100, "batch_size": 3, "dtype": torch.bfloat16}
    whole = predict(facts, "keep_products", **sizes)
    plan = predict(facts, "keep_products", **sizes, num_block_parameters=100, num_resident=4, num_offloaded=7)
    kept = KEPT_UNITS["keep_products"] * 3 * 100 * 32 * 2
    assert whole.host == 0 and whole.weights == 2200 and whole.kept == int(10 * kept)
    assert plan.weights == 200 + (4 + 2) * 200, "outside of the blocks, resident, and two slots"
    assert plan.kept == int((3 + OFFLOADED_AT_ONCE) * kept)
    assert plan.host == 10 * 200 + int(7 * kept), "every block has its copy there"
    assert (plan.trainable, plan.workspace) == (whole.trainable, whole.workspace)
    assert plan.name() == "keep_products, 4 blocks resident, others streamed, activations of 7 blocks on the host"
    last = predict(facts, "keep_products", **sizes, num_block_parameters=100, num_resident=9)
    assert last.weights == whole.weights, "one streamed block needs one slot"


def test_lean_blocks_keep_less_and_leave_last(tiny_folder: Path) -> None:
    """Against the arrangement that runs, block by block; a third block may be there where two are under way."""
    facts = replace(read_facts(tiny_folder), num_layers=10)
    sizes = {"num_parameters": 1100, "num_trainable": 10, "tokens": 100, "batch_size": 3, "dtype": torch.bfloat16}
    unit = 3 * 100 * 32 * 2
    for num_lean, num_offloaded, num_leaving in [(4, 0, 1), (4, 5, 1), (4, 5, 2), (4, 8, 1), (9, 10, 2)]:
        counts = {"num_lean": num_lean, "num_offloaded": num_offloaded}
        plan = predict(facts, "keep_products", **sizes, **counts, num_leaving=num_leaving)
        arrangement = arrange(10, **counts)
        units = [KEPT_UNITS["keep_attention" if n in arrangement.lean else "keep_products"] for n in range(10)]
        gone = sorted((units[number] for number in arrangement.offloaded), reverse=True)
        there = sum(units) - sum(gone) + sum(gone[: num_leaving + 1])
        assert plan.kept == pytest.approx(there * unit, abs=1) and plan.host == pytest.approx(sum(gone) * unit, abs=1)
    assert plan.name() == (
        "keep_products, keep_attention for 9 blocks, activations of 10 blocks on the host, 2 at once on their way"
    )


def test_a_cpu_has_no_limit_of_its_own() -> None:
    assert free_device_bytes(torch.device("cpu")) is None


def test_out_of_memory_names_what_is_left_to_turn() -> None:
    totals = zip(ACTIVATIONS_FAST_TO_SLOW, (40, 30, 20, 10), strict=True)
    plans = [MemoryPlan(activations, total * GIB, 0, 0, 0) for activations, total in totals]
    error = torch.OutOfMemoryError("Tried to allocate 2 GiB\nand more lines")
    text = explain_out_of_memory(plans[0], error)
    for part in ("planned 40.0 GiB", "memory.mode=keep_all", "Tried to allocate 2 GiB", "memory.mode=recompute"):
        assert part in text
    assert "and more lines" not in text
    assert "memory.mode=recompute;" not in explain_out_of_memory(plans[-1], error), "that is what it ran with"
    assert "train.batch_size=1" in explain_out_of_memory(plans[-1], error)
    assert "memory.resident_blocks=0 (gives back up to 40.0 GiB)" in text
    assert "memory.offloaded_blocks=99" in text
    smallest = MemoryPlan("recompute", GIB, 0, 0, 0, num_resident=0, num_offloaded=4)
    assert "resident_blocks" not in explain_out_of_memory(smallest, error)
    assert "offloaded_blocks" not in explain_out_of_memory(smallest, error)


def test_the_image_encoder_is_in_the_plan_of_image_models_only() -> None:
    """Its weights always, its workspace where that is larger than what the blocks need: never at native size."""
    plans = {}
    for model in ("cogvideox-5b", "cogvideox-5b-i2v"):
        facts = make_architecture_facts(model)
        plans[model] = predict(
            facts, "recompute", num_parameters=10**9, num_trainable=10**6, tokens=17_776, batch_size=1,
            dtype=torch.bfloat16, num_encoder=count_image_encoder(facts), image_pixels=480 * 720,
        )  # fmt: skip
    text, image = plans.values()
    assert image.weights - text.weights == 2 * 92_215_456, "the encoder of the released autoencoder"
    assert image.workspace == text.workspace and image.kept == text.kept
    facts = make_architecture_facts("tiny-i2v")
    small, large = (
        predict(
            facts, "recompute", num_parameters=1, num_trainable=1, tokens=100, batch_size=2, dtype=torch.float32,
            num_encoder=1, image_pixels=pixels,
        )
        for pixels in (0, 480 * 720)
    )  # fmt: skip
    assert large.total - large.weights > ENCODER_UNITS * 2 * 480 * 720 * 128 * 4 > small.total


def test_8_bit_state_needs_no_float32_weights_and_one_blocks_gradients(tiny_folder: Path) -> None:
    facts = replace(read_facts(tiny_folder), num_layers=10)
    sizes = {"num_parameters": 0, "num_trainable": 5120, "tokens": 100, "batch_size": 3, "dtype": torch.bfloat16}
    float32 = predict(facts, "recompute", **sizes, num_block_parameters=500)
    plan = predict(facts, "recompute", **sizes, num_block_parameters=500, eight_bit=True)
    assert float32.weights == 0 and float32.trainable == 5120 * 16
    assert plan.weights == 5120 * 2
    assert plan.trainable - CHUNK * UPDATE_BYTES == 2 * (5120 + 5120 // 256 * 4) + 500 * 2
    assert (plan.kept, plan.workspace, plan.host) == (float32.kept, float32.workspace, 0)
    assert plan.name() == "recompute, bfloat16 weights and 8-bit optimizer state"
    text = explain_out_of_memory(plan, torch.OutOfMemoryError("full"))
    assert "memory.resident_blocks=0 (gives back up to" in text


def test_streamed_blocks_take_their_8_bit_state_along(tiny_folder: Path) -> None:
    """Two blocks of those that come and go are on the device, with their state; the host has all blocks'."""
    facts = replace(read_facts(tiny_folder), num_layers=10)
    sizes = {"num_parameters": 0, "num_trainable": 6000, "tokens": 100, "batch_size": 3, "dtype": torch.bfloat16}
    sizes |= {"num_block_parameters": 512, "eight_bit": True}
    whole = predict(facts, "recompute", **sizes)
    state = 2 * (512 + 512 // 256 * 4)
    for resident in (0, 3, 9):
        plan = predict(facts, "recompute", **sizes, num_resident=resident)
        away = max(0, 10 - resident - 2)
        assert whole.weights - plan.weights == away * 512 * 2
        assert whole.trainable - plan.trainable == away * state
        assert plan.host == 10 * (512 * 2 + state)
        assert plan.streams_trained and not whole.streams_trained
    assert plan.name() == "recompute, bfloat16 weights and 8-bit optimizer state, 9 blocks resident, others streamed"
    part = predict(facts, "recompute", **sizes | {"num_parameters": 900}, num_resident=0)
    assert not part.streams_trained and part.trainable == whole.trainable, "of a part, what is frozen comes and goes"
    text = explain_out_of_memory(plan, torch.OutOfMemoryError("full"))
    assert "memory.resident_blocks=5 (gives back up to" in text
    least = predict(facts, "recompute", **sizes, num_resident=0)
    assert "resident_blocks" not in explain_out_of_memory(least, torch.OutOfMemoryError("full"))


def test_an_average_is_counted_where_the_weights_are(tiny_folder: Path) -> None:
    """Four processes: a quarter of it each where weights are divided; an adapter is whole under FSDP2 and DDP."""

    def more(strategy: Strategy, *, full: bool, on_host: bool = False) -> tuple[int, int]:
        shape = {"num_parameters": 0 if full else 80_000, "num_trainable": 40_000, "num_block_parameters": 10_000}
        plain, averaged = (
            predict(
                read_facts(tiny_folder), "recompute", **shape, tokens=32, batch_size=1, dtype=torch.bfloat16,
                full=full, strategy=strategy, ema_bytes=ema_bytes, ema_on_host=on_host and ema_bytes > 0,
            )
            for ema_bytes in (0, 160_000)
        )  # fmt: skip
        return averaged.total - plain.total, averaged.host - plain.host

    fsdp2, away = Strategy("fsdp2", 4, 4), Strategy("fsdp2", 4, 4, offload_weights=True)
    assert more(Strategy("ddp", 4), full=True) == more(fsdp2, full=False) == (160_000, 0)
    for kind in ("zero1", "zero2", "zero3"):
        assert more(Strategy(kind, 4, 4), full=True) == more(Strategy(kind, 4, 4), full=False) == (40_000, 0)
        assert more(Strategy(kind, 4, 4, offload_optimizer=True), full=True) == (0, 40_000)
    assert more(fsdp2, full=True) == (40_000, 0) and more(away, full=True) == (0, 40_000)
    assert more(away, full=False) == (160_000, 0)
    assert more(fsdp2, full=True, on_host=True) == (0, 40_000 + EMA_STAGING_BYTES)

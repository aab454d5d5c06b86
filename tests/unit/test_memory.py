"""The memory plan: its arithmetic, which plan is chosen, and how near it comes to measured peaks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogtune.adapter import count_adapter_parameters
from cogtune.config import AdapterSettings
from cogtune.errors import UserError
from cogtune.memory import (
    ACTIVATIONS_FAST_TO_SLOW,
    ENCODER_UNITS,
    GIB,
    KEPT_UNITS,
    MARGIN,
    WORKSPACE_UNITS,
    MemoryPlan,
    choose_activations,
    explain_out_of_memory,
    free_device_bytes,
    predict,
)
from cogtune.models import count_image_encoder, make_meta_transformer, read_facts
from cogtune.random_pipeline import make_architecture_facts


@pytest.mark.parametrize(
    "model, dtype, activations, measured_gib",
    [
        ("cogvideox-5b", torch.bfloat16, "recompute", 17.74),
        ("cogvideox-5b", torch.bfloat16, "keep_attention", 21.54),
        ("cogvideox-2b", torch.float16, "recompute", 7.19),
        ("cogvideox-2b", torch.float16, "keep_all", 31.7),
    ],
)
def test_prediction_is_near_the_measured_peak(
    skeleton_folder: Callable[[str], Path], model: str, dtype: torch.dtype, activations: str, measured_gib: float
) -> None:
    """Peaks measured on an H100: batch 1, rank 64, 49 frames of 720x480, compiled blocks."""
    facts = read_facts(skeleton_folder(model))
    meta = make_meta_transformer(facts)
    plan = predict(
        facts,
        activations,
        num_parameters=sum(p.numel() for p in meta.parameters()),
        num_trainable=count_adapter_parameters(meta, AdapterSettings(rank=64)),
        tokens=facts.num_tokens(49, 480, 720),
        batch_size=1,
        dtype=dtype,
    )
    assert plan.total / GIB == pytest.approx(measured_gib, rel=0.07)


@pytest.mark.parametrize("activations", ACTIVATIONS_FAST_TO_SLOW)
def test_arithmetic(tiny_folder: Path, activations: str) -> None:
    facts = read_facts(tiny_folder)
    plan = predict(
        facts, activations, num_parameters=1000, num_trainable=10, tokens=100, batch_size=3, dtype=torch.bfloat16
    )
    unit = 3 * 100 * 32 * 2  # batch, tokens, width, bytes
    assert plan.weights == 2000
    assert plan.trainable == 160, "float32 weight, gradient and two moments"
    assert plan.kept == int(2 * KEPT_UNITS[activations] * unit)
    assert plan.workspace == int(WORKSPACE_UNITS * unit)
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


def test_faster_plans_need_more(tiny_folder: Path) -> None:
    units = [KEPT_UNITS[activations] for activations in ACTIVATIONS_FAST_TO_SLOW]
    assert units == sorted(units, reverse=True) and len(set(units)) == 4 == len(KEPT_UNITS)


def make_plans(*totals_gib: float) -> list[MemoryPlan]:
    return [
        MemoryPlan(activations, int(total * GIB), 0, 0, 0)
        for activations, total in zip(ACTIVATIONS_FAST_TO_SLOW, totals_gib, strict=True)
    ]


@pytest.mark.parametrize(
    "free_gib, expected",
    [
        (100.0, "keep_all"),
        (40.0 / MARGIN + 0.01, "keep_all"),
        (40.0, "keep_products"),
        (30.0, "keep_attention"),
        (11.0, "recompute"),
    ],
)
def test_the_fastest_plan_that_fits_is_chosen(free_gib: float, expected: str) -> None:
    assert choose_activations(make_plans(40, 30, 20, 10), "auto", int(free_gib * GIB)).activations == expected


def test_a_given_mode_is_taken_whatever_is_free() -> None:
    for mode in ACTIVATIONS_FAST_TO_SLOW:
        assert choose_activations(make_plans(40, 30, 20, 10), mode, GIB).activations == mode


def test_a_cpu_keeps_what_is_small_and_refuses_nothing() -> None:
    assert free_device_bytes(torch.device("cpu")) is None
    assert choose_activations(make_plans(40, 30, 20, 10), "auto", None).activations == "recompute"
    assert choose_activations(make_plans(40, 30, 1.5, 1), "auto", None).activations == "keep_attention"
    assert choose_activations(make_plans(1.5, 1.2, 1, 0.5), "auto", None).activations == "keep_all"


def test_what_does_not_fit_is_refused_with_the_settings_to_turn() -> None:
    with pytest.raises(UserError) as caught:
        choose_activations(make_plans(40, 30, 20, 10), "auto", 8 * GIB)
    for part in ("needs 10.0 GiB", "8.0 GiB are free", "train.batch_size", "adapter.rank", "memory.mode=recompute"):
        assert part in str(caught.value)


def test_out_of_memory_names_what_is_left_to_turn() -> None:
    plans = make_plans(40, 30, 20, 10)
    error = torch.OutOfMemoryError("Tried to allocate 2 GiB\nand more lines")
    text = explain_out_of_memory(plans[0], error)
    for part in ("planned 40.0 GiB", "memory.mode=keep_all", "Tried to allocate 2 GiB", "memory.mode=recompute"):
        assert part in text
    assert "and more lines" not in text
    assert "memory.mode=recompute;" not in explain_out_of_memory(plans[-1], error), "that is what it ran with"
    assert "train.batch_size=1" in explain_out_of_memory(plans[-1], error)


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

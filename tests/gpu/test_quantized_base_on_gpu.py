"""A frozen base in int8 and NF4 on a GPU: codes as a CPU makes them, steps near the exact ones, streamed, memory."""

import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory_on_gpu import CHANGES, DEVICE, LAYERS, SIZE, deviation, make, step

from cogtune.adapter import adapter_parameters
from cogtune.arrangement import ACTIVATIONS_FAST_TO_SLOW, Activations
from cogtune.memory import GIB, predict
from cogtune.quantized_linear import QuantizedLinear
from cogtune.quantized_ways import count_coded
from cogtune.random_pipeline import make_architecture_facts, make_random_transformer
from cogtune.weight_codes import WeightKind

BOTH: list[WeightKind] = ["int8", "nf4"]
pytestmark = pytest.mark.usefixtures("clean_gpu")


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_those_that_a_cpu_makes(kind: WeightKind, dtype: torch.dtype) -> None:
    """Divisions may differ in a last bit, which moves a number from one side of a limit to the other."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(768, 1024, generator=generator).to(dtype), torch.randn(300, 1024, generator=generator)
    there, here = (QuantizedLinear(weight.to(device), None, kind) for device in (DEVICE, "cpu"))
    assert (there.weight.cpu() != here.weight).float().mean() < 1e-4
    torch.testing.assert_close(there.scale.cpu(), here.scale, rtol=1e-6, atol=0)
    exact = x.to(dtype).double() @ there.decode(dtype).cpu().double().t()
    torch.testing.assert_close(there(x.to(DEVICE, dtype)).cpu().double(), exact, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("activations", ACTIVATIONS_FAST_TO_SLOW)
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.1), ("nf4", 0.4)])
def test_compiled_steps_are_near_the_exact_base_and_one_graph(
    activations: Activations, kind: WeightKind, bound: float
) -> None:
    """Relative errors of single tensors' gradients; every layer gets one."""
    exact = step(make(activations))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    quantized = make(activations, quantized=kind)
    got = step(quantized)
    assert abs(float(got["loss"] / exact["loss"]) - 1) < 0.01
    assert all(value.norm() > 0 for name, value in got.items() if "lora_B" in name)
    assert deviation(got, exact) < bound
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and counters["graph_break"] == {}
    with torch.compiler.set_stance("fail_on_recompile"):
        step(quantized, 1)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("activations", ["keep_all", "keep_attention"])
def test_streamed_steps_are_near_resident_ones(activations: Activations, kind: WeightKind) -> None:
    plain = make(activations, quantized=kind)
    expected = [step(plain, seed) for seed in (0, 1)]
    noise = max(deviation(step(plain, 0), expected[0]), 1e-4)
    del plain
    gc.collect()
    streamed = make(activations, quantized=kind, resident=0, offloaded=LAYERS)
    for seed, reference in itertools.islice(itertools.cycle(enumerate(expected)), 6):
        assert deviation(step(streamed, seed), reference) < 4 * noise + 1e-3


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("activations", ACTIVATIONS_FAST_TO_SLOW)
@pytest.mark.parametrize("resident", [None, 0])
def test_peaks_are_near_the_prediction(
    activations: Activations, resident: int | None, kind: WeightKind, measure_peak: Callable[..., int]
) -> None:
    """Above all: no decoded weight is kept between the passes."""
    facts = make_architecture_facts("cogvideox-5b", **CHANGES)
    meta = make_random_transformer("cogvideox-5b", seed=0, device=torch.device("meta"), dtype=torch.bfloat16, **CHANGES)
    block = meta.transformer_blocks[0]
    transformer = make(activations, quantized=kind, resident=resident)
    parameters = adapter_parameters(transformer)
    peak = measure_peak(transformer, step)
    plan = predict(
        facts, activations, num_parameters=sum(p.numel() for p in meta.parameters()),
        num_trainable=sum(p.numel() for p in parameters.values()), tokens=facts.num_tokens(*SIZE), batch_size=1,
        dtype=torch.bfloat16, num_resident=resident, coded=count_coded(block, kind, torch.bfloat16),
        num_block_parameters=sum(p.numel() for p in block.parameters()),
    )  # fmt: skip
    assert plan.total / GIB == pytest.approx(peak / GIB, rel=0.1), plan.describe()


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.55), ("nf4", 0.4)])
def test_a_quantized_base_is_small_and_was_never_there_whole(kind: WeightKind, share: float) -> None:
    torch.cuda.reset_peak_memory_stats()
    make("recompute", compiled=False)
    whole = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = make("recompute", compiled=False, quantized=kind)
    assert torch.cuda.memory_allocated() - before < share * (whole - before)
    assert torch.cuda.max_memory_allocated() < whole
    del held


@pytest.mark.parametrize("kind", BOTH)
def test_a_job_over_codes_is_near_the_exact_one_and_can_be_replayed_as_a_graph(
    kind: WeightKind, make_job: Callable[..., Path], run_command: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    losses = {}
    for name, graph in (("none", False), (kind, False), (kind, True)):
        settings = {"memory": {"quantized_base": name}, "train": {"cuda_graph": graph, "max_steps": 6}}
        folder = tmp_path / f"{name}-{graph}"
        job = make_job(tiny_folder, validation={"enabled": False}, **settings)
        outcome = run_command("train/lora.py", "--config", job, f"--output_dir={folder}")
        assert outcome.code == 0, outcome.err
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name, graph] = [row["loss"] for row in rows if "loss" in row]
    assert losses[kind, True] == pytest.approx(losses[kind, False], rel=2e-3)
    assert losses[kind, False] == pytest.approx(losses["none", False], rel=0.03)

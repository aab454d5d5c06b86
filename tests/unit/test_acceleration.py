"""When sampling compiles, tiles and merges by itself, and what float8 replaces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_adapter import make_trained

from cogtune import acceleration, generation, models
from cogtune.acceleration import accelerate, decide_compile, decide_tiling, merge_adapters, quantize_for_inference
from cogtune.adapter import save_adapter
from cogtune.attention_backends import BackendTiming
from cogtune.config import AdapterSettings
from cogtune.errors import UserError
from cogtune.frozen import Float8Base
from cogtune.joint_blocks import join_blocks, part_blocks
from cogtune.random_pipeline import make_random_transformer
from cogtune.step_cache import CacheSettings
from cogtune.video_request import Request

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REQUEST = Request("a red ball", 17, 64, 96, seed=3, num_inference_steps=2)


def test_compiling_pays_from_fifty_steps_on() -> None:
    decide = decide_compile
    assert not decide("auto", device=CPU, offload="none", num_steps=500)
    assert not decide("auto", device=CUDA, offload="none", num_steps=49)
    assert decide("auto", device=CUDA, offload="none", num_steps=50)
    assert decide("on", device=CPU, offload="none", num_steps=1)
    assert not decide("off", device=CUDA, offload="none", num_steps=500)
    assert not decide("auto", device=CUDA, offload="sequential", num_steps=500)
    with pytest.raises(UserError, match="single layers"):
        decide("on", device=CUDA, offload="sequential", num_steps=500)


def test_the_attention_kernel_is_the_fastest_forward_where_there_is_a_choice(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = models.read_facts(tiny_folder)
    timings = {"cudnn": BackendTiming(2.0, 1.0), "flash": BackendTiming(3.0, 0.1), "flash3": BackendTiming(1.0, 9.0)}
    active: list[str] = []
    monkeypatch.setattr(acceleration, "measure_backends", lambda **_: timings)
    monkeypatch.setattr(acceleration, "activate", active.append)
    monkeypatch.setattr(acceleration, "is_installed", lambda backend: backend == "flash3")
    choose = acceleration.choose_sampling_backend
    assert choose(facts, 100, torch.bfloat16, CUDA) == "flash3" and active == ["flash3"]
    assert choose(facts, 100, torch.bfloat16, CPU) == "default"
    monkeypatch.setattr(acceleration, "is_installed", lambda _: False)
    assert choose(facts, 100, torch.bfloat16, CUDA) == "default" and active == ["flash3"]


def test_tiling_is_off_unless_asked_for_without_a_gpu() -> None:
    assert [decide_tiling(wanted, CPU, "none") for wanted in ("auto", "on", "off")] == [False, True, False]


def test_float8_replaces_the_products_and_keeps_the_modulations() -> None:
    transformer = make_random_transformer("tiny", seed=0, device=CPU, dtype=torch.float32)
    tokens = [torch.randn(1, 48, 32), torch.randn(1, 8, 32), torch.randn(1, 32)]
    join_blocks(transformer, compiled=False)
    expected = transformer.transformer_blocks[0](*tokens)[0]
    part_blocks(transformer)
    assert sum(quantize_for_inference(block) for block in transformer.transformer_blocks) == 12
    block = transformer.transformer_blocks[1]
    assert isinstance(block.ff.net[0].proj, Float8Base) and isinstance(block.attn1.qkv, Float8Base)
    assert type(block.norm1.linear) is type(block.norm2.linear) is torch.nn.Linear
    assert all(module.transposed.numel() == 0 for module in transformer.modules() if isinstance(module, Float8Base))
    join_blocks(transformer, compiled=False)
    with torch.no_grad():
        got = transformer.transformer_blocks[0](*tokens)[0]
    error = (got - expected).norm() / (expected - tokens[0]).norm()
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_work_in_joined_blocks_merged_or_not(tiny_folder: Path, tmp_path: Path, merged: bool) -> None:
    save_adapter(make_trained(tiny_folder, AdapterSettings(rank=4, alpha=9.0)), tmp_path, trained=True)
    videos = []
    for fast in (False, True):
        pipeline = generation.load_pipeline(models.read_facts(tiny_folder), dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generation.load_adapters(pipeline, [(tmp_path, 0.7)])
        coder = None
        if fast:
            if merged:
                merge_adapters(pipeline)
                assert not getattr(pipeline.transformer, "peft_config", None)
            coder = accelerate(pipeline, compiled=False, cache=CacheSettings(threshold=1e-9), coded=True)
        videos.append(generation.generate(pipeline, REQUEST, max_text_length=32, coder=coder).astype(int))
    assert np.abs(videos[1] - videos[0]).max() <= 1


def test_the_base_model_differs_from_the_merged_one(tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(make_trained(tiny_folder, AdapterSettings(rank=4, alpha=9.0)), tmp_path, trained=True)
    pipeline = generation.load_pipeline(models.read_facts(tiny_folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    videos = [generation.generate(pipeline, REQUEST, max_text_length=32).astype(int)]
    generation.load_adapters(pipeline, [(tmp_path, 0.7)])
    merge_adapters(pipeline)
    videos.append(generation.generate(pipeline, REQUEST, max_text_length=32).astype(int))
    assert np.abs(videos[1] - videos[0]).max() > 1

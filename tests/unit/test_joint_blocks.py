"""Blocks on one joined sequence give what the stock blocks give, alone, compiled, cached and inside a pipeline."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from cogtune import generation, models
from cogtune.joint_blocks import find_step_cache, join_blocks, part_blocks
from cogtune.random_pipeline import ARCHITECTURES, make_random_transformer
from cogtune.step_cache import CacheSettings, StepCache
from cogtune.video_request import Request


def make_transformer(model: str) -> CogVideoXTransformer3DModel:
    return make_random_transformer(model, seed=0, device=torch.device("cpu"), dtype=torch.float32, num_layers=3)


@torch.no_grad()
def call(transformer: CogVideoXTransformer3DModel, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 5, 16, 8, 12, generator=generator)
    text = torch.randn(2, 32, 32, generator=generator)
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 6)), (4, 6), 5)
    timestep = torch.tensor([500, 500])
    return transformer(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)[0]


@pytest.mark.parametrize("model", ["tiny", "tiny-2b"])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_call_equals_the_stock_models(model: str, compiled: bool) -> None:
    transformer = make_transformer(model)
    expected = call(transformer)
    keys = set(transformer.state_dict())
    join_blocks(transformer, compiled=compiled)
    torch.testing.assert_close(call(transformer), expected, rtol=1e-5, atol=1e-5)
    part_blocks(transformer)
    assert set(transformer.state_dict()) == keys
    torch.testing.assert_close(call(transformer), expected)


def test_all_blocks_and_steps_share_one_compiled_graph() -> None:
    torch._dynamo.reset()
    transformer = make_transformer("tiny")
    join_blocks(transformer, compiled=True)
    call(transformer)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    with torch.compiler.set_stance("fail_on_recompile"):
        call(transformer, seed=2)
        call(transformer, seed=3)


@pytest.mark.parametrize("pipeline_fixture", ["tiny_folder", "tiny_2b_folder"])
def test_a_video_equals_the_stock_pipelines(pipeline_fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(pipeline_fixture)
    pipeline = generation.load_pipeline(models.read_facts(folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = Request("a red ball", 17, 64, 96, seed=3, num_inference_steps=3)
    expected = generation.generate(pipeline, wanted, max_text_length=32)
    join_blocks(pipeline.transformer, compiled=False)
    got = generation.generate(pipeline, wanted, max_text_length=32)
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 5


def test_a_cache_that_may_skip_nothing_changes_nothing_and_counts(tiny_folder: Path) -> None:
    pipeline = generation.load_pipeline(models.read_facts(tiny_folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = Request("a red ball", 17, 64, 96, seed=3, num_inference_steps=10)
    exact = generation.generate(pipeline, wanted, max_text_length=32)
    videos = {}
    for name, settings in {
        "never": CacheSettings(threshold=1e-9, guidance_interval=1),
        "blocks": CacheSettings(threshold=100.0, max_skipped=1),
        "guidance": CacheSettings(guidance_interval=2),
    }.items():
        transformer = copy.deepcopy(pipeline.transformer)
        stock, pipeline.transformer = pipeline.transformer, transformer
        join_blocks(transformer, compiled=False, cache=StepCache(settings))
        videos[name] = generation.generate(pipeline, wanted, max_text_length=32)
        cache = find_step_cache(transformer)
        assert cache is not None
        if name == "never":
            assert cache.describe() == "10 steps: 10 full"
        if name == "blocks":
            assert cache.kinds == ["full"] * 4 + ["first block", "full"] * 2 + ["full"] * 2
        if name == "guidance":
            assert cache.kinds == ["full"] * 4 + ["one half", "full"] * 2 + ["full"] * 2
        generation.generate(pipeline, wanted, max_text_length=32)  # a second video starts anew
        assert len(cache.kinds) == 10
        pipeline.transformer = stock
    assert np.abs(videos["never"].astype(int) - exact.astype(int)).max() <= 1
    for name in ("blocks", "guidance"):
        difference = np.abs(videos[name].astype(int) - exact.astype(int))
        assert difference.max() > 0 and difference.mean() < 16


def test_arguments_without_effect_are_refused() -> None:
    transformer = make_transformer("tiny")
    assert ARCHITECTURES["tiny"][0]["num_layers"] == 2
    blocks = join_blocks(transformer, compiled=False)
    with pytest.raises(ValueError, match="no effect"):
        blocks(torch.zeros(1, 1, 32), torch.zeros(1, 1, 32), torch.zeros(1, 32), attention_kwargs={"scale": 0.5})

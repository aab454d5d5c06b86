"""Models that take turns on the device give the same videos; how many of their blocks stay there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogtune import placement
from cogtune.acceleration import accelerate, decide_offload
from cogtune.adapter import add_lora, save_adapter
from cogtune.attention import fuse_projections
from cogtune.config import AdapterSettings
from cogtune.encoding import embed
from cogtune.errors import UserError
from cogtune.generation import Request, generate, load_adapters, load_pipeline
from cogtune.memory import GIB, MARGIN
from cogtune.models import load_text_encoder, load_tokenizer, load_transformer, read_facts
from cogtune.placement import (
    TEXT_BLOCKS,
    TEXT_WORKSPACE,
    TRANSFORMER_BLOCKS,
    count_residents,
    make_coder,
    place_in_turns,
    place_text_encoder,
    release_blocks,
    weight_bytes,
)
from cogtune.step_cache import CacheSettings
from cogtune.streaming.blocks import DEFAULT_SLOTS, find_stream

CPU = torch.device("cpu")
REQUEST = Request("waves", 9, 32, 48, seed=3, num_inference_steps=8, guidance_scale=4.0)
TOKENS = 32 + 3 * 2 * 3


def make_pipeline(folder: Path) -> Any:
    pipeline = load_pipeline(read_facts(folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.transformer, pipeline.text_encoder):  # aligned as streamed weights are
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return pipeline


def force_residents(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(placement, "count_residents", lambda *_arguments: count)


@pytest.mark.parametrize("way", ["stock", "joint", "first block", "guidance", "compiled"])
def test_streamed_videos_equal_resident_ones(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    force_residents(monkeypatch, 0)
    cache = {
        "stock": None,
        "joint": CacheSettings(threshold=None, guidance_interval=1),
        "first block": CacheSettings(threshold=9.0, max_skipped=1),
        "guidance": CacheSettings(threshold=None, guidance_interval=2),
        "compiled": None,
    }[way]
    videos = []
    for streamed in (False, True):
        pipeline = make_pipeline(tiny_folder)
        if streamed:
            place_in_turns(pipeline, CPU, TOKENS)
        coder = accelerate(pipeline, compiled=way == "compiled", cache=cache, coded=True)
        videos += [generate(pipeline, REQUEST, max_text_length=32, coder=coder) for _ in range(1 + streamed)]
    assert videos[0].std() > 1 and all(np.array_equal(videos[0], video) for video in videos[1:])
    for model in (pipeline.text_encoder, pipeline.transformer):
        stream = find_stream(model)
        assert stream is not None and stream.loaded() == [], "each model leaves when it is done"


def test_adapters_that_are_not_merged_are_streamed_too(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = load_transformer(read_facts(tiny_folder), torch.float32)
    add_lora(transformer, AdapterSettings(rank=4, alpha=9.0), seed=1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    save_adapter(transformer, tmp_path, trained=True)
    force_residents(monkeypatch, 1)
    videos = []
    for streamed in (False, True):
        pipeline = make_pipeline(tiny_folder)
        load_adapters(pipeline, [(tmp_path, 0.7)])
        if streamed:
            place_in_turns(pipeline, CPU, TOKENS)
        videos.append(generate(pipeline, REQUEST, max_text_length=32).astype(int))
    assert np.abs(videos[0] - videos[1]).max() <= 1, "fused projections sum in another order"


def test_the_text_encoder_is_streamed_where_it_does_not_fit(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(tiny_folder)
    tokenizer = load_tokenizer(facts)
    texts = ["a red ball", ""]
    encoder = load_text_encoder(facts, torch.float32)
    for parameter in encoder.parameters():
        parameter.data = parameter.data.clone()
    expected = embed(texts, tokenizer, encoder, 32)
    assert place_text_encoder(encoder, CPU) is encoder and find_stream(encoder) is None
    force_residents(monkeypatch, 0)
    place_text_encoder(encoder, CPU)
    assert torch.equal(embed(texts, tokenizer, encoder, 32), expected)
    release_blocks(encoder)
    assert torch.equal(embed(texts, tokenizer, encoder, 32), expected)
    stream = find_stream(encoder)
    assert stream is not None and len(stream.flat) == 1


def test_how_many_blocks_stay() -> None:
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList(
        [torch.nn.Linear(1024, 1024, bias=False).requires_grad_(False) for _ in range(10)]
    )
    model.outside = torch.nn.Linear(1024, 1024, bias=False)
    block = 4 << 20

    def count(free_blocks: float) -> int | None:
        free = int((free_blocks * block + TEXT_WORKSPACE) / MARGIN) + 8
        return count_residents(model, TRANSFORMER_BLOCKS, free, TEXT_WORKSPACE)

    assert weight_bytes(model) == 11 * block
    assert count(11) is None and count_residents(model, TRANSFORMER_BLOCKS, None, 1 << 60) is None
    assert count(10) == 10 - DEFAULT_SLOTS - 1, "all but one, two of them slots"
    assert count(1 + DEFAULT_SLOTS) == 0
    with pytest.raises(UserError, match="even with all blocks streamed"):
        count(DEFAULT_SLOTS + 0.5)


def test_fused_projections_are_counted_once(tiny_folder: Path) -> None:
    transformer = load_transformer(read_facts(tiny_folder), torch.float32)
    before = weight_bytes(transformer)
    for block in transformer.transformer_blocks:
        fuse_projections(block.attn1)
    assert abs(weight_bytes(transformer) - before) < 0.02 * before, "padding only"
    parameters = sum(p.numel() * 4 for p in transformer.parameters())
    assert weight_bytes(transformer) < parameters * 1.1


def test_released_sizes_under_their_caps() -> None:
    """Counted, in the precision of a GPU: what of 5B and of T5-XXL stays under each cap (GB), two halves at once."""
    five, text = 42 * 132_000_000 * 2, 24 * 193_000_000 * 2
    workspace = placement.sampling_workspace(17776, 3072, torch.bfloat16)
    assert 2.4 * GIB < workspace < 2.7 * GIB
    for cap in (5, 6, 8, 12, 16, 24):
        left = cap * 1e9 * MARGIN - workspace - 0.43e9 - 0.05e9  # autoencoder, layers outside of the blocks
        assert left > DEFAULT_SLOTS * five / 42, cap
        assert cap * 1e9 * MARGIN - TEXT_WORKSPACE - 0.7e9 > DEFAULT_SLOTS * text / 24, cap


def test_a_cpu_streams_nothing_by_itself(tiny_folder: Path) -> None:
    pipeline = make_pipeline(tiny_folder)
    assert decide_offload("auto", pipeline, CPU, TOKENS) == "none"
    assert decide_offload("model", pipeline, CPU, TOKENS) == "model"
    with pytest.raises(UserError, match="--offload stream"):
        decide_offload("stream", pipeline, CPU, TOKENS)
    assert not make_coder(pipeline.vae).in_slabs
    assert TEXT_BLOCKS == "encoder.block"

"""Sampling, decoding and encoding on a GPU: each fast way is as near to float32 as the stock way is."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from cogtune import generation, models
from cogtune.acceleration import accelerate, quantize_transformer
from cogtune.joint_blocks import join_blocks
from cogtune.overlap import Batch, encode_overlapped
from cogtune.random_pipeline import make_random_transformer
from cogtune.step_cache import CacheSettings, StepCache
from cogtune.vae.frame_coder import FrameCoder
from cogtune.video_request import Request

GPU = torch.device("cuda")


def make_transformer(model: str, dtype: torch.dtype) -> Any:
    """Two blocks of 8 heads; the same weights in every precision."""
    transformer = make_random_transformer(
        model, seed=0, device=GPU, dtype=torch.float32, num_attention_heads=8, num_layers=2, text_embed_dim=64
    )
    return transformer.to(dtype)


@torch.no_grad()
def call(transformer: Any, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(transformer.parameters()).dtype
    latents = torch.randn(2, 5, 16, 60, 90, generator=generator).to(GPU, dtype)
    text = torch.randn(2, 226, 64, generator=generator).to(GPU, dtype)
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = get_3d_rotary_pos_embed(64, ((0, 0), (30, 45)), (30, 45), 5, device=GPU)
    timestep = torch.tensor([500, 500], device=GPU)
    return transformer(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)[0].float()


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).norm() / second.double().norm())


@pytest.mark.parametrize(("model", "dtype"), [("cogvideox-5b", torch.bfloat16), ("cogvideox-2b", torch.float16)])
def test_joined_compiled_blocks_are_as_exact_as_stock_ones(model: str, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = call(make_transformer(model, torch.float32))
    stock = distance(call(make_transformer(model, dtype)), exact)
    fast = make_transformer(model, dtype)
    join_blocks(fast, compiled=True)
    error = distance(call(fast), exact)
    assert error < 1.2 * stock, (error, stock)
    with torch.compiler.set_stance("fail_on_recompile"):
        call(fast, seed=2)


def test_float8_is_near_and_smaller() -> None:
    exact = call(make_transformer("cogvideox-5b", torch.float32))
    fast = make_transformer("cogvideox-5b", torch.bfloat16)
    before = sum(tensor.nbytes for tensor in {**dict(fast.named_parameters()), **dict(fast.named_buffers())}.values())
    quantize_transformer(fast, "float8", GPU)
    after = sum(p.nbytes for p in fast.parameters()) + sum(b.nbytes for b in fast.buffers())
    join_blocks(fast, compiled=True)
    assert distance(call(fast), exact) < 0.1
    assert after < before  # although q, k and v are counted twice: alone, and as the whole that they are views of


def test_both_batch_sizes_of_a_cache_compile_once() -> None:
    fast = make_transformer("cogvideox-5b", torch.bfloat16)
    cache = StepCache(CacheSettings(threshold=9.0, guidance_interval=2, num_first_steps=2, num_last_steps=1))
    join_blocks(fast, compiled=True, cache=cache)
    cache.start(8)
    for step in range(8):
        call(fast, seed=step)
    kinds = cache.kinds
    cache.start(8)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(8):
            call(fast, seed=step)
    assert cache.kinds == kinds and len(set(kinds)) > 2


def make_vae(dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(block_out_channels=(32, 64, 64, 128), layers_per_block=1, norm_num_groups=16)
    return vae.requires_grad_(False).eval().to(GPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_frame_coder_is_as_exact_as_the_stock_autoencoder(dtype: torch.dtype, batch: int) -> None:
    with torch.backends.cudnn.flags(allow_tf32=False):
        pixels = torch.rand(batch, 3, 17, 96, 144, generator=torch.Generator().manual_seed(0)).to(GPU) * 2 - 1
        exact = make_vae(torch.float32)
        moments = exact.encode(pixels).latent_dist.parameters
        frames = exact.decode(moments[:, :16]).sample
        vae = make_vae(dtype)
        stock = [vae.encode(pixels.to(dtype)).latent_dist.parameters, vae.decode(moments[:, :16].to(dtype)).sample]
        coder = FrameCoder(vae)
        fast = [coder.encode(pixels.to(dtype)), coder.decode(moments[:, :16].to(dtype))]
    for expected, plain, got in zip((moments, frames), stock, fast, strict=True):
        assert distance(got, expected) < max(1e-4, 1.2 * distance(plain, expected))


def test_a_whole_video_with_everything_on(tiny_folder: Path) -> None:
    facts = models.read_facts(tiny_folder)
    videos = []
    for fast in (False, True):
        pipeline = generation.load_pipeline(facts, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generation.place_pipeline(pipeline, GPU, vae_tiling=False)
        coder = accelerate(pipeline, compiled=True, cache=None, coded=True) if fast else None
        request = Request("a red ball", 17, 64, 96, seed=3, num_inference_steps=4)
        videos.append(generation.generate(pipeline, request, max_text_length=32, coder=coder).astype(int))
    assert abs(videos[1] - videos[0]).max() <= 3
    assert videos[0].std() > 5


def test_encoding_overlaps_with_making_and_writing() -> None:
    weight = torch.randn(4096, 4096, device=GPU)

    def batches() -> Iterator[Batch]:
        for number in range(12):
            time.sleep(0.01)
            yield [str(number)], torch.full((4096, 256), float(number))

    def encode(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        product = values
        for _ in range(60):
            product = weight @ product * 1e-2
        return (values + 1, product)

    written: dict[str, float] = {}

    def write(keys: list[str], results: tuple[torch.Tensor, ...]) -> None:
        time.sleep(0.01)
        assert not results[0].is_cuda
        assert (results[0] == results[0][0, 0]).all()
        written[keys[0]] = float(results[0][0, 0])

    times = encode_overlapped(batches(), encode, write, GPU)
    assert written == {str(number): number + 1.0 for number in range(12)}
    assert times.num_items == 12 and 0 < times.busy_seconds <= times.wall_seconds


def test_the_command_with_compiled_blocks_and_a_cache(run_command: Any, tiny_folder: Path, tmp_path: Path) -> None:
    outcome = run_command(
        "scripts/generate.py", "--model", tiny_folder, "--prompt", "a red ball", "--steps", "10", "--compile", "on",
        "--cache", "both", "--cache-threshold", "9", "--output", tmp_path / "out.mp4", "--allow-unsupported-size",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "10 steps:" in outcome.out and "first block" in outcome.out

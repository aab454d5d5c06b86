"""Our generation against the stock pipeline, and its checks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from tests.unit.test_adapter import make_trained

from cogtune import generation, models
from cogtune.adapter import save_adapter
from cogtune.cli import parse_adapter
from cogtune.config import AdapterSettings
from cogtune.encoding import embed
from cogtune.errors import UserError
from cogtune.frame_convolution import use_frame_convolutions
from cogtune.generation_options import make_requests, output_path, parse_generation
from cogtune.video_request import Request

REQUEST = Request("a red ball", 17, 64, 96, seed=3, negative_prompt="blue", num_inference_steps=3, guidance_scale=4.0)


def stock_frames(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """By the stock pipeline, its autoencoder's sums in our order (`test_reconstruction.py` compares the orders)."""
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    use_frame_convolutions(pipeline.vae)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    video = pipeline(
        "a red ball", negative_prompt="blue", num_frames=17, height=64, width=96, num_inference_steps=3,
        guidance_scale=4.0, max_sequence_length=32, generator=torch.Generator().manual_seed(3), output_type="np",
    ).frames[0]  # fmt: skip
    return np.round(video * 255).astype(np.uint8)


@pytest.mark.parametrize("pipeline_fixture", ["tiny_folder", "tiny_2b_folder"])
def test_video_equals_the_stock_pipelines(pipeline_fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(pipeline_fixture)
    pipeline = generation.load_pipeline(models.read_facts(folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = generation.generate(pipeline, REQUEST, max_text_length=32)
    assert frames.dtype == np.uint8 and frames.shape == (17, 64, 96, 3)
    assert np.array_equal(frames, stock_frames(folder))


def test_validations_way_gives_the_same_video(tiny_folder: Path) -> None:
    """Latents from cached embeddings, decoded afterwards: what validation does."""
    facts = models.read_facts(tiny_folder)
    tokenizer, encoder = models.load_tokenizer(facts), models.load_text_encoder(facts, torch.float32)
    embeddings, negative = embed(["a red ball", "blue"], tokenizer, encoder, facts.max_text_length)
    pipeline = generation.make_pipeline(
        facts, transformer=models.load_transformer(facts, torch.float32), scheduler=models.load_scheduler(facts)
    )
    pipeline.set_progress_bar_config(disable=True)
    latents = generation.generate_latents(pipeline, REQUEST, embeddings, negative)
    frames = generation.decode_latents(models.load_vae(facts, torch.float32), latents, facts.scaling_factor)
    assert np.abs(frames.astype(int) - stock_frames(tiny_folder).astype(int)).max() <= 1  # rounding of 0.5 steps


def test_adapters_load_with_their_strength_and_say_what_they_touch(tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(make_trained(tiny_folder, AdapterSettings(rank=4, alpha=9.0)), tmp_path, trained=True)
    facts = models.read_facts(tiny_folder)
    pipeline = generation.load_pipeline(facts, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    report = generation.load_adapters(pipeline, [(tmp_path, 1.0)])
    assert "8 layers" in report[0] and "attn1.to_q x 2" in report[0] and "rank 4, alpha 9.0; scale 1" in report[0]
    with_adapter = generation.generate(pipeline, REQUEST, max_text_length=32)
    assert np.array_equal(with_adapter, stock_frames(tiny_folder, tmp_path))
    assert not np.array_equal(with_adapter, stock_frames(tiny_folder))


def test_scale_zero_is_the_base_model_and_two_adapters_add_up(tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(make_trained(tiny_folder, AdapterSettings(rank=4)), tmp_path, trained=True)
    facts = models.read_facts(tiny_folder)
    frames = {}
    for name, adapters in {
        "off": [(tmp_path, 0.0)],
        "halves": [(tmp_path, 0.5)] * 2,
        "whole": [(tmp_path, 1.0)],
    }.items():
        pipeline = generation.load_pipeline(facts, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generation.load_adapters(pipeline, adapters)
        frames[name] = generation.generate(pipeline, REQUEST, max_text_length=32).astype(int)
    assert np.array_equal(frames["off"], stock_frames(tiny_folder))
    assert np.abs(frames["halves"] - frames["whole"]).max() <= 1
    assert np.abs(frames["whole"] - frames["off"]).max() > 1


def test_samplers_differ_and_the_seed_decides(tiny_folder: Path) -> None:
    facts = models.read_facts(tiny_folder)
    videos = []
    for sampler, seed in (("default", 3), ("dpm", 3), ("default", 4)):
        pipeline = generation.load_pipeline(facts, dtype=torch.float32, sampler=sampler)
        pipeline.set_progress_bar_config(disable=True)
        request = Request("a red ball", 17, 64, 96, seed=seed, num_inference_steps=3)
        videos.append(generation.generate(pipeline, request, max_text_length=32))
    assert not np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_offload_without_a_gpu_is_refused(tiny_folder: Path) -> None:
    pipeline = generation.make_pipeline(models.read_facts(tiny_folder))
    with pytest.raises(UserError, match="no GPU to offload from"):
        generation.place_pipeline(pipeline, torch.device("cpu"), offload="model", vae_tiling=False)


def test_command_line_of_generate(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo, with a comma\n")
    options = parse_generation(
        "",
        ["--model", "m", "--prompts-file", str(tmp_path / "prompts.txt"), "--seed", "1", "--seed", "2",
         "--lora", "a/b:0.5", "--lora", "c:d", "--output", "o.mp4"],
    )  # fmt: skip
    assert options.prompts == ["one", "two, with a comma"]
    assert options.lora == [(Path("a/b"), 0.5), (Path("c:d"), 1.0)]
    requests = make_requests(options, models.read_facts(tiny_folder))
    assert [(r.prompt[:3], r.seed) for r in requests] == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]
    names = [output_path(options, number, r.seed).name for number, r in enumerate(requests)]
    assert names == ["o-00-1.mp4", "o-00-2.mp4", "o-01-1.mp4", "o-01-2.mp4"]
    assert parse_adapter("x:-1e-1") == (Path("x"), -0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "o.mp4"], "--model"),
        (["--model", "m", "--output", "o.mp4"], "no prompt"),
        (["--model", "m", "--prompt", "p", "--output", "o.avi"], "must end in .mp4"),
        (["--model", "m", "--prompt", "p", "--output", "o.mp4", "--steps", "0"], "at least 1"),
        (["--model", "m", "--prompts-file", "/nowhere.txt", "--output", "o.mp4"], "cannot be read"),
    ],
)
def test_wrong_command_lines_say_what_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_generation("", arguments)

"""Every variant: training gives the transformer what the released pipeline gives it, and sizes follow its rules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from PIL import Image

from cogtune import generation, models
from cogtune.adapter import add_lora
from cogtune.attention import install_attention
from cogtune.conditions import ImageCondition, clean_condition, join_conditions
from cogtune.config import AdapterSettings
from cogtune.dataset import Batch
from cogtune.denoiser import OFS, Denoiser, make_rotary
from cogtune.diffusion import add_noise, pad_front, velocity
from cogtune.errors import UserError
from cogtune.execution import allow_shapes, configure_blocks
from cogtune.image_encoder import ImageEncoder, load_image_encoder
from cogtune.joint_blocks import join_blocks, part_blocks
from cogtune.manifest import Clip
from cogtune.random_pipeline import make_architecture_facts
from cogtune.step_cache import CacheSettings, StepCache
from cogtune.variants import VARIANTS
from cogtune.video import write_video
from cogtune.video_request import Request, check_request, check_size

CPU = torch.device("cpu")
Draw = Callable[..., np.ndarray]
FRAMES, HEIGHT, WIDTH = 17, 64, 96
VARIANT_MODELS = ["tiny", "tiny-2b", "tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"]


def make_denoiser(facts: models.ModelFacts) -> Denoiser:
    encoder = load_image_encoder(facts, torch.float32, CPU) if facts.takes_image else None
    return Denoiser(facts, device=CPU, dtype=torch.float32, min_snr_gamma=None, image_encoder=encoder)


def make_batch(
    latents: torch.Tensor,
    noise: torch.Tensor,
    text: torch.Tensor,
    timesteps: torch.Tensor,
    clips: list[Clip],
    image: ImageCondition | None = None,
) -> Batch:
    count = len(clips)
    return Batch(
        latents, noise, text, timesteps, torch.ones(count), torch.zeros(count, dtype=torch.bool), list(range(count)),
        clips, [False] * count, 0, image,
    )  # fmt: skip


def load_stock(folder: Path, kind: Any = None) -> Any:
    facts = models.read_facts(folder)
    kind = kind or (CogVideoXImageToVideoPipeline if facts.takes_image else CogVideoXPipeline)
    stock = kind.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


def watch(transformer: torch.nn.Module) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Collects what the transformer is called with, and what it gives."""
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []
    transformer.register_forward_hook(
        lambda _module, _args, kwargs, output: seen.append((kwargs, output[0].clone())), with_kwargs=True
    )
    return seen


@pytest.fixture
def image(tmp_path: Path, draw_clip: Draw) -> Path:
    path = tmp_path / "first.png"
    Image.fromarray(draw_clip(5)[0]).save(path)
    return path


@pytest.mark.parametrize("model", VARIANT_MODELS)
def test_forward_equals_the_released_pipelines(
    model: str, variant_folder: Callable[[str], Path], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same latents, image at zero noise, positions, ofs and padding give the same input and the same output."""
    folder = variant_folder(model)
    facts, stock = models.read_facts(folder), load_stock(folder)
    seen = watch(stock.transformer)
    # The posterior's noise is drawn by other generators: both sides take its mean.
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample", lambda self, generator=None: self.mean
    )
    stock(
        prompt="a red ball", num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=facts.max_text_length, generator=torch.Generator().manual_seed(1), output_type="latent",
        **({"image": Image.open(image)} if facts.takes_image else {}),
    )  # fmt: skip
    denoiser, transformer = make_denoiser(facts), models.load_transformer(facts, torch.float32)
    ours = watch(transformer)
    condition = None
    if facts.takes_image:
        pixels = torch.from_numpy(np.array(Image.open(image)))
        condition = clean_condition(pixels, (16, HEIGHT // 8, WIDTH // 8), key="k")
        condition.posterior_noise.zero_()
    for kwargs, expected in list(seen):
        noisy = kwargs["hidden_states"][:, :, :16]
        assert noisy.shape[1] == 5 + facts.num_padding(5)
        with torch.no_grad():
            found = denoiser.predict(transformer, noisy, kwargs["encoder_hidden_states"], kwargs["timestep"], condition)
        given = ours[-1][0]
        torch.testing.assert_close(given["hidden_states"], kwargs["hidden_states"], rtol=0, atol=1e-5)
        assert (given["ofs"] is None) == (kwargs.get("ofs") is None)
        assert facts.takes_ofs == (given["ofs"] is not None)
        if facts.takes_ofs:
            assert torch.equal(given["ofs"], kwargs["ofs"]) and given["ofs"].item() == OFS
        for mine, theirs in zip(given["image_rotary_emb"] or (), kwargs["image_rotary_emb"] or (), strict=True):
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("model", "scale"), [("tiny-i2v", 0.7), ("tiny-1.5-i2v", 1 / 0.7)])
def test_scale_of_image_latents_follows_the_released_pipeline(
    model: str, scale: float, variant_folder: Callable[[str], Path], draw_clip: Draw
) -> None:
    """1.5 was trained without the factor, and its VAE config says so (`invert_scale_latents`): diffusers divides."""
    facts = models.read_facts(variant_folder(model))
    assert facts.image_latent_scale == pytest.approx(scale)
    encoder = load_image_encoder(facts, torch.float32, CPU)
    pixels = torch.from_numpy(draw_clip(1)[0])
    condition = clean_condition(pixels, (16, HEIGHT // 8, WIDTH // 8), key="k")
    condition.posterior_noise.zero_()
    with torch.no_grad():
        mean = models.load_vae(facts, torch.float32).encode(condition.pixels[:, :, None]).latent_dist.mean
    torch.testing.assert_close(encoder.encode(condition), mean.transpose(1, 2) * scale)
    condition.kept.zero_()
    assert not encoder.encode(condition).any(), "a dropped condition is zero latents, not a black picture"


def test_image_latents_stand_in_frame_0_and_nowhere_else(
    variant_folder: Callable[[str], Path], draw_clip: Draw
) -> None:
    facts = models.read_facts(variant_folder("tiny-1.5-i2v"))
    encoder = load_image_encoder(facts, torch.float32, CPU)
    condition = clean_condition(torch.from_numpy(draw_clip(1)[0]), (16, 8, 12), key="k")
    joined = encoder.append(torch.ones(1, 6, 16, 8, 12), condition)
    assert joined.shape == (1, 6, 32, 8, 12) and (joined[:, :, :16] == 1).all()
    assert joined[:, 0, 16:].any() and not joined[:, 1:, 16:].any()


@pytest.mark.parametrize(("frames", "expected"), [(21, 1), (41, 1), (22, 0), (1, 1)])
def test_latents_are_padded_at_the_front_by_their_first_frame(frames: int, expected: int) -> None:
    facts = make_architecture_facts("cogvideox-1.5-5b")
    assert facts.num_padding(frames) == expected
    latents = torch.randn(16, frames, 2, 3, generator=torch.Generator().manual_seed(frames))
    padded = pad_front(latents, facts.num_padding(frames))
    assert padded.shape[1] % 2 == 0 and torch.equal(padded[:, expected:], latents)
    assert torch.equal(padded[:, 0], latents[:, 0])
    assert make_architecture_facts("cogvideox-5b").num_padding(frames) == 0


def test_released_shapes_have_the_known_number_of_tokens() -> None:
    tokens = {name: make_architecture_facts(name) for name in VARIANTS if name != "tiny"}
    found = {name: facts.num_tokens(facts.num_frames, facts.height, facts.width) for name, facts in tokens.items()}
    assert found == {
        "cogvideox-2b": 17_776, "cogvideox-5b": 17_776, "cogvideox-5b-i2v": 17_776,
        "cogvideox-1.5-5b": 45_104, "cogvideox-1.5-5b-i2v": 45_104,
    }  # fmt: skip
    assert all(facts.variant == name for name, facts in tokens.items())
    assert {n for n, f in tokens.items() if f.takes_image} == {"cogvideox-5b-i2v", "cogvideox-1.5-5b-i2v"}
    assert {n for n, f in tokens.items() if f.learned_positions} == {"cogvideox-5b-i2v"}
    assert {n for n, f in tokens.items() if f.takes_ofs} == {"cogvideox-1.5-5b-i2v"}
    assert tokens["cogvideox-1.5-5b"].max_text_length == 224


LANDSCAPE = [(81, 768, 1360), (161, 768, 1360), (49, 768, 768), (17, 768, 1024)]


@pytest.mark.parametrize(
    ("size", "sample"),
    [*((size, sample) for size in LANDSCAPE for sample in ((96, 170), (300, 300))), ((17, 1360, 768), (300, 300))],
)
def test_slice_positions_equal_the_pipelines(
    size: tuple[int, int, int], sample: tuple[int, int], variant_folder: Callable[[str], Path]
) -> None:
    """Ours with the hub's sample size, the pipeline's with that or the 300 x 300 of diffusers' converter."""
    facts = make_architecture_facts("cogvideox-1.5-5b")
    assert [facts.transformer_config[name] for name in ("sample_height", "sample_width")] == [96, 170]
    stock = load_stock(variant_folder("tiny-1.5"))
    config = {"sample_height": sample[0], "sample_width": sample[1], "attention_head_dim": facts.head_dim}
    stock.transformer.register_to_config(**config)
    latents = (size[0] - 1) // 4 + 1
    latents += facts.num_padding(latents)
    expected = stock._prepare_rotary_positional_embeddings(size[1], size[2], latents, CPU)
    found = make_rotary(facts, latents, size[1], size[2], CPU)
    assert found is not None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(found[0]) == latents // 2 * (size[1] // 16) * (size[2] // 16)


def test_portrait_has_positions_though_the_released_table_ends_before() -> None:
    """A table of 300 x 300 slices to the same values; the released 96 x 170 has no row for it."""
    facts = make_architecture_facts("cogvideox-1.5-5b-i2v")
    square = replace(facts, transformer_config=facts.transformer_config | {"sample_height": 300, "sample_width": 300})
    for found, expected in zip(
        make_rotary(facts, 6, 1360, 768, CPU) or (), make_rotary(square, 6, 1360, 768, CPU) or (), strict=True
    ):
        assert torch.equal(found, expected) and len(found) == 3 * 85 * 48


@pytest.mark.parametrize("model", ["tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"])
def test_generated_videos_equal_the_released_pipelines(
    model: str, variant_folder: Callable[[str], Path], image: Path
) -> None:
    """Frames and latents, padding gone, from one seed."""
    folder = variant_folder(model)
    facts, stock = models.read_facts(folder), load_stock(folder)
    request = Request(
        "a red ball", FRAMES, HEIGHT, WIDTH, seed=3, num_inference_steps=2,
        image=str(image) if facts.takes_image else None,
    )  # fmt: skip
    expected = stock(
        prompt="a red ball", num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=2, guidance_scale=6.0,
        max_sequence_length=facts.max_text_length, generator=torch.Generator().manual_seed(3), output_type="np",
        **({"image": Image.open(image)} if facts.takes_image else {}),
    ).frames[0]  # fmt: skip
    pipeline = generation.load_pipeline(facts, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = generation.generate(pipeline, request, max_text_length=facts.max_text_length)
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(frames - expected * 255).max() <= 1.01
    embeddings = pipeline.encode_prompt("a red ball", "", True, max_sequence_length=facts.max_text_length)
    latents = generation.generate_latents(pipeline, request, embeddings[0][0], embeddings[1][0])
    assert latents.shape == (1, 5, 16, 8, 12), "the padding is gone"
    decoded = generation.decode_latents(pipeline.vae, latents, facts.scaling_factor)
    assert np.abs(decoded.astype(int) - frames.astype(int)).max() <= 1


@pytest.fixture
def start_video(tmp_path: Path, draw_clip: Draw) -> Path:
    write_video(tmp_path / "start.mp4", draw_clip(2, 33), 8)
    return tmp_path / "start.mp4"


@pytest.mark.parametrize("model", ["tiny", "tiny-2b"])
def test_video_to_video_equals_the_released_pipelines(
    model: str, variant_folder: Callable[[str], Path], start_video: Path
) -> None:
    folder = variant_folder(model)
    facts, stock = models.read_facts(folder), load_stock(folder, CogVideoXVideoToVideoPipeline)
    request = Request(
        "a red ball", FRAMES, HEIGHT, WIDTH, seed=3, num_inference_steps=4, video=str(start_video), fps=8.0,
        strength=0.6,
    )  # fmt: skip
    given = [Image.fromarray(frame) for frame in generation._load_start(request)]
    expected = stock(
        video=given, prompt="a red ball", height=HEIGHT, width=WIDTH, num_inference_steps=4, guidance_scale=6.0,
        strength=0.6, max_sequence_length=32, generator=torch.Generator().manual_seed(3), output_type="np",
    ).frames[0]  # fmt: skip
    pipeline = generation.load_pipeline(facts, dtype=torch.float32, from_video=True)
    pipeline.set_progress_bar_config(disable=True)
    seen = watch(pipeline.transformer)
    frames = generation.generate(pipeline, request, max_text_length=32)
    assert len(seen) == request.num_steps == 2
    assert np.abs(frames - expected * 255).max() <= 1.01


@pytest.mark.parametrize("frames", [17, 33])
def test_video_to_video_of_version_1_5_keeps_its_length(
    frames: int, variant_folder: Callable[[str], Path], start_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released pipeline refuses these lengths; the first step that runs gets the video, padded and noised."""
    sampled = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    monkeypatch.setattr(sampled, lambda self, generator=None: self.mean)
    facts = models.read_facts(variant_folder("tiny-1.5"))
    pipeline = generation.load_pipeline(facts, dtype=torch.float32, from_video=True)
    pipeline.set_progress_bar_config(disable=True)
    seen = watch(pipeline.transformer)
    request = Request(
        "a red ball", frames, HEIGHT, WIDTH, num_inference_steps=40, video=str(start_video), fps=8.0, strength=0.03
    )
    made = generation.generate(pipeline, request, max_text_length=24)
    assert made.shape == (frames, HEIGHT, WIDTH, 3)
    latents = seen[0][0]["hidden_states"][0]
    assert len(seen) == 1 and latents.shape[0] == (frames - 1) // 4 + 2
    vae = models.load_vae(facts, torch.float32)
    pixels = torch.from_numpy(generation._load_start(request)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        clean = vae.encode(pixels).latent_dist.mean[0].transpose(0, 1) * facts.scaling_factor
    clean = torch.cat([clean[:1], clean])
    noise = torch.randn((1, *clean.shape), generator=torch.Generator().manual_seed(0))[0]
    abar = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps[-1]]
    torch.testing.assert_close(latents, abar.sqrt() * clean + (1 - abar).sqrt() * noise, rtol=0, atol=1e-5)
    assert pipeline.vae_scale_factor_temporal == 4


def request_for(facts: models.ModelFacts, **changes: Any) -> Request:
    return Request("a ball", facts.num_frames, facts.height, facts.width, **changes)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("cogvideox-5b-i2v", {}, ["no image", "--image FILE"]),
        ("cogvideox-1.5-5b-i2v", {"video": "a.mp4", "image": "a.png"}, ["--video a.mp4", "text-to-video model"]),
        ("cogvideox-5b", {"image": "a.png"}, ["--image a.png", "takes no image", "cogvideox-5b-i2v"]),
        ("cogvideox-5b", {"strength": 0.5}, ["--strength 0.5", "no effect without --video"]),
        ("cogvideox-5b", {"video": "a.mp4", "strength": 1.5}, ["--strength 1.5", "at most 1"]),
        ("cogvideox-5b", {"video": "a.mp4", "strength": 0.0}, ["--strength 0", "above 0"]),
        ("cogvideox-1.5-5b", {"video": "a.mp4", "strength": 0.01}, ["leaves no step", "raise one"]),
    ],
)
def test_wrong_images_videos_and_strengths_are_refused(model: str, changes: dict[str, Any], words: list[str]) -> None:
    facts = make_architecture_facts(model)
    with pytest.raises(UserError) as caught:
        check_request(request_for(facts, **changes), facts)
    assert all(word in str(caught.value) for word in words), caught.value


def test_right_images_and_videos_are_taken() -> None:
    image_model, text_model = make_architecture_facts("cogvideox-1.5-5b-i2v"), make_architecture_facts("cogvideox-2b")
    check_request(request_for(image_model, image="a.png"), image_model)
    check_request(request_for(text_model, video="a.mp4", strength=1.0, fps=8.0), text_model)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((80, 768, 1360), ["4k + 1"]),
        ((85, 768, 1360), ["16k + 1", "81"]),
        ((177, 768, 1360), ["from 17 to 161", "161"]),
        ((1, 768, 1360), ["16k + 1", "17"]),
        ((81, 480, 720), ["shorter side must be 768", "768 and 1152"]),
        ((81, 768, 1376), ["up to 1360", "768 and 1360"]),
        ((81, 768, 1000), ["multiple of 16"]),
    ],
)
def test_sizes_of_version_1_5_follow_its_rule(size: tuple[int, int, int], words: list[str]) -> None:
    facts = make_architecture_facts("cogvideox-1.5-5b")
    for right in [(81, 768, 1360), (161, 768, 1360), (17, 768, 768), (81, 1360, 768), (97, 768, 1024)]:
        check_size(facts, *right)
    with pytest.raises(UserError) as caught:
        check_size(facts, *size)
    assert all(word in str(caught.value) for word in words), caught.value


def test_learned_positions_refuse_other_sizes_even_where_they_are_allowed() -> None:
    facts = make_architecture_facts("cogvideox-5b-i2v")
    check_size(facts, 49, 480, 720)
    for size in [(49, 480, 480), (33, 480, 720)]:
        with pytest.raises(UserError, match="learned table for 49 frames of 720x480"):
            check_size(facts, *size, allow_unsupported_size=True)


def test_losses_of_image_models_reach_the_weights(variant_folder: Callable[[str], Path], draw_clip: Draw) -> None:
    """Against the pipeline's arithmetic written out: noised latents, image channels, v target."""
    facts = models.read_facts(variant_folder("tiny-1.5-i2v"))
    transformer, denoiser = models.load_transformer(facts, torch.float32), make_denoiser(facts)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(1, 6, 16, 8, 12, generator=generator) for _ in range(2))
    condition = clean_condition(torch.from_numpy(draw_clip(1)[0]), (16, 8, 12), key="k")
    text = torch.randn(1, 24, 32, generator=generator)
    clip = Clip("a", Path("a"), "a")
    batch = make_batch(latents, noise, text, torch.tensor([400]), [clip], condition)
    abar = models.load_scheduler(facts).alphas_cumprod[400].float()
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    encoder = ImageEncoder(models.load_vae(facts, torch.float32), facts)
    image = torch.cat([encoder.encode(condition), torch.zeros(1, 5, 16, 8, 12)], dim=1)
    transformer.requires_grad_(True)
    v = transformer(
        torch.cat([noisy, image], dim=2), text, torch.tensor([400]), ofs=torch.tensor([2.0]),
        image_rotary_emb=make_rotary(facts, 6, 64, 96, CPU), return_dict=False,
    )[0]  # fmt: skip
    expected = (v - (abar.sqrt() * noise - (1 - abar).sqrt() * latents)).square().mean()
    losses = denoiser.losses(transformer, batch)
    torch.testing.assert_close(losses[0], expected)
    losses.mean().backward()
    assert transformer.patch_embed.proj.weight.grad.abs().max() > 0
    assert transformer.ofs_embedding.linear_1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in denoiser.image_encoder.vae.parameters())


def make_step(facts: models.ModelFacts, draw_clip: Draw) -> Batch:
    generator = torch.Generator().manual_seed(0)
    frames = 5 + facts.num_padding(5)
    latents, noise = (torch.randn(2, frames, 16, 8, 12, generator=generator) for _ in range(2))
    image = None
    if facts.takes_image:
        conditions = [clean_condition(torch.from_numpy(draw_clip(n)[0]), (16, 8, 12), key=str(n)) for n in range(2)]
        image = join_conditions(conditions)
    text = torch.randn(2, facts.max_text_length, facts.text_dim, generator=generator)
    clips = [Clip(name, Path(name), name) for name in "ab"]
    return make_batch(latents, noise, text, torch.tensor([100, 900]), clips, image)


@pytest.mark.parametrize("model", ["tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"])
def test_training_fast_paths_equal_the_stock_blocks(
    model: str, variant_folder: Callable[[str], Path], draw_clip: Draw
) -> None:
    """Fused attention with an adapter, recomputing, and the compiler, in loss and gradients."""
    facts = models.read_facts(variant_folder(model))
    denoiser, batch = make_denoiser(facts), make_step(facts, draw_clip)
    found: dict[str, list[torch.Tensor]] = {}
    for way in ("stock", "recompute", "compiled"):
        transformer = models.load_transformer(facts, torch.float32)
        add_lora(transformer, AdapterSettings(rank=4), seed=1)
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(2)
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        transformer.train()
        if way != "stock":
            install_attention(transformer, "default")
            configure_blocks(
                transformer, "recompute", compiled=way == "compiled", has_dropout=False, compiler="aot_eager"
            )
        losses = denoiser.losses(transformer, batch)
        found[way] = [losses.detach(), *torch.autograd.grad(losses.sum(), parameters)]
    for way in ("recompute", "compiled"):
        for one, other in zip(found[way], found["stock"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in found["stock"][1:])


@pytest.mark.parametrize("model", ["tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"])
def test_sampling_fast_paths_equal_the_stock_blocks(
    model: str, variant_folder: Callable[[str], Path], image: Path
) -> None:
    """Joined blocks give the stock video; step caches run, and skip what they say."""
    facts = models.read_facts(variant_folder(model))
    request = Request(
        "a red ball", FRAMES, HEIGHT, WIDTH, seed=3, num_inference_steps=8,
        image=str(image) if facts.takes_image else None,
    )  # fmt: skip
    pipeline = generation.load_pipeline(facts, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    expected = generation.generate(pipeline, request, max_text_length=facts.max_text_length)
    join_blocks(pipeline.transformer, compiled=False)
    frames = generation.generate(pipeline, request, max_text_length=facts.max_text_length)
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1
    part_blocks(pipeline.transformer)
    cache = StepCache(CacheSettings(threshold=100.0, max_skipped=1, guidance_interval=2))
    join_blocks(pipeline.transformer, compiled=False, cache=cache)
    generation.generate(pipeline, request, max_text_length=facts.max_text_length)
    assert cache.kinds[:4] == ["full"] * 4 and cache.kinds[6:] == ["full"] * 2
    assert any(kind != "full" for kind in cache.kinds[4:6])


@torch._dynamo.config.patch(recompile_limit=2)  # restored afterwards
def test_the_compiler_makes_a_graph_for_every_shape_of_a_run(
    variant_folder: Callable[[str], Path],
) -> None:
    """Past its limit it would run blocks uncompiled without a word, or refuse."""
    torch._dynamo.reset()
    facts = models.read_facts(variant_folder("tiny-1.5"))
    transformer, denoiser = models.load_transformer(facts, torch.float32), make_denoiser(facts)
    transformer.requires_grad_(True).train()
    install_attention(transformer, "default")
    configure_blocks(transformer, "recompute", compiled=True, has_dropout=False, compiler="eager")
    allow_shapes(4)
    assert torch._dynamo.config.recompile_limit >= 4
    text = torch.randn(1, 24, 32)
    clips = [Clip("a", Path("a"), "a")]
    for rows in (2, 4, 6, 8):
        latents = torch.randn(1, 6, 16, rows, 12)
        denoiser.losses(transformer, make_batch(latents, latents, text, torch.tensor([1]), clips)).sum()
    torch._dynamo.reset()


@pytest.mark.parametrize("ask_base", ["samples", "batch"])
def test_prior_clips_of_image_models_ask_the_base_with_their_image(
    ask_base: Any, variant_folder: Callable[[str], Path], draw_clip: Draw
) -> None:
    """Held samples go towards what the base model predicts for the same image, which is encoded once."""
    facts = models.read_facts(variant_folder("tiny-1.5-i2v"))
    base = models.load_transformer(facts, torch.float32)
    changed = models.load_transformer(facts, torch.float32)
    torch.nn.init.normal_(changed.proj_out.bias, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = make_step(facts, draw_clip)
    batch.held[1], batch.num_held = True, 1

    weights = {name: tensor.clone() for name, tensor in changed.state_dict().items()}

    @contextmanager
    def as_base() -> Iterator[None]:
        changed.load_state_dict(base.state_dict())
        yield
        changed.load_state_dict(weights)

    encoder = load_image_encoder(facts, torch.float32, CPU)
    denoiser = Denoiser(
        facts, device=CPU, dtype=torch.float32, min_snr_gamma=None, image_encoder=encoder, base=as_base,
        ask_base=ask_base,
    )  # fmt: skip
    with torch.no_grad():
        losses = denoiser.losses(changed, batch)
        abar = denoiser.alphas_cumprod
        noisy = add_noise(batch.latents, batch.noise, batch.timesteps, abar)
        ours, theirs = (
            make_denoiser(facts).predict(m, noisy, batch.embeddings, batch.timesteps, batch.image)
            for m in (changed, base)
        )
    target = velocity(batch.latents, batch.noise, batch.timesteps, abar)
    torch.testing.assert_close(losses[0], (ours[0] - target[0]).square().mean())
    torch.testing.assert_close(losses[1], (ours[1] - theirs[1]).square().mean())
    assert losses[1] > 0


def test_portrait_videos_are_made_where_the_stock_pipeline_has_no_positions(
    variant_folder: Callable[[str], Path],
) -> None:
    folder = variant_folder("tiny-1.5")
    facts = models.read_facts(folder)
    pipeline = generation.load_pipeline(facts, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    request = Request("a red ball", 9, 96, 64, num_inference_steps=1)
    assert generation.generate(pipeline, request, max_text_length=24).shape == (9, 96, 64, 3)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        load_stock(folder)("a", num_frames=9, height=96, width=64, num_inference_steps=1, max_sequence_length=24)

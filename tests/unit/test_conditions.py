"""What an image-to-video sample starts from: noise on the pixels, keyed by seed and position, and at times no image."""

import math
from pathlib import Path

import pytest
import torch

from cogtune.cache import Cache
from cogtune.conditions import clean_condition, draw_condition, join_conditions, to_pixels
from cogtune.dataset import Batch, Entry, TrainingSet, join_samples
from cogtune.draws import draw_image_dropped, draw_image_noise, draw_noise
from cogtune.errors import UserError
from cogtune.manifest import Clip

IMAGE = torch.randint(0, 256, (16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LATENTS = (4, 2, 3)


def test_noise_scales_are_log_normal() -> None:
    logs = torch.tensor([math.log(draw_image_noise(3, p, (0,), (1,))[0]) for p in range(4000)], dtype=torch.float64)
    assert logs.mean().item() == pytest.approx(-3.0, abs=4 * 0.5 / 4000**0.5)
    assert logs.std().item() == pytest.approx(0.5, rel=0.05)


def test_pixels_carry_exactly_the_noise_that_was_drawn() -> None:
    condition = draw_condition(IMAGE, LATENTS, seed=5, position=9, dropout=0.0)
    sigma, noise, posterior_noise = draw_image_noise(5, 9, (3, 16, 24), LATENTS)
    expected = IMAGE.double().permute(2, 0, 1) / 127.5 - 1 + sigma * noise.double()
    torch.testing.assert_close(condition.pixels[0].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(condition.posterior_noise[0], posterior_noise) and condition.kept.tolist() == [1.0]
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)
    clean = clean_condition(IMAGE, LATENTS, key="clip")
    assert torch.equal(clean.pixels[0], to_pixels(IMAGE)) and clean.pixels.abs().max() <= 1


def test_every_position_draws_anew_and_always_the_same() -> None:
    def draw(seed: int, position: int) -> torch.Tensor:
        return draw_condition(IMAGE, LATENTS, seed=seed, position=position, dropout=0.5).pixels

    assert torch.equal(draw(1, 7), draw(1, 7))
    assert not torch.equal(draw(1, 7), draw(1, 8)) and not torch.equal(draw(1, 7), draw(2, 7))
    state = torch.get_rng_state()
    draw(1, 7)
    assert torch.equal(state, torch.get_rng_state())
    noise = draw_image_noise(1, 7, (3, 16, 24), (3, 16, 24))
    assert not torch.equal(noise[1], noise[2]) and not torch.equal(noise[2], draw_noise(1, 7, (3, 16, 24))[0])


@pytest.mark.parametrize("probability", [0.0, 0.05, 1.0])
def test_images_are_dropped_at_their_rate(probability: float) -> None:
    count = sum(draw_image_dropped(11, p, probability) for p in range(6000))
    assert abs(count - 6000 * probability) <= 4 * (6000 * probability * (1 - probability)) ** 0.5


def test_joining_keeps_the_order_and_none_stays_none() -> None:
    one, two = (draw_condition(IMAGE, LATENTS, seed=0, position=p, dropout=0.0) for p in range(2))
    joined = join_conditions([one, two])
    assert joined is not None and torch.equal(joined.pixels, torch.cat([one.pixels, two.pixels]))
    assert joined.kept.shape == (2,) and join_conditions([None, None]) is None


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path)
    for index in range(3):
        mean = torch.full((4, 5, 2, 3), float(index))
        cache.write("latents", f"l{index}", {"mean": mean, "logvar": mean * 0 - 60})
        cache.write("text", f"t{index}", {"embeddings": torch.zeros(6, 8)})
        cache.write("images", f"i{index}", {"image": IMAGE + index})
    return cache


def make_set(cache: Cache, *, patch_size_t: int | None = None, image_dropout: float = 0.05) -> TrainingSet:
    entries = [Entry(Clip(str(i), Path(f"{i}.mp4"), "c"), f"l{i}", f"t{i}", f"i{i}") for i in range(3)]
    return TrainingSet(
        entries, cache, seed=1, scaling_factor=1.0, caption_dropout=0.0, timestep_strata=4, patch_size_t=patch_size_t,
        image_dropout=image_dropout,
    )  # fmt: skip


def test_a_sample_has_its_own_clips_image(cache: Cache) -> None:
    dataset = make_set(cache)
    for position in range(6):
        sample = dataset[position]
        expected = draw_condition(IMAGE + int(sample.clips[0].id), LATENTS, seed=1, position=position, dropout=0.05)
        assert sample.image is not None and torch.equal(sample.image.pixels, expected.pixels)
        assert sample.image.posterior_noise.shape == (1, *LATENTS)


def test_batches_of_images_move_and_are_released(cache: Cache) -> None:
    dataset = make_set(cache, image_dropout=1.0)
    batch = join_samples([dataset[0], dataset[1]])
    moved = batch.to(torch.device("cpu"))
    assert moved.image is not None and batch.image is not None
    assert moved.image.pixels.shape == (2, 3, 16, 24) and moved.image.kept.tolist() == [0.0, 0.0]
    batch.release()
    assert batch.image is None and batch.latents.numel() == 0 and batch.describe()


@pytest.mark.parametrize(("patch_size_t", "frames"), [(None, 5), (2, 6), (3, 6), (5, 5)])
def test_latents_and_noise_are_padded_at_the_front(cache: Cache, patch_size_t: int | None, frames: int) -> None:
    sample: Batch = make_set(cache, patch_size_t=patch_size_t)[2]
    plain = make_set(cache)[2]
    assert sample.latents.shape == sample.noise.shape == (1, frames, 4, 2, 3)
    assert torch.equal(sample.latents[:, frames - 5 :], plain.latents)
    assert torch.equal(sample.latents[:, 0], plain.latents[:, 0])
    noise = sample.noise[0]
    assert all(not torch.equal(noise[a], noise[b]) for a in range(frames) for b in range(a)), "padding has its own"


def test_a_missing_image_says_what_to_do(cache: Cache) -> None:
    for index in range(3):
        cache.path("images", f"i{index}").unlink()
    with pytest.raises(UserError, match=r"\(image\) is missing.*start the run again"):
        make_set(cache)[0]

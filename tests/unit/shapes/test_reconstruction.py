"""What the autoencoder's training rests on: its imagery, its measures, and convolutions run by frames."""

import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogtune.frame_convolution import convolve_frames, use_frame_convolutions
from cogtune.shapes.imagery import sample_imagery
from cogtune.shapes.pool import ClipPool
from cogtune.shapes.reconstruction import (
    decoder_loss,
    halve_colour_resolution,
    measure_psnr,
    object_weights,
    reconstruction_loss,
    to_pixels,
)
from patience import patient


def make_vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval()


def test_imagery_is_reproducible_and_varied():
    clip = sample_imagery(3, 4)
    assert clip.shape == (17, 64, 96, 3) and clip.dtype == np.uint8
    assert np.array_equal(clip, sample_imagery(3, 4)) and not np.array_equal(clip, sample_imagery(3, 5))
    colours = [len(np.unique(sample_imagery(3, index)[8].reshape(-1, 3), axis=0)) for index in range(40)]
    assert min(colours) < 100 < max(colours)


def wait_until_ready(pool: ClipPool) -> None:
    deadline = time.monotonic() + patient(60)
    while pool.count_ready() < len(pool.clips):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_pool_holds_the_clips_of_a_seed():
    with ClipPool(3, size=6, workers=2, renewed=False) as pool:
        wait_until_ready(pool)
        for index, clip in enumerate(pool.clips):
            np.testing.assert_array_equal(clip, sample_imagery(3, index))


def test_the_pool_renews_its_clips():
    with ClipPool(3, size=6, workers=2) as pool:
        wait_until_ready(pool)
        first, deadline = pool.clips.copy(), time.monotonic() + patient(60)
        while any(np.array_equal(*pair) for pair in zip(pool.clips, first, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with pytest.raises(ValueError, match="1 worker or more"):
        ClipPool(3, size=6, workers=0)


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_by_frames_equals_the_3d_one(kernel: int):
    torch.manual_seed(1)
    convolution = torch.nn.Conv3d(5, 7, kernel, padding=(0, kernel // 2, kernel // 2)).double()
    volume = torch.randn(2, 5, 6, 8, 9, dtype=torch.float64, requires_grad=True)
    expected, got = convolution(volume), convolve_frames(convolution, volume)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), [volume, convolution.weight]) for y in (expected, got)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_an_autoencoder_by_frames_equals_the_stock_one():
    vae = make_vae()
    pixels = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        frames = vae.decode(latents).sample
        keys = set(vae.state_dict())
        use_frame_convolutions(vae)
        torch.testing.assert_close(vae.encode(pixels).latent_dist.mode(), latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vae.decode(latents).sample, frames, atol=1e-4, rtol=1e-4)
    assert set(vae.state_dict()) == keys
    with pytest.raises(ValueError, match="can't run by frames"):
        use_frame_convolutions(torch.nn.Sequential(torch.nn.Conv3d(2, 2, 3, padding=1)))  # type: ignore[arg-type]


def test_colour_resolution_is_halved_and_brightness_kept():
    pixels = to_pixels(torch.from_numpy(np.stack([sample_imagery(0, index) for index in range(3)])))
    halved = halve_colour_resolution(pixels * 0.5)  # half the contrast: nothing is clipped
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close((halved * luma).sum(1), (pixels * 0.5 * luma).sum(1), atol=1e-5, rtol=0)
    assert (halved - pixels * 0.5).abs().max() > 0.1
    grey = torch.rand(1, 1, 2, 8, 8).expand(1, 3, 2, 8, 8)
    torch.testing.assert_close(halve_colour_resolution(grey), grey)


def test_the_loss_is_zero_error_plus_its_priors():
    pixels = torch.rand(2, 3, 5, 16, 16)
    latents = torch.randn(2, 4, 2, 2, 2)
    _, perfect = reconstruction_loss(pixels, pixels, latents, torch.zeros_like(latents))
    assert perfect["l1"] == 0 and perfect["mse"] == 0 and perfect["kl"] > 0
    loss, parts = reconstruction_loss(pixels, pixels + 0.1, latents, torch.zeros_like(latents))
    assert parts["l1"] == pytest.approx(0.1) and parts["mse"] == pytest.approx(0.01)
    assert float(loss) > 0.2  # L1, and ten times the squared error


def test_psnr_of_a_known_error():
    class Brighter:
        """Gives pixels back 8 of 255 brighter."""

        def parameters(self):
            return iter([torch.zeros(1)])

        def encode(self, pixels, return_dict):
            self.mode = lambda: pixels
            return (self,)

        def decode(self, latents, return_dict):
            return (latents + 8 / 127.5,)

    clips = np.full((3, 17, 8, 8, 3), 100, dtype=np.uint8)
    psnr, worst = measure_psnr(Brighter(), clips, batch_size=2)  # type: ignore[arg-type]
    assert psnr == pytest.approx(20 * np.log10(255 / 8)) == worst


def draw_square(colour: float, side: int) -> torch.Tensor:
    """A grey clip [1, 3, 2, 64, 96] with a square of another grey; smaller in the second frame."""
    pixels = torch.zeros(1, 3, 2, 64, 96)
    for frame, size in enumerate((side, side // 2)):
        pixels[:, :, frame, 20 : 20 + size, 30 : 30 + size] = colour
    return pixels


def test_errors_weigh_more_on_small_objects_of_little_contrast():
    pale, bright = object_weights(draw_square(0.6, 16)), object_weights(draw_square(1.2, 16))
    assert pale.shape == (1, 1, 2, 1, 1)
    torch.testing.assert_close(pale, 2 * bright, msg="as the contrast falls")
    assert 1.0 < pale[0, 0, 1] / pale[0, 0, 0] <= 2.0, "as the area falls, by its root"
    whole = object_weights(torch.zeros(1, 3, 2, 64, 96))
    assert torch.isfinite(whole).all() and whole.max() <= 3.0, "an empty clip has a weight, too"


def test_the_decoders_loss_is_weighted_and_its_parts_are_not():
    pixels = draw_square(0.5, 16)
    decoded = pixels + 0.1
    loss, parts = decoder_loss(pixels, decoded)
    weights = object_weights(pixels)
    expected = 0.1 * weights.mean() + 10.0 * (0.1 * weights).square().mean()
    torch.testing.assert_close(loss, expected)
    assert float(parts["l1"]) == pytest.approx(0.1, rel=1e-4) and float(parts["mse"]) == pytest.approx(0.01, rel=1e-4)

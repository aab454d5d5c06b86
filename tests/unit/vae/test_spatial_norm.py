"""The decoder's spatial norms with their convolutions before the enlarging."""

import torch
from diffusers import AutoencoderKLCogVideoX

from cogtune.vae.spatial_norm import use_small_spatial_norms


def test_spatial_norms_before_the_upsampling_equal_the_stock_ones() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval().double()
    pixels = torch.rand(1, 3, 17, 32, 48, dtype=torch.float64) * 2 - 1
    expected = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), list(vae.parameters()))
    use_small_spatial_norms(vae)
    got = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(got, expected)
    again = torch.autograd.grad((got * weights).sum(), list(vae.parameters()))
    torch.testing.assert_close(again, gradients)

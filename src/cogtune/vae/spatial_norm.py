"""Runs the decoder's spatial norms with their 1x1 convolutions before the upsampling, not after it: the same values.

The stock module enlarges the latents to the features' size, up to 64 positions for one, and convolves those twice; most
of a small decoder's memory traffic is that. A convolution of kernel 1 and nearest-neighbour enlarging commute.
"""

import functools

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX, CogVideoXSpatialNorm3D
from torch import Tensor


def enlarge(values: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Nearest-neighbour enlarging of [B, C, t, h, w] to whole multiples; with odd frames the first one stays single."""
    frames, first = values.shape[2], size[0] % 2 if size[0] > 1 else 0
    if frames != size[0]:
        if frames <= first or (size[0] - first) % (frames - first):
            raise ValueError(f"{frames} latent frames can't be enlarged to {size[0]} frames: not a whole multiple")
        rest = values[:, :, first:].unsqueeze(3).expand(-1, -1, -1, (size[0] - first) // (frames - first), -1, -1)
        values = torch.cat([values[:, :, :first], rest.flatten(2, 3)], dim=2)
    return F.interpolate(values.flatten(1, 2), size=size[1:]).unflatten(1, values.shape[1:3])


def normalize(
    norm: CogVideoXSpatialNorm3D, f: Tensor, zq: Tensor, conv_cache: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `norm` gives for features `f` [B, C, T, H, W] and latents `zq` [B, c, t, h, w], up to summation order."""
    size = (f.shape[2], f.shape[3], f.shape[4])
    scale, shift = (enlarge(convolution.conv(zq), size) for convolution in (norm.conv_y, norm.conv_b))
    return norm.norm_layer(f) * scale + shift, {}  # kernels of 1 look at no earlier frame


def use_small_spatial_norms(vae: AutoencoderKLCogVideoX) -> None:
    """Lets every spatial norm of an autoencoder run this way; weights and state dict stay as they are."""
    for module in vae.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            module.forward = functools.partial(normalize, module)  # pyright: ignore[reportAttributeAccessIssue]

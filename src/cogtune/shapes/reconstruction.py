"""How well an autoencoder gives clips back: what it is trained on, and the PSNR it is measured by."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from numpy.typing import NDArray
from torch import Tensor

from cogtune.shapes.imagery import sample_imagery
from cogtune.shapes.render import render
from cogtune.shapes.world import sample_clip

UNSEEN_SEED = 1_000_003
"""Of the clips that PSNR is measured on."""
_TYPICAL_CONTRAST = 1.5  # of an object to its background, Euclidean in RGB in [-1, 1]; the world has 1.0 to 2.6
_TYPICAL_AREA = 0.035  # of an object, as a share of its frame; the world has 0.018 to 0.115
_MSE_WEIGHT = 10.0  # L1 alone leaves the edges soft; they make nearly all of the squared error
_GRADIENT_WEIGHT = 0.5
_KL_WEIGHT = 1e-6
_MOMENT_WEIGHT = 1e-2


def to_pixels(clips: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def halve_colour_resolution(pixels: Tensor) -> Tensor:
    """What yuv420p video does to pixels [B, 3, F, H, W]: full brightness, colour at half resolution."""
    red, green, blue = pixels.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([blue - luma, red - luma], dim=1).flatten(1, 2)  # [B, 2F, H, W]
    chroma = F.interpolate(F.avg_pool2d(chroma, 2), scale_factor=2.0, mode="bilinear")
    blue, red = (part + luma for part in chroma.unflatten(1, (2, -1)).unbind(1))
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack([red, green, blue], dim=1).clamp(-1.0, 1.0)


def reconstruction_loss(
    pixels: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch in float32, and its parts; pixels and decoded [B, 3, F, H, W], the others [B, C, f, h, w].

    Beside the error: the KL divergence, weighted so low that it only keeps the variances finite, and a pull of every
    latent channel towards mean 0 and deviation 1 over the batch, so that one scaling factor suits all channels and
    noise put on the latents has the same meaning for all.
    """
    error = decoded - pixels
    reconstruction, parts = _error_loss(error)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    channel_mean, channel_std = mean.mean((0, 2, 3, 4)), mean.std((0, 2, 3, 4))
    moments = (channel_mean.square() + (channel_std - 1.0).square()).mean()
    loss = reconstruction + _KL_WEIGHT * kl + _MOMENT_WEIGHT * moments
    return loss, parts | {"kl": kl.detach(), "moments": moments.detach()}


def _error_loss(error: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What is lost by an error [B, 3, F, H, W], edges counted once more; and its parts."""
    l1, mse = error.abs().mean(), error.square().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss = l1 + _MSE_WEIGHT * mse + _GRADIENT_WEIGHT * gradient
    return loss, {"l1": l1.detach(), "mse": mse.detach()}


def object_weights(pixels: Tensor) -> Tensor:
    """How much an error in each frame hides of its object, [B, 1, F, 1, 1] for pixels [B, 3, F, H, W]; 1 is typical.

    Background and contrast are the clip's, the area is the frame's.

    The corners of a small object of little contrast to its background say as much of its shape as those of a large,
    bright one, and are a fraction of the squared error.
    """
    sides = (pixels[..., :2, :], pixels[..., -2:, :], pixels[..., :2], pixels[..., -2:])
    ground = torch.cat([side.flatten(2) for side in sides], dim=2).mean(2)[:, :, None, None, None]
    distance = (pixels - ground).square().sum(1, keepdim=True).sqrt()  # [B, 1, F, H, W]
    contrast = distance.amax((2, 3, 4), keepdim=True).clamp(min=0.5)
    area = (distance > contrast / 2).float().mean((3, 4), keepdim=True).clamp(min=0.005)
    return (_TYPICAL_CONTRAST / contrast * (_TYPICAL_AREA / area).sqrt().clamp(0.5, 2.0)).clamp(0.3, 3.0)


def decoder_loss(pixels: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a decoder alone in float32, its errors weighted by `object_weights`; and its parts, not weighted."""
    error = decoded - pixels
    loss, _ = _error_loss(error * object_weights(pixels))
    return loss, _error_loss(error.detach())[1]


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLCogVideoX, clips: NDArray[np.uint8], batch_size: int = 20) -> tuple[float, float]:
    """PSNR in dB of clips [N, F, H, W, 3] given back from their latents' means, in 8 bits: of all, and of the worst."""
    errors: list[float] = []
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    for start in range(0, len(clips), batch_size):
        batch = torch.from_numpy(clips[start : start + batch_size]).to(device)
        (posterior,) = vae.encode(to_pixels(batch).to(dtype), return_dict=False)
        (decoded,) = vae.decode(posterior.mode(), return_dict=False)
        shown = ((decoded.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().permute(0, 2, 3, 4, 1)
        errors += (shown - batch).square().mean((1, 2, 3, 4)).tolist()
    mean_error = max(sum(errors) / len(errors), 1e-6)
    return 10 * math.log10(255**2 / mean_error), 10 * math.log10(255**2 / max(*errors, 1e-6))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLCogVideoX, clips: NDArray[np.uint8], batch_size: int = 20) -> Tensor:
    """The latents' means [N, C, f, h, w] of clips, unscaled, float32 on the CPU."""
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    batches = (torch.from_numpy(clips[i : i + batch_size]).to(device) for i in range(0, len(clips), batch_size))
    encoded = (vae.encode(to_pixels(batch).to(dtype), return_dict=False)[0] for batch in batches)
    return torch.cat([posterior.mode().float().cpu() for posterior in encoded])


def measure_unseen(vae: AutoencoderKLCogVideoX, count: int) -> dict[str, float]:
    """PSNR in dB on `count` clips each that training did not show: of the base world, of the concept, and of the varied
    imagery; and how the latents of the first are spread. In 3 decimals."""
    sets = {
        "base": [render(sample_clip("base", UNSEEN_SEED, 10**6 + index)) for index in range(count)],
        "concept": [render(sample_clip("concept", UNSEEN_SEED, index)) for index in range(count)],
        "imagery": [sample_imagery(UNSEEN_SEED, index) for index in range(count)],
    }
    measured = {}
    for name, clips in sets.items():
        measured[f"psnr_{name}"], measured[f"psnr_{name}_worst"] = measure_psnr(vae, np.stack(clips))
    latents = measure_latents(vae, np.stack(sets["base"]))
    measured["latent_std"] = float(latents.std())
    measured["channel_std_min"] = float(latents.std((0, 2, 3, 4)).min())
    measured["channel_std_max"] = float(latents.std((0, 2, 3, 4)).max())
    measured["channel_mean_max"] = float(latents.mean((0, 2, 3, 4)).abs().max())
    return {name: round(value, 3) for name, value in measured.items()}

"""Encodes the images of image-to-video models: the autoencoder without its decoder, in training and in validation."""

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from cogtune import models
from cogtune.conditions import ImageCondition
from cogtune.models import ModelFacts


class ImageEncoder:
    """Condition to latents, as the released image-to-video pipeline makes them."""

    def __init__(self, vae: AutoencoderKLCogVideoX, facts: ModelFacts) -> None:
        self.vae, self._scale = vae, facts.image_latent_scale

    @torch.no_grad()
    def encode(self, condition: ImageCondition) -> torch.Tensor:
        """Scaled latents of the first frames, float32 [B, 1, C, h, w]; zeros where the condition is dropped."""
        pixels = condition.pixels.to(self.vae.device, self.vae.dtype)[:, :, None]  # [B, 3, 1, H, W]
        posterior: DiagonalGaussianDistribution = self.vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        noise = condition.posterior_noise.to(pixels.device)[:, :, None]
        latents = (posterior.mean.float() + posterior.std.float() * noise) * self._scale
        kept = condition.kept.to(latents.device)[:, None, None, None, None]
        return torch.where(kept > 0, latents, 0.0).transpose(1, 2)

    def append(self, latents: torch.Tensor, condition: ImageCondition) -> torch.Tensor:
        """Latents [B, F, C, h, w] with the image's behind them on the channels: in frame 0, zeros in all others."""
        image = self.encode(condition)
        padding = image.new_zeros(latents.shape[0], latents.shape[1] - 1, *image.shape[2:])
        return torch.cat([latents, torch.cat([image, padding], dim=1)], dim=2)


def load_image_encoder(facts: ModelFacts, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    """The encoder on the device; the decoder's weights are left behind."""
    vae = models.load_vae(facts, dtype)
    drop_decoder(vae)
    return ImageEncoder(vae.to(device), facts)  # pyright: ignore[reportArgumentType]


def drop_decoder(vae: AutoencoderKLCogVideoX) -> None:
    """Frees the decoder, in place."""
    vae.decoder = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

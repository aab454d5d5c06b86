"""The image that an image-to-video model starts from, as training sees it: noised anew for every sample.

The released models saw the first frame with noise of scale exp(N(-3, 0.5)) on its PIXELS, before the autoencoder, and
in about one sample of twenty none at all: zero latents (SAT `add_noise_to_first_frame`, `noised_image_dropout`). Noise
on pixels is no noise on latents, so the cache keeps the pixels and every step encodes one frame (`image_encoder`).
"""

from dataclasses import dataclass, fields

import torch

from cogtune.draws import draw_image_dropped, draw_image_noise


@dataclass
class ImageCondition:
    """First frames on their way to the device, float32."""

    pixels: torch.Tensor  # [B, 3, H, W] in [-1, 1], with their noise
    posterior_noise: torch.Tensor  # [B, C, h, w], for the autoencoder's posterior
    kept: torch.Tensor  # [B], 0 where zero latents stand for the image

    def pin_memory(self) -> "ImageCondition":
        """Page-locked copies."""
        return ImageCondition(*(getattr(self, field.name).pin_memory() for field in fields(self)))

    def to(self, device: torch.device) -> "ImageCondition":
        """The same on a device."""
        return ImageCondition(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return image.permute(2, 0, 1).float() / 127.5 - 1.0


def draw_condition(
    image: torch.Tensor, latent_shape: tuple[int, ...], *, seed: int, position: int, dropout: float
) -> ImageCondition:
    """The condition of the sample at a global position; `image` is uint8 [H, W, 3], `latent_shape` [C, h, w]."""
    pixels = to_pixels(image)
    sigma, noise, posterior_noise = draw_image_noise(seed, position, tuple(pixels.shape), latent_shape)
    kept = torch.tensor([0.0 if draw_image_dropped(seed, position, dropout) else 1.0])
    return ImageCondition((pixels + sigma * noise)[None], posterior_noise[None], kept)


def clean_condition(image: torch.Tensor, latent_shape: tuple[int, ...], *, key: str) -> ImageCondition:
    """The condition as sampling has it, without noise on the pixels; the posterior's noise is keyed by `key`."""
    _, _, posterior_noise = draw_image_noise(0, key, (0,), latent_shape)
    return ImageCondition(to_pixels(image)[None], posterior_noise[None], torch.ones(1))


def join_conditions(conditions: list[ImageCondition | None]) -> ImageCondition | None:
    """One of several; None for models without images."""
    given = [condition for condition in conditions if condition is not None]
    assert len(given) in (0, len(conditions))
    if not given:
        return None
    return ImageCondition(*(torch.cat([getattr(c, field.name) for c in given]) for field in fields(ImageCondition)))

"""Random images for measuring image-to-video models: the encoder, a condition, cached pixels."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogtune.benchmark.autoencoder import make_random_vae
from cogtune.benchmark.clock import time_work
from cogtune.conditions import ImageCondition, draw_condition
from cogtune.image_encoder import ImageEncoder, drop_decoder
from cogtune.models import ModelFacts, choose_dtype
from cogtune.random_pipeline import make_architecture_facts


def make_random_image_encoder(model: str, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """The encoder of a released autoencoder with random weights."""
    vae = make_random_vae(model, device, dtype)
    drop_decoder(vae)
    return ImageEncoder(vae, make_architecture_facts(model))


def time_image_encoding(model: str, size: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of encoding one image of a clip's size, the encoder's weights included."""
    facts = make_architecture_facts(model)
    encoder = make_random_image_encoder(model, device, choose_dtype("auto", facts, device))
    condition = make_random_condition(facts, size).to(device)
    return time_work(lambda: encoder.encode(condition), device, repeats=10, limit_seconds=20)


def make_random_image(size: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Pixels uint8 [H, W, 3] for a clip of frames, height and width."""
    return torch.randint(0, 256, (*size[1:], 3), generator=generator, dtype=torch.uint8)


def write_random_image(folder: Path, size: tuple[int, int, int]) -> Path:
    """An image file for a clip of frames, height and width."""
    path = folder / "random.png"
    Image.fromarray(make_random_image(size, torch.Generator().manual_seed(5)).numpy()).save(path)
    return path


def make_random_condition(facts: ModelFacts, size: tuple[int, int, int]) -> ImageCondition:
    """A noised image for a clip of frames, height and width."""
    _, channels, rows, columns = facts.latent_shape(*size)
    image = make_random_image(size, torch.Generator().manual_seed(4))
    return draw_condition(image, (channels, rows, columns), seed=0, position=0, dropout=0.0)

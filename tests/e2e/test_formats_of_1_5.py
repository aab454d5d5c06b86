"""Adapters of a 1.5 image-to-video model (patches in time, ofs) through the commands: equal outputs after each way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

from cogtune.config import AdapterSettings

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
CONVERT, EXPORT = "scripts/convert.py", "scripts/export.py"
EVERYWHERE = ["to_q", "to_k", "to_v", "to_out.0", r"patch_embed\.proj", r"ofs_embedding\.linear_[12]", "proj_out"]


@pytest.fixture
def base(variant_folder: Callable[[str], Path]) -> Path:
    return variant_folder("tiny-1.5-i2v")


@pytest.fixture
def sample(draw_clip: Callable[..., np.ndarray]) -> Callable[..., torch.Tensor]:
    """The latents of a short video by the stock pipeline, from an image, with or without an adapter."""

    def call(folder: Path, lora: Path | None = None) -> torch.Tensor:
        pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        options = {"num_frames": 17, "height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 24}
        return pipeline(
            Image.fromarray(draw_clip(5)[0]), "a ship", generator=torch.Generator().manual_seed(1),
            output_type="latent", **options,
        ).frames  # fmt: skip

    return call


def test_merged_and_extracted(
    good: Callable[..., str], make_adapter: Callable[..., Path], base: Path, sample: Callable, tmp_path: Path
) -> None:
    settings = AdapterSettings(rank=3, alpha=6.0, target_modules=EVERYWHERE)
    lora = make_adapter(base, settings)
    expected = sample(base, lora)
    assert (sample(base) - expected).abs().max() > 1e-2
    good(EXPORT, "merge", base, "merged", "--lora", lora)
    torch.testing.assert_close(sample(tmp_path / "merged"), expected, rtol=0, atol=1e-4)
    assert "12 layers, rank 3, 100.00 %" in good(EXPORT, "extract", base, "merged", "extracted", "--rank", 3)
    torch.testing.assert_close(sample(base, tmp_path / "extracted"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["keep", "fold"])
def test_through_sat_and_back(
    good: Callable[..., str],
    make_adapter: Callable[..., Path],
    base: Path,
    sample: Callable,
    tmp_path: Path,
    scale: str,
) -> None:
    lora = make_adapter(base, AdapterSettings(rank=3, alpha=6.0))
    alpha = {"keep": 6, "fold": 1}[scale]
    assert f"lora_alpha: {alpha}" in good(CONVERT, "to-sat", "lora", lora, "sat", "--scale", scale)
    good(CONVERT, "from-sat", "lora", "sat", "back", "--alpha", alpha, "--base", base)
    expected = sample(base, lora)
    torch.testing.assert_close(sample(base, tmp_path / "back"), expected, rtol=0, atol=1e-4)
    assert (sample(base) - expected).abs().max() > 1e-2

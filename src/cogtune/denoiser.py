"""The transformer as training sees it: rotary positions, casts at its border, and the loss of a batch.

Noising, target and loss are float32 (`cogtune.diffusion`); only what enters the transformer is cast to its precision.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogtune import diffusion
from cogtune.conditions import ImageCondition
from cogtune.dataset import Batch
from cogtune.image_encoder import ImageEncoder
from cogtune.models import ModelFacts

Rotary = tuple[torch.Tensor, torch.Tensor]
OFS = 2.0
"""The frame offset that image-to-video models of version 1.5 know; diffusers samples with it."""


def make_rotary(
    facts: ModelFacts, num_latent_frames: int, height: int, width: int, device: torch.device
) -> Rotary | None:
    """cos and sin [video tokens, head_dim] for a clip of that size in pixels; None for models with added positions.

    Only video tokens rotate. The grid is diffusers': for version 1.0 `linspace` over the resize-crop region, for 1.5
    (patches in time) `slice`, a part of a larger grid, which is made as large as the clip needs.
    """
    if not facts.use_rotary:
        return None
    rows, columns = (size // (facts.spatial_factor * facts.patch_size) for size in (height, width))
    config = facts.transformer_config
    base_rows, base_columns = (
        config.get(k, d) // facts.patch_size for k, d in (("sample_height", 60), ("sample_width", 90))
    )
    if facts.patch_size_t is None:
        region = get_resize_crop_region_for_grid((rows, columns), base_columns, base_rows)
        grid: dict[str, Any] = {"crops_coords": region, "temporal_size": num_latent_frames}
    else:
        frames = (num_latent_frames + facts.num_padding(num_latent_frames)) // facts.patch_size_t
        # The released pipeline's table ends at the sample size of the config: 96 x 170 has no place for portrait.
        largest = max(base_rows, rows), max(base_columns, columns)
        grid = {"crops_coords": None, "temporal_size": frames, "grid_type": "slice", "max_size": largest}
    return get_3d_rotary_pos_embed(embed_dim=facts.head_dim, grid_size=(rows, columns), device=device, **grid)  # pyright: ignore[reportReturnType]  # always a pair


class Denoiser:
    """Turns batches into losses with a given transformer (wrapped or not).

    `autocast`: the weights are float32 and computed with in `dtype` (full fine-tuning in low precision).
    `base`: inside this context the transformer is the base model, whose predictions are the targets of held samples.
    `ask_base`: it is asked for those samples; for the whole batch where one is among them, so that shapes stay the same
    and nothing waits for the device; or always, for a recorded pass.
    `image_encoder`: for image-to-video models.
    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        device: torch.device,
        dtype: torch.dtype,
        min_snr_gamma: float | None,
        autocast: bool = False,
        base: Callable[[], AbstractContextManager[object]] | None = None,
        ask_base: Literal["samples", "batch", "always"] = "samples",
        image_encoder: ImageEncoder | None = None,
    ) -> None:
        assert facts.takes_image == (image_encoder is not None), "image-to-video models have an image encoder"
        self.alphas_cumprod = diffusion.make_alphas_cumprod(facts.scheduler_config).to(device)
        self._facts, self._device = facts, device
        self._dtype, self._gamma, self._autocast = dtype, min_snr_gamma, autocast
        self._base, self._ask_base = base, ask_base
        self.image_encoder = image_encoder
        self._ofs = torch.full((1,), OFS, device=device) if facts.takes_ofs else None
        self._rotary: dict[tuple[int, ...], Rotary | None] = {}

    def predict(
        self,
        transformer: torch.nn.Module,
        noisy: torch.Tensor,
        embeddings: torch.Tensor,
        timesteps: torch.Tensor,
        image: ImageCondition | None = None,
    ) -> torch.Tensor:
        """v [B, F, C, H, W] for noisy latents of that shape, embeddings [B, L, D] and timesteps [B]."""
        return self._run(transformer, self._add_image(noisy, image), embeddings, timesteps)

    def _add_image(self, noisy: torch.Tensor, image: ImageCondition | None) -> torch.Tensor:
        if self.image_encoder is None:
            return noisy
        assert image is not None, "an image-to-video model needs one"
        return self.image_encoder.append(noisy, image)

    def _run(
        self, transformer: torch.nn.Module, inputs: torch.Tensor, embeddings: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(inputs.device.type, self._dtype, enabled=self._autocast):
            return transformer(
                hidden_states=inputs.to(self._dtype),
                encoder_hidden_states=embeddings.to(self._dtype),
                timestep=timesteps,
                ofs=self._ofs,
                image_rotary_emb=self._find_rotary(inputs),
                return_dict=False,
            )[0]

    def _find_rotary(self, latents: torch.Tensor) -> Rotary | None:
        """The positions of a clip's shape, made once."""
        _, frames, _, rows, columns = latents.shape
        shape, factor = (frames, rows, columns), self._facts.spatial_factor
        if shape not in self._rotary:
            self._rotary[shape] = make_rotary(self._facts, frames, rows * factor, columns * factor, self._device)
        return self._rotary[shape]

    def losses(self, transformer: torch.nn.Module, batch: Batch, *, weighted: bool = True) -> torch.Tensor:
        """The v loss of each sample, float32 [B]; with the samples' weights and min-SNR's, unless told otherwise."""
        abar = self.alphas_cumprod
        noisy = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps, abar)
        target = diffusion.velocity(batch.latents, batch.noise, batch.timesteps, abar)
        inputs = self._add_image(noisy, batch.image)
        if self._base is not None and (batch.num_held or self._ask_base == "always"):
            target = self._ask(transformer, batch, inputs, target)
        losses = diffusion.sample_losses(self._run(transformer, inputs, batch.embeddings, batch.timesteps), target)
        if not weighted:
            return losses
        losses = losses * batch.weights
        if self._gamma is not None:
            losses = losses * diffusion.min_snr_weights(batch.timesteps, abar, self._gamma)
        return losses

    @torch.no_grad()
    def _ask(
        self, transformer: torch.nn.Module, batch: Batch, noisy: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """The target with the base model's prediction for held samples."""
        assert self._base is not None
        inputs = (noisy, batch.embeddings, batch.timesteps)
        with self._base():
            if self._ask_base == "samples":
                chosen = (tensor[batch.held] for tensor in inputs)
                target[batch.held] = self._run(transformer, *chosen).float()
                return target
            predicted = self._run(transformer, *inputs).float()
            return torch.where(batch.held.reshape(-1, *[1] * (target.ndim - 1)), predicted, target)

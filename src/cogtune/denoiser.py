"""The transformer as training sees it: rotary positions, casts at its border, and the loss of a batch.

Noising, target and loss are float32 (`cogtune.diffusion`); only what enters the transformer is cast to its precision.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogtune import diffusion
from cogtune.dataset import Batch
from cogtune.models import ModelFacts

Rotary = tuple[torch.Tensor, torch.Tensor]


def make_rotary(
    facts: ModelFacts, num_latent_frames: int, height: int, width: int, device: torch.device
) -> Rotary | None:
    """cos and sin [video tokens, head_dim] for a clip of that size in pixels; None for models with added positions.

    Only video tokens rotate. The grid is diffusers' for version 1.0: `linspace` over the resize-crop region.
    """
    if not facts.use_rotary:
        return None
    rows, columns = (size // (facts.spatial_factor * facts.patch_size) for size in (height, width))
    config = facts.transformer_config
    base_rows, base_columns = (
        config.get(k, d) // facts.patch_size for k, d in (("sample_height", 60), ("sample_width", 90))
    )
    region = get_resize_crop_region_for_grid((rows, columns), base_columns, base_rows)
    return get_3d_rotary_pos_embed(  # pyright: ignore[reportReturnType]  # always a pair
        embed_dim=facts.head_dim,
        crops_coords=region,
        grid_size=(rows, columns),
        temporal_size=num_latent_frames,
        device=device,
    )


class Denoiser:
    """Turns batches into losses with a given transformer (wrapped or not).

    `autocast`: the weights are float32 and computed with in `dtype` (full fine-tuning in low precision).
    `base`: inside this context the transformer is the base model, whose predictions are the targets of held samples.
    `ask_base`: it is asked for those samples; for the whole batch where one is among them, so that shapes stay the same
    and nothing waits for the device; or always, for a recorded pass.
    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        num_latent_frames: int,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        min_snr_gamma: float | None,
        autocast: bool = False,
        base: Callable[[], AbstractContextManager[object]] | None = None,
        ask_base: Literal["samples", "batch", "always"] = "samples",
    ) -> None:
        self.alphas_cumprod = diffusion.make_alphas_cumprod(facts.scheduler_config).to(device)
        self._rotary = make_rotary(facts, num_latent_frames, height, width, device)
        self._dtype, self._gamma, self._autocast = dtype, min_snr_gamma, autocast
        self._base, self._ask_base = base, ask_base

    def predict(
        self, transformer: torch.nn.Module, noisy: torch.Tensor, embeddings: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """v [B, F, C, H, W] for noisy latents of that shape, embeddings [B, L, D] and timesteps [B]."""
        with torch.autocast(noisy.device.type, self._dtype, enabled=self._autocast):
            return transformer(
                hidden_states=noisy.to(self._dtype),
                encoder_hidden_states=embeddings.to(self._dtype),
                timestep=timesteps,
                image_rotary_emb=self._rotary,
                return_dict=False,
            )[0]

    def losses(self, transformer: torch.nn.Module, batch: Batch, *, weighted: bool = True) -> torch.Tensor:
        """The v loss of each sample, float32 [B]; with the samples' weights and min-SNR's, unless told otherwise."""
        abar = self.alphas_cumprod
        noisy = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps, abar)
        target = diffusion.velocity(batch.latents, batch.noise, batch.timesteps, abar)
        if self._base is not None and (batch.num_held or self._ask_base == "always"):
            target = self._ask(transformer, batch, noisy, target)
        losses = diffusion.sample_losses(self.predict(transformer, noisy, batch.embeddings, batch.timesteps), target)
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
        inputs = [noisy, batch.embeddings, batch.timesteps]
        with self._base():
            if self._ask_base == "samples":
                chosen = [tensor[batch.held] for tensor in inputs]
                target[batch.held] = self.predict(transformer, *chosen).float()
                return target
            predicted = self.predict(transformer, *inputs).float()
            return torch.where(batch.held.reshape(-1, *[1] * (target.ndim - 1)), predicted, target)

"""The diffusion objective of CogVideoX as pure float32 tensors: schedule, noising, v target, loss, weights.

The released schedule is scaled-linear betas in float64, then the SNR shift, then the zero-terminal-SNR rescale
(diffusers `CogVideoXDDIMScheduler`, SAT `ZeroSNRDDPMDiscretization`). The reference trainers weight the x0 error with
1 / (1 - abar); since x0 = sqrt(abar) x_t - sqrt(1 - abar) v, that equals plain MSE on v, which is what is computed
here, in float32: noising in bfloat16 would leave timesteps 0 and 1 of the 5B model without any noise.
"""

from typing import Any

import torch

NUM_TIMESTEPS = 1000


def make_alphas_cumprod(scheduler_config: dict[str, Any]) -> torch.Tensor:
    """abar for every integer timestep, float32 [1000], from a checkpoint's scheduler config.

    Raises `ValueError` for a schedule that no CogVideoX was trained with.
    """
    config = scheduler_config
    if config.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise ValueError(f"beta_schedule={config['beta_schedule']!r}: CogVideoX uses 'scaled_linear'")
    if config.get("prediction_type") != "v_prediction":
        raise ValueError(f"prediction_type={config.get('prediction_type')!r}: CogVideoX predicts v ('v_prediction')")
    num_timesteps = config.get("num_train_timesteps", NUM_TIMESTEPS)
    start, end = config.get("beta_start", 0.00085) ** 0.5, config.get("beta_end", 0.012) ** 0.5
    betas = torch.linspace(start, end, num_timesteps, dtype=torch.float64) ** 2
    abar = torch.cumprod(1.0 - betas, dim=0)
    shift = config.get("snr_shift_scale", 3.0)
    abar = abar / (shift + (1.0 - shift) * abar)
    if config.get("rescale_betas_zero_snr", False):
        root = abar.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        abar = root**2
    return abar.float()


def pad_front(latents: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Latents [C, F, H, W] with `num_frames` copies of the first frame before it, as version 1.5 was trained."""
    return torch.cat([latents[:, :1].expand(-1, num_frames, -1, -1), latents], dim=1) if num_frames else latents


def _gather(abar: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return abar.to(like.device)[timesteps].reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(abar) latents + sqrt(1 - abar) noise; float32 [B, F, C, H, W], timesteps [B]."""
    assert latents.dtype == noise.dtype == abar.dtype == torch.float32, "the objective is float32 throughout"
    signal = _gather(abar, timesteps, latents)
    return signal.sqrt() * latents + (1.0 - signal).sqrt() * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """The target v = sqrt(abar) noise - sqrt(1 - abar) latents; float32 [B, F, C, H, W]."""
    assert latents.dtype == noise.dtype == abar.dtype == torch.float32, "the objective is float32 throughout"
    signal = _gather(abar, timesteps, latents)
    return signal.sqrt() * noise - (1.0 - signal).sqrt() * latents


def min_snr_weights(timesteps: torch.Tensor, abar: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-gamma weights for v prediction, min(SNR, gamma) / (SNR + 1), float32 [B] (arXiv:2303.09556, sec. 3.4).

    With SNR = abar / (1 - abar) this is min(abar, gamma (1 - abar)), which needs no division.
    """
    signal = abar.to(timesteps.device)[timesteps]
    return torch.minimum(signal, gamma * (1.0 - signal))


def sample_losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared v error of each sample, float32 [B]; unweighted."""
    return (prediction.float() - target).square().flatten(1).mean(dim=1)

"""The objective against float64 formulas of our own and against the released scheduler."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from cogtune.diffusion import add_noise, make_alphas_cumprod, min_snr_weights, sample_losses, velocity

SHIFTS = [1.0, 3.0]  # 5B, 2B
ALL_TIMESTEPS = torch.arange(1000)


def released_config(shift: float) -> dict:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": shift,
    }


def float64_schedule(shift: float) -> np.ndarray:
    """abar from the SAT code's description, in numpy: betas, product, shift, rescale to zero terminal SNR."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.array([np.prod(1 - betas[: t + 1]) for t in range(1000)])
    snr = abar / (1 - abar)
    abar = (snr / shift) / (1 + snr / shift)  # dividing the SNR by s is what the shift means
    root = np.sqrt(abar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def draw_samples(num: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num, 2, 4, 3, 5)
    latents, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return latents.to(dtype), noise.to(dtype)


@pytest.mark.parametrize("shift", SHIFTS)
def test_schedule_equals_the_released_scheduler(shift: float) -> None:
    released = CogVideoXDDIMScheduler(**released_config(shift)).alphas_cumprod
    ours = make_alphas_cumprod(released_config(shift))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, released.float())


@pytest.mark.parametrize("shift", SHIFTS)
def test_schedule_equals_float64(shift: float) -> None:
    ours = make_alphas_cumprod(released_config(shift)).double().numpy()
    # float32 holds abar to 6e-8; what is left of the 1 - abar of early steps matters as much as abar itself
    np.testing.assert_allclose(ours, float64_schedule(shift), rtol=0, atol=6e-8)
    assert ours[-1] == 0.0, "the last timestep is pure noise"
    assert np.all(np.diff(ours) < 0)


def test_shift_divides_the_signal_to_noise_ratio() -> None:
    plain, shifted = (make_alphas_cumprod(released_config(s) | {"rescale_betas_zero_snr": False}) for s in SHIFTS)
    ratio = (plain / (1 - plain)) / (shifted / (1 - shifted))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("key, value", [("beta_schedule", "linear"), ("prediction_type", "epsilon")])
def test_other_schedules_are_refused(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{key}='{value}'"):
        make_alphas_cumprod(released_config(1.0) | {key: value})


@pytest.mark.parametrize("shift", SHIFTS)
def test_noising_and_target_equal_float64(shift: float) -> None:
    latents, noise = draw_samples(1000)
    abar = make_alphas_cumprod(released_config(shift))
    signal = float64_schedule(shift).reshape(-1, 1, 1, 1, 1)
    x0, epsilon = latents.double().numpy(), noise.double().numpy()
    noisy = add_noise(latents, noise, ALL_TIMESTEPS, abar)
    target = velocity(latents, noise, ALL_TIMESTEPS, abar)
    assert noisy.dtype == target.dtype == torch.float32
    # At the ends sqrt(abar) or sqrt(1 - abar) is small and float32's 6e-8 in abar is 1e-5 of it; values are < 6.
    np.testing.assert_allclose(noisy, np.sqrt(signal) * x0 + np.sqrt(1 - signal) * epsilon, rtol=0, atol=2e-5)
    np.testing.assert_allclose(target, np.sqrt(signal) * epsilon - np.sqrt(1 - signal) * x0, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shift", SHIFTS)
def test_noising_equals_the_released_scheduler_in_float32(shift: float) -> None:
    latents, noise = draw_samples(1000, seed=1)
    scheduler = CogVideoXDDIMScheduler(**released_config(shift))
    abar = make_alphas_cumprod(released_config(shift))
    theirs = scheduler.add_noise(latents, noise, ALL_TIMESTEPS)
    torch.testing.assert_close(add_noise(latents, noise, ALL_TIMESTEPS, abar), theirs, rtol=0, atol=1e-6)
    theirs = scheduler.get_velocity(latents, noise, ALL_TIMESTEPS)
    torch.testing.assert_close(velocity(latents, noise, ALL_TIMESTEPS, abar), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
def test_v_loss_is_the_reference_trainers_weighted_x0_loss(shift: float) -> None:
    """(x0_hat - x0)^2 / (1 - abar) with x0_hat from the scheduler's get_velocity, computed here in float64."""
    latents, noise = draw_samples(1000, seed=2)
    prediction, _ = draw_samples(1000, seed=3)
    abar = make_alphas_cumprod(released_config(shift))
    ours = sample_losses(prediction, velocity(latents, noise, ALL_TIMESTEPS, abar))

    scheduler = CogVideoXDDIMScheduler(**released_config(shift))
    scheduler.alphas_cumprod = torch.from_numpy(float64_schedule(shift))
    x0, epsilon, v = latents.double(), noise.double(), prediction.double()
    noisy = scheduler.add_noise(x0, epsilon, ALL_TIMESTEPS)
    x0_hat = scheduler.get_velocity(v, noisy, ALL_TIMESTEPS)
    weights = 1 / (1 - scheduler.alphas_cumprod)
    reference = (weights.reshape(-1, 1, 1, 1, 1) * (x0_hat - x0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=0)


def test_losses_are_float32_for_a_low_precision_prediction() -> None:
    target, _ = draw_samples(8, seed=4)
    prediction = draw_samples(8, seed=5)[0].bfloat16()
    losses = sample_losses(prediction, target)
    assert losses.dtype == torch.float32 and losses.shape == (8,)
    expected = ((prediction.double() - target.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_equal_the_definition(shift: float, gamma: float) -> None:
    abar = float64_schedule(shift)
    with np.errstate(divide="ignore"):
        snr = abar / (1 - abar)
    expected = np.minimum(snr, gamma) / (snr + 1)  # the paper's v-prediction form
    ours = min_snr_weights(ALL_TIMESTEPS, make_alphas_cumprod(released_config(shift)), gamma)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=gamma * 6e-8)
    assert ours[-1] == 0.0 and ours.max() <= gamma / (gamma + 1) + 1e-6


def test_early_timesteps_of_5b_get_noise_unlike_in_bfloat16() -> None:
    """`add_noise` of the released scheduler casts abar to bfloat16, where that of timesteps 0 and 1 is 1."""
    timesteps = torch.tensor([0, 1])
    latents, noise = draw_samples(2, seed=6)
    scheduler = CogVideoXDDIMScheduler(**released_config(1.0))
    low = latents.bfloat16()
    assert torch.equal(scheduler.add_noise(low, noise.bfloat16(), timesteps), low), "diffusers mended it: say so"

    abar = make_alphas_cumprod(released_config(1.0))
    added = add_noise(latents, noise, timesteps, abar) - abar[timesteps].sqrt().reshape(-1, 1, 1, 1, 1) * latents
    expected = np.sqrt(1 - float64_schedule(1.0)[:2])
    assert expected[0] > 0.029
    ratio = (added / noise).flatten(1).double().median(dim=1).values.numpy()
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)


@pytest.mark.parametrize("function", [add_noise, velocity])
def test_low_precision_inputs_are_refused(function) -> None:
    latents, noise = draw_samples(1)
    abar = make_alphas_cumprod(released_config(1.0))
    with pytest.raises(AssertionError, match="float32"):
        function(latents.bfloat16(), noise.bfloat16(), torch.tensor([3]), abar)

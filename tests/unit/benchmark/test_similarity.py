"""PSNR and SSIM of videos."""

import math

import numpy as np
import pytest

from cogtune.benchmark.similarity import measure_psnr, measure_ssim


def test_psnr_of_a_known_error() -> None:
    video = np.full((2, 16, 16, 3), 100, np.uint8)
    assert measure_psnr(video + 8, video) == pytest.approx(20 * math.log10(255 / 8))
    assert measure_psnr(video - 8, video) == pytest.approx(20 * math.log10(255 / 8))
    assert measure_psnr(video, video) == math.inf


def test_ssim_is_one_for_equal_videos_and_falls_with_noise() -> None:
    rng = np.random.default_rng(0)
    video = (np.indices((2, 48, 64)).sum(0)[..., None] * 2 % 256 * np.ones(3)).astype(np.uint8)
    assert measure_ssim(video, video) == pytest.approx(1.0)
    noisy = [np.clip(video + rng.normal(0, deviation, video.shape), 0, 255).astype(np.uint8) for deviation in (5, 40)]
    slight, strong = (measure_ssim(frames, video) for frames in noisy)
    assert strong < slight < 1.0 and strong < 0.8


def test_ssim_by_its_formula_on_flat_frames() -> None:
    """Without variance, only the means count."""
    first, second = (np.full((1, 20, 20, 3), value, np.uint8) for value in (100, 150))
    a, b, c1 = 100 / 255, 150 / 255, 0.01**2
    assert measure_ssim(first, second) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-3)

"""How near one video is to another: PSNR and SSIM of 8-bit frames, as video coding reports them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_LUMA = (0.299, 0.587, 0.114)


def measure_psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """In dB over all pixels of uint8 [F, H, W, 3]; infinite for equal videos."""
    error = np.square(video.astype(np.float64) - reference.astype(np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def measure_ssim(video: np.ndarray, reference: np.ndarray, device: torch.device | None = None) -> float:
    """Structural similarity of the luma, mean over frames of uint8 [F, H, W, 3]; 1 for equal ones (Wang et al. 2004).

    Gaussian window of 11 pixels and sigma 1.5, without padding.
    """
    first, second = (_to_luma(frames, device) for frames in (video, reference))
    offsets = torch.arange(_WINDOW, dtype=torch.float32, device=first.device) - _WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    line = line / line.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))

    mean1, mean2 = blur(first), blur(second)
    variance1, variance2 = blur(first * first) - mean1 * mean1, blur(second * second) - mean2 * mean2
    covariance = blur(first * second) - mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean1.square() + mean2.square() + c1) * (variance1 + variance2 + c2))
    return float(similarity.mean())


def _to_luma(frames: np.ndarray, device: torch.device | None) -> Tensor:
    weights = torch.tensor(_LUMA, device=device) / 255
    return (torch.from_numpy(frames).to(device).float() @ weights)[:, None]  # [F, 1, H, W]

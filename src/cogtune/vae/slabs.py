"""The autoencoder's layers frame by frame, for devices with little memory: the same values without whole copies.

A group's normalised copy, its float32 intermediates and the enlarged input of an upsampling layer are never there as a
whole; statistics are still a whole group's, so there are no seams. `layers.Layers` calls these where it is told to.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_terms(values: Tensor, bias: Tensor | None, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Factor and summand [B, C, 1, 1, 1], float32, of a group norm of `values + bias`, from moments of each frame.

    Frames have equally many pixels, so the group's variance is the mean of theirs and of their means' deviations.
    """
    moments = [_frame_moments(values[:, :, number : number + 1], bias) for number in range(values.shape[2])]
    means, variances = (torch.stack(part) for part in zip(*moments, strict=True))  # [F, B, C]
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    return terms_of_moments(mean, variance, norm)


def terms_of_moments(mean: Tensor, variance: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Factor and summand [B, C, 1, 1, 1], float32, of a group norm, from the moments [B, C] of its input's channels."""
    mean, variance = (part.unflatten(1, (norm.num_groups, -1)) for part in (mean, variance))
    centre = mean.mean(-1, keepdim=True)
    spread = (variance + (mean - centre).square()).mean(-1, keepdim=True)
    inverse = torch.rsqrt(spread + norm.eps).expand_as(mean).flatten(1)
    factor = inverse * norm.weight.float()
    summand = norm.bias.float() - centre.expand_as(mean).flatten(1) * factor
    return factor[:, :, None, None, None], summand[:, :, None, None, None]


def _frame_moments(frame: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if bias is not None:
        frame = frame + bias[:, None, None, None]
    variance, mean = torch.var_mean(frame.float(), dim=(2, 3, 4), correction=0)
    return mean, variance


def activate_and_convolve(
    values: Tensor,
    bias: Tensor | None,
    norm: nn.GroupNorm,
    modulation: tuple[Tensor, Tensor] | None,
    kept: Tensor | None,
    convolution: nn.Conv3d,
) -> tuple[Tensor, Tensor]:
    """`layers.activate` and the convolution after it without its bias; and the two activated frames to keep."""
    factor, summand = group_terms(values, bias, norm)
    output: Tensor | None = None
    before = kept
    for number in range(values.shape[2]):
        one = slice(number, number + 1)
        frame = values[:, :, one]
        if bias is not None:
            frame = frame + bias[:, None, None, None]
        frame = (frame.float() * factor).add_(summand)
        if modulation is not None:
            times = values.shape[-1] // modulation[0].shape[-1]
            scale, shift = (_enlarge(part[:, :, number], times)[:, :, None] for part in modulation)
            frame = frame.mul_(scale).add_(shift)
        active = F.silu(frame, inplace=True).to(values.dtype)
        before = active.expand(-1, -1, 2, -1, -1) if before is None else before
        padded = torch.cat([before, active], dim=2).contiguous(memory_format=torch.channels_last_3d)
        result = F.conv3d(padded, convolution.weight, padding=convolution.padding)  # pyright: ignore[reportArgumentType]
        output = _empty_like(result, values.shape[2]) if output is None else output
        output[:, :, one] = result
        before = padded[:, :, -2:]
    assert output is not None and before is not None
    return output, before.clone()


def add(hidden: Tensor, bias: Tensor, values: Tensor) -> Tensor:
    """`hidden + bias + values`, in the memory of `hidden`."""
    return hidden.add_(bias[:, None, None, None]).add_(values)


def upsample_frames(values: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Each frame enlarged to twice its height and width and convolved."""
    return _each_frame(values, lambda frame: convolution(_enlarge(frame, 2)))


def downsample_frames(values: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Each frame padded at the right and below, and convolved."""
    return _each_frame(values, lambda frame: convolution(F.pad(frame, (0, 1, 0, 1))))


def _each_frame(values: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on one frame [B, C, H, W] after the other."""
    output: Tensor | None = None
    for number in range(values.shape[2]):
        result = work(values[:, :, number])[:, :, None]
        output = _empty_like(result, values.shape[2]) if output is None else output
        output[:, :, number : number + 1] = result
    assert output is not None
    return output


def _enlarge(frame: Tensor, times: int) -> Tensor:
    """[B, C, H, W] by nearest neighbours."""
    return F.interpolate(frame, scale_factor=float(times)) if times > 1 else frame


def _empty_like(frame: Tensor, num_frames: int) -> Tensor:
    shape: Any = (*frame.shape[:2], num_frames, *frame.shape[3:])
    return torch.empty(shape, dtype=frame.dtype, device=frame.device, memory_format=torch.channels_last_3d)

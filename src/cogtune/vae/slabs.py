"""The autoencoder's layers frame by frame, for devices with little memory: the same values without whole copies.

A group's normalised copy, its float32 intermediates and the enlarged input of an upsampling layer are never there as a
whole, the second convolution of a block writes over its input, and what the next group needs waits on the host.
Statistics are still a whole group's, so there are no seams. `layers.Layers` calls these where it is told to.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_BANDS = 4
"""Into how many parts of its height a frame is cut for what is computed pixel by pixel in float32."""


def group_terms(values: Tensor, bias: Tensor | None, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Factor and summand [B, C, 1, 1], float32, of a group norm of `values + bias`, from moments of each band.

    Bands have equally many pixels, so the group's variance is the mean of theirs and of their means' deviations.
    """
    moments = [
        _moments(values[:, :, number, rows], bias)
        for number in range(values.shape[2])
        for rows in _bands(values.shape[3], 1)
    ]
    means, variances = (torch.stack(part) for part in zip(*moments, strict=True))  # [parts, B, C]
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    factor, summand = terms_of_moments(mean, variance, norm)
    return factor[..., 0], summand[..., 0]


def terms_of_moments(mean: Tensor, variance: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Factor and summand [B, C, 1, 1, 1], float32, of a group norm, from the moments [B, C] of its input's channels."""
    mean, variance = (part.unflatten(1, (norm.num_groups, -1)) for part in (mean, variance))
    centre = mean.mean(-1, keepdim=True)
    spread = (variance + (mean - centre).square()).mean(-1, keepdim=True)
    inverse = torch.rsqrt(spread + norm.eps).expand_as(mean).flatten(1)
    factor = inverse * norm.weight.float()
    summand = norm.bias.float() - centre.expand_as(mean).flatten(1) * factor
    return factor[:, :, None, None, None], summand[:, :, None, None, None]


def _bands(height: int, step: int) -> Iterator[slice]:
    """Ranges of equally many rows that make up `height`, each a multiple of `step`."""
    count = next(n for n in range(_MOST_BANDS, 0, -1) if (height // step) % n == 0)
    size = height // count
    return (slice(first, first + size) for first in range(0, height, size))


def _moments(band: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, C] of a band [B, C, H, W]."""
    variance, mean = torch.var_mean(_plus(band, bias).float(), dim=(2, 3), correction=0)
    return mean, variance


def _plus(frame: Tensor, bias: Tensor | None) -> Tensor:
    return frame if bias is None else frame + bias[:, None, None]


def activate_and_convolve(
    values: Tensor,
    bias: Tensor | None,
    norm: nn.GroupNorm,
    modulation: tuple[Tensor, Tensor] | None,
    kept: Tensor | None,
    convolution: nn.Conv3d,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """`layers.activate` and the convolution after it without its bias; and the two activated frames to keep, on the
    host. `in_place`: the output, of the same shape, is written over `values`."""
    terms = group_terms(values, bias, norm)
    shape = (*values.shape[:2], 3, *values.shape[3:])
    window = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=torch.channels_last_3d)
    if kept is not None:
        window[:, :, 1:].copy_(kept, non_blocking=True)
    output: Tensor | None = values if in_place else None
    for number in range(values.shape[2]):
        window[:, :, 0].copy_(window[:, :, 1])
        window[:, :, 1].copy_(window[:, :, 2])
        at_frame = None if modulation is None else [part[:, :, number] for part in modulation]
        _activate(values[:, :, number], bias, terms, at_frame, window[:, :, 2])
        if number == 0 and kept is None:  # the first frame of a video stands in for those before it
            window[:, :, :2] = window[:, :, 2:]
        result = F.conv3d(window, convolution.weight, padding=convolution.padding)  # pyright: ignore[reportArgumentType]
        output = _empty_like(result, values.shape[2]) if output is None else output
        output[:, :, number : number + 1] = result
    assert output is not None
    return output, to_host(window[:, :, 1:])


def _activate(
    frame: Tensor, bias: Tensor | None, terms: tuple[Tensor, Tensor], modulation: list[Tensor] | None, target: Tensor
) -> None:
    """Writes SiLU of the normalised, modulated `frame + bias` [B, C, H, W] into `target`, band by band."""
    factor, summand = terms
    times = 1 if modulation is None else frame.shape[-1] // modulation[0].shape[-1]
    for rows in _bands(frame.shape[2], times):
        band = (_plus(frame[:, :, rows], bias).float() * factor).add_(summand)
        if modulation is not None:
            small = slice(rows.start // times, rows.stop // times)
            scale, shift = (_enlarge(part[:, :, small], times) for part in modulation)
            band = band.mul_(scale).add_(shift)
        target[:, :, rows] = F.silu(band, inplace=True)


def to_host(values: Tensor) -> Tensor:
    """A copy in host memory, page-locked where it comes from a GPU."""
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return copy.copy_(values, non_blocking=True)


def convolve(values: Tensor, bias: Tensor, kept: Tensor | None, convolution: nn.Conv3d) -> tuple[Tensor, Tensor]:
    """A causal convolution of plain values, frame by frame; and the two frames to keep, on the host."""
    before = values[:, :, :1].expand(-1, -1, 2, -1, -1) if kept is None else kept.to(values.device)
    padded = torch.cat([before, values], dim=2)
    output: Tensor | None = None
    for number in range(values.shape[2]):
        window = padded[:, :, number : number + 3].contiguous(memory_format=torch.channels_last_3d)
        result = F.conv3d(window, convolution.weight, bias, padding=convolution.padding)  # pyright: ignore[reportArgumentType]
        output = _empty_like(result, values.shape[2]) if output is None else output
        output[:, :, number : number + 1] = result
    assert output is not None
    return output, to_host(padded[:, :, -2:])


def add_shortcut(hidden: Tensor, bias: Tensor, values: Tensor, shortcut: nn.Conv3d) -> Tensor:
    """`hidden + bias` and a 1x1 convolution of `values`, in the memory of `hidden`."""
    for number in range(values.shape[2]):
        one = slice(number, number + 1)
        through = F.conv3d(values[:, :, one], shortcut.weight, padding=shortcut.padding)  # pyright: ignore[reportArgumentType]
        hidden[:, :, one].add_(bias[:, None, None, None]).add_(through)
    return hidden


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

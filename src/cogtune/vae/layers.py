"""The autoencoder's layers as plain functions of a stock module's weights, for channels-last tensors [B, C, T, H, W].

Each gives what the stock layer gives, up to rounding (`tests/unit/vae/test_frame_coder.py`), with less memory traffic:

- normalisation, its modulation, SiLU and the frames kept from before meet in one function that a compiler can fuse;
- 1x1 convolutions of the latents run before the latents are enlarged, 3x3 ones before frames are repeated;
- statistics are taken in float32 over channels that lie side by side.

What a causal convolution keeps of earlier frames goes in and out as a list, in the order of the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogtune.vae import slabs

Kept = list[Tensor]


@dataclass(frozen=True)
class Operations:
    """How the layers compute: the work between convolutions in plain torch or as kernels, and the convolutions."""

    activate: Callable[..., Tensor]
    add: Callable[[Tensor, Tensor, Tensor], Tensor]
    convolve: Callable[[Tensor, nn.Conv3d], Tensor]
    in_slabs: bool = False
    """Frame by frame, with a fraction of the memory; of the other fields `add` serves then."""


def normalization_terms(values: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Factor and summand [B, C, 1, 1, 1], float32, that make a group norm of `values`."""
    rows = values.permute(0, 2, 3, 4, 1).flatten(1, 3).float()  # [B, positions, C]
    variance, mean = torch.var_mean(rows, dim=1, correction=0)
    return slabs.terms_of_moments(mean, variance, norm)


def repeat_pixels(values: Tensor, times: int) -> Tensor:
    """Nearest-neighbour enlarging of height and width by a whole factor."""
    if times == 1:
        return values
    frames = F.interpolate(values.transpose(1, 2).flatten(0, 1), scale_factor=float(times))
    return frames.unflatten(0, (values.shape[0], -1)).transpose(1, 2)


def repeat_frames(values: Tensor, num_frames: int) -> Tensor:
    """Nearest-neighbour enlarging in time; an odd number of frames, as a clip's first, keeps one single."""
    if values.shape[2] == num_frames:
        return values
    single = num_frames % 2
    times = (num_frames - single) // (values.shape[2] - single)
    # Written in place, since `expand` and `cat` would leave channels-last memory.
    shape = (*values.shape[:2], num_frames, *values.shape[3:])
    output = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=torch.channels_last_3d)
    output[:, :, :single] = values[:, :, :single]
    for offset in range(times):
        output[:, :, single + offset :: times] = values[:, :, single:]
    return output


def activate(
    values: Tensor,
    bias: Tensor | None,
    norm: nn.GroupNorm,
    modulation: tuple[Tensor, Tensor] | None,
    kept: Tensor | None,
) -> Tensor:
    """SiLU of the normalised `values + bias` with the two frames kept from before in front, for a causal convolution.

    `modulation` has the factor and summand of the decoder's spatial norm at the latents' height and width. Without
    kept frames the first one is repeated.
    """
    if bias is not None:
        values = values + bias[:, None, None, None]
    factor, summand = normalization_terms(values, norm)
    normalised = values.float() * factor + summand
    if modulation is not None:
        times = values.shape[-1] // modulation[0].shape[-1]
        scale, shift = (repeat_pixels(part, times).float() for part in modulation)
        normalised = normalised * scale + shift
    output = F.silu(normalised).to(values.dtype)
    before = output[:, :, :1].expand(-1, -1, 2, -1, -1) if kept is None else kept
    return torch.cat([before, output], dim=2).contiguous(memory_format=torch.channels_last_3d)


def add(hidden: Tensor, bias: Tensor, values: Tensor) -> Tensor:
    """`hidden + values` with a bias for each channel."""
    return hidden + bias[:, None, None, None] + values


def convolve(values: Tensor, convolution: nn.Conv3d) -> Tensor:
    """A 3D convolution without its bias, which cuDNN's caller would add in a pass of its own.

    Not through the stock module: it splits large inputs by frames, to no use for groups as short as these.
    """
    return F.conv3d(values, convolution.weight, padding=convolution.padding)  # pyright: ignore[reportArgumentType]


def convolve_stacked(values: Tensor, convolution: nn.Conv3d) -> Tensor:
    """The same as a 2D convolution whose input channels are those of successive frames."""
    depth = convolution.kernel_size[0]
    num_frames = values.shape[2] - depth + 1
    if depth > 1:
        values = torch.cat([values[:, :, first : first + num_frames] for first in range(depth)], dim=1)
    weight = convolution.weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    frames = values.transpose(1, 2).flatten(0, 1)
    output = F.conv2d(frames, weight, padding=convolution.padding[1:])  # pyright: ignore[reportArgumentType]
    return output.unflatten(0, (-1, num_frames)).transpose(1, 2)


class Layers:
    """The layers over one group of frames: consumes what was kept of the group before, and keeps for the next."""

    def __init__(self, kept: Kept | None, operations: Operations) -> None:
        self._before = None if kept is None else iter(kept)
        self._operations = operations
        self.kept: Kept = []

    def _next_kept(self) -> Tensor | None:
        return None if self._before is None else next(self._before)

    def convolve(self, values: Tensor, convolution: Any) -> Tensor:
        """A causal convolution of plain values."""
        kept = self._next_kept()
        if self._operations.in_slabs:
            output, last = slabs.convolve(values, convolution.conv.bias, kept, convolution.conv)
            self.kept.append(last)
            return output
        before = values[:, :, :1].expand(-1, -1, 2, -1, -1) if kept is None else kept
        return self._finish(torch.cat([before, values], dim=2), convolution) + _bias(convolution.conv)

    def activate_and_convolve(
        self,
        values: Tensor,
        bias: Tensor | None,
        norm: Any,
        latents: Tensor | None,
        convolution: Any,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """Norm (spatial where there are latents) of `values + bias`, SiLU, causal convolution without its bias.

        `in_place`: nobody needs `values` any more, and the output has their shape.
        """
        modulation = None
        if latents is not None:
            scale, shift = (repeat_frames(layer.conv(latents), values.shape[2]) for layer in (norm.conv_y, norm.conv_b))
            modulation = scale, shift
            norm = norm.norm_layer
        if self._operations.in_slabs:
            output, kept = slabs.activate_and_convolve(
                values, bias, norm, modulation, self._next_kept(), convolution.conv, in_place=in_place
            )
            self.kept.append(kept)
            return output
        return self._finish(self._operations.activate(values, bias, norm, modulation, self._next_kept()), convolution)

    def _finish(self, padded: Tensor, convolution: Any) -> Tensor:
        self.kept.append(padded[:, :, -2:].clone())
        return self._operations.convolve(padded, convolution.conv)

    def resnet(self, values: Tensor, block: Any, latents: Tensor | None) -> Tensor:
        """Two convolutions beside the unchanged values, or beside a 1x1 convolution of them."""
        hidden = self.activate_and_convolve(values, None, block.norm1, latents, block.conv1)
        hidden = self.activate_and_convolve(
            hidden, block.conv1.conv.bias, block.norm2, latents, block.conv2, in_place=True
        )
        bias = block.conv2.conv.bias
        if block.in_channels != block.out_channels and self._operations.in_slabs:
            return slabs.add_shortcut(hidden, bias + block.conv_shortcut.bias, values, block.conv_shortcut)
        if block.in_channels != block.out_channels:
            values, bias = self._operations.convolve(values, block.conv_shortcut), bias + block.conv_shortcut.bias
        return self._operations.add(hidden, bias, values)

    def finish(self, values: Tensor, norm: Any, latents: Tensor | None, convolution: Any) -> Tensor:
        """The last layer of an encoder or a decoder."""
        return self.activate_and_convolve(values, None, norm, latents, convolution).add_(_bias(convolution.conv))


def _bias(convolution: nn.Conv3d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias[:, None, None, None]


def _convolve_frames(values: Tensor, convolution: nn.Conv2d) -> Tensor:
    batch = values.shape[0]
    return convolution(values.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


def downsample(values: Tensor, layer: Any, *, in_slabs: bool = False) -> Tensor:
    """Half the height and width; half the frames too where the layer compresses time."""
    if layer.compress_time and values.shape[2] > 1:
        single = values.shape[2] % 2
        # A mean over pairs, which would leave channels-last memory.
        pairs = torch.lerp(values[:, :, single::2], values[:, :, single + 1 :: 2], 0.5)
        values = torch.cat([values[:, :, :single], pairs], dim=2)
    if in_slabs:
        return slabs.downsample_frames(values, layer.conv)
    return _convolve_frames(F.pad(values, (0, 1, 0, 1)), layer.conv)


def upsample(values: Tensor, layer: Any, *, in_slabs: bool = False) -> Tensor:
    """Twice the height and width; twice the frames (but for a clip's first) where the layer enlarges time."""
    frames = values.shape[2]
    if in_slabs:
        output = slabs.upsample_frames(values, layer.conv)
    else:
        output = _convolve_frames(repeat_pixels(values, 2), layer.conv)
    if layer.compress_time and frames > 1:
        output = repeat_frames(output, 2 * frames - frames % 2)
    return output


def encode_group(encoder: Any, pixels: Tensor, kept: Kept | None, operations: Operations) -> tuple[Tensor, Kept]:
    """Moments of one group of frames, and what the next group needs."""
    layers = Layers(kept, operations)
    values = layers.convolve(pixels, encoder.conv_in)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            values = layers.resnet(values, resnet, None)
        for layer in block.downsamplers or ():
            values = downsample(values, layer, in_slabs=operations.in_slabs)
    for resnet in encoder.mid_block.resnets:
        values = layers.resnet(values, resnet, None)
    return layers.finish(values, encoder.norm_out, None, encoder.conv_out), layers.kept


def decode_group(decoder: Any, latents: Tensor, kept: Kept | None, operations: Operations) -> tuple[Tensor, Kept]:
    """Pixels of one group of latent frames, and what the next group needs."""
    layers = Layers(kept, operations)
    values = layers.convolve(latents, decoder.conv_in)
    for resnet in decoder.mid_block.resnets:
        values = layers.resnet(values, resnet, latents)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            values = layers.resnet(values, resnet, latents)
        for layer in block.upsamplers or ():
            values = upsample(values, layer, in_slabs=operations.in_slabs)
    return layers.finish(values, decoder.norm_out, latents, decoder.conv_out), layers.kept

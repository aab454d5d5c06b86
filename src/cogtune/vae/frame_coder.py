"""Encodes and decodes whole videos with a stock autoencoder's weights, faster: `layers.py` in channels-last memory.

    coder = FrameCoder(vae)
    moments = coder.encode(pixels)   # [B, 3, F, H, W] -> [B, 2 C, F', H', W']
    pixels = coder.decode(latents)   # [B, C, F', H', W'] -> [B, 3, F, H, W]

Frames go through in the stock autoencoder's groups (8 frames, 2 latent ones, the odd one with the first group): its
group norms take their statistics over a group, so longer groups would give another video.
"""

from typing import Any, Literal

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from cogtune.vae import kernels, slabs
from cogtune.vae.layers import (
    Kept,
    Operations,
    activate,
    add,
    convolve,
    convolve_stacked,
    decode_group,
    encode_group,
)

Fused = Literal["kernels", "compiled", "everything compiled", "nothing"]
_MANY_SHAPES = 64  # of compiled activations: one for each width, size, and number of frames


class FrameCoder:
    """An autoencoder's weights, laid out for this way of running; the module itself keeps working."""

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        *,
        fused: Fused | None = None,
        tune_convolutions: bool = True,
        stacked: bool = False,
        in_slabs: bool = False,
    ) -> None:
        """`fused`: what joins the work between convolutions; the kernels by default where they run, or else nothing.

        `stacked`: 3D convolutions run as 2D ones over the channels of three frames. `in_slabs`: frame by frame, with
        the least memory (`vae/slabs.py`); nothing is fused then.
        """
        if vae.quant_conv is not None or vae.post_quant_conv is not None:
            raise ValueError("an autoencoder with quant_conv layers can't run this way; use the stock one")
        self.vae = vae
        self.in_slabs = in_slabs
        self._tune = tune_convolutions
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
            elif isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        fused = "nothing" if in_slabs else fused or ("kernels" if _takes_kernels(vae) else "nothing")
        convolution = convolve_stacked if stacked else convolve
        self._operations = Operations(activate, slabs.add if in_slabs else add, convolution, in_slabs)
        if fused == "kernels":
            self._operations = Operations(kernels.activate, kernels.add, convolution)
        elif fused == "compiled":
            self._operations = Operations(torch.compile(activate, dynamic=False), add, convolution)
        whole = fused == "everything compiled"
        self._encode: Any = torch.compile(encode_group, fullgraph=True, dynamic=False) if whole else encode_group
        self._decode: Any = torch.compile(decode_group, fullgraph=True, dynamic=False) if whole else decode_group

    def encode(self, pixels: Tensor) -> Tensor:
        """The posterior's moments [B, 2 C, F', H', W']: means, then log-variances."""
        return self._run(self._encode, self.vae.encoder, pixels, self.vae.num_sample_frames_batch_size)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] in [-1, 1] or a little beyond, from unscaled latents."""
        return self._run(self._decode, self.vae.decoder, latents, self.vae.num_latent_frames_batch_size)

    @torch.no_grad()
    def _run(self, code: Any, module: nn.Module, frames: Tensor, group: int) -> Tensor:
        frames = frames.to(memory_format=torch.channels_last_3d)
        odd = frames.shape[2] % group
        starts = range(odd, max(frames.shape[2], odd + 1), group) if frames.shape[2] >= group else range(0, 1)
        outputs: list[Tensor] = []
        kept: Kept | None = None
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=self._tune, allow_tf32=_allows_tf32()),
            torch._dynamo.config.patch(recompile_limit=_MANY_SHAPES),  # pyright: ignore[reportPrivateUsage]
        ):
            for number, start in enumerate(starts):
                first, last = (0 if number == 0 else start), start + group
                output, kept = code(module, frames[:, :, first:last], kept, self._operations)
                outputs.append(output)
        return torch.cat(outputs, dim=2)


def _takes_kernels(vae: AutoencoderKLCogVideoX) -> bool:
    norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
    fitting = all(kernels.suits(norm.num_channels, norm.num_groups) for norm in norms)
    return fitting and kernels.is_available() and next(vae.parameters()).is_cuda


def _allows_tf32() -> bool:
    """The setting as it is: `flags` would turn it on."""
    return torch.backends.cudnn.allow_tf32

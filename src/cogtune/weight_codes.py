"""Frozen weights in 8 or 4 bits: integers with a scale for each output, or NF4 with a scale for each 64 inputs.

    int8   w ~ scale k, k in -127 .. 127, the row's largest size at 127; float32 scales. 8 bits a weight
    nf4    w ~ scale v[k], v the 16 values of arXiv:2305.14314: quantiles of a normal distribution, zero among them; the
           scale is the block's largest size in bfloat16. 4.25 bits a weight

NF4's scales are not quantized a second time: 8-bit ones would save 3 % of the memory. That they are bfloat16 can't be
seen in the error (docs/LOG.md).
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WeightKind = Literal["int8", "nf4"]
NF4_BLOCK = 64
"""Neighbours along a row that share a scale; a row is padded to whole blocks."""
_INT8_LARGEST = 127.0
_BITS = 4


@cache
def nf4_values() -> tuple[float, ...]:
    """The 16 numbers of NF4, ascending from -1 to 1: eight quantiles below zero, seven above, and zero."""
    # The outermost one lies half a bin inside, on the average of 15 and 16 bins.
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64))[:-1]
    below = torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64))[:-1]
    ends = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return tuple((ends / ends.max()).tolist())


@torch.no_grad()
def encode(weight: Tensor, kind: WeightKind) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [out, in].

    int8: int8 [out, in], float32 [out, 1]. nf4: two codes a byte, uint8 [out, blocks * 32], bfloat16 [out, blocks].
    """
    wide = weight.float()
    if kind == "int8":
        scale = wide.abs().amax(1, keepdim=True) / _INT8_LARGEST
        return (wide / _not_zero(scale)).round().to(torch.int8), scale
    blocks = F.pad(wide, (0, -wide.shape[1] % NF4_BLOCK)).unflatten(1, (-1, NF4_BLOCK))
    scale = blocks.abs().amax(2).bfloat16()
    values = torch.tensor(nf4_values(), device=weight.device)
    parts = blocks / _not_zero(scale.float())[..., None]
    codes = torch.bucketize(parts, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | codes[:, 1::2] << _BITS, scale


def decode(codes: Tensor, scale: Tensor, values: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in = `width`] that the codes stand for, computed in float32; `values` are NF4's, None: int8."""
    if values is None:
        return (codes * scale).to(dtype)
    shifts = torch.arange(0, 2 * _BITS, _BITS, dtype=torch.uint8, device=codes.device)
    pairs = codes[..., None] >> shifts & (1 << _BITS) - 1
    numbers = values[pairs.int()].view(len(codes), -1, NF4_BLOCK) * scale[..., None]
    return numbers.to(dtype).flatten(1)[:, :width]


def count_code_bytes(out_features: int, in_features: int, kind: WeightKind) -> int:
    """Bytes of a layer's codes and scales."""
    if kind == "int8":
        return out_features * (in_features + 4)
    return out_features * -(-in_features // NF4_BLOCK) * (NF4_BLOCK // 2 + 2)


def _not_zero(scale: Tensor) -> Tensor:
    """For dividing by: rows and blocks of zeros have scale zero."""
    return scale.clamp(min=torch.finfo(torch.float32).tiny)

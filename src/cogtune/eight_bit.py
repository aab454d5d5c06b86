"""Optimizer state in 8 bits, with a scale for each block of 256 numbers, and weights that are rounded stochastically.

The 8-bit data type is the dynamic one of "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), as
bitsandbytes and torchao use it: each decade of [1e-7, 1] has half as many values as the next larger one. Two things
differ. Of the second moment, the square root is stored: it needs as many decades as the first moment, not twice as
many, and its errors come out smaller (docs/LOG.md). And its smallest value is above zero: beside a first moment that is
not zero, a second moment rounded to zero would make a step of any size (arXiv:2309.01507).
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7


def _make_values(*, signed: bool) -> list[float]:
    """The 256 numbers that codes stand for, ascending."""
    values: list[float] = []
    for decade in range(_DECADES):
        count = 2**decade * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        values += ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - _DECADES + 1)).tolist()
    zero = [0.0] if signed else [min(values) / 2]
    return sorted([*([-value for value in values] if signed else []), *zero, *values, 1.0])


@cache
def make_tables(device: torch.device, *, signed: bool) -> tuple[Tensor, Tensor]:
    """What the codes stand for, float32 [256], and the 255 limits between neighbours."""
    values = torch.tensor(_make_values(signed=signed), dtype=torch.float32)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def quantize(x: Tensor, limits: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] of the nearest values for float32 [n], and float32 scales [n / 256], each block's largest size.

    n must be a multiple of 256. A block of zeros has scale zero.
    """
    blocks = x.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    parts = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return _find_codes(parts, limits, signed=signed).to(torch.uint8).view(-1), scales


def _find_codes(parts: Tensor, limits: Tensor, *, signed: bool) -> Tensor:
    """`torch.bucketize(parts, limits)` for finite parts in [-1, 1]: int32 of their shape.

    A search reads eight limits for each number, one after the other. A decade's values are evenly spaced: the place
    computed from that is at most one off, which the two limits around it tell.
    """
    size = parts.abs()
    count = torch.full_like(size, 1.0 if signed else 2.0)  # values in the number's decade
    inside = size * 10.0 ** (_DECADES - 1)  # the number in its decade, from 0.1 to 1
    for decade in range(1, _DECADES):
        reached = size >= 10.0 ** (decade - _DECADES)
        count = torch.where(reached, (1.0 if signed else 2.0) * 2**decade, count)
        inside = torch.where(reached, size * 10.0 ** (_DECADES - 1 - decade), inside)
    place = ((inside - 0.1) * (count / 0.9)).to(torch.int32)
    whole = count.to(torch.int32)
    before = whole - (1 if signed else 2)  # values of the decades below
    place = before + torch.minimum(place.clamp(min=0), whole - 1)
    code = torch.where(parts < 0, 126 - place, 128 + place) if signed else 1 + place
    above = (parts > limits[code]).to(torch.int32)
    below = (parts <= limits[(code - 1).clamp(min=0)]).to(torch.int32)
    return (code + above - below).clamp(min=0)


def dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """The numbers that `quantize` kept, float32 [n]."""
    return (values[codes.int()].view(-1, BLOCK) * scales[:, None]).view(-1)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 in bfloat16, up or down so that the mean is `x`; `bits` are uniform int16 of the same shape.

    bfloat16 is the upper half of float32: where random bits added to the lower half carry over, it rounds up.
    """
    whole = x.view(torch.int32) + (bits.int() & 0xFFFF)
    return (whole & -0x10000).view(torch.float32).bfloat16()

"""The autoencoder's memory-bound work as three passes of a GPU, in channels-last memory (Triton).

    moments   reads a tensor once: mean and squared deviations of each channel, in float32, chunk by chunk
    terms     joins the chunks of a group's channels: factor and summand of the group norm (tiny)
    apply     reads and writes once: norm, modulation by the nearest latent, SiLU; leaves room for kept frames

A convolution's bias is added in the pass that reads its output next, instead of in one of its own.
`layers.py` has the same operations in plain torch; `tests/unit/vae/test_kernels.py` compares them in the interpreter.
"""
# ruff: noqa: ANN001, N803  (what Triton compiles takes pointers, sizes and capital constants)
# pyright: reportInvalidTypeForm=false

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

try:  # comes with CUDA builds of torch
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    triton: Any = None
    tl: Any = SimpleNamespace(constexpr=int)

_CHUNKS = 1024
_TILE = 4096


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def is_available() -> bool:
    """Whether these kernels can be compiled here."""
    return triton is not None


@_jit
def _moments_kernel(
    values, means, deviations, num_rows, chunk_rows, num_chunks, C: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, C)
    mean = tl.zeros([C], tl.float32)
    deviation = tl.zeros([C], tl.float32)
    available = tl.minimum(num_rows - chunk * chunk_rows, chunk_rows)
    for start in range(0, chunk_rows, BLOCK):
        rows = chunk * chunk_rows + start + tl.arange(0, BLOCK)
        inside = (rows < num_rows)[:, None]
        offsets = (batch * num_rows + rows)[:, None] * C + channels[None, :]
        tile = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
        tile_count = tl.sum((rows < num_rows).to(tl.float32), 0)
        tile_mean = tl.sum(tile, 0) / tl.maximum(tile_count, 1.0)
        difference = tl.where(inside, tile - tile_mean[None, :], 0.0)
        # Joining two sets' moments (Chan et al. 1983): no cancellation, whatever the mean.
        count = tl.minimum(available, start) * 1.0
        part = tile_count / tl.maximum(count + tile_count, 1.0)
        step = tile_mean - mean
        mean += step * part
        deviation += tl.sum(difference * difference, 0) + step * step * count * part
    offsets = (batch * num_chunks + chunk) * C + channels
    tl.store(means + offsets, mean)
    tl.store(deviations + offsets, deviation)


@_jit
def _terms_kernel(
    means, deviations, bias, weight, norm_bias, factor, summand, num_rows, chunk_rows, num_chunks, eps,
    C: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, BIASED: tl.constexpr,
) -> None:  # fmt: skip
    group, batch = tl.program_id(0), tl.program_id(1)
    channels = group * GROUP + tl.arange(0, GROUP)
    chunks = tl.arange(0, CHUNKS)
    counts = tl.maximum(tl.minimum(num_rows - chunks * chunk_rows, chunk_rows), 0).to(tl.float32)
    counts = tl.where(chunks < num_chunks, counts, 0.0)
    offsets = (batch * num_chunks + chunks)[:, None] * C + channels[None, :]
    inside = (chunks < num_chunks)[:, None]
    mean = tl.load(means + offsets, mask=inside, other=0.0)
    deviation = tl.load(deviations + offsets, mask=inside, other=0.0)
    added = tl.zeros([GROUP], tl.float32)
    if BIASED:
        added = tl.load(bias + channels).to(tl.float32)
    mean += added[None, :]
    total = num_rows * 1.0 * GROUP
    centre = tl.sum(tl.sum(mean * counts[:, None], 0), 0) / total
    away = mean - centre
    spread = tl.sum(tl.sum(deviation + counts[:, None] * away * away, 0), 0) / total
    scale = tl.load(weight + channels).to(tl.float32) / tl.sqrt(spread + eps)
    tl.store(factor + batch * C + channels, scale)
    shift = tl.load(norm_bias + channels).to(tl.float32) + (added - centre) * scale
    tl.store(summand + batch * C + channels, shift)


@_jit
def _apply_kernel(
    values, factor, summand, scale, shift, output, num_rows, frame_rows, width, times, small_rows, small_width,
    C: tl.constexpr, BLOCK: tl.constexpr, MODULATED: tl.constexpr,
) -> None:  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, C)
    inside = (rows < num_rows)[:, None]
    tile = tl.load(values + (batch * num_rows + rows)[:, None] * C + channels[None, :], mask=inside, other=0.0)
    factors = tl.load(factor + batch * C + channels)[None, :]
    result = tile.to(tl.float32) * factors + tl.load(summand + batch * C + channels)[None, :]
    if MODULATED:
        frame, place = rows // frame_rows, rows % frame_rows
        small = frame * small_rows + (place // width // times) * small_width + place % width // times
        small = batch * (num_rows // frame_rows) * small_rows + small
        offsets = small[:, None] * C + channels[None, :]
        result = result * tl.load(scale + offsets, mask=inside, other=0.0).to(tl.float32)
        result += tl.load(shift + offsets, mask=inside, other=0.0).to(tl.float32)
    result = result / (1.0 + tl.exp(-result))
    target = batch * (num_rows + 2 * frame_rows) + 2 * frame_rows + rows
    offsets = target[:, None] * C + channels[None, :]
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=inside)


@_jit
def _add_kernel(first, second, bias, count, C: tl.constexpr, BLOCK: tl.constexpr) -> None:
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    total = tl.load(first + offsets, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(second + offsets, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + offsets % C).to(tl.float32)
    tl.store(first + offsets, total.to(first.dtype.element_ty), mask=inside)


def suits(channels: int, groups: int) -> bool:
    """Whether the kernels take so many channels: they and a group's are powers of two."""
    return all(number & (number - 1) == 0 for number in (channels, channels // groups)) and channels % groups == 0


def normalization_terms(values: Tensor, bias: Tensor | None, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Factor and summand [B, C], float32, that make a group norm of `values + bias`, applied to `values` alone."""
    batch, channels = values.shape[:2]
    num_rows = values[0, 0].numel()
    block = max(1, _TILE // channels)
    chunk_rows = -(-num_rows // (_CHUNKS * block)) * block
    num_chunks = -(-num_rows // chunk_rows)
    means, deviations = torch.empty(2, batch, num_chunks, channels, device=values.device).unbind()
    _moments_kernel[(num_chunks, batch)](
        values, means, deviations, num_rows, chunk_rows, num_chunks, C=channels, BLOCK=block
    )
    factor, summand = torch.empty(2, batch, channels, device=values.device).unbind()
    _terms_kernel[(norm.num_groups, batch)](
        means, deviations, norm.bias if bias is None else bias, norm.weight, norm.bias, factor, summand,
        num_rows, chunk_rows, num_chunks, norm.eps,
        C=channels, GROUP=channels // norm.num_groups, CHUNKS=max(2, triton.next_power_of_2(num_chunks)),
        BIASED=bias is not None,
    )  # fmt: skip
    return factor, summand


def activate(
    values: Tensor,
    bias: Tensor | None,
    norm: nn.GroupNorm,
    modulation: tuple[Tensor, Tensor] | None,
    kept: Tensor | None,
) -> Tensor:
    """As `layers.activate`, for [B, C, T, H, W] in channels-last memory."""
    values = _channels_last(values)
    batch, channels, frames, height, width = values.shape
    factor, summand = normalization_terms(values, bias, norm)
    shape = (batch, channels, frames + 2, height, width)
    output = torch.empty(shape, device=values.device, dtype=values.dtype, memory_format=torch.channels_last_3d)
    scale, shift = (values, values) if modulation is None else (_channels_last(part) for part in modulation)
    times = width // scale.shape[-1]
    num_rows, block = frames * height * width, max(1, _TILE // channels)
    _apply_kernel[(-(-num_rows // block), batch)](
        values, factor, summand, scale, shift, output, num_rows, height * width, width, times,
        scale.shape[-2] * scale.shape[-1], scale.shape[-1],
        C=channels, BLOCK=block, MODULATED=modulation is not None,
    )  # fmt: skip
    output[:, :, :2] = output[:, :, 2:3] if kept is None else kept
    return output


def add(hidden: Tensor, bias: Tensor, values: Tensor) -> Tensor:
    """`hidden + values` with a bias for each channel, written over `hidden`."""
    hidden, values = _channels_last(hidden), _channels_last(values)
    count = hidden.numel()
    _add_kernel[(-(-count // _TILE),)](hidden, values, bias, count, C=hidden.shape[1], BLOCK=_TILE)
    return hidden


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last_3d)

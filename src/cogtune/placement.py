"""Puts frozen models on the device: whole where they fit, or else with some of their blocks streamed from the host."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from cogtune.attention import fuse_projections
from cogtune.errors import UserError
from cogtune.host_threads import count_cores
from cogtune.memory import GIB, MARGIN, SAMPLING_UNITS, free_device_bytes
from cogtune.streaming.blocks import DEFAULT_SLOTS, all_tensors, count_bytes, find_stream, frozen_tensors, stream_blocks
from cogtune.streaming.host import HostBuffer
from cogtune.vae.frame_coder import FrameCoder

TRANSFORMER_BLOCKS = "transformer_blocks"
TEXT_BLOCKS = "encoder.block"
TEXT_WORKSPACE = 1 * GIB
"""Counted for T5-XXL and 8 texts of 226 tokens: attention's scores in three copies, the feed-forward's products."""
RELEASED_PIXELS = 480 * 720
_STAGE_BYTES = 128 << 20
_STAGED_FROM = 1 << 20
_STAGE_THREADS = 8


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared memory once."""
    return count_bytes(all_tensors(module))


def sampling_workspace(tokens: int, width: int, dtype: torch.dtype, *, batch_size: int = 2) -> int:
    """Bytes that the blocks need beside weights for a batch of sequences (guidance: two)."""
    return int(SAMPLING_UNITS * batch_size * tokens * width * torch.finfo(dtype).bits // 8)


def count_residents(model: nn.Module, blocks_name: str, free_bytes: int | None, workspace_bytes: int) -> int | None:
    """How many of a model's blocks can stay on the device; None: all of it fits. Raises `UserError` below the ring."""
    if free_bytes is None:
        return None
    left = int(free_bytes * MARGIN) - workspace_bytes - weight_bytes(model)
    if left >= 0:
        return None
    blocks = list(model.get_submodule(blocks_name).children())
    block = max(count_bytes(frozen_tensors(each)) for each in blocks)
    resident = len(blocks) - DEFAULT_SLOTS + left // block
    if resident < 0:
        least = weight_bytes(model) - (len(blocks) - DEFAULT_SLOTS) * block + workspace_bytes
        raise UserError(
            f"memory: {free_bytes / GIB:.1f} GiB are free on the device; {type(model).__name__} needs "
            f"{least / MARGIN / GIB:.1f} GiB even with all blocks streamed; close other programs on the device, or "
            "choose a smaller size"
        )
    return resident


@torch.no_grad()
def move_to_device(module: nn.Module, device: torch.device) -> None:
    """`module.to(device)`; to a GPU by way of two page-locked buffers that several cores fill.

    The driver, left to it, takes a file's pages over by one core.
    """
    if device.type != "cuda":
        module.to(device)
        return
    try:
        buffers = [HostBuffer(_STAGE_BYTES, page_locked=True) for _ in range(2)]
    except UserError:  # a limit on locked memory
        module.to(device)
        return
    numbers = [buffer.bytes.numpy() for buffer in buffers]
    free: list[torch.cuda.Event] = [torch.cuda.Event() for _ in buffers]
    turns = itertools.cycle(range(len(buffers)))
    num_threads = max(1, min(_STAGE_THREADS, count_cores()))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="placing") as pool:

        def move(tensor: torch.Tensor) -> torch.Tensor:
            is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_contiguous()
            if tensor.device.type != "cpu" or not is_plain or tensor.nbytes < _STAGED_FROM:
                return tensor.to(device)
            there = torch.empty_like(tensor, device=device)
            source, target = (x.detach().reshape(-1).view(torch.uint8) for x in (tensor, there))
            for start in range(0, len(source), _STAGE_BYTES):
                turn, piece = next(turns), source[start : start + _STAGE_BYTES].numpy()
                free[turn].synchronize()
                stripe = -(-len(piece) // num_threads)
                ends = [(at, min(at + stripe, len(piece))) for at in range(0, len(piece), stripe)]
                # numpy lets go of Python's lock while it copies, and counts no threads of its own.
                list(pool.map(partial(_copy_stripe, numbers[turn], piece), ends))
                target[start : start + len(piece)].copy_(buffers[turn].bytes[: len(piece)], non_blocking=True)
                free[turn].record()
            return there

        module._apply(move)
    torch.cuda.synchronize(device)  # before the buffers go


def _copy_stripe(target: Any, source: Any, ends: tuple[int, int]) -> None:
    target[ends[0] : ends[1]] = source[ends[0] : ends[1]]


def place_text_encoder(encoder: nn.Module, device: torch.device) -> nn.Module:
    """The text encoder on the device, streamed where it doesn't fit; returns it."""
    resident = count_residents(encoder, TEXT_BLOCKS, free_device_bytes(device), TEXT_WORKSPACE)
    if resident is None:
        move_to_device(encoder, device)
        return encoder
    stream_blocks(encoder, TEXT_BLOCKS, device, num_resident=resident)
    return encoder


def place_in_turns(
    pipeline: Any,
    device: torch.device,
    tokens: int,
    *,
    prepare: Callable[[nn.Module], object] | None = None,
) -> None:
    """A pipeline whose models take turns on the device (`generation.generate`), each with as much of it as fits.

    `prepare` is called with each block of the transformer on the device before it leaves, to quantize it.
    """
    pipeline.vae.to(device)
    free = free_device_bytes(device)
    for block in pipeline.transformer.transformer_blocks:
        fuse_projections(block.attn1)
    parts: list[tuple[Any, str, int]] = [
        (pipeline.text_encoder, TEXT_BLOCKS, TEXT_WORKSPACE),
        (pipeline.transformer, TRANSFORMER_BLOCKS, _workspace_of(pipeline, tokens)),
    ]
    for model, name, workspace in parts:
        if model is None:
            continue
        count = len(list(model.get_submodule(name).children()))
        resident = count_residents(model, name, free, workspace)
        # One that fits alone leaves in its turn too: all of its blocks are resident, and released afterwards.
        own = prepare if model is pipeline.transformer else None
        stream_blocks(model, name, device, num_resident=count if resident is None else resident, prepare=own)


def fits_whole(pipeline: Any, device: torch.device, tokens: int) -> bool:
    """Whether all models of a pipeline fit on the device at once beside what sampling needs."""
    free = free_device_bytes(device)
    models: list[Any] = [pipeline.text_encoder, pipeline.transformer, pipeline.vae]
    needed = sum(weight_bytes(model) for model in models) + _workspace_of(pipeline, tokens)
    return free is None or needed <= free * MARGIN


def _workspace_of(pipeline: Any, tokens: int) -> int:
    config: Any = pipeline.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    return sampling_workspace(tokens, width, pipeline.transformer.dtype)


def release_blocks(model: nn.Module) -> None:
    """Frees the device memory of a streamed model's blocks; they come back when they are visited."""
    stream = find_stream(model)
    if stream is not None:
        stream.release()


def stock_decode_bytes(pixels: int) -> int:
    """Free memory from which the stock decoder takes videos of so many pixels a frame without tiles: it peaks at 16 GiB
    of 24 for the released size, and its memory grows with a frame's size."""
    return int(24 * GIB * max(1.0, pixels / RELEASED_PIXELS))


def whole_coding_bytes(pixels: int) -> int:
    """Free memory from which videos of so many pixels a frame are coded in whole groups. Fitted to the released size on
    an H100: 8.4 GiB allocated, and it passed with 10.4 GiB reserved under a cap of 11.2."""
    return int(10.5 * GIB * pixels / RELEASED_PIXELS)


def make_coder(
    vae: AutoencoderKLCogVideoX, *, tune_convolutions: bool = False, pixels: int = RELEASED_PIXELS
) -> FrameCoder:
    """What codes videos of so many pixels a frame: in whole groups where there is memory for it, or frame by frame."""
    free = free_device_bytes(vae.device)
    in_slabs = free is not None and free < whole_coding_bytes(pixels)
    return FrameCoder(vae, tune_convolutions=tune_convolutions and not in_slabs, in_slabs=in_slabs)

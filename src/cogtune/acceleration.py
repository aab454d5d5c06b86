"""What makes sampling fast, and when each part of it is on without being asked for.

Exact, up to rounding: blocks compiled on one joined sequence (`joint_blocks`), adapters merged into the weights, whole
videos decoded in channels-last memory (`vae/frame_coder`). Not exact, and never on by itself: float8, step caches.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from cogtune.attention import fuse_projections
from cogtune.attention_backends import Backend, activate, is_installed, measure_backends
from cogtune.errors import UserError
from cogtune.float8 import check_float8_device
from cogtune.frozen import Float8Base, quantize_block
from cogtune.joint_blocks import join_blocks
from cogtune.memory import free_device_bytes
from cogtune.models import ModelFacts
from cogtune.parallel.videos import SharedVideo
from cogtune.placement import RELEASED_PIXELS, fits_whole, make_coder, stock_decode_bytes
from cogtune.step_cache import CacheSettings, StepCache
from cogtune.vae.frame_coder import FrameCoder

Switch = Literal["auto", "on", "off"]
Quantization = Literal["none", "int8", "float8"]
Offload = Literal["auto", "none", "stream", "model", "sequential"]

COMPILE_FROM_STEPS = 50
"""Compiling a block takes some 15 s once; 5B saves about 0.4 s a step with guidance, so one whole video pays for it."""


def decide_compile(wanted: Switch, *, device: torch.device, offload: Offload, num_steps: int) -> bool:
    """Whether blocks are compiled: `auto` does from 50 sampling steps in all (videos x steps) on, on a GPU."""
    if offload == "sequential":
        if wanted == "on":
            raise UserError("--compile on: can't go with --offload sequential, which moves single layers; use model")
        return False
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and num_steps >= COMPILE_FROM_STEPS)


def decide_offload(wanted: Offload, pipeline: Any, device: torch.device, tokens: int) -> Offload:
    """How the models share the device: `auto` streams them where they don't fit at once."""
    if wanted == "stream" and device.type == "cpu":
        raise UserError("--offload stream: there is no GPU to stream to; leave it out")
    if wanted != "auto":
        return wanted
    return "none" if device.type == "cpu" or fits_whole(pipeline, device, tokens) else "stream"


def decide_tiling(wanted: Switch, device: torch.device, offload: Offload, *, pixels: int = RELEASED_PIXELS) -> bool:
    """Whether decoding goes by tiles: `auto` does where single models or layers are moved by hooks and memory is short.

    Elsewhere `FrameCoder` decodes frame by frame instead, without seams.
    """
    free = free_device_bytes(device)
    if wanted != "auto" or free is None:
        return wanted == "on"
    return offload in ("model", "sequential") and free < stock_decode_bytes(pixels)


def merge_adapters(pipeline: Any) -> None:
    """Adds the adapters to the weights, which rounds them once; sampling then costs what the base model costs."""
    if getattr(pipeline.transformer, "peft_config", None):
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def quantize_transformer(
    transformer: Any, kind: Quantization, device: torch.device, *, offload: Offload = "none"
) -> Callable[[torch.nn.Module], object] | None:
    """Makes the blocks' linear layers smaller, in place; adapters must be merged before.

    int8: weights only, with torchao: less memory, not faster. float8: weights and inputs, faster. Where blocks are to
    be streamed, returns what is to be done to each of them on the device instead.
    """
    if kind == "float8":
        check_float8_device(device)
        if offload == "stream":
            return quantize_for_inference
        for block in transformer.transformer_blocks:
            fuse_projections(block.to(device).attn1)
            quantize_for_inference(block)
    elif kind == "int8":
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]
        except ImportError:  # an optional extra
            raise UserError("--quantize int8: torchao is not installed; pip install 'cogtune[quantize]'") from None
        quantize_(
            transformer.transformer_blocks,
            Int8WeightOnlyConfig(),
            filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and "norm" not in name,
        )
    return None


def quantize_for_inference(block: Any) -> int:
    """Makes a block's linear layers float8 and keeps what the forward pass reads; returns how many."""
    replaced = quantize_block(block)
    for module in block.modules():
        if isinstance(module, Float8Base):
            module.transposed = module.transposed.new_empty(0)
    return replaced


def choose_sampling_backend(facts: ModelFacts, tokens: int, dtype: torch.dtype, device: torch.device) -> Backend:
    """The attention kernel that is fastest forward, for two halves of so many tokens, made active for the process.

    PyTorch's own choice where no other package offers one: nothing is measured then.
    """
    if device.type != "cuda" or not (is_installed("flash3") or is_installed("flash4")):
        return "default"
    timings = measure_backends(
        batch_size=2, num_heads=facts.num_heads, tokens=tokens, head_dim=facts.head_dim, dtype=dtype, device=device,
        backward=False,
    )  # fmt: skip
    best: Backend = "default"
    for name, timing in timings.items():
        if best == "default" or timing.forward < timings[best].forward:
            best = name
    activate(best)
    return best


def accelerate(
    pipeline: Any,
    *,
    compiled: bool,
    cache: CacheSettings | None,
    coded: bool,
    backend: Backend = "default",
    pixels: int = RELEASED_PIXELS,
    shared: SharedVideo | None = None,
) -> FrameCoder | None:
    """Sets up sampling on a placed pipeline; returns what decodes the videos, or None where the stock decoder does.

    `coded`: decode with `FrameCoder`, which needs the whole autoencoder on the device. `shared`: the ranks of a video.
    """
    if compiled or cache is not None or shared is not None:
        steps = StepCache(cache, None if shared is None else shared.add_up) if cache else None
        team = None if shared is None else shared.attention
        join_blocks(pipeline.transformer, compiled=compiled, cache=steps, backend=backend, team=team)
    # Trying convolution algorithms takes longer than a few videos gain by it.
    return make_coder(pipeline.vae, pixels=pixels) if coded else None

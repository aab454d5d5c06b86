"""Times ways of running the autoencoder on one clip, each against the stock one's result.

stock           diffusers, whole frames
tiled           diffusers, by tiles (another result, by design)
small-norms     diffusers, the decoder's 1x1 convolutions before the enlarging
channels-last   diffusers' code, weights and input in channels-last memory
coder           `FrameCoder`, its fused kernels where the device has them
untuned         the same without trying convolution algorithms
compiled        `FrameCoder`, norm and activation compiled
whole           `FrameCoder`, everything compiled (minutes of compiling)
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from cogtune.benchmark.clock import attempt, time_work
from cogtune.benchmark.kernels import profile_steps
from cogtune.random_pipeline import ARCHITECTURES
from cogtune.vae.frame_coder import FrameCoder, Fused
from cogtune.vae.spatial_norm import use_small_spatial_norms

WAYS = ("stock", "tiled", "small-norms", "channels-last", "coder", "untuned", "stacked", "compiled", "whole")
Code = Callable[[Tensor], Tensor]


def make_random_vae(model: str, device: torch.device, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """A released autoencoder with random weights, made on the device."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            vae = AutoencoderKLCogVideoX(**ARCHITECTURES[model][1])
    finally:
        torch.set_default_dtype(default)
    return vae.requires_grad_(False).eval()


def prepare_way(vae: AutoencoderKLCogVideoX, way: str) -> tuple[Code, Code]:
    """Functions that encode pixels to moments and decode latents this way, on a copy of the weights."""
    vae = copy.deepcopy(vae)
    if way in ("coder", "untuned", "stacked", "compiled", "whole"):
        fused: dict[str, Fused] = {"compiled": "compiled", "whole": "everything compiled"}
        coder = FrameCoder(vae, fused=fused.get(way), tune_convolutions=way != "untuned", stacked=way == "stacked")
        return coder.encode, coder.decode
    if way == "tiled":
        vae.enable_tiling()
    if way == "small-norms":
        use_small_spatial_norms(vae)
    memory_format = torch.contiguous_format
    if way == "channels-last":
        memory_format = torch.channels_last_3d
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                two = isinstance(module, nn.Conv2d)
                module.to(memory_format=torch.channels_last if two else torch.channels_last_3d)  # pyright: ignore[reportCallIssue]

    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(pixels.to(memory_format=memory_format), return_dict=False)[0]
        return posterior.parameters

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.to(memory_format=memory_format), return_dict=False)[0]

    return encode, decode


@torch.no_grad()
def measure_ways(
    vae: AutoencoderKLCogVideoX,
    ways: list[str],
    work: str,
    sample: Tensor,
    *,
    repeats: int,
    limit_seconds: float,
    profiled: bool,
    report: Callable[[str, dict[str, Any]], None],
) -> dict[str, Any]:
    """Seconds, memory and deviation of each way to `encode` or `decode` a sample; the first way is the reference."""
    results: dict[str, Any] = {}
    reference: list[Tensor] = []

    def measure(way: str) -> dict[str, Any]:
        code = prepare_way(vae, way)[0 if work == "encode" else 1]
        outputs: list[Tensor] = []

        def run() -> None:
            outputs[:] = [code(sample)]

        row = time_work(run, sample.device, repeats=repeats, limit_seconds=limit_seconds)
        output = outputs[0].float().cpu()
        if not reference:
            reference.append(output)
        error = output - reference[0]
        row["relative_error"] = float(error.norm() / reference[0].norm())
        if profiled:
            row["profile"] = attempt(lambda: profile_steps(run, 1, sample.device))
        return row

    for way in ways:
        results[way] = attempt(lambda way=way: measure(way))
        torch._dynamo.reset()
        report(f"{work} {way}", results[way])
    return results


def describe_ways(results: dict[str, Any]) -> list[str]:
    """A line for each way."""
    lines = []
    for way, row in results.items():
        if "error" in row:
            lines.append(f"{way:<16} {row['error'][:100]}")
        else:
            peak = f"{row['peak_allocated_gib']:6.2f} GiB" if "peak_allocated_gib" in row else ""
            lines.append(
                f"{way:<16} {row['seconds']:8.3f} s   first {row['first_seconds']:6.1f} s   {peak}   "
                f"off by {row['relative_error']:.1e}"
            )
    return lines

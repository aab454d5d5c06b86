"""Generates videos with the released pipeline: the one implementation behind `scripts/generate.py` and validation.

pipeline = load_pipeline(facts, dtype=torch.bfloat16)
reports = load_adapters(pipeline, [(Path("runs/my-lora/final"), 1.0)])
place_pipeline(pipeline, device, offload="none")
coder = accelerate(pipeline, compiled=True, cache=None, coded=True)  # from `acceleration`; may be left out
frames = generate(pipeline, Request("a red ball", num_frames=49, height=480, width=720), coder=coder)
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline

from cogtune import models
from cogtune.acceleration import Offload
from cogtune.adapter import check_adapter_fits, find_adapter_file, read_adapter_file
from cogtune.encoding import embed
from cogtune.errors import UserError
from cogtune.joint_blocks import find_step_cache
from cogtune.models import ModelFacts
from cogtune.placement import place_in_turns, release_blocks
from cogtune.streaming.blocks import find_stream
from cogtune.vae.frame_coder import FrameCoder


@dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    num_frames: int
    height: int
    width: int
    seed: int = 0
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    dynamic_guidance: bool = False
    """Guidance that grows along the steps (the vendor's choice for 5B with the DPM sampler)."""


def check_request(request: Request, facts: ModelFacts, *, allow_unsupported_size: bool = False) -> None:
    """Raises `UserError` for a length or size that the model can't make or wasn't trained for."""
    check_size(facts, request.num_frames, request.height, request.width, allow_unsupported_size=allow_unsupported_size)
    if not request.prompt.strip():
        raise UserError("--prompt is empty; describe the video")


def check_size(
    facts: ModelFacts, num_frames: int, height: int, width: int, *, allow_unsupported_size: bool = False
) -> None:
    """Raises `UserError` unless the frames are 4k + 1, the size divides into patches and the model supports both."""
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if (num_frames - 1) % facts.temporal_factor:
        below = (num_frames - 1) // facts.temporal_factor * facts.temporal_factor + 1
        raise UserError(
            f"num_frames={num_frames}: must be {facts.temporal_factor}k + 1, such as {below} or "
            f"{below + facts.temporal_factor}: the VAE encodes the first frame alone and the rest in fours"
        )
    multiple = facts.spatial_factor * facts.patch_size
    for name, size in (("height", height), ("width", width)):
        if size % multiple:
            raise UserError(f"{name}={size}: must be a multiple of {multiple} pixels (VAE and patches)")
    native = (facts.num_frames, facts.height, facts.width)
    if facts.fixed_size and (num_frames, height, width) != native and not allow_unsupported_size:
        raise UserError(
            f"{num_frames} frames of {width}x{height}: {facts.variant} supports {native[0]} frames of "
            f"{native[2]}x{native[1]} only (model card); keep that, or allow it outright with "
            "data.allow_unsupported_size=true (training) or --allow-unsupported-size (generation)"
        )


def make_pipeline(facts: ModelFacts, **components: Any) -> CogVideoXPipeline:
    """A released pipeline from loaded components; absent ones (None) are fine where they aren't used."""
    parts = {name: components.get(name) for name in models.COMPONENTS}
    pipeline = CogVideoXPipeline(**parts)  # pyright: ignore[reportArgumentType]
    pipeline.vae_scale_factor_spatial = facts.spatial_factor
    pipeline.vae_scale_factor_temporal = facts.temporal_factor
    pipeline.vae_scaling_factor_image = facts.scaling_factor
    return pipeline


def load_pipeline(
    facts: ModelFacts, *, dtype: torch.dtype, sampler: Literal["default", "ddim", "dpm"] = "default"
) -> CogVideoXPipeline:
    """The whole pipeline on the CPU, its sampler the checkpoint's own unless told otherwise."""
    scheduler = models.load_scheduler(facts)
    if sampler != "default":
        chosen = CogVideoXDDIMScheduler if sampler == "ddim" else CogVideoXDPMScheduler
        scheduler = chosen.from_config(scheduler.config, timestep_spacing="trailing")
    return make_pipeline(
        facts,
        tokenizer=models.load_tokenizer(facts),
        text_encoder=models.load_text_encoder(facts, dtype),
        vae=models.load_vae(facts, dtype),
        transformer=models.load_transformer(facts, dtype),
        scheduler=scheduler,
    )


def load_adapters(pipeline: CogVideoXPipeline, adapters: Sequence[tuple[Path, float]]) -> list[str]:
    """Loads adapters (file or folder, scale) through diffusers; one line each on what it touches.

    Raises `UserError` for a file that is no adapter or another model's.
    """
    names, scales, reports = [], [], []
    for number, (path, scale) in enumerate(adapters):
        state, config = read_adapter_file(path)
        check_adapter_fits(state, pipeline.transformer, path)
        file = find_adapter_file(path)
        name = f"lora{number}"
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        names.append(name)
        scales.append(scale)
        reports.append(_describe_adapter(path, state, config, scale))
    if names:
        pipeline.set_adapters(names, scales)
    return reports


def _describe_adapter(path: Path, state: dict[str, torch.Tensor], config: dict[str, Any], scale: float) -> str:
    layers = [key.split(".lora_")[0] for key in state if ".lora_B." in key]
    kinds = Counter(layer.split(".", 3)[-1] for layer in layers)
    ranks = sorted({tensor.shape[1] for key, tensor in state.items() if ".lora_B." in key})
    listed = ", ".join(f"{kind} x {count}" for kind, count in sorted(kinds.items()))
    if config:
        trained = f"alpha {config.get('lora_alpha')}" + (", rsLoRA" if config.get("use_rslora") else "")
        trained += ", DoRA" if config.get("use_dora") else ""
    else:
        trained = "no alpha in the file: taken as alpha = rank"
    return f"{path}: {len(layers)} layers ({listed}); rank {'/'.join(map(str, ranks))}, {trained}; scale {scale:g}"


def place_pipeline(
    pipeline: CogVideoXPipeline,
    device: torch.device,
    *,
    offload: Offload = "none",
    vae_tiling: bool = True,
    tokens: int = 0,
    prepare: Callable[[torch.nn.Module], object] | None = None,
) -> None:
    """Moves the pipeline to the device: all of it, streamed, one model at a time, or one layer at a time.

    Streaming needs the `tokens` of a video, and takes what is to be done to each block (`placement.place_in_turns`).
    """
    if offload != "none" and device.type == "cpu":
        raise UserError(f"--offload {offload}: there is no GPU to offload from; leave it out")
    if vae_tiling:
        pipeline.vae.enable_tiling()
    if offload == "stream":
        place_in_turns(pipeline, device, tokens, prepare=prepare)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)


def explain_out_of_memory(error: BaseException) -> str:
    """What to turn after the device ran out of memory."""
    return (
        f"out of memory on the device: {str(error).splitlines()[0][:300]}\n       try: --offload stream, then "
        "--offload sequential --vae-tiling on; close other programs on the device"
    )


def generate(
    pipeline: CogVideoXPipeline, request: Request, *, max_text_length: int = 226, coder: FrameCoder | None = None
) -> np.ndarray:
    """One video, uint8 RGB [F, H, W, 3], from a whole pipeline; `coder` decodes it, or else the pipeline."""
    if find_stream(pipeline.transformer) is not None:
        return _generate_in_turns(pipeline, request, max_text_length, coder)
    _start_steps(pipeline, request)
    output = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        max_sequence_length=max_text_length,
        output_type="pt" if coder is None else "latent",
        **_sampling_arguments(request),
    ).frames  # pyright: ignore[reportAttributeAccessIssue]
    if coder is not None:
        return decode_latents(coder.vae, output, pipeline.vae_scaling_factor_image, coder)
    return _to_uint8(output[0].permute(0, 2, 3, 1))


def _generate_in_turns(
    pipeline: CogVideoXPipeline, request: Request, max_text_length: int, coder: FrameCoder | None
) -> np.ndarray:
    """Text encoder, transformer and autoencoder one after the other; each one's blocks leave when it is done."""
    encoder: Any = pipeline.text_encoder
    texts = [
        embed([text], pipeline.tokenizer, encoder, max_text_length)[0]
        for text in (request.prompt, request.negative_prompt)
    ]
    release_blocks(encoder)
    latents = generate_latents(pipeline, request, *texts)
    release_blocks(pipeline.transformer)
    return decode_latents(pipeline.vae, latents, pipeline.vae_scaling_factor_image, coder)


@torch.no_grad()
def generate_latents(
    pipeline: CogVideoXPipeline,
    request: Request,
    embeddings: torch.Tensor,
    negative_embeddings: torch.Tensor,
    *,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Sampled latents [1, F, C, H, W], scaled, from embeddings [L, D]; needs transformer and scheduler only.

    `on_step` is called with each step's number after it.
    """

    def call(_pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step)
        return {}

    guided = request.guidance_scale > 1.0
    _start_steps(pipeline, request)
    return pipeline(
        prompt_embeds=embeddings[None],  # pyright: ignore[reportArgumentType]
        negative_prompt_embeds=negative_embeddings[None] if guided else None,  # pyright: ignore[reportArgumentType]
        output_type="latent",
        callback_on_step_end=call,  # pyright: ignore[reportArgumentType]  # annotated with other arguments than it gets
        **_sampling_arguments(request),
    ).frames  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKLCogVideoX, latents: torch.Tensor, scaling_factor: float, coder: FrameCoder | None = None
) -> np.ndarray:
    """Latents [1, F, C, H, W] to uint8 RGB [F, H, W, 3]."""
    unscaled = latents.to(vae.device, vae.dtype).transpose(1, 2) / scaling_factor
    decoded = vae.decode(unscaled).sample if coder is None else coder.decode(unscaled)  # pyright: ignore[reportAttributeAccessIssue]
    video = decoded[0]  # [C, F, H, W]
    return _to_uint8((video.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0))


def _start_steps(pipeline: CogVideoXPipeline, request: Request) -> None:
    cache = find_step_cache(pipeline.transformer)
    if cache is not None:
        cache.start(request.num_inference_steps)


def _sampling_arguments(request: Request) -> dict[str, Any]:
    return {
        "num_frames": request.num_frames,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "use_dynamic_cfg": request.dynamic_guidance,
        # On the CPU: the same seed gives the same noise whatever the device.
        "generator": torch.Generator("cpu").manual_seed(request.seed),
    }


def _to_uint8(video: torch.Tensor) -> np.ndarray:
    return (video.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

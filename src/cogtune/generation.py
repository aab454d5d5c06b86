"""Generates videos with the released pipeline: the one implementation behind `scripts/generate.py` and validation.

pipeline = load_pipeline(facts, dtype=torch.bfloat16)
reports = load_adapters(pipeline, [(Path("runs/my-lora/final"), 1.0)])
place_pipeline(pipeline, device, offload="none")
coder = accelerate(pipeline, compiled=True, cache=None, coded=True)  # from `acceleration`; may be left out
frames = generate(pipeline, Request("a red ball", num_frames=49, height=480, width=720), coder=coder)
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)

from cogtune import models
from cogtune.acceleration import Offload
from cogtune.adapter import check_adapter_fits, find_adapter_file, read_adapter_file
from cogtune.denoiser import Rotary, make_rotary
from cogtune.diffusion import pad_front
from cogtune.encoding import embed
from cogtune.errors import UserError
from cogtune.joint_blocks import find_step_cache
from cogtune.models import ModelFacts
from cogtune.placement import move_to_device, place_in_turns, release_blocks
from cogtune.streaming.blocks import find_stream
from cogtune.vae.frame_coder import FrameCoder
from cogtune.video import ClipError, load_clip, load_image
from cogtune.video_request import Request

Pipeline = CogVideoXPipeline | CogVideoXImageToVideoPipeline | CogVideoXVideoToVideoPipeline


def make_pipeline(facts: ModelFacts, *, from_video: bool = False, **components: Any) -> Pipeline:
    """A released pipeline from loaded components; absent ones (None) are fine where they aren't used.

    Image-to-video models get theirs; `from_video`: the one that starts from a video.
    """
    parts = {name: components.get(name) for name in models.COMPONENTS}
    if facts.takes_image:
        kind = CogVideoXImageToVideoPipeline
    else:
        kind = CogVideoXVideoToVideoPipeline if from_video else CogVideoXPipeline
    pipeline = kind(**parts)  # pyright: ignore[reportArgumentType]
    pipeline.vae_scale_factor_spatial = facts.spatial_factor
    pipeline.vae_scale_factor_temporal = facts.temporal_factor
    pipeline.vae_scaling_factor_image = facts.scaling_factor
    if facts.patch_size_t is not None:
        # The same values, where the released table ends too early (`make_rotary`).
        def prepare_rotary(height: int, width: int, num_frames: int, device: torch.device) -> Rotary | None:
            return make_rotary(facts, num_frames, height, width, device)

        pipeline._prepare_rotary_positional_embeddings = prepare_rotary  # pyright: ignore[reportAttributeAccessIssue]
    return pipeline


def load_pipeline(
    facts: ModelFacts,
    *,
    dtype: torch.dtype,
    sampler: Literal["default", "ddim", "dpm"] = "default",
    from_video: bool = False,
) -> Pipeline:
    """The whole pipeline on the CPU, its sampler the checkpoint's own unless told otherwise."""
    scheduler = models.load_scheduler(facts)
    if sampler != "default":
        chosen = CogVideoXDDIMScheduler if sampler == "ddim" else CogVideoXDPMScheduler
        scheduler = chosen.from_config(scheduler.config, timestep_spacing="trailing")
    return make_pipeline(
        facts,
        from_video=from_video,
        tokenizer=models.load_tokenizer(facts),
        text_encoder=models.load_text_encoder(facts, dtype),
        vae=models.load_vae(facts, dtype),
        transformer=models.load_transformer(facts, dtype),
        scheduler=scheduler,
    )


def load_adapters(pipeline: Pipeline, adapters: Sequence[tuple[Path, float]]) -> list[str]:
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
    pipeline: Pipeline,
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
        for model in pipeline.components.values():
            if isinstance(model, torch.nn.Module):
                move_to_device(model, device)


def explain_out_of_memory(error: BaseException) -> str:
    """What to turn after the device ran out of memory."""
    return (
        f"out of memory on the device: {str(error).splitlines()[0][:300]}\n       try: --offload stream, then "
        "--offload sequential --vae-tiling on; close other programs on the device"
    )


def help_generate(pipeline: Pipeline, request: Request, *, max_text_length: int = 226) -> None:
    """`generate` on a rank that only has part of the tokens: nothing is decoded."""
    if find_stream(pipeline.transformer) is not None:
        _sample_in_turns(pipeline, request, max_text_length)
        return
    _start_steps(pipeline, request)
    _call_with_texts(pipeline, request, max_text_length, "latent")


def generate(
    pipeline: Pipeline, request: Request, *, max_text_length: int = 226, coder: FrameCoder | None = None
) -> np.ndarray:
    """One video, uint8 RGB [F, H, W, 3], from a whole pipeline; `coder` decodes it, or else the pipeline."""
    if find_stream(pipeline.transformer) is not None:
        latents = _sample_in_turns(pipeline, request, max_text_length)
        return decode_latents(pipeline.vae, latents, pipeline.vae_scaling_factor_image, coder)
    _start_steps(pipeline, request)
    whole = coder is None and request.video is None
    output = _call_with_texts(pipeline, request, max_text_length, "pt" if whole else "latent")
    if whole:
        return _to_uint8(output[0].permute(0, 2, 3, 1))
    device = pipeline._execution_device
    return decode_latents(pipeline.vae, output, pipeline.vae_scaling_factor_image, coder, device=device)


def _call_with_texts(pipeline: Pipeline, request: Request, max_text_length: int, output_type: str) -> torch.Tensor:
    return _call(
        pipeline,
        request,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        max_sequence_length=max_text_length,
        output_type=output_type,
    )


def _sample_in_turns(pipeline: Pipeline, request: Request, max_text_length: int) -> torch.Tensor:
    """Latents, with text encoder and transformer one after the other; each one's blocks leave when it is done."""
    encoder: Any = pipeline.text_encoder
    texts = [
        embed([text], pipeline.tokenizer, encoder, max_text_length)[0]
        for text in (request.prompt, request.negative_prompt)
    ]
    release_blocks(encoder)
    latents = generate_latents(pipeline, request, *texts)
    release_blocks(pipeline.transformer)
    return latents


@torch.no_grad()
def generate_latents(
    pipeline: Pipeline,
    request: Request,
    embeddings: torch.Tensor,
    negative_embeddings: torch.Tensor,
    *,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Sampled latents [1, F, C, H, W], scaled, from embeddings [L, D].

    Needs transformer and scheduler only, and for an image the autoencoder's encoder. `on_step` is called with each
    step's number after it.
    """

    def call(_pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step)
        return {}

    guided = request.guidance_scale > 1.0
    _start_steps(pipeline, request)
    return _call(
        pipeline,
        request,
        prompt_embeds=embeddings[None],
        negative_prompt_embeds=negative_embeddings[None] if guided else None,
        output_type="latent",
        callback_on_step_end=call,
    )


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKLCogVideoX,
    latents: torch.Tensor,
    scaling_factor: float,
    coder: FrameCoder | None = None,
    *,
    device: torch.device | None = None,
) -> np.ndarray:
    """Latents [1, F, C, H, W] to uint8 RGB [F, H, W, 3]; `device`: where an offloaded autoencoder runs."""
    unscaled = latents.to(device or vae.device, vae.dtype).transpose(1, 2) / scaling_factor
    decoded = vae.decode(unscaled).sample if coder is None else coder.decode(unscaled)  # pyright: ignore[reportAttributeAccessIssue]
    video = decoded[0]  # [C, F, H, W]
    return _to_uint8((video.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0))


def _start_steps(pipeline: Pipeline, request: Request) -> None:
    cache = find_step_cache(pipeline.transformer)
    if cache is not None:
        cache.start(request.num_steps)


def _call(pipeline: Any, request: Request, **arguments: Any) -> torch.Tensor:
    """The pipeline's frames [1, F, 3, H, W], or its latents without the padding of version 1.5, as asked for."""
    # On the CPU: the same seed gives the same noise whatever the device.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    arguments |= {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "use_dynamic_cfg": request.dynamic_guidance,
        "generator": generator,
    }
    num_latent_frames = (request.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1
    if request.video is not None:
        arguments["strength"] = request.strength
        latents = noise_video(pipeline, request, generator)
        output = _call_with_latents(pipeline, latents, arguments)
    else:
        if request.image is not None:
            try:
                image = load_image(Path(request.image), request.height, request.width)
            except ClipError as error:
                raise UserError(f"image of {request.prompt!r}: {error}") from None
            arguments["image"] = torch.from_numpy(image).permute(2, 0, 1)[None] / 255.0
        output = pipeline(num_frames=request.num_frames, **arguments).frames
    return output[:, -num_latent_frames:] if arguments["output_type"] == "latent" else output


def _call_with_latents(pipeline: Any, latents: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    # diffusers 0.42.1 takes the number of given latents for a number of frames, and refuses some that are fine.
    factor, pipeline.vae_scale_factor_temporal = pipeline.vae_scale_factor_temporal, 1
    try:
        return pipeline(latents=latents, **arguments).frames
    finally:
        pipeline.vae_scale_factor_temporal = factor


def _load_start(request: Request) -> np.ndarray:
    assert request.video is not None and request.fps is not None
    try:
        return load_clip(
            Path(request.video),
            num_frames=request.num_frames,
            height=request.height,
            width=request.width,
            fps=request.fps,
        )
    except ClipError as error:
        raise UserError(f"--video: {error} (on this command line: --frames)") from None


@torch.no_grad()
def noise_video(pipeline: Any, request: Request, generator: torch.Generator) -> torch.Tensor:
    """A video's latents [1, F, C, H, W] with the noise of the first step that runs, padded as the model needs.

    As the released pipeline does it, with the same draws; in float32, and for version 1.5 at any length.
    """
    device, dtype = pipeline._execution_device, pipeline.vae.dtype
    frames = torch.from_numpy(_load_start(request))
    pixels = (frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).to(device, dtype)
    posterior = pipeline.vae.encode(pixels).latent_dist
    latents = (posterior.sample(generator) * pipeline.vae_scaling_factor_image)[0].float()  # [C, F, H, W]
    latents = pad_front(latents, -latents.shape[1] % (pipeline.transformer.config.patch_size_t or 1))
    latents = latents.transpose(0, 1)[None]
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    pipeline.scheduler.set_timesteps(request.num_inference_steps, device=device)
    timesteps, _ = pipeline.get_timesteps(
        request.num_inference_steps, pipeline.scheduler.timesteps, request.strength, device
    )
    return pipeline.scheduler.add_noise(latents, noise, timesteps[:1]).to(dtype)


def _to_uint8(video: torch.Tensor) -> np.ndarray:
    return (video.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

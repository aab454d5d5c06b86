"""The command line of `scripts/generate.py`."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogtune.acceleration import Offload, Quantization, Switch
from cogtune.adapter import find_adapter_file
from cogtune.cli import CommandParser, parse_adapter
from cogtune.errors import UserError
from cogtune.models import ModelFacts
from cogtune.step_cache import CacheSettings, make_settings
from cogtune.variants import VARIANTS
from cogtune.video import ClipError, describe_fit, read_image_size, read_timeline
from cogtune.video_request import Request


@dataclass(frozen=True)
class GenerationOptions:
    """What the user asked for."""

    model: str
    prompts: list[str]
    seeds: list[int]
    lora: list[tuple[Path, float]]
    output: Path
    negative_prompt: str
    steps: int
    guidance: float
    dynamic_guidance: bool
    sampler: Literal["default", "ddim", "dpm"]
    images: list[Path]
    video: Path | None
    strength: float | None
    frames: int | None
    height: int | None
    width: int | None
    fps: float | None
    allow_unsupported_size: bool
    device: str
    dtype: str
    offload: Offload
    quantize: Quantization
    vae_tiling: Switch
    compile: Switch
    merge: Switch
    cache: CacheSettings | None
    gpus_per_video: int | Literal["auto"]

    @property
    def may_part_guidance(self) -> bool:
        """Whether there are two halves that run in every step."""
        return self.guidance > 1 and (self.cache is None or self.cache.guidance_interval == 1)

    @property
    def num_steps(self) -> int:
        """Sampling steps of all videos together."""
        steps = self.steps if self.strength is None else int(self.steps * self.strength)
        return steps * len(self.prompts) * len(self.seeds)


def parse_generation(description: str, argv: list[str] | None = None) -> GenerationOptions:
    """The options from the command line; raises `UserError` for wrong usage."""
    parser = CommandParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help=f"hub name, pipeline folder, or {', '.join(VARIANTS)}")
    add("--prompt", action="append", default=[], help="what the video shows; may be repeated")
    add("--prompts-file", type=Path, help="a text file with one prompt a line")
    add("--seed", type=int, action="append", default=[], help="may be repeated; default 0")
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="adapter folder or file; may be repeated")
    add("--output", type=Path, required=True, help="an .mp4 file; several videos get -<nn>-<seed> before the ending")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--steps", type=int, default=50, help="sampling steps")
    add("--guidance", type=float, default=6.0, help="classifier-free guidance; 1: none")
    add("--dynamic-guidance", action="store_true", help="guidance that grows along the steps")
    add("--sampler", choices=["default", "ddim", "dpm"], default="default", help="default: the checkpoint's own")
    add("--image", type=Path, action="append", default=[], help="first frame (image-to-video); one, or one a prompt")
    add("--video", type=Path, help="start from this video (text-to-video models): frames by time, cut at the centre")
    add("--strength", type=float, help="with --video: part of the steps that run; default 0.8, 1 keeps nothing of it")
    for name in ("frames", "height", "width"):
        add(f"--{name}", type=int, help="default: the model's own")
    add("--fps", type=float, help="frame rate of the file; default: the model's own")
    add("--allow-unsupported-size", action="store_true", help="sizes that the model card doesn't support")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add(
        "--offload",
        choices=["auto", "none", "stream", "model", "sequential"],
        default="auto",
        help="auto: none where all fits, or else stream: blocks come from host memory just in time; model, sequential: "
        "by diffusers' hooks, slower",
    )
    add(
        "--quantize", choices=["none", "int8", "float8"], default="none", help="float8: faster; int8: smaller (torchao)"
    )
    add(
        "--vae-tiling", choices=["auto", "on", "off"], default="auto", help="by tiles: slower, less memory, faint seams"
    )
    add("--compile", choices=["auto", "on", "off"], default="auto", help="auto: on a GPU, from 50 steps in all on")
    add("--merge", choices=["auto", "on", "off"], default="auto", help="adapters into the weights; auto: on a GPU")
    add("--cache", choices=["none", "first-block", "guidance", "both"], default="none", help="skip work; other videos")
    add("--cache-threshold", type=float, default=0.1, help="first-block: largest change that is skipped")
    add("--cache-max-skipped", type=int, default=3, help="first-block: steps in a row that may be skipped")
    add("--guidance-interval", type=int, default=3, help="guidance: steps between full ones")
    add("--gpus-per-video", default="auto", help="with torchrun: GPUs that share one video; auto: as is fastest")
    given = parser.parse_args(argv)
    prompts = [*given.prompt, *(_read_prompts(given.prompts_file) if given.prompts_file else [])]
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT or --prompts-file FILE")
    if given.steps < 1 or given.guidance < 1:
        raise UserError(f"--steps {given.steps} --guidance {given.guidance:g}: both must be at least 1")
    if given.output.suffix.lower() != ".mp4":
        raise UserError(f"--output {given.output}: must end in .mp4")
    _check_cache(given)
    gpus_per_video = _read_gpus_per_video(given.gpus_per_video, given.offload)
    if len(given.image) not in (0, 1, len(prompts)):
        raise UserError(f"--image: {len(given.image)} for {len(prompts)} prompts; give one for all, or one for each")
    return GenerationOptions(
        model=given.model,
        prompts=prompts,
        seeds=given.seed or [0],
        lora=[parse_adapter(text) for text in given.lora],
        output=given.output,
        negative_prompt=given.negative_prompt,
        steps=given.steps,
        guidance=given.guidance,
        dynamic_guidance=given.dynamic_guidance,
        sampler=given.sampler,
        images=given.image,
        video=given.video,
        strength=0.8 if given.video is not None and given.strength is None else given.strength,
        frames=given.frames,
        height=given.height,
        width=given.width,
        fps=given.fps,
        allow_unsupported_size=given.allow_unsupported_size,
        device=given.device,
        dtype=given.dtype,
        offload=given.offload,
        quantize=given.quantize,
        vae_tiling=given.vae_tiling,
        compile=given.compile,
        merge=given.merge,
        cache=make_settings(
            given.cache,
            threshold=given.cache_threshold,
            guidance_interval=given.guidance_interval,
            max_skipped=given.cache_max_skipped,
        ),
        gpus_per_video=gpus_per_video,
    )


def _read_gpus_per_video(text: str, offload: str) -> int | Literal["auto"]:
    if text == "auto":
        return 1 if offload == "sequential" else "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--gpus-per-video {text}: expected a number of GPUs, or auto")
    if int(text) > 1 and offload == "sequential":
        raise UserError(
            f"--gpus-per-video {text}: can't go with --offload sequential, which moves single layers; use stream"
        )
    return int(text)


def _check_cache(given: argparse.Namespace) -> None:
    if given.cache_threshold <= 0:
        raise UserError(f"--cache-threshold {given.cache_threshold:g}: must be above 0; --cache none skips nothing")
    if given.guidance_interval < 2:
        raise UserError(
            f"--guidance-interval {given.guidance_interval}: must be at least 2; --cache none skips nothing"
        )
    if given.cache in ("guidance", "both") and given.guidance == 1:
        raise UserError(f"--cache {given.cache}: there is no guidance to skip with --guidance 1; use first-block")
    if given.cache != "none" and given.offload == "sequential":
        raise UserError(f"--cache {given.cache}: can't go with --offload sequential; use --offload model")
    if given.offload == "stream" and given.quantize == "int8":
        raise UserError("--offload stream: can't go with --quantize int8; leave it out, or use float8")
    if given.merge == "off" and given.quantize != "none":
        raise UserError(f"--merge off: --quantize {given.quantize} needs merged adapters; leave --merge out")


def check_files(options: GenerationOptions) -> None:
    """Raises `UserError` for a missing adapter, an unreadable image or video, or an unwritable output folder."""
    for path, _ in options.lora:
        find_adapter_file(path)
    try:
        for image in options.images:
            read_image_size(image)
        if options.video is not None:
            read_timeline(options.video)
    except ClipError as error:
        raise UserError(f"--{'image' if options.video is None else 'video'}: {error}") from None
    folder = options.output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output}: its folder can't be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {options.output}: its folder can't be written; choose another")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def make_requests(options: GenerationOptions, facts: ModelFacts) -> list[Request]:
    """One request for each prompt and seed."""
    return [
        Request(
            prompt,
            facts.num_frames if options.frames is None else options.frames,
            facts.height if options.height is None else options.height,
            facts.width if options.width is None else options.width,
            seed,
            options.negative_prompt,
            options.steps,
            options.guidance,
            options.dynamic_guidance,
            image=str(options.images[number % len(options.images)]) if options.images else None,
            video=None if options.video is None else str(options.video),
            fps=None if options.video is None else facts.fps,
            strength=options.strength,
        )
        for number, prompt in enumerate(options.prompts)
        for seed in options.seeds
    ]


def describe_inputs(requests: Sequence[Request]) -> list[str]:
    """A line for each image or video of another shape or size than the video to be made."""
    lines = {}
    for request in requests:
        if request.image is not None:
            fit = describe_fit(read_image_size(Path(request.image)), request.height, request.width, most_cut=0.01)
            lines[request.image] = fit
        elif request.video is not None:
            timeline = read_timeline(Path(request.video))
            fit = describe_fit((timeline.width, timeline.height), request.height, request.width, most_cut=0.01)
            lines[request.video] = fit
    return [f"{name}: {fit}" for name, fit in lines.items() if fit]


def output_path(options: GenerationOptions, number: int, seed: int) -> Path:
    """The file of the n-th request."""
    if len(options.prompts) * len(options.seeds) == 1:
        return options.output
    prompt = number // len(options.seeds)
    return options.output.with_name(f"{options.output.stem}-{prompt:02d}-{seed}{options.output.suffix}")

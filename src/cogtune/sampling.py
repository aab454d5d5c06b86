"""A pipeline set up as the options of `scripts/generate.py` say: loaded, merged, placed, compiled, shared by ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cogtune.acceleration import (
    accelerate,
    choose_sampling_backend,
    decide_compile,
    decide_offload,
    decide_tiling,
    merge_adapters,
    quantize_transformer,
)
from cogtune.errors import UserError
from cogtune.generation import (
    Pipeline,
    explain_out_of_memory,
    generate,
    help_generate,
    load_adapters,
    load_pipeline,
    place_pipeline,
)
from cogtune.generation_options import GenerationOptions
from cogtune.head_start import keep_kernels
from cogtune.joint_blocks import find_step_cache
from cogtune.models import ModelFacts, choose_dtype
from cogtune.parallel.videos import VideoRanks, share_video
from cogtune.vae.frame_coder import FrameCoder
from cogtune.video_request import Request


@dataclass(frozen=True)
class Sampling:
    """Makes videos; on ranks that don't lead a team it helps to."""

    pipeline: Pipeline
    coder: FrameCoder | None
    max_text_length: int
    ranks: VideoRanks

    def make(self, request: Request) -> np.ndarray | None:
        """Frames uint8 RGB [F, H, W, 3], or None on a rank that helped; raises `UserError` where memory ends."""
        try:
            if self.ranks.leads:
                return generate(self.pipeline, request, max_text_length=self.max_text_length, coder=self.coder)
            return help_generate(self.pipeline, request, max_text_length=self.max_text_length)
        except torch.OutOfMemoryError as error:
            raise UserError(explain_out_of_memory(error)) from error

    def describe_skipped(self) -> str:
        """What a step cache left out of the last video, in brackets."""
        cache = find_step_cache(self.pipeline.transformer)
        return "" if cache is None else f"  ({cache.describe()})"


def set_up(
    options: GenerationOptions,
    facts: ModelFacts,
    requests: Sequence[Request],
    ranks: VideoRanks,
    device: torch.device,
) -> Sampling:
    """Loads everything onto this rank's device for requests of one size; the first rank says what adapters touch."""
    keep_kernels()
    num_steps = options.num_steps // ranks.teams.num_teams
    compiled = decide_compile(options.compile, device=device, offload=options.offload, num_steps=num_steps)
    dtype = choose_dtype(options.dtype, facts, device)
    pipeline = load_pipeline(facts, dtype=dtype, sampler=options.sampler, from_video=options.video is not None)
    lines = load_adapters(pipeline, options.lora)
    if ranks.teams.rank == 0:
        for line in lines:
            print(line)
    pipeline.set_progress_bar_config(disable=not ranks.leads)
    if options.merge == "on" or options.quantize != "none" or (options.merge == "auto" and device.type == "cuda"):
        merge_adapters(pipeline)
    first = requests[0]
    tokens, pixels = facts.num_tokens(first.num_frames, first.height, first.width), first.height * first.width
    offload = decide_offload(options.offload, pipeline, device, tokens)
    prepare = quantize_transformer(pipeline.transformer, options.quantize, device, offload=offload)
    tiling = decide_tiling(options.vae_tiling, device, offload, pixels=pixels)
    place_pipeline(pipeline, device, offload=offload, vae_tiling=tiling, tokens=tokens, prepare=prepare)
    coder = accelerate(
        pipeline,
        compiled=compiled,
        cache=options.cache,
        coded=device.type == "cuda" and offload in ("none", "stream") and not tiling,
        backend=choose_sampling_backend(facts, tokens, dtype, device),
        pixels=pixels,
        shared=share_video(pipeline.transformer, ranks),
    )
    return Sampling(pipeline, coder, facts.max_text_length, ranks)

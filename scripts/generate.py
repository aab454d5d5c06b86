"""Generates videos with CogVideoX and trained adapters.

    python scripts/generate.py --model cogvideox-5b --lora runs/my-lora/final --prompt "..." --seed 1 --output out.mp4

Image-to-video models: --image first.png. From a video (text-to-video models): --video in.mp4 --strength 0.8.
Several prompts, seeds or both give several files: out-00-1.mp4, out-00-2.mp4, ...
"""

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
from cogtune.errors import UserError, run_command
from cogtune.generation import explain_out_of_memory, generate, load_adapters, load_pipeline, place_pipeline
from cogtune.generation_options import check_files, describe_inputs, make_requests, output_path, parse_generation
from cogtune.joint_blocks import find_step_cache
from cogtune.machine import avoid_fragments
from cogtune.models import choose_device, choose_dtype, find_folder, read_facts
from cogtune.video import write_video
from cogtune.video_request import check_request


def main() -> None:
    """Check, load, generate, write."""
    options = parse_generation(__doc__ or "")
    check_files(options)
    device = choose_device(options.device)
    avoid_fragments(device)
    facts = read_facts(find_folder(options.model))
    requests = make_requests(options, facts)
    for request in requests:
        check_request(request, facts, allow_unsupported_size=options.allow_unsupported_size)
    compiled = decide_compile(options.compile, device=device, offload=options.offload, num_steps=options.num_steps)

    dtype = choose_dtype(options.dtype, facts, device)
    for line in describe_inputs(requests):
        print(line)
    pipeline = load_pipeline(facts, dtype=dtype, sampler=options.sampler, from_video=options.video is not None)
    for line in load_adapters(pipeline, options.lora):
        print(line)
    if options.merge == "on" or options.quantize != "none" or (options.merge == "auto" and device.type == "cuda"):
        merge_adapters(pipeline)
    first = requests[0]
    tokens = facts.num_tokens(first.num_frames, first.height, first.width)
    offload = decide_offload(options.offload, pipeline, device, tokens)
    prepare = quantize_transformer(pipeline.transformer, options.quantize, device, offload=offload)
    pixels = first.height * first.width
    tiling = decide_tiling(options.vae_tiling, device, offload, pixels=pixels)
    place_pipeline(pipeline, device, offload=offload, vae_tiling=tiling, tokens=tokens, prepare=prepare)
    coded = device.type == "cuda" and offload in ("none", "stream") and not tiling
    backend = choose_sampling_backend(facts, tokens, dtype, device)
    coder = accelerate(pipeline, compiled=compiled, cache=options.cache, coded=coded, backend=backend, pixels=pixels)
    cache = find_step_cache(pipeline.transformer)
    for number, request in enumerate(requests):
        try:
            frames = generate(pipeline, request, max_text_length=facts.max_text_length, coder=coder)
        except torch.OutOfMemoryError as error:
            raise UserError(explain_out_of_memory(error)) from error
        path = output_path(options, number, request.seed)
        write_video(path, frames, options.fps or facts.fps)
        print(path if cache is None else f"{path}  ({cache.describe()})")


if __name__ == "__main__":
    run_command(main)

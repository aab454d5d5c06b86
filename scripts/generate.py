"""Generates videos with CogVideoX and trained adapters.

    python scripts/generate.py --model cogvideox-5b --lora runs/my-lora/final --prompt "..." --seed 1 --output out.mp4
    torchrun --nproc_per_node 4 scripts/generate.py ...    the same on 4 GPUs, one video or many

Image-to-video models: --image first.png. From a video (text-to-video models): --video in.mp4 --strength 0.8.
Several prompts, seeds or both give several files: out-00-1.mp4, out-00-2.mp4, ...
"""

from cogtune.head_start import read_weights_ahead

read_weights_ahead(
    ("text_encoder", "transformer", "vae"), option="--model"
)  # while the imports below take their seconds

from cogtune.errors import run_command
from cogtune.generation_options import check_files, describe_inputs, make_requests, output_path, parse_generation
from cogtune.launch import read_launch
from cogtune.machine import avoid_fragments
from cogtune.models import choose_device, find_folder, read_facts
from cogtune.parallel.videos import plan_ranks, started_ranks
from cogtune.sampling import set_up
from cogtune.video import write_video
from cogtune.video_request import check_request


def main() -> None:
    """Check, connect the processes if there are several, load, generate, write."""
    options = parse_generation(__doc__ or "")
    check_files(options)
    device = choose_device(options.device)
    avoid_fragments(device)
    facts = read_facts(find_folder(options.model))
    requests = make_requests(options, facts)
    for request in requests:
        check_request(request, facts, allow_unsupported_size=options.allow_unsupported_size)
    ranks = plan_ranks(
        options.gpus_per_video, num_videos=len(requests), guided=options.may_part_guidance, launch=read_launch()
    )
    if ranks.teams.rank == 0:
        for line in [*describe_inputs(requests), *ranks.describe()]:
            print(line)
    with started_ranks(device, ranks.teams.num_ranks) as own_device:
        sampling = set_up(options, facts, requests, ranks, own_device)
        for number, request in list(enumerate(requests))[ranks.teams.team :: ranks.teams.num_teams]:
            frames = sampling.make(request)
            if frames is not None:
                path = output_path(options, number, request.seed)
                write_video(path, frames, options.fps or facts.fps)
                print(f"{path}{sampling.describe_skipped()}", flush=True)


if __name__ == "__main__":
    run_command(main)

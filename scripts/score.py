"""Measures how often a model of the world of shapes shows what it is asked for, by the judge.

    python scripts/score.py --model tiny --prompts base --count 300 --seeds 0 1 2
    python scripts/score.py --model tiny --lora runs/demo/run/final --prompts concept

base: prompts of combinations that the base model never saw; concept: the demo's trigger word, in unseen wordings.
"""

import argparse
import json
import time
from pathlib import Path

from cogtune.cli import CommandParser
from cogtune.errors import run_command
from cogtune.models import choose_device
from cogtune.shapes.captions import base_prompts, concept_prompts
from cogtune.shapes.scoring import (
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    default_batch_size,
    load_scored_pipeline,
    score_prompts,
)
from cogtune.shapes.statistics import describe_spread


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="pipeline folder or short name (default: tiny)")
    parser.add_argument("--lora", type=Path, help="adapter: a run's final/ folder or the file")
    parser.add_argument("--prompts", choices=("base", "concept"), default="base")
    parser.add_argument("--count", type=int, help="how many prompts (default: 300 of base, all 60 of concept)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one round of videos for each")
    parser.add_argument("--steps", type=int, default=NUM_INFERENCE_STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--batch-size", type=int, help="videos at once (default: 1 on a CPU, 50 on a GPU)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--json", type=Path, help="write the shares here as well")
    return parser.parse_args()


def main() -> None:
    """Loads the model once and scores it on every seed."""
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    pipeline = load_scored_pipeline(arguments.model, arguments.lora, device)
    if arguments.prompts == "base":
        prompts = base_prompts(arguments.count or 300, seed=0)
    else:
        prompts = concept_prompts()[: arguments.count]
    rows = []
    for seed in arguments.seeds:
        started = time.perf_counter()
        scores = score_prompts(
            pipeline,
            prompts,
            seed=seed,
            batch_size=arguments.batch_size or default_batch_size(device),
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
        )
        rows.append({"seed": seed, **scores.to_plain()})
        seconds = (time.perf_counter() - started) / scores.num_videos
        print(f"seed {seed}: {scores.describe()}; {seconds:.2f} s a video", flush=True)
        print("   " + "; ".join(f"{count} x {reason}" for reason, count in scores.reasons.most_common(4)))
    print(f"right: {describe_spread([row['right'] for row in rows])}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments), "rows": rows}, default=str, indent=1))


if __name__ == "__main__":
    run_command(main)

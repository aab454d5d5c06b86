"""The whole way from clips to a video on any computer: a LoRA that learns a new word, in a few minutes.

    make demo            (or: python scripts/demo.py)

The base model inside the package draws six shapes in motion. Twenty-four clips show it what a "zibber" is: an hourglass
that moves down and to the right; clips of the base's own world beside them keep it from forgetting. The demo trains an
adapter on them as `configs/demo.yaml` says, and a judge that measures pixels counts how often both show what
their prompts ask for.
"""

import argparse
import time
from pathlib import Path

from cogtune.cli import CommandParser
from cogtune.errors import UserError, run_command
from cogtune.models import choose_device
from cogtune.shapes.demonstration import count_scorers, format_rows, run_step, score_adapter, training_precision
from cogtune.shapes.scoring import GUIDANCE_SCALE, NUM_INFERENCE_STEPS

FOLDER, CONFIG = Path("runs/demo"), "configs/demo.yaml"
WEIGHT = 12  # showings of the concept's clips for one of the base's own world
PROMPT = "a blue zibber on a white background"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="videos of each kind for the table (default: 6)")
    parser.add_argument("--ordinary", type=int, default=96, help="clips against forgetting (default: 96)")
    parser.add_argument("--steps", type=int, help="training steps, to try the way only (default: the config's)")
    return parser.parse_args()


def main() -> None:
    """Clips, then the commands that a user runs, then the judge."""
    arguments = parse_arguments()
    if FOLDER.exists():
        raise UserError(f"{FOLDER} exists; look at it, then delete it to run the demo again")
    started = time.monotonic()
    run_step(
        "data/make_shapes.py", "--out", str(FOLDER / "clips"), "--split", "concept",
        "--ordinary", str(arguments.ordinary), "--weight", str(WEIGHT),
    )  # fmt: skip
    run_step("data/make_shapes.py", "--out", str(FOLDER / "held_out"), "--split", "concept_held_out", "--count", "6")
    run_step("data/check.py", "--config", CONFIG)
    precision = f"--model.dtype={training_precision()}"
    run_step("data/prepare.py", "--config", CONFIG, precision)
    steps = [f"--train.max_steps={arguments.steps}"] if arguments.steps else []
    run_step("train/lora.py", "--config", CONFIG, precision, *steps)
    final, video = FOLDER / "run/final", FOLDER / "out.mp4"
    run_step(
        "scripts/generate.py", "--model", "tiny", "--lora", str(final), "--prompt", PROMPT, "--output", str(video),
        "--steps", str(NUM_INFERENCE_STEPS), "--guidance", str(GUIDANCE_SCALE),
    )  # fmt: skip

    print(f"\nscoring {4 * arguments.prompts} videos of prompts that training never saw", flush=True)
    device = choose_device("auto")
    rows = score_adapter("tiny", final, device, num_prompts=arguments.prompts, num_processes=count_scorers(device))
    print(f"\n{format_rows(rows)}\n\ndone in {time.monotonic() - started:.0f} s")
    print(f"curves, clips and videos side by side: {FOLDER}/run/report.html; one video more: {video}")


if __name__ == "__main__":
    run_command(main)

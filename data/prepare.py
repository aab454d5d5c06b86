"""Fills the cache: clips through the VAE, captions through T5. Training does the same where entries are missing.

    accelerate launch data/prepare.py --config configs/lora/cogvideox-5b.yaml --data.manifest=clips/

Several processes share the work; a killed run goes on where it stopped.
"""

from cogtune.cli import parse_run
from cogtune.data_plan import make_data_plan
from cogtune.errors import run_command
from cogtune.preparation import encode_data
from cogtune.run import start_accelerator


def main() -> None:
    """Plan, encode."""
    invocation = parse_run(__doc__ or "")
    plan = make_data_plan(invocation.config)
    if invocation.dry_run:
        print(
            f"{len(plan.train_clips)} + {len(plan.validation_clips)} clips for {plan.facts.folder}\n"
            f"format      {plan.describe_formats()}"
        )
        return
    accelerator = start_accelerator(plan)
    encode_data(plan, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)

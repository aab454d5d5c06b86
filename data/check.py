"""Reads every clip and caption of a data set, prints what is usable, and changes nothing.

    python data/check.py --config configs/lora/cogvideox-5b.yaml --data.manifest=clips/

Exits with 2 where nothing is usable.
"""

from cogtune.cli import parse_run
from cogtune.data_plan import make_data_plan
from cogtune.errors import UserError, run_command
from cogtune.inspection import inspect_clips


def main() -> None:
    """Plan, read, report."""
    config = parse_run(__doc__ or "").config
    plan = make_data_plan(config)
    result = inspect_clips(
        [*plan.train_clips, *plan.validation_clips],
        plan.facts,
        plan.clip_format,
        num_workers=max(1, plan.num_workers),
        timeout_seconds=config.data.decode_timeout_seconds,
    )
    print(result.describe())
    if not result.usable:
        raise UserError(f"data.manifest={config.data.manifest}: no clip is usable; the findings above say why")


if __name__ == "__main__":
    run_command(main)

"""Trains and scores a list of configs over several seeds on the world of shapes, and writes a table.

    python scripts/compare.py --runs configs/compare/lora.yaml --out runs/compare --seeds 0 1 2
    python scripts/compare.py --runs configs/compare/lora.yaml --out runs/compare --jobs 8 --minutes 4     one GPU

Start it again to go on: finished runs are not made again. --out gets results.json, table.md, and each run's folder.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cogtune.cli import CommandParser
from cogtune.errors import UserError, run_command
from cogtune.shapes.comparison import (
    Scoring,
    describe_device,
    draw_clips,
    end_with_command,
    limit_threads,
    perform_all,
    read_jobs,
)
from cogtune.shapes.scoring import NUM_INFERENCE_STEPS
from cogtune.shapes.tables import make_table


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="YAML file: config, set, runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison; given again, it goes on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs only")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--concept-prompts", type=int, default=60, help="of 60 (default: 60)")
    parser.add_argument("--base-prompts", type=int, default=100, help="of 600 (default: 100)")
    parser.add_argument("--steps", type=int, default=NUM_INFERENCE_STEPS, help="sampling steps")
    parser.add_argument("--batch-size", type=int, help="videos at once (default: 1 on a CPU, 50 on a GPU)")
    return parser.parse_args()


def main() -> None:
    """Clips, then every job in a pool of processes, then the table."""
    arguments = parse_arguments()
    for name in ("jobs", "concept_prompts", "base_prompts", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    jobs = read_jobs(arguments.runs, arguments.out, arguments.seeds, arguments.only)
    scoring = Scoring(arguments.concept_prompts, arguments.base_prompts, arguments.steps, arguments.batch_size)
    draw_clips(arguments.out, jobs)
    # For the pool's processes, which import torch and transformers themselves.
    os.environ["OMP_NUM_THREADS"] = limit_threads(arguments.jobs, os.cpu_count() or 1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=spawn, initializer=end_with_command) as pool:
        results = perform_all(arguments.out, jobs, scoring, pool, num_workers=arguments.jobs, minutes=arguments.minutes)
    conditions = {"device": describe_device(), "jobs": arguments.jobs, **vars(scoring)}
    (arguments.out / "results.json").write_text(json.dumps({"conditions": conditions, "results": results}, indent=1))
    table = make_table(results)
    (arguments.out / "table.md").write_text(table)
    print(f"\n{', '.join(f'{name} {value}' for name, value in conditions.items())}\n\n{table}")


if __name__ == "__main__":
    run_command(main)

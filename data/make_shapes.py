"""Writes captioned clips of the embedded model's world: mp4 files, metadata.jsonl and truth.jsonl.

    python data/make_shapes.py --out data/shapes --split base --count 2000 --seed 0
    python data/make_shapes.py --out data/zibber --split concept

Splits: `base` (what the base model is trained on), `held_out` (combinations it never saw), `concept` (24 clips of the
trigger word's thing), `concept_held_out` (the same thing in unseen colours, backgrounds and wordings).
"""

import argparse
import os
from pathlib import Path

from cogtune.errors import run_command
from cogtune.shapes.world import SPLITS
from cogtune.shapes.writing import write_clips

CONCEPT_CLIPS = 24


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--split", choices=SPLITS, default="base", help="which clips (default: base)")
    parser.add_argument("--count", type=int, default=CONCEPT_CLIPS, help=f"how many clips (default: {CONCEPT_CLIPS})")
    parser.add_argument("--seed", type=int, default=0, help="other clips for every seed (default: 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--ordinary", type=int, default=0, help="clips of `base` beside them, against forgetting")
    parser.add_argument("--weight", type=float, default=1.0, help="showings of the split's clips for one of those")
    arguments = parser.parse_args()
    write_clips(
        arguments.out,
        arguments.split,
        count=arguments.count,
        seed=arguments.seed,
        workers=arguments.workers,
        num_ordinary=arguments.ordinary,
        weight=arguments.weight,
    )
    ordinary = f" and {arguments.ordinary} of 'base'" if arguments.ordinary else ""
    written = f"{arguments.count} clips of '{arguments.split}'{ordinary}"
    print(f"{written} in {arguments.out}: metadata.jsonl, truth.jsonl, clips/")


if __name__ == "__main__":
    run_command(main)

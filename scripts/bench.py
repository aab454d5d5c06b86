"""Measures training, generation, preparation, attention, memory and checkpoints on this machine, with random weights.

    python scripts/bench.py train --model cogvideox-5b --baseline diffusers --json train.json
    python scripts/bench.py attention
    python scripts/bench.py generate ...
    python scripts/bench.py prepare ...
    torchrun --nproc_per_node 2 scripts/bench.py checkpoint
    python scripts/bench.py memory --caps 24,16,12,8,6 --job lora
    python scripts/bench.py scale --gpus 2
    python scripts/bench.py context --gpus 1,2,4

`python scripts/bench.py train --help` lists the options; docs/benchmarks.md has the results.
"""

import importlib
import sys

from cogtune.cli import CommandParser
from cogtune.errors import UserError, run_command

SUBJECTS = {
    "train": "training",
    "attention": "attention",
    "generate": "generation",
    "prepare": "preparation",
    "memory": "memory",
    "scale": "scale",
    "checkpoint": "checkpoint",
    "context": "context",
}


def main() -> None:
    """Measure one subject and print its summary."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if wanted in ("-h", "--help"):
        print(__doc__)
        return
    if wanted not in SUBJECTS:
        raise UserError(f"bench.py {wanted}: expected one of {', '.join(SUBJECTS)}")
    subject = importlib.import_module(f"cogtune.benchmark.{SUBJECTS[wanted]}")
    parser = CommandParser(prog=f"bench.py {wanted}", description=subject.__doc__)
    subject.add_arguments(parser)
    print(subject.describe(subject.run(parser.parse_args(sys.argv[2:]))))


if __name__ == "__main__":
    run_command(main)

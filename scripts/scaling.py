"""Estimates samples a second, storage rates and checkpoint times on 8 to 512 GPUs from one measured step.

    python scripts/scaling.py --step-seconds 2.05
    python scripts/scaling.py --model cogvideox-2b --job sft --step-seconds 0.9 --gpus 8,64 --between 160

On paper: nothing is measured. docs/scaling.md has the formulas; `--help` lists the assumptions, which can all be set.
"""

from cogtune.cli import CommandParser
from cogtune.cluster.scaling_tables import add_arguments, make_tables
from cogtune.errors import run_command


def main() -> None:
    """Print the tables."""
    parser = CommandParser(prog="scaling.py", description=__doc__)
    add_arguments(parser)
    print(make_tables(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)

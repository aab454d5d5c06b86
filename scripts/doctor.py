"""Checks the nodes of a job before training: versions, GPUs, network, disks, memory, clocks; names what is bad.

    python scripts/doctor.py                                                      this machine
    torchrun --nproc-per-node=8 scripts/doctor.py --config configs/lora/cogvideox-5b.yaml --manifest clips/
    SCRIPT=scripts/doctor.py sbatch --nodes=4 scripts/slurm/many_nodes.sbatch     all nodes of a job
    srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 python scripts/doctor.py

Exit code 0: nothing found; 1: something to look at; 2: the check could not be done, or a rank didn't answer. Launchers
turn 2 into 1. docs/cluster.md explains the output.
"""

import os
import sys

from cogtune.cli import CommandParser
from cogtune.cluster.doctor import NO_ANSWER, add_arguments, examine
from cogtune.errors import run_command


def main() -> None:
    """Check, print, exit."""
    parser = CommandParser(prog="doctor.py", description=__doc__)
    add_arguments(parser)
    code = examine(parser.parse_args())
    if code == NO_ANSWER:  # a rank is stuck, perhaps this process's own network threads with it
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)

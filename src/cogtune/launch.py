"""What the launcher (torchrun, `accelerate launch`) says of this process: variables that are read here alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cogtune.errors import UserError


@dataclass(frozen=True)
class Launch:
    """A process among those that were started together; alone without a launcher."""

    rank: int = 0
    num_processes: int = 1
    local_rank: int | None = None
    """Its number on its node; None where the launcher doesn't say."""
    num_local: int = 1
    """Processes on its node; all, where the launcher doesn't say."""
    was_told: bool = False
    """Whether a launcher gave rank and number of processes."""


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """From the given variables, by default the process's own; raises `UserError` for one that is no number, or a rank
    outside of the processes."""
    variables = os.environ if environment is None else environment

    def read(name: str) -> int | None:
        value = variables.get(name)
        if value is None:
            return None
        if not value.isdecimal():
            raise UserError(f"{name}={value}: must be a number; start with torchrun, accelerate launch or srun")
        return int(value)

    rank, num_processes, local_rank = read("RANK"), read("WORLD_SIZE"), read("LOCAL_RANK")
    count = 1 if num_processes is None else num_processes
    told = rank is not None and num_processes is not None
    if count < 1 or (told and (rank or 0) >= count):
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={count}: there is no such process; start with torchrun, accelerate launch or "
            "srun"
        )
    num_local = read("LOCAL_WORLD_SIZE")
    return Launch(rank or 0, count, local_rank, count if num_local is None else num_local, told)

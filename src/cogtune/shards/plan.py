"""Whether checkpoints are written beside training: decided before weights load, from the memory that is free."""

from cogtune.config import CheckpointSettings
from cogtune.errors import UserError
from cogtune.ladder import HOST_MARGIN
from cogtune.memory import EIGHT_BIT_STATE_BYTES

_GB = 1e9


def count_saved_bytes(num_trained: int, *, eight_bit: bool, has_ema: bool) -> int:
    """Of a checkpoint, all processes together: float32 weights and two moments, or bfloat16 with 8-bit moments."""
    return int(num_trained * ((2 + EIGHT_BIT_STATE_BYTES if eight_bit else 12) + (4 if has_ema else 0)))


def decide_asynchronous(
    settings: CheckpointSettings, *, num_bytes: int, other_bytes: int, free_host: int | None
) -> bool:
    """`num_bytes`: what a process saves; `other_bytes`: what it has planned on the host anyway.

    Raises `UserError` where it is asked for and doesn't fit.
    """
    fits = free_host is None or num_bytes + other_bytes <= HOST_MARGIN * free_host
    if settings.asynchronous == "on" and not fits:
        raise UserError(
            f"checkpoint.asynchronous=on: takes {num_bytes / _GB:.1f} GB of host memory for each process beside "
            f"{other_bytes / _GB:.1f} GB planned, and {(free_host or 0) / _GB:.1f} GB are free; set it to auto or off"
        )
    return settings.asynchronous != "off" and fits

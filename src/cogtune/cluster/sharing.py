"""Which ranks see the same folder: output folders must be one for all, caches may be one for each node."""

import secrets
import socket
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from cogtune.errors import UserError


def check_shared_folder(folder: Path, steps: tuple[int, ...]) -> None:
    """Raises `UserError` where ranks found different checkpoints: they would train from different weights."""
    found = sorted(set(gather_object([(socket.gethostname(), steps)])), key=str)
    if len({own for _, own in found}) > 1:
        listed = ", ".join(f"{host}: {f'steps {list(own)}' if own else 'none'}" for host, own in found[:8])
        raise UserError(
            f"output_dir={folder}: the nodes find different checkpoints there ({listed}); put it on a file system that "
            "all nodes share"
        )


def find_companions(folder: Path) -> list[int]:
    """The ranks, this one included, that see this rank's files in the folder; all ranks have to call it.

    Each looks for names that it never asked for before, so no cache of a network file system can answer.
    """
    state = PartialState()
    told = [secrets.token_hex(8)]
    broadcast_object_list(told)
    mark = folder / f".seen-{told[0]}-{state.process_index}"
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        state.wait_for_everyone()
        seen = [rank for rank in range(state.num_processes) if (folder / f".seen-{told[0]}-{rank}").exists()]
        state.wait_for_everyone()
    finally:
        mark.unlink(missing_ok=True)
    return seen

"""Accelerate's `Accelerator` whose ranks watch each other: one that is lost, hangs or fails ends all at once."""

import json
import os
import secrets
import socket
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed import PrefixStore, TCPStore

from cogtune.cluster.hub import Hub
from cogtune.cluster.watch import Watch, connect
from cogtune.errors import on_failure
from cogtune.launch import read_launch

_BACKSTOP = timedelta(minutes=5)
_NEVER = timedelta(days=1)
_new_store: TCPStore | None = None


class WatchedAccelerator(Accelerator):
    """With one process, a plain `Accelerator`."""

    watch: Watch | None = None

    def __init__(
        self, *, timeout_minutes: float | None, kwargs_handlers: list[Any] | None = None, **options: Any
    ) -> None:
        """`timeout_minutes`: how long all ranks may stand still; None: as long as they like."""
        # Collectives give up later than the watch does, so that its message is what shows.
        leave_old_store()
        limit = _NEVER if timeout_minutes is None else timedelta(minutes=timeout_minutes) + _BACKSTOP
        super().__init__(kwargs_handlers=[*(kwargs_handlers or []), InitProcessGroupKwargs(timeout=limit)], **options)
        if self.num_processes > 1:
            self.watch = join_watch(None if timeout_minutes is None else 60 * timeout_minutes)
            on_failure(self.watch.fail)

    def wait_for_everyone(self) -> None:
        """However long the others work: what waits is no collective, which would have a time limit."""
        if self.watch is not None:
            self.watch.meet()
        super().wait_for_everyone()

    def end_training(self) -> None:
        """Ends trackers, process group and watch."""
        super().end_training()
        if self.watch is not None:
            self.watch.close()
            on_failure(None)


def leave_old_store() -> None:
    """After a restart by torchrun: lets the ranks meet in a new store.

    torchrun 2.13 gives them the store of those before, with their addresses in it; some would connect to the dead.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    global _new_store  # it lives as long as the process
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    old = PrefixStore(f"cogtune/{attempt}", TCPStore(address, port, is_master=False))
    if read_launch().rank == 0:
        with socket.create_connection((address, port)) as route:
            here = route.getsockname()[0]  # this node as the others of the job reach it
        _new_store = TCPStore(here, 0, is_master=True, wait_for_workers=False)
        old.set("store", json.dumps([here, _new_store.port]))
    address, port = json.loads(old.get("store"))
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def join_watch(timeout_seconds: float | None) -> Watch:
    """Starts the hub on rank 0 and connects every rank to it; needs a process group."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    told: list[Any] = [None]
    if rank == 0:
        token = secrets.token_hex(16)
        hub = Hub(world_size, token, timeout_seconds=timeout_seconds)
        hub.start()
        # Where rank 0's store answers comes first: every rank has been there.
        names = [os.environ.get("MASTER_ADDR"), socket.gethostname(), socket.getfqdn()]
        told = [(token, hub.port, list(dict.fromkeys(name for name in names if name)))]
    torch.distributed.broadcast_object_list(told)
    token, port, addresses = told[0]
    watch = Watch(
        connect(addresses, port),
        token,
        rank=rank,
        host=socket.gethostname(),
        speaks=rank == 1 or (rank > 0 and read_launch().local_rank == 0),
        beat_seconds=max(1.0, world_size / 100),
    )
    watch.start()
    return watch

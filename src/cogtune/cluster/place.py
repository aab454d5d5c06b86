"""Which process of a job this is, by what torchrun, `accelerate launch` or srun say; answers under a time limit."""

import json
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, TCPStore

from cogtune.errors import UserError
from cogtune.launch import read_launch

_SLURM_PORT = 21_300  # plus what the job's number gives, where nobody says


@dataclass(frozen=True)
class Place:
    """A process among the processes of a job."""

    rank: int
    world_size: int
    local_rank: int
    group: int
    """The launcher's number of the node."""
    address: str
    port: int
    hosts_store: bool
    """Whether rank 0 has to host the store; torchrun does it itself."""


def find_place(environment: dict[str, str]) -> Place:
    """Reads the launcher's variables; alone where there are none. Raises `UserError` where they don't fit."""
    get = environment.get
    launch = read_launch(environment)
    if launch.was_told:
        try:
            return Place(
                rank=launch.rank,
                world_size=launch.num_processes,
                local_rank=launch.local_rank or 0,
                group=int(get("GROUP_RANK", "0")),
                address=environment["MASTER_ADDR"],
                port=int(environment["MASTER_PORT"]),
                hosts_store=get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                f"RANK is set, but {error} is missing or no number; start with torchrun, accelerate launch or srun"
            ) from None
    if int(get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_NTASKS"]),
            local_rank=int(get("SLURM_LOCALID", "0")),
            group=int(get("SLURM_NODEID", "0")),
            address=get("MASTER_ADDR") or _first_host(environment["SLURM_JOB_NODELIST"]),
            port=int(get("MASTER_PORT", _SLURM_PORT + int(get("SLURM_JOB_ID", "0")) % 10_000)),
            hosts_store=True,
        )
    return Place(0, 1, 0, 0, "localhost", 0, hosts_store=True)


def _first_host(node_list: str) -> str:
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"scontrol can't say which nodes {node_list!r} are ({error}); set MASTER_ADDR") from None


class RoundTable:
    """Answers of all ranks, each under a time limit; whoever doesn't answer is None in the list."""

    def __init__(self, place: Place, *, seconds: float) -> None:
        self.place, self._seconds = place, seconds
        self.clock_seconds = 0.0
        """How far this rank's clock was ahead of rank 0's when it got the last answers, give or take milliseconds."""
        self.store: TCPStore | None = None
        if place.world_size == 1:
            return
        try:
            self.store = TCPStore(
                place.address,
                place.port,
                is_master=place.hosts_store and place.rank == 0,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except (DistStoreError, RuntimeError) as error:
            raise UserError(
                f"{socket.gethostname()}: rank 0 at {place.address}:{place.port} doesn't answer within {seconds:g} s "
                f"({str(error).splitlines()[0][:200]}); is its node up, and may this one reach it?"
            ) from None

    def ask(self, question: str, answer: Any, *, seconds: float | None = None) -> list[Any]:
        """Everyone's answers by rank, as rank 0 has them after at most that long."""
        limit = seconds or self._seconds
        if self.store is None:
            return [json.loads(json.dumps(answer))]
        place, store = self.place, self.store
        store.set(f"{question}/{place.rank}", json.dumps(answer))
        if place.rank == 0:
            missing, deadline = set(range(place.world_size)), time.monotonic() + limit
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not store.check([f"{question}/{rank}"])}
                time.sleep(0.02)
            told = [
                None if rank in missing else json.loads(store.get(f"{question}/{rank}"))
                for rank in range(place.world_size)
            ]
            store.set(f"{question}/all", json.dumps([time.time(), told]))
        try:
            store.wait([f"{question}/all"], timedelta(seconds=limit + self._seconds))
        except (DistStoreError, RuntimeError) as error:
            raise UserError(f"{socket.gethostname()}: rank 0 is gone or doesn't answer ({error})") from None
        self.clock_seconds = time.time() - json.loads(store.get(f"{question}/all"))[0]
        return json.loads(store.get(f"{question}/all"))[1]

    def note(self, what: str) -> None:
        """Where this rank is, in case it doesn't answer."""
        if self.store is not None:
            self.store.set(f"at/{self.place.rank}", what)

    def last_note(self, rank: int) -> str:
        """What a rank noted last."""
        key = f"at/{rank}"
        return self.store.get(key).decode() if self.store is not None and self.store.check([key]) else "the start"

    def leave(self) -> None:
        """Rank 0, whose process may be the store, leaves last."""
        if self.store is None:
            return
        self.store.add("left", 1)
        deadline = time.monotonic() + 10
        while self.place.rank == 0 and self.store.add("left", 0) < self.place.world_size:
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)

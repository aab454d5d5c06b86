"""How fast ranks exchange data: all-reduce over all and within each node, and pairs of nodes to find a slow one."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

_REPEATS = 5
_MOST_ROUNDS = 15
_MEBIBYTES = {"cuda": 256, "cpu": 4}


def bus_bandwidth(num_bytes: int, seconds: float, num_ranks: int) -> float:
    """GB/s through each rank's link in an all-reduce: 2 (n - 1) / n of the bytes, as NCCL's own tests count."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds / 1e9


def pair_nodes(num_nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which everyone meets everyone; the first 15 where there are more."""
    places: list[int | None] = [*range(num_nodes), *([None] if num_nodes % 2 else [])]
    for _ in range(min(len(places) - 1, _MOST_ROUNDS)):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def measure_bandwidth(
    rank: int, nodes: Sequence[Sequence[int]], device: torch.device, note: Callable[[str], None]
) -> dict[str, Any]:
    """GB/s of all ranks, of this rank's node, and from this node to others (by number, on a node's first rank).

    `nodes`: the ranks of each node. Needs a process group; every rank has to call it.
    """
    num_ranks = sum(map(len, nodes))
    data = torch.ones(_MEBIBYTES[device.type] << 18, device=device)  # float32: 4 bytes each
    found: dict[str, Any] = {"pairs": {}}
    note("all-reduce over all ranks")
    found["all"] = bus_bandwidth(data.nbytes, _time(lambda: distributed.all_reduce(data), device), num_ranks)
    mine = next(number for number, ranks in enumerate(nodes) if rank in ranks)
    groups = [distributed.new_group(list(ranks)) if len(ranks) > 1 else None for ranks in nodes]
    note("all-reduce within its node")
    if groups[mine] is not None and len(nodes) > 1:
        seconds = _time(lambda: distributed.all_reduce(data, group=groups[mine]), device)
        found["node"] = bus_bandwidth(data.nbytes, seconds, len(nodes[mine]))
    distributed.barrier()
    if rank == nodes[mine][0]:
        received = torch.empty_like(data)
        for pairs in pair_nodes(len(nodes)):
            for a, b in pairs:
                if mine in (a, b):
                    other = b if mine == a else a
                    note(f"exchange between node {a} and node {b}")
                    seconds = _time(lambda other=other: _exchange(data, received, nodes[other][0]), device)
                    found["pairs"][str(other)] = data.nbytes / seconds / 1e9
    note("the last barrier")
    distributed.barrier()
    return found


def try_gloo(seconds: float, note: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds of an all-reduce of one number over gloo, or what went wrong within so many seconds.

    Checkpoints are agreed on over it (`shards.ranks`), beside whatever GPUs use: another network card, another address.
    Needs a process group; every rank has to call it.
    """
    note("connecting over gloo")
    number, cpu = torch.zeros(1), torch.device("cpu")
    try:
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        return {"gloo_ms": 1e3 * _time(lambda: distributed.all_reduce(number, group=group), cpu)}
    except RuntimeError as error:
        return {"gloo_problem": str(error).strip().splitlines()[0][:200]}


def _exchange(sent: torch.Tensor, received: torch.Tensor, other: int) -> None:
    operations = [
        distributed.P2POp(distributed.isend, sent, other),
        distributed.P2POp(distributed.irecv, received, other),
    ]
    for request in distributed.batch_isend_irecv(operations):
        request.wait()


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run: the best of some, after one that connects."""
    best = float("inf")
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        best = seconds if best == float("inf") else min(best, seconds)
    return best

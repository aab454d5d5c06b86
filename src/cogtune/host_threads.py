"""A thread that computes on the host's cores beside the device's work.

How many cores PyTorch uses is a number of each thread. A new thread takes the one that was set last anywhere in the
process: a loader with page-locked batches sets 1 in a thread of its own, and launchers start processes with
`OMP_NUM_THREADS=1`. An update of billions of weights would run on a single core.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cogtune.launch import read_launch

_CORES_OF_CONTAINER = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Cores of the node that this process may use, a container's limit respected."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _container_cores() or cores)


def _container_cores() -> int | None:
    """Whole cores that a control group (version 2) gives, at least one; None without a limit."""
    try:
        quota, period = _CORES_OF_CONTAINER.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # "max": no limit
        return None


def count_cores() -> int:
    """Three quarters of this process's share of its node's cores, at least one.

    With all of them, every piece of work would wait for the core that a loader is busy on.
    """
    return max(1, available_cores() // read_launch().num_local * 3 // 4)


def start_computing_thread(name: str, begin: Callable[[], object] | None = None) -> ThreadPoolExecutor:
    """One thread that computes with `count_cores()`, as threads that start later do; `begin` is called in it first."""
    num_cores = count_cores()

    def start() -> None:
        torch.get_num_threads()  # else the thread's first operation would take the number set last elsewhere, after all
        torch.set_num_threads(num_cores)
        if begin is not None:
            begin()

    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=start)

"""Threads that compute on the host."""

import os
import threading

import pytest
import torch

from cogtune.host_threads import count_cores, start_computing_thread

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize("num_cores, num_local, expected", [(32, 1, 24), (32, 4, 6), (2, 1, 1), (1, 1, 1), (4, 8, 1)])
def test_processes_of_a_node_share_its_cores(
    num_cores: int, num_local: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(num_cores)), raising=False)
    for name, value in zip(VARIABLES, (0, num_local, 0, num_local), strict=True):
        monkeypatch.setenv(name, str(value))
    assert count_cores() == expected


def test_a_thread_computes_with_those_cores_whatever_others_have_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()

    def set_one() -> None:
        """As a loader's thread does that pins batches (torch/utils/data/_utils/pin_memory.py)."""
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start()
        other.join()

    begun: list[str] = []
    set_one()
    with start_computing_thread("update", lambda: begun.append(threading.current_thread().name)) as thread:
        thread.submit(int).result()
        set_one()
        assert thread.submit(torch.get_num_threads).result() == 6
    set_one()
    assert begun == ["update_0"]
    assert torch.get_num_threads() == before

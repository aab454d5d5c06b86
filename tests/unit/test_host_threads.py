"""Threads that compute on the host."""

import os
import threading
from pathlib import Path

import pytest
import torch

from cogtune import host_threads
from cogtune.host_threads import available_cores, count_cores, start_computing_thread

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _in_no_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_threads, "_CORES_OF_CONTAINER", tmp_path / "none")


@pytest.mark.parametrize("num_cores, num_local, expected", [(32, 1, 24), (32, 4, 6), (2, 1, 1), (1, 1, 1), (4, 8, 1)])
def test_processes_of_a_node_share_its_cores(
    num_cores: int, num_local: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(num_cores)), raising=False)
    for name, value in zip(VARIABLES, (0, num_local, 0, num_local), strict=True):
        monkeypatch.setenv(name, str(value))
    assert count_cores() == expected


@pytest.mark.parametrize(
    "limit, expected",
    [("600000 100000", 6), ("650000 100000", 6), ("50000 100000", 1), ("3200000 100000", 16), ("max 100000", 16)],
)
def test_a_containers_limit_counts(limit: str, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(16)), raising=False)
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(host_threads, "_CORES_OF_CONTAINER", tmp_path / "cpu.max")
    assert available_cores() == expected
    monkeypatch.setattr(host_threads, "_CORES_OF_CONTAINER", tmp_path / "none")
    assert available_cores() == 16


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

"""What the doctor says of made-up nodes: a healthy job has no finding, each defect names its node."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cogtune.cluster.bandwidth import bus_bandwidth, pair_nodes
from cogtune.cluster.findings import find_problems, make_table
from cogtune.cluster.health import read_nvidia_smi

Facts = dict[str, Any]
NAMES = ("anna", "bert", "carl", "dora")


def make_job() -> list[Facts]:
    """Four nodes of two GPUs."""
    job = []
    for rank in range(8):
        number = rank // 2
        folder = {"path": "/shared/x", "write": 900.0, "read": 2000.0, "free_gib": 500.0, "seen_by": list(range(8))}
        pairs = {str(other): 40.0 + other for other in range(4) if other != number} if rank % 2 == 0 else {}
        job.append(
            {
                "rank": rank, "node": NAMES[number], "number": number, "clock_seconds": 0.01,
                "versions": {"torch": "2.11.0", "NCCL": "2.28"},
                "gpu": {"name": "H100", "free_gib": 79.0, "total_gib": 80.0, "driver": "580", "celsius": 40,
                        "ecc_errors": 0, "slowed": [], "processes": 0},
                "host": {"memory_gib": 900.0, "shm_gib": 400.0, "cores": 64}, "tflops": 700.0 + rank,
                "folders": {"data.cache_dir": dict(folder), "output_dir": dict(folder)},
                "model": {"digest": "abc", "files": 9},
                "speed": {"all": 45.0, "node": 300.0, "gloo_ms": 0.4, "pairs": pairs},
            }
        )  # fmt: skip
    return job


def test_a_healthy_job_has_no_finding() -> None:
    assert find_problems(make_job()) == []
    table = make_table(make_job())
    assert table.count("H100") == 8 and "data.cache_dir: writes 900, reads 2000 MB/s, 500 GiB free" in table


def slow_links(job: list[Facts], number: int) -> None:
    for facts in job:
        pairs = facts["speed"]["pairs"]
        for other in pairs:
            if number in (facts["number"], int(other)):
                pairs[other] = 9.0


DEFECTS: dict[str, tuple[Callable[[list[Facts]], Any], str]] = {
    "version": (lambda job: job[5]["versions"].update(torch="2.8.0"), "torch is 2.8.0 on node carl and 2.11.0"),
    "driver": (lambda job: job[1]["gpu"].update(driver="550"), "the driver is 550 on node anna"),
    "matmul": (lambda job: job[3].update(tflops=500.0), "rank 3 (node bert) multiplies at 500 TFLOP/s"),
    "processes": (lambda job: job[6]["gpu"].update(processes=2), "rank 6 (node dora): 2 other process(es)"),
    "memory": (lambda job: job[6]["gpu"].update(free_gib=20.0), "rank 6 (node dora): only 20.0 of 80.0 GiB"),
    "ecc": (lambda job: job[0]["gpu"].update(ecc_errors=3), "rank 0 (node anna): 3 uncorrected memory error(s)"),
    "hot": (lambda job: job[0]["gpu"].update(slowed=["too hot"]), "slowed down or hot (too hot)"),
    "gloo": (
        lambda job: job[4]["speed"].update(gloo_problem="Connection refused"),
        "rank 4 (node carl): no answer over gloo (Connection refused)",
    ),
    "shm": (lambda job: [job[i]["host"].update(shm_gib=0.06) for i in (2, 3)], "node bert: 0.06 GiB free in /dev/shm"),
    "clock": (lambda job: [job[i].update(clock_seconds=-7.0) for i in (2, 3)], "node bert: its clock is -7.0 s off"),
    "disk": (lambda job: job[2]["folders"]["output_dir"].update(write=9.0), "(node bert): output_dir (/shared/x)"),
    "full": (lambda job: job[2]["folders"].update({"output_dir": {"path": "x", "problem": "x: Permission denied"}}),
             "rank 2 (node bert): output_dir can't be used: x: Permission denied"),
    "apart": (lambda job: [job[i]["folders"]["output_dir"].update(seen_by=[6, 7]) for i in (6, 7)],
              "output_dir is not one folder for all nodes (dora)"),
    "model": (lambda job: job[7].update(model={"digest": "xyz"}), "the model's files on node dora differ"),
    "no model": (lambda job: job[7].update(model={"problem": "/m: missing"}), "rank 7 (node dora): the model can't be"),
    "network": (lambda job: slow_links(job, 2), "node carl exchanges at most 9.00 GB/s with any other"),
    "nvlink": (lambda job: [job[i]["speed"].update(node=50.0) for i in (4, 5)], "node carl reduces among its own GPUs"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_one_finding_that_names_its_node(name: str) -> None:
    job = copy.deepcopy(make_job())
    break_, expected = DEFECTS[name]
    break_(job)
    found = find_problems(job)
    assert [finding.level != "note" for finding in found] == [True], found
    assert expected in found[0].text


def test_caches_of_nodes_and_missing_entries_are_notes() -> None:
    job = make_job()
    for facts in job:
        facts["folders"]["data.cache_dir"]["seen_by"] = [facts["rank"]]
    job[2]["cache"] = {"clips": 5, "wanted": 10, "missing": 4}
    found = find_problems(job)
    assert {finding.level for finding in found} == {"note"}
    assert any("node bert: 4 of 10 cache entries of 5 clip(s) are missing" in finding.text for finding in found)


def test_of_two_nodes_none_is_blamed_for_their_link() -> None:
    job = make_job()[:4]
    job[0]["speed"]["pairs"], job[2]["speed"]["pairs"] = {"1": 3.0}, {"0": 3.0}
    for facts in job:
        for folder in facts["folders"].values():
            folder["seen_by"] = [0, 1, 2, 3]
    assert find_problems(job) == []


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 7, 8])
def test_every_node_meets_every_other_once(num_nodes: int) -> None:
    met: list[frozenset[int]] = []
    for pairs in pair_nodes(num_nodes):
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy)), "one pair at a time"
        met += [frozenset(pair) for pair in pairs]
    assert len(met) == len(set(met)) == num_nodes * (num_nodes - 1) // 2


def test_many_nodes_meet_some() -> None:
    rounds = list(pair_nodes(64))
    assert len(rounds) == 15 and all(len(pairs) == 32 for pairs in rounds)


def test_bus_bandwidth_is_counted_as_nccl_tests_do() -> None:
    assert bus_bandwidth(10**9, 1.0, 2) == pytest.approx(1.0)
    assert bus_bandwidth(10**9, 0.5, 8) == pytest.approx(3.5)


def test_the_drivers_tables_are_read() -> None:
    rows = (
        "GPU-1, 580.1, 34, 0, 0x0000000000000001\n"
        "GPU-2, 580.1, 88, 2, 0x0000000000000048\n"
        "GPU-3, 580.1, 30, [N/A], [Not Supported]\n"
    )
    found = read_nvidia_smi(rows, "GPU-2, 500\nGPU-2, 20\nGPU-9, 1\n")
    assert found["GPU-1"] == {"driver": "580.1", "celsius": 34, "ecc_errors": 0, "slowed": [], "processes": 0}
    assert found["GPU-2"]["slowed"] == ["slowed down", "too hot"] and found["GPU-2"]["ecc_errors"] == 2
    assert found["GPU-2"]["processes"] == 2 and found["GPU-3"]["ecc_errors"] is None

"""scripts/doctor.py on a CPU: alone, on several ranks of two nodes, and with a rank that doesn't answer."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ranks import start_ranks

DOCTOR = "scripts/doctor.py"
QUICK = ["--cpu", "--file-mebibytes=1", "--timeout=40"]


@pytest.fixture
def config(tiny_folder: Path, clips_folder: Path, tmp_path: Path) -> Path:
    values = {
        "model": {"path": str(tiny_folder)},
        "data": {"manifest": str(clips_folder), "cache_dir": str(tmp_path / "cache")},
        "output_dir": str(tmp_path / "runs" / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_alone_it_checks_folders_model_and_cache(config: Path, run_command: Any, tmp_path: Path) -> None:
    outcome = run_command(DOCTOR, "--config", config, *QUICK, "--json", tmp_path / "found.json")
    assert "12 of 12 cache entries of 6 clip(s) are missing" in outcome.out and "data.cache_dir: writes" in outcome.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert outcome.code == any(finding["level"] != "note" for finding in found["findings"])
    assert found["ranks"][0]["model"]["files"] > 5 and found["ranks"][0]["versions"]["cogtune"] == "0.1.0"
    assert run_command(DOCTOR, "--cofnig", config).code == 2


def test_three_ranks_on_two_nodes_measure_each_other(config: Path, execute: Callable[..., int], tmp_path: Path) -> None:
    answers = tmp_path / "found.json"
    ranks = start_ranks(
        execute,
        tmp_path / "out",
        DOCTOR,
        [["--config", str(config), *QUICK, f"--json={answers}"]] * 3,
        environment=lambda rank: {"GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2)},
        prepare=lambda rank: _break_version() if rank == 2 else None,
    )
    assert ranks.wait(100) == [1, 1, 1], ranks.text()
    found = json.loads(answers.read_text())
    assert [facts["number"] for facts in found["ranks"]] == [0, 0, 1]
    assert all(facts["speed"]["all"] > 0 for facts in found["ranks"])
    assert found["ranks"][0]["speed"]["node"] > 0 and found["ranks"][0]["speed"]["pairs"].keys() == {"1"}
    assert all(facts["speed"]["gloo_ms"] > 0 for facts in found["ranks"])
    assert found["ranks"][2]["speed"]["pairs"].keys() == {"0"} and found["ranks"][1]["speed"]["pairs"] == {}
    assert all(facts["folders"]["output_dir"]["seen_by"] == [0, 1, 2] for facts in found["ranks"])
    assert all(abs(facts["clock_seconds"]) < 1 for facts in found["ranks"])
    node = found["ranks"][2]["node"]
    assert f"peft is 0.0.1 on node {node} and" in ranks.outputs[0].read_text() and node.endswith("#1")
    assert not ranks.outputs[1].read_text().count("rank  node"), "one rank prints"
    assert not list(tmp_path.rglob(".doctor-*"))


def _break_version() -> None:
    from cogtune.cluster import doctor

    find = doctor.find_versions
    doctor.find_versions = lambda: find() | {"peft": "0.0.1"}


def test_a_rank_that_gloo_can_not_reach_is_named(execute: Callable[..., int], tmp_path: Path) -> None:
    """As GPUs of several nodes may be connected while the hosts' names lead nowhere."""

    def refuse(rank: int) -> None:
        from torch import distributed

        new_group = distributed.new_group

        def fail(*ranks: Any, backend: str | None = None, **named: Any) -> Any:
            if backend == "gloo":
                raise RuntimeError("Connection refused\nsome trace")
            return new_group(*ranks, backend=backend, **named)

        if rank == 1:
            distributed.new_group = fail

    options = ["--cpu", "--file-mebibytes=1", "--timeout=10"]
    ranks = start_ranks(execute, tmp_path, DOCTOR, [options] * 2, prepare=refuse)
    assert ranks.wait(60) == [1, 1], ranks.text()
    told = ranks.outputs[0].read_text()
    assert "rank 1 (node" in told and "no answer over gloo (Connection refused); checkpoints" in told


def test_a_rank_that_does_not_answer_is_named(execute: Callable[..., int], tmp_path: Path) -> None:
    """Rank 1 never starts; and, a second time, it falls silent at the matrix product."""
    options = ["--cpu", "--file-mebibytes=1", "--timeout=2"]
    alone = start_ranks(execute, tmp_path / "a", DOCTOR, [options], environment=lambda _rank: {"WORLD_SIZE": "2"})
    assert alone.wait(30) == [2]
    assert "rank 1 (its node never answered) gave no answer" in alone.text()

    def sleep(rank: int) -> None:
        import time

        from cogtune.cluster import doctor

        if rank == 1:
            doctor.measure_matmul = lambda _device: time.sleep(600)  # pyright: ignore[reportAttributeAccessIssue]

    ranks = start_ranks(execute, tmp_path / "b", DOCTOR, [options] * 2, prepare=sleep)
    try:
        ranks.wait_for(0, 60)
    finally:
        ranks.end()
    assert ranks.codes[1] == -signal.SIGKILL, "it was still asleep"
    assert "gave no answer; its last word: its own facts" in ranks.outputs[0].read_text()

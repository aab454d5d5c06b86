"""metrics.jsonl: appended, cut back on resuming, readable after a kill; the trackers get the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.tracking import MetricsLog, read_metrics


def open_log(folder: Path, first_step: int = 0, *, active: bool = True, report_to: Any = "none") -> MetricsLog:
    return MetricsLog(
        folder,
        active=active,
        first_step=first_step,
        report_to=report_to,
        project="test",
        wandb_mode="offline",
        config={"train": {"seed": 1}},
    )


def write_rows(folder: Path, steps: list[int], **options: Any) -> None:
    with open_log(folder, **options) as log:
        for step in steps:
            log.write({"step": step, "loss": step / 3})


def test_rows_survive_unchanged(tmp_path: Path) -> None:
    write_rows(tmp_path / "run", [1, 2, 3])
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": s, "loss": s / 3} for s in (1, 2, 3)]


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path, [0, 10, 20, 30])
    write_rows(tmp_path, [30, 40], first_step=20)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 10, 20, 30, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("rest", ['{"step": 20, "lo', '{"step": 20'])
def test_a_line_cut_off_by_a_kill_costs_nothing_else(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(tmp_path, [0, 10])
    with path.open("a") as file:
        file.write(rest)
    assert [row["step"] for row in read_metrics(path)] == [0, 10]
    write_rows(tmp_path, [20], first_step=10)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(tmp_path, [0, 10])
    path.write_text(path.read_text().removesuffix("\n"))
    write_rows(tmp_path, [20], first_step=10)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20]


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write({"step": 1})
        assert read_metrics(log.path) == [{"step": 1}]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "run", [1, 2], active=False)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number_once(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_log(tmp_path, report_to="tensorboard") as log:
        log.write({"step": 5, "loss": 0.25, "peak_memory_gib": None})
        log.write({"step": 10, "eval_loss": 0.5, "eval_loss_by_quantile": {"0.1": 0.75}})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert seen == {"loss": [(5, 0.25)], "eval_loss": [(10, 0.5)], "eval_loss_by_quantile/0.1": [(10, 0.75)]}

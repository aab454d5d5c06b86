"""`bench.py checkpoint` saves, reads and reports, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest

BENCH = "scripts/bench.py"


@pytest.mark.parametrize("extra", [["--ema", "host"], ["--asynchronous", "off", "--prepare", "off", "--layers", "1"]])
def test_the_bench_of_checkpoints(extra: list[str], run_command: Any, tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--device", "cpu", "--saves", "2", "--folder", tmp_path / "out"]
    outcome = run_command(BENCH, "checkpoint", *arguments, "--json", tmp_path / "out.json", *extra)
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["saves"]) == 2 and result["resume"]["bits_are_equal"]
    for save in result["saves"]:
        assert 0 < save["still_seconds"] <= save["complete_seconds"]
        assert save["gb"] == pytest.approx(result["checkpoint_gb"], rel=0.01)
    assert "training stands still" in outcome.out and "bits equal" in outcome.out
    assert ("average: " in outcome.out) == ("--ema" in extra)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(run_command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cogtune.benchmark import checkpoint

    monkeypatch.setattr(checkpoint, "_SPARE", 1e12)
    outcome = run_command(BENCH, "checkpoint", "--model", "tiny", "--device", "cpu", "--folder", tmp_path / "out")
    assert outcome.code == 2 and "fewer --layers" in outcome.err

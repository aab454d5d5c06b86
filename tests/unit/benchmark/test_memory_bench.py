"""`bench.py memory` runs each job whole on a tiny model, each in a process of its own, and goes on after a failure."""

import argparse
import json
from pathlib import Path

import pytest

from cogtune.benchmark import memory
from cogtune.benchmark.capped import CappedRun
from cogtune.errors import UserError
from patience import patient


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    return parser.parse_args(["--model", "tiny", "--device", "cpu", "--compile", "off", *arguments])


def test_both_jobs_are_measured_and_settings_reach_them(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    options = ["--steps", "1", "--warmup", "1", "--set", "offloaded_blocks=1", "--set", "quantized_base=nf4"]
    options += ["--set", "resident_blocks=0", "--time_limit", str(patient(540))]
    results = memory.run(parse("--caps", "", "--job", "lora,generate", "--json", str(file), *options))
    assert json.loads(file.read_text()) == results
    lora, video = results["jobs"]["lora"]["no cap"], results["jobs"]["generate"]["no cap"]
    assert "error" not in lora and "error" not in video, results
    assert "nf4, 0 blocks resident, others streamed, activations of 1 blocks on the host" in lora["way"]
    assert lora["seconds"] > 0 and lora["host_gib"] > 0
    assert video["seconds"] > 50 * video["step_seconds"] and video["decode"]["seconds"] > 0
    assert "1.000x" in memory.describe(results)


def test_preparing_is_measured_too() -> None:
    """Captions as many at once as a run takes, and clips."""
    task = vars(parse("--steps", "2", "--warmup", "1")) | {"job": "prepare", "cap": 0.0}
    found = CappedRun(task).measure()
    assert found["way"] == "clips encoded stock; T5 all resident"
    assert 0 < found["spread"][0] <= found["seconds"] <= found["spread"][1] and found["text"]["seconds"] > 0


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        (["optimizer=host"], "weights and optimizer on the host"),
        (["optimizer=8bit"], "bfloat16 weights and 8-bit optimizer state, activations"),
        (
            ["optimizer=8bit", "resident_blocks=1"],
            "8-bit optimizer state, 1 blocks resident, others streamed, activations",
        ),
    ],
)
def test_full_fine_tuning_is_measured_where_its_weights_are(settings: list[str], way: str) -> None:
    """In this process, which is what each of the others does."""
    chosen = [f"--set={setting}" for setting in [*settings, "offloaded_blocks=1"]]
    task = vars(parse("--steps", "1", "--warmup", "1", *chosen)) | {"job": "sft", "cap": 0.0}
    found = CappedRun(task).measure()
    assert way in found["way"] and found["seconds"] > 0
    assert found["host_gib"] > 0, "a block's activations"
    assert (found["host_gib"] > 1e-4) == (settings != ["optimizer=8bit"]), "weights and state, where they are there"


def test_what_fails_is_said_and_what_has_no_time_is_left_out(tmp_path: Path) -> None:
    results = memory.run(parse("--caps", "1", "--job", "lora", "--set", "mode=frugal", "--time_limit", "1000"))
    assert all("mode" in row["error"] for row in results["jobs"]["lora"].values())
    assert "failed" in memory.describe(results)
    results = memory.run(parse("--caps", "1", "--job", "lora", "--time_limit", "1"))
    assert all("no time" in row["error"] for row in results["jobs"]["lora"].values())
    with pytest.raises(UserError, match="numbers of GB"):
        memory.run(parse("--caps", "small"))

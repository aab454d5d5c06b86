"""`bench.py context`: each measurement in a launch of its own, compared with one process; failures cost no other."""

import argparse
import json
import time
from pathlib import Path

import pytest

from cogtune.benchmark import context
from cogtune.errors import UserError
from patience import patient


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    context.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--compile", "off", *arguments])


WORKER = """
import json, sys, time
task = json.loads(sys.argv[1])
if task["part"].startswith("train"):
    print("RuntimeError: as it happens"), sys.exit(1)
if "ring" in task["part"]:
    time.sleep(600)
json.dump({"step_seconds": 0.5, "video_seconds": 25.0}, open(task["output"], "w"))
"""


def test_a_measurement_that_fails_or_hangs_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring itself runs in tests/e2e/test_context_parallel.py."""
    monkeypatch.setattr(context, "_WORKER", ["-c", WORKER])
    monkeypatch.setattr(context, "_LEAST_SECONDS", 0)
    file = tmp_path / "context.json"
    parts = ["train:tiny:alone:1", "generate:tiny:alone:1"]
    results = context.run(parse("--only", ",".join(parts), "--json", str(file)))
    assert json.loads(file.read_text()) == results and list(results["parts"]) == parts
    failed, video = results["parts"].values()
    assert failed["error"] == "ended with 1: RuntimeError: as it happens" and video["step_seconds"] == 0.5
    said = context.describe(results)
    assert "1.000 of one GPU's" in said and "failed" in said
    monkeypatch.setattr(context, "ALONE", "ring")
    started = time.monotonic()
    results = context.run(parse("--only", "generate:tiny:ring:1", "--time_limit", "0.5"))
    assert "not done after" in results["parts"]["generate:tiny:ring:1"][
        "error"
    ] and time.monotonic() - started < patient(20)


def test_names_are_checked() -> None:
    assert context.list_parts(parse("--models", "tiny", "--gpus", "1,2")) == [
        "train:tiny:alone:1", "generate:tiny:alone:1", "train:tiny:ulysses:2", "train:tiny:ring:2",
        "generate:tiny:halves:2", "generate:tiny:ulysses:2",
    ]  # fmt: skip
    for wrong in (
        "train:tiny:halves:2",
        "train:tiny:ulysses:1",
        "sleep:tiny:alone:1",
        "train:tiny",
        "train:huge:ring:2",
    ):
        with pytest.raises(UserError):
            context.list_parts(parse("--only", wrong))

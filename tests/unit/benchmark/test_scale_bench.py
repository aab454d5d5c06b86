"""`bench.py scale` measures parts in processes of their own; what fails or hangs loses no other numbers."""

import argparse
import json
from pathlib import Path

import pytest

from cogtune.benchmark import scale
from cogtune.errors import UserError
from patience import patient


def bench(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    common = ["--model", "tiny", "--device", "cpu", "--compile", "off", "--steps", "2", "--warmup", "1", "--rank", "4"]
    return parser.parse_args([*common, *options])


def test_parts_are_measured_against_one_process(tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    limits = ("--time_limit", str(patient(170)), "--total_time_limit", str(patient(540)))
    results = scale.run(bench("--parts", "sft-one,sft-fsdp2", "--json", str(file), *limits))
    assert json.loads(file.read_text()) == json.loads(json.dumps(results))
    one, two = results["parts"]["sft-one"], results["parts"]["sft-fsdp2"]
    assert (one["num_processes"], two["num_processes"]) == (1, 2) and two["strategy"].startswith("FSDP2")
    for row in (one, two):
        assert row["samples_per_second"] == pytest.approx(row["num_processes"] / row["step_seconds"])
        assert row["predicted_gib"] > 0
    share = 50 * two["samples_per_second"] / one["samples_per_second"]
    assert f"{share:5.1f} %" in scale.describe(results)


def test_what_fails_or_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    results = scale.run(bench("--parts", "lora-one", "--time_limit", "0.2"))
    assert "not done after 0 s" in results["parts"]["lora-one"]["error"]
    assert (
        "left out" in scale.run(bench("--parts", "lora-one", "--total_time_limit", "1"))["parts"]["lora-one"]["error"]
    )
    tries = []

    def run_apart(_arguments: argparse.Namespace, part: str, activations: str, _seconds: float) -> dict[str, object]:
        tries.append((part, activations))
        return {"error": "CUDA out of memory. Tried"} if len(tries) == 1 else {"error": "other"}

    monkeypatch.setattr(scale, "_run_apart", run_apart)
    results = scale.run(bench("--parts", "sft-zero2"))
    assert tries == [("sft-zero2", "auto"), ("sft-zero2", "recompute")]
    assert "failed: other" in scale.describe(results)
    with pytest.raises(UserError, match="expected all, or some of lora-one"):
        scale.run(bench("--parts", "nothing"))

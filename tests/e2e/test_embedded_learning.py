"""The embedded model learns: a short run of the demo lowers the evaluation loss on unseen clips of the concept."""

import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.shapes.comparison import draw_clips

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "train.max_steps": 50,
    "train.batch_size": 4,
    "data.num_workers": 0,
    "checkpoint.every_steps": "null",
    "validation.every_steps": "null",
    "validation.prompts": "[]",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, execute: Any) -> Path:
    """The demo's run with fewer steps."""
    folder = tmp_path_factory.mktemp("demo")
    draw_clips(folder)
    settings = SHORT | {
        "data.manifest": folder / "clips",
        "data.validation_manifest": folder / "held_out",
        "data.cache_dir": folder / "cache",
        "output_dir": folder / "run",
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    assert execute("train/lora.py", "--config", ROOT / "configs/demo.yaml", *options) == 0
    return folder / "run"


def test_the_evaluation_loss_falls(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < 0.75 * losses[0]

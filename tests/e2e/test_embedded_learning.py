"""The embedded model learns: a short run of the demo lowers the evaluation loss on unseen clips of the concept, and the
judge sees more of it in videos of unseen prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.shapes.captions import concept_prompts
from cogtune.shapes.comparison import draw_clips
from cogtune.shapes.demonstration import pick_evenly
from cogtune.shapes.scoring import load_scored_pipeline, score_prompts
from patience import takes_minutes

pytestmark = [takes_minutes, pytest.mark.timeout(1800)]  # 200 steps on one core
ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "train.max_steps": 200,
    "train.batch_size": 8,
    "train.prior_penalty": "null",  # there are no prior clips
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
    assert losses[-1] < 0.5 * losses[0]


def test_the_judge_sees_the_concepts_motion(trained: Path) -> None:
    """The motion is learned before the shape: 8 of 10 videos after these steps, where the base model has none."""
    pipeline = load_scored_pipeline("tiny", trained / "final", torch.device("cpu"))
    prompts = pick_evenly(concept_prompts(), 6)
    shares = []
    for switch in (pipeline.disable_lora, pipeline.enable_lora):
        switch()
        shares.append(score_prompts(pipeline, prompts, seed=0, batch_size=6).share("motion"))
    assert shares[0] == 0.0 and shares[1] >= 0.5

"""What `train.cuda_graph` refuses, before anything is loaded. That a replay equals a plain pass: tests/gpu."""

from pathlib import Path

import pytest

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.plan import make_adapter_plan


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "it needs a GPU"),
        ({"train": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps must be 1"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout must be 0"),
    ],
)
def test_runs_that_no_graph_can_hold_are_refused(settings: dict, reason: str, tiny_folder: Path, clips_folder: Path):
    train = {"cuda_graph": True} | settings.pop("train", {})
    config = RunConfig(
        model={"path": str(tiny_folder), "device": "cpu"}, data={"manifest": clips_folder}, train=train, **settings
    )
    with pytest.raises(UserError, match=reason):
        make_adapter_plan(config)

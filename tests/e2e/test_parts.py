"""Full fine-tuning of a part: it learns, everything else keeps its bits, and the result is a whole pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

SFT = "train/sft.py"
FILE = "transformer/diffusion_pytorch_model.safetensors"
ATTENTION = {"train__trained_weights": '["attention"]', "optimizer__learning_rate": 3e-3}


def read_losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_part_learns_and_the_rest_keeps_its_bits(
    options: Callable[..., list[str]], run_command: Any, read_tensors: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, object] = ATTENTION | {"train__max_steps": 30, "train__batch_size": 2}
    settings |= {"train__timestep_strata": 4, "validation__enabled": "true", "checkpoint__every_steps": 30}
    outcome = run_command(SFT, *options("run", **settings))
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert last < 0.98 * first

    before = load_file(tiny_folder / FILE)
    after = load_file(tmp_path / "run/final" / FILE)
    assert after.keys() == before.keys()
    saved = read_tensors(tmp_path / "run/checkpoints/step-000030")
    weights = {n.removeprefix("weights."): t for n, t in saved.items() if n.startswith("weights.")}
    assert weights and all(".attn1." in name for name in weights), "a checkpoint holds what is trained"
    for name, tensor in before.items():
        if name in weights:
            assert torch.equal(after[name], weights[name]) and not torch.equal(after[name], tensor), name
        else:
            assert torch.equal(after[name], tensor), name
    CogVideoXPipeline.from_pretrained(tmp_path / "run/final")
    assert "a part (`attention`) of its transformer" in (tmp_path / "run/final/README.md").read_text()
    num_trained = sum(tensor.numel() for tensor in weights.values())
    num_frozen = sum(p.numel() for p in CogVideoXPipeline.from_pretrained(tiny_folder).transformer.parameters())
    assert f"{num_frozen - num_trained:,} frozen, {num_trained:,} trained" in outcome.out


def test_streaming_the_frozen_weights_changes_no_result(
    options: Callable[..., list[str]], run_command: Any, tmp_path: Path
) -> None:
    """Against one block resident; whole weights lie at other addresses, which changes a CPU's last bits."""
    settings = ATTENTION | {"memory__mode": "recompute"}
    assert run_command(SFT, *options("whole", **settings)).code == 0
    assert run_command(SFT, *options("few", **settings, memory__resident_blocks=1)).code == 0
    outcome = run_command(SFT, *options("none", **settings, memory__resident_blocks=0))
    assert outcome.code == 0 and "0 blocks resident, others streamed" in outcome.out, outcome.err
    whole, few, none = (load_file(tmp_path / run / "final" / FILE) for run in ("whole", "few", "none"))
    assert all(torch.equal(few[key], none[key]) for key in few)
    assert all(torch.allclose(whole[key], none[key], rtol=0, atol=1e-4) for key in whole)


@pytest.mark.parametrize(
    "changes", [{}, {"memory__optimizer": "8bit"}, {"train__trained_weights": '["last 1 blocks"]'}]
)
def test_frozen_weights_are_in_the_runs_precision(
    changes: dict[str, object], options: Callable[..., list[str]], run_command: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """bfloat16: trained weights in float32 beside them, or in bfloat16 with 8-bit state; resuming is exact."""
    settings = ATTENTION | {"model__dtype": "bfloat16"} | changes
    outcome = run_command(SFT, *options("run", **settings))
    assert outcome.code == 0, outcome.err
    losses = read_losses(tmp_path / "run")
    assert all(loss == loss for loss in losses)
    before = load_file(tiny_folder / FILE)
    final = load_file(tmp_path / "run/final" / FILE)
    changed = {name for name, tensor in final.items() if not torch.equal(tensor, before[name].bfloat16())}
    part = ".attn1." if "train__trained_weights" not in changes else "transformer_blocks."
    assert changed and all(part in name for name in changed)
    (tmp_path / "run/checkpoints/step-000004").rename(tmp_path / "straight")
    (tmp_path / "run/final").rename(tmp_path / "straight-final")
    outcome = run_command(SFT, *options("run", **settings))
    assert outcome.code == 0 and "at step 2" in outcome.out, outcome.err
    resumed = load_file(tmp_path / "run/final" / FILE)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in final.items())


def test_what_can_not_be(options: Callable[..., list[str]], run_command: Any, tmp_path: Path) -> None:
    cases = {
        "matches no weight; did you mean attn1.to_q?": (SFT, {"train__trained_weights": '["attn1.to_qq"]'}),
        "is for full fine-tuning (train/sft.py)": ("train/lora.py", {"train__trained_weights": '["to_q"]'}),
        "the frozen weights are what can wait": (SFT, ATTENTION | {"memory__optimizer": "host"}),
        "has no effect without train.ema_decay": (SFT, {"train__ema_on_host": "true"}),
    }
    for message, (script, changes) in cases.items():
        outcome = run_command(script, *options("run", **changes))
        assert outcome.code == 2 and message in outcome.err, outcome.err
    assert run_command(SFT, *options("run", **ATTENTION)).code == 0
    (tmp_path / "run/checkpoints/step-000004").rename(tmp_path / "gone")
    outcome = run_command(SFT, *options("run", optimizer__learning_rate=3e-3))
    assert outcome.code == 2 and "train.trained_weights: ['attention'] -> None" in outcome.err

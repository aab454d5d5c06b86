"""Full fine-tuning in float16 with loss scaling, and what `scripts/export.py` makes of a result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtune import models, optimization

SFT = "train/sft.py"
FILE = "transformer/diffusion_pytorch_model.safetensors"


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_float16_skips_overflows_and_resumes_with_its_scale(
    options: Callable[..., list[str]],
    run_command: Any,
    read_tensors: Any,
    tiny_2b_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float32 weights computed with in float16 by autocast, as for 2B; the first scale is far too large."""
    monkeypatch.setattr(optimization, "FIRST_LOSS_SCALE", 2.0**23)
    # A CPU refuses float16, since it is slow there; it runs all the same.
    monkeypatch.setattr(models, "choose_dtype", lambda *_: torch.float16)
    settings: dict[str, object] = {"model__path": tiny_2b_folder, "model__dtype": "float16", "train__max_steps": 8}
    settings |= {"checkpoint__every_steps": 4, "checkpoint__keep_last": 9, "optimizer__learning_rate": 1e-3}
    outcome = run_command(SFT, *options("run", **settings))
    assert outcome.code == 0, outcome.err
    rows = read_rows(tmp_path / "run")
    skipped = rows[-1]["skipped_steps"]
    assert 1 <= skipped < 8 and all(row["loss"] == row["loss"] for row in rows)
    checkpoints = tmp_path / "run/checkpoints"
    states = {
        step: json.loads((checkpoints / f"step-{step:06d}/manifest.json").read_text())["state"]["guard"]
        for step in (4, 8)
    }
    assert states[8] == {"scale": 2.0 ** (23 - skipped), "good": 8.0 - skipped, "skipped": float(skipped)}
    assert states[4]["skipped"] == min(4, skipped)
    before = load_file(tiny_2b_folder / FILE)
    straight = read_tensors(checkpoints / "step-000008")
    name = "weights.proj_out.weight"
    assert straight[name].dtype == torch.float32
    assert not torch.equal(straight[name], before["proj_out.weight"])
    assert not torch.equal(straight[name], straight[name].half().float()), "float32 weights, not rounded ones"
    early = read_tensors(checkpoints / "step-000004")
    if skipped >= 4:
        assert torch.equal(early[name], before["proj_out.weight"]), "skipped steps change nothing"

    (checkpoints / "step-000008").rename(tmp_path / "straight")
    outcome = run_command(SFT, *options("run", **settings))
    assert outcome.code == 0 and "at step 4" in outcome.out
    resumed = read_tensors(checkpoints / "step-000008")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.items())
    assert read_rows(tmp_path / "run")[-1]["skipped_steps"] == skipped


def test_a_lora_of_the_difference_merged_again_is_the_result(
    options: Callable[..., list[str]], run_command: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"train__trained_weights": '["to_q", "to_out.0"]', "optimizer__learning_rate": 1e-2}
    assert run_command(SFT, *options("run", **settings)).code == 0
    final, adapter, merged = tmp_path / "run/final", tmp_path / "adapter", tmp_path / "merged"
    for arguments in (
        ["extract", tiny_folder, final, adapter, "--rank", 32],
        ["merge", tiny_folder, merged, "--lora", adapter],
        ["cast", final, tmp_path / "cast", "--dtype", "bfloat16"],
    ):
        outcome = run_command("scripts/export.py", *arguments)
        assert outcome.code == 0, outcome.err
    before, tuned, again, half = (load_file(path / FILE) for path in (tiny_folder, final, merged, tmp_path / "cast"))
    assert half.keys() == tuned.keys() and all(torch.equal(half[key], tuned[key].bfloat16()) for key in tuned)
    matrices = [key for key in tuned if not torch.equal(tuned[key], before[key]) and tuned[key].ndim == 2]
    assert len(matrices) == 4, "q and out of two blocks"
    for key in matrices:
        torch.testing.assert_close(again[key], tuned[key], rtol=0, atol=1e-5)
        assert not torch.allclose(again[key], before[key], rtol=0, atol=1e-3)

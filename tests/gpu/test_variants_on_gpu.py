"""Image-to-video and version 1.5 on a GPU: compiled training of several formats, validation, and a video."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cogtune.video import read_video, write_video

SIZES = [(17, 64, 96), (33, 64, 96), (17, 64, 64), (9, 64, 96)]


@pytest.mark.parametrize("model", ["tiny-i2v", "tiny-1.5", "tiny-1.5-i2v"])
def test_compiled_training_and_sampling(
    model: str,
    variant_folder: Callable[[str], Path],
    run_command: Any,
    tmp_path: Path,
    draw_clip: Callable[..., np.ndarray],
) -> None:
    takes_image = model.endswith("i2v")
    sizes = SIZES[:1] if model == "tiny-i2v" else SIZES  # learned positions have one size
    for number in range(12):
        write_video(tmp_path / f"clips/{number}.mp4", draw_clip(number, *sizes[number % len(sizes)]), 8)
        (tmp_path / f"clips/{number}.txt").write_text("waves")
    Image.fromarray(draw_clip(9)[0]).save(tmp_path / "first.png")
    validation: dict[str, Any] = {"prompts": ["waves"], "num_inference_steps": 4}
    data: dict[str, Any] = {"manifest": str(tmp_path / "clips"), "cache_dir": str(tmp_path / "cache"), "fps": 8}
    data["validation_clips"] = 2
    if takes_image:
        validation["images"] = [str(tmp_path / "first.png")]
    if len(sizes) > 1:
        data["buckets"] = ["x".join(map(str, size)) for size in sizes]
    config = {
        "model": {"path": str(variant_folder(model)), "dtype": "bfloat16"},
        "data": data,
        "adapter": {"rank": 16},
        "train": {"max_steps": 12, "batch_size": 2},
        "validation": validation,
        "tracking": {"log_every_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = run_command("train/lora.py", "--config", tmp_path / "run.yaml")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row.get("loss", row.get("eval_loss"))) for row in rows)
    assert "recompile_limit" not in done.err
    made = run_command(
        "scripts/generate.py", "--model", variant_folder(model), "--lora", tmp_path / "run/final", "--prompt", "waves",
        "--steps", 4, "--compile", "on", "--output", tmp_path / "out.mp4",
        *(("--image", tmp_path / "first.png") if takes_image else ()),
    )  # fmt: skip
    assert made.code == 0, made.err
    assert len(read_video(tmp_path / "out.mp4")) == 17 and torch.cuda.max_memory_allocated() > 0

"""Prior clips in whole runs: what they are trained towards, their weight, and that batches may mix them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from ranks import start_ranks

CLIPS = ("clip0.mp4", "clip1.mp4")
SEED_THAT_BEGINS_WITH_IT = 0
"""Of a run over two clips: the second one, the prior, is its first sample."""


@pytest.fixture
def make_job(tiny_folder: Path, clips_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A config over two clips, of which the second may be prior; equal but for what is given."""

    def make(name: str, *, prior: bool = True, **train: Any) -> Path:
        rows = [{"video": clip, "caption": f"coloured waves {clip}"} for clip in CLIPS]
        rows[1] |= {"prior": True} if prior else {}
        for clip in CLIPS:
            if not (tmp_path / clip).exists():
                (tmp_path / clip).write_bytes((clips_folder / clip).read_bytes())
        manifest = tmp_path / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": {"path": str(tiny_folder)},
            "data": {"manifest": str(manifest), "cache_dir": str(tmp_path / "cache"), "num_workers": 0},
            "train": {"max_steps": 3, "timestep_strata": 2, "caption_dropout": 0.0} | train,
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"warmup_steps": 0},
            "validation": {"enabled": False},
            "tracking": {"log_every_steps": 1},
            "output_dir": str(tmp_path / name),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_first_loss_of_a_prior_clip_is_zero_and_batches_may_mix(
    make_job: Callable[..., Path], run_command: Any, tmp_path: Path
) -> None:
    """Before the first step the adapter changes nothing, so the base model's prediction is its own."""
    runs = {
        "plain": {"prior": False},
        "held": {},
        "weighty": {"prior_weight": 5.0},
        "themselves": {"prior_target": "clip"},
    }
    for name, options in runs.items():
        done = run_command("train/lora.py", "--config", make_job(name, batch_size=2, **options))
        assert done.code == 0, done.err
    first = {name: losses(tmp_path / name)[0] for name in runs}
    assert first["themselves"] == first["plain"] > 1.5 * first["held"], "two samples, of which one costs nothing"
    assert first["weighty"] == first["held"]
    later = {name: losses(tmp_path / name)[2] for name in runs}
    assert len({later["held"], later["weighty"], later["themselves"]}) == 3
    weights = [
        load_file(tmp_path / name / "final/pytorch_lora_weights.safetensors") for name in ("plain", "themselves")
    ]
    assert all(bool((tensor == weights[1][key]).all()) for key, tensor in weights[0].items())


def test_a_run_may_begin_with_a_prior_clip(make_job: Callable[..., Path], run_command: Any, tmp_path: Path) -> None:
    """No loss, and so no gradient in any layer: nothing is wrong."""
    done = run_command("train/lora.py", "--config", make_job("alone", batch_size=1, seed=SEED_THAT_BEGINS_WITH_IT))
    assert done.code == 0, done.err
    first, second, _ = losses(tmp_path / "alone")
    assert first == 0 < second


def test_the_plan_says_what_prior_clips_are_trained_towards(make_job: Callable[..., Path], run_command: Any) -> None:
    done = run_command("train/lora.py", "--config", make_job("a"), "--dry-run")
    assert "1 of the clips, trained towards the base model's predictions" in done.out
    done = run_command("train/sft.py", "--config", make_job("b"), "--dry-run")
    assert done.code == 0 and "1 of the clips, trained towards themselves" in done.out
    done = run_command("train/lora.py", "--config", make_job("c", prior=False), "--dry-run")
    assert "of the clips, trained" not in done.out


def test_a_penalty_holds_the_adapter_back_in_one_process_and_in_two(
    make_job: Callable[..., Path], run_command: Any, execute: Callable[..., int], tmp_path: Path
) -> None:
    """A mighty one leaves nearly nothing of the updates that a run without it makes; two processes find the same."""
    runs = {"free": {}, "held": {"prior_penalty": 1e6, "prior_penalty_samples": 4}}
    size = {}
    for name, options in runs.items():
        done = run_command("train/lora.py", "--config", make_job(name, batch_size=2, max_steps=6, **options))
        assert done.code == 0, done.err
        assert ("penalty     from 4 prior samples" in done.out) == (name == "held")
        tensors = load_file(tmp_path / name / "final/pytorch_lora_weights.safetensors")
        size[name] = sum(float(tensor.square().sum()) for key, tensor in tensors.items() if "lora_B" in key)
    assert 0 < size["held"] < 0.5 * size["free"]
    job = make_job("two", batch_size=1, max_steps=6, **runs["held"])
    ranks = start_ranks(execute, tmp_path / "printed", "train/lora.py", [["--config", str(job)]] * 2)
    assert ranks.wait(120) == [0, 0], ranks.text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "held"), rel=1e-3)


def test_full_fine_tuning_has_no_base_model_to_ask(make_job: Callable[..., Path], run_command: Any) -> None:
    done = run_command("train/sft.py", "--config", make_job("a", prior_target="base"))
    assert done.code == 2 and "train.prior_target=base: full fine-tuning" in done.err

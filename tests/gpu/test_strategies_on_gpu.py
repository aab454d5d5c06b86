"""Every strategy on 2 GPUs (4 where there are): compiled, in float32 equal to one GPU, in bfloat16 near it.

python -m pytest tests/gpu/test_strategies_on_gpu.py      (about a launch of 20 s for each strategy; needs 2 GPUs)
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
NUM_GPUS = 4 if torch.cuda.device_count() >= 4 else 2
pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, there are {torch.cuda.device_count()}"
)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = FSDP2 | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def zero(stage: int, **offload: str) -> dict[str, str]:
    settings = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    return settings | {f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE": place for name, place in offload.items()}


STRATEGIES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "fsdp2-whole-blocks": FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"},
    "fsdp2-host": FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"},
    "hsdp": HSDP,
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero3-offload": zero(3, optimizer="cpu", param="cpu"),
}


def run(script: str, config: Path, num_gpus: int, environment: dict[str, str], *options: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_gpus)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / script), "--config", str(config)]
    folders = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = os.environ | {"PYTHONPATH": folders} | environment
    done = subprocess.run(
        [*command, *options], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=220, check=False
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]


def run_side_by_side(*runs: tuple[Any, ...]) -> None:
    """Each of them `run`'s arguments; starting takes longer than training."""
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda arguments: run(*arguments), runs))


def read_losses(folder: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("script", ["train/lora.py", "train/sft.py"])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_strategy_trains_as_one_gpu_does(
    strategy: str, script: str, dtype: str, make_job: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    if strategy == "hsdp" and NUM_GPUS < 4:
        pytest.skip("needs 4 GPUs: 2 copies of 2 parts")
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    config = make_job(
        tiny_folder,
        model={"dtype": dtype},
        memory={"allow_tf32": False, "mode": "keep_attention"},
        schedule={"warmup_steps": 0},
        tracking={"log_every_steps": 1},
    )
    spread, one = tmp_path / "spread", tmp_path / "one"
    run_side_by_side(
        (script, config, NUM_GPUS, STRATEGIES[strategy], f"--output_dir={spread}"),
        (script, config, 1, {}, f"--output_dir={one}", f"--train.batch_size={NUM_GPUS}"),
    )
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert read_losses(spread) == pytest.approx(read_losses(one), rel=tolerance)
    assert len(list((spread / "samples" / "step-000012").glob("*.mp4"))) == 2
    if script == "train/lora.py":
        assert all(t.any() for t in load_file(spread / "final" / "pytorch_lora_weights.safetensors").values())
    else:
        assert (spread / "final" / "model_index.json").is_file()


@pytest.mark.timeout(700)
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2-host", "zero1", "zero2", "zero3", "zero3-offload"])
def test_an_average_of_a_part_is_that_of_one_gpu(
    strategy: str, make_job: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    """In bfloat16, beside training and on the host: losses, and an evaluation with the average."""
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    config = make_job(
        tiny_folder,
        model={"dtype": "bfloat16"},
        train={"ema_decay": 0.8, "ema_on_host": True, "trained_weights": ["attention", "last 1 blocks"]},
        checkpoint={"asynchronous": "on"},
        schedule={"warmup_steps": 0},
        tracking={"log_every_steps": 1},
    )
    spread, one = tmp_path / "spread", tmp_path / "one"
    run_side_by_side(
        ("train/sft.py", config, NUM_GPUS, STRATEGIES[strategy], f"--output_dir={spread}"),
        ("train/sft.py", config, 1, {}, f"--output_dir={one}", f"--train.batch_size={NUM_GPUS}"),
    )
    for key in ("loss", "eval_loss"):
        assert read_losses(spread, key) == pytest.approx(read_losses(one, key), rel=2e-2)
    assert (spread / "final" / "model_index.json").is_file()


def test_a_run_goes_on_under_another_strategy(make_job: Callable[..., Path], tiny_folder: Path, tmp_path: Path) -> None:
    config: Any = make_job(
        tiny_folder, model={"dtype": "bfloat16"}, schedule={"warmup_steps": 0}, tracking={"log_every_steps": 1}
    )
    straight, other = tmp_path / "straight", tmp_path / "other"
    run("train/sft.py", config, 2, FSDP2, f"--output_dir={straight}")
    start = straight / "checkpoints" / "step-000006"
    run("train/sft.py", config, 2, zero(3), f"--output_dir={other}", f"--checkpoint.resume={start}")
    assert read_losses(other) == pytest.approx(read_losses(straight)[6:], rel=2e-2)

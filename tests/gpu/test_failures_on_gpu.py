"""Doctor and lost ranks with NCCL.  python -m pytest tests/gpu/test_failures_on_gpu.py   (2 GPUs; one for the first)"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, found {torch.cuda.device_count()}")
WITHIN_SECONDS = 60


def launch(num: int, script: str, *options: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    return subprocess.Popen(
        [*command, str(ROOT / script), *map(str, options)],
        cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def find_rank(rank: int) -> int:
    """The training process of that rank, by its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"RANK={rank}" in environment and "COGTUNE_TEST=killed" in environment and "spawn_main" not in arguments:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize("num", [1, pytest.param(2, marks=TWO)])
def test_doctor_measures_gpus_and_links(num: int, tmp_path: Path) -> None:
    output, _ = (process := launch(num, "scripts/doctor.py", f"--folder={tmp_path}")).communicate(timeout=150)
    assert process.returncode in (0, 1), output  # 1: it found something, such as another program on the GPU
    name = torch.cuda.get_device_properties(0).name
    # The launcher has a traceback of its own where the doctor ends with 1.
    assert output.count(name) >= num and "NCCL" in output and 'doctor.py", line' not in output, output
    rows = [line.split() for line in output.splitlines() if name in line and re.match(r"\d+ ", line)]
    assert len(rows) == num
    if num > 1:
        assert all(float(row[-3]) > 1 for row in rows), "GB/s of the all-reduce"


@TWO
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_nccl_rank_ends_all_within_a_minute(
    victim: int, tiny_folder: Path, clips_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model.path": tiny_folder, "data.manifest": clips_folder, "data.cache_dir": tmp_path / "cache",
        "data.validation_clips": 0, "output_dir": tmp_path / "run", "train.max_steps": 100000, "train.compile": "off",
        "schedule.name": "constant", "schedule.warmup_steps": 0, "checkpoint.every_steps": 2,
        "tracking.log_every_steps": 1, "validation.enabled": "false",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in options.items()]
    process = launch(2, "train/lora.py", *arguments, COGTUNE_TEST="killed")
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    other = find_rank(1 - victim)
    os.kill(find_rank(victim), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode != 0 and time.monotonic() - killed < WITHIN_SECONDS
    assert re.search(rf"rank {victim} \(node \S+\),? last seen at step \d+ in ", output), output
    assert not Path(f"/proc/{other}").exists()
    done = metrics.read_text().count("\n")
    again = launch(2, "train/lora.py", *arguments, f"--train.max_steps={done}")
    output, _ = again.communicate(timeout=150)
    assert again.returncode == 0 and "resumed from" in output

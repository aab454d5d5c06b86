"""The job scripts with a stand-in for slurm: two nodes, a preemption, the requeued job goes on; and their syntax."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from patience import patient

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts" / "slurm").iterdir())

# `srun` starts a copy of the step for each node; `scancel` signals every process of the step, as slurmstepd does.
STAND_INS = {
    "srun": """#!{python}
import os, pathlib, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("-"):
    arguments.pop(0)
nodes = [
    subprocess.Popen(arguments, env=os.environ | {{"SLURM_NODEID": str(node)}}, start_new_session=True)
    for node in range(int(os.environ["SLURM_NNODES"]))
]
pathlib.Path("{folder}/step").write_text(" ".join(str(node.pid) for node in nodes))
sys.exit(max(abs(node.wait()) for node in nodes))
""",
    "scancel": """#!{python}
import os, pathlib, signal, sys
assert sys.argv[1:] == ["--signal=USR1", os.environ["SLURM_JOB_ID"]], sys.argv
open_ = pathlib.Path("{folder}/step").read_text().split()
while open_:
    pid = open_.pop()
    for task in pathlib.Path(f"/proc/{{pid}}/task").iterdir():
        open_ += (task / "children").read_text().split()
    os.kill(int(pid), signal.SIGUSR1)
""",
    "scontrol": """#!{python}
import pathlib, sys
if sys.argv[1] == "show":
    print("localhost\\nlocalhost")
else:
    with pathlib.Path("{folder}/requeued").open("a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a job of two nodes with one GPU each."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(text.format(python=sys.executable, folder=folder))
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "1", "SAVE_SECONDS": "60",
    }  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_scripts_are_sound(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    text = path.read_text()
    if path.suffix == ".sbatch":
        directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        assert "#SBATCH --signal=B:USR1@120" in directives and "#SBATCH --requeue" in directives
        assert "set -euo pipefail" in text and text.index("#SBATCH") < text.index("set -euo")
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--exclude=SC1091", "--shell=bash", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def start(script: str, cluster: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = ["bash", str(ROOT / "scripts" / "slurm" / script), *options]
    return subprocess.Popen(
        command, env=cluster, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_job_whose_time_is_over_is_requeued_and_goes_on(
    options: Any, execute: Any, cluster: dict[str, str], tmp_path: Path
) -> None:
    settings = {"schedule__name": "constant", "checkpoint__every_steps": 100000}
    process = start("many_nodes.sbatch", cluster, *options("job", train__max_steps=100000, **settings))
    deadline = time.monotonic() + patient(120)
    while len(rows_of(tmp_path / "job")) < 3:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=patient(30))
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # to the batch script alone
    output, _ = process.communicate(timeout=patient(90))
    assert process.returncode == 0, output
    assert "stopped by a signal; the checkpoint is saved" in output
    requeued = tmp_path / "slurm" / "requeued"
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    saved = [int(path.name[5:]) for path in (tmp_path / "job" / "checkpoints").glob("step-*")]
    assert len(saved) == 1 and saved[0] >= 3
    # The job that goes on: as one node this time, and to the end; it is not requeued.
    rest = options("job", train__max_steps=saved[0] + 2, train__batch_size=2, **settings)
    again = start("one_node.sbatch", cluster | {"SLURM_NNODES": "1", "LAUNCH": "python"}, *rest)
    output, _ = again.communicate(timeout=patient(120))
    assert again.returncode == 0, output
    assert f"at step {saved[0]}" in output and requeued.read_text().count("requeue") == 1
    assert [row["step"] for row in rows_of(tmp_path / "job")] == list(range(1, saved[0] + 3))
    straight = options("straight", train__max_steps=saved[0] + 2, train__batch_size=2, **settings)
    assert execute("train/lora.py", *straight) == 0
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("job", "straight")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_job_that_fails_is_not_requeued_and_says_so(cluster: dict[str, str], tmp_path: Path) -> None:
    failing = cluster | {"LAUNCH": "false", "SLURM_NNODES": "1"}
    process = start("one_node.sbatch", failing)
    process.communicate(timeout=patient(30))
    assert process.returncode == 1 and not (tmp_path / "slurm" / "requeued").exists()

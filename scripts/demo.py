"""The whole way from clips to a video on any computer, in about two minutes: check, prepare, train, resume, generate.

    make demo            (or: python scripts/demo.py)

It draws six clips of 49 frames and fine-tunes an adapter on them as `configs/demo.yaml` says. The base model is a tiny
one with RANDOM weights: the demo shows every step and every file, not pretty pictures.
"""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from cogtune.errors import UserError, run_command
from cogtune.random_pipeline import write_random_pipeline
from cogtune.shapes.render import blend, coverage
from cogtune.shapes.world import COLOURS
from cogtune.video import write_video

FOLDER, CONFIG = Path("runs/demo"), Path("configs/demo.yaml")
NUM_FRAMES = 49
STOP_AFTER_ROWS = 12


def draw_clips(folder: Path) -> None:
    """Six clips of a circle that crosses the picture, each with its caption beside it."""
    for number, colour in enumerate(sorted(COLOURS)):
        centres = np.linspace((20 + 4 * number, 14), (70, 24 + 5 * number), NUM_FRAMES)
        alpha = coverage("circle", centres, np.full(NUM_FRAMES, 10.0))
        frames = blend(np.full((*alpha.shape, 3), 200.0, np.float32), alpha, COLOURS[colour])
        write_video(folder / f"{colour}.mp4", (frames + 0.5).astype(np.uint8), 8)
        (folder / f"{colour}.txt").write_text(f"a {colour} circle moves\n")


def run(*command: str) -> None:
    """Shows and runs one of the project's commands."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise UserError(f"{command[0]} failed; its message is above")


def run_and_stop(*command: str) -> None:
    """Starts training and ends it by SIGTERM as a cluster would; it saves a checkpoint and exits with 0."""
    print(f"\n$ python {shlex.join(command)}     (will be told to stop)", flush=True)
    process = subprocess.Popen([sys.executable, *command])
    metrics = FOLDER / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= STOP_AFTER_ROWS):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    if process.wait():
        raise UserError(f"{command[0]} failed; its message is above")


def main() -> None:
    """Clips, base, then the four commands that a user runs."""
    if FOLDER.exists():
        raise UserError(f"{FOLDER} exists; look at it, then delete it to run the demo again")
    started = time.monotonic()
    draw_clips(FOLDER / "clips")
    write_random_pipeline(FOLDER / "base", "tiny")
    print(
        "NOTE: the base model of this demo is random; its videos are noise. The commands and files are the real ones."
    )
    run("data/check.py", "--config", str(CONFIG))
    run("data/prepare.py", "--config", str(CONFIG))
    run_and_stop("train/lora.py", "--config", str(CONFIG))
    run("train/lora.py", "--config", str(CONFIG))
    prompt, out = "a red circle moves", str(FOLDER / "out.mp4")
    run("scripts/generate.py", "--model", str(FOLDER / "base"), "--lora", str(FOLDER / "run/final"),
        "--frames", str(NUM_FRAMES), "--steps", "10", "--prompt", prompt, "--output", out)  # fmt: skip
    print(f"\ndone in {time.monotonic() - started:.0f} s. Look at {FOLDER}/run/report.html and {out}")
    print("NOTE: the base model of this demo is random; its videos are noise.")


if __name__ == "__main__":
    run_command(main)

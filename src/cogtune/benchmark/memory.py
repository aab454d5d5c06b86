"""Runs encoding, training steps and sampling of random weights under caps of device memory, each in its own process.

    python scripts/bench.py memory --job prepare --caps 24,12,8,6,5 --json memory_prepare.json
    python scripts/bench.py memory --job lora --caps 24,16,12,8,6 --json memory_lora.json
    python scripts/bench.py memory --job generate --caps 24,16,12,8,6,5 --json memory_generate.json
    python scripts/bench.py memory --job sft --caps 40,24,16 --json memory_sft.json

A cap is in GB (10^9 bytes) and holds for PyTorch's allocator (`torch.cuda.set_per_process_memory_fraction`); the
driver's context is not in it. Without a cap, the fastest way is the reference. The program chooses the rung, as a run
does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogtune.benchmark.clock import attempt
from cogtune.errors import UserError
from cogtune.random_pipeline import ARCHITECTURES

JOBS = ("prepare", "lora", "generate", "sft")
UNCAPPED = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py memory`."""
    add = parser.add_argument
    add("--model", choices=list(ARCHITECTURES), default="cogvideox-5b")
    add("--job", default="all", help=f"all, or by comma: {', '.join(JOBS)}")
    add("--caps", default="24,16,12,8,6", help="GB of device memory, by comma; without a cap is always measured first")
    add("--steps", type=int, default=3, help="timed steps")
    add("--warmup", type=int, default=2, help="steps before them; the first one compiles")
    add("--rank", type=int, default=64)
    for name in ("num_frames", "height", "width"):
        add(f"--{name}", type=int, help="default: the model's own")
    add("--num_steps", type=int, default=50, help="sampling steps of a video, from the steps that were timed")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="memory settings of the runs, such as mode=...")
    add("--compile", choices=["on", "off"], default="on")
    add("--time_limit", type=float, default=540.0, help="seconds in all; what doesn't begin in time is left out")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--json", type=Path, help="write everything that was measured to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures each job under each cap; the file of `--json` is brought up to date after each."""
    try:
        caps = [UNCAPPED, *(float(cap) for cap in arguments.caps.split(",") if cap)]
    except ValueError:
        raise UserError(f"--caps {arguments.caps}: expected numbers of GB, such as 24,16,8") from None
    jobs = JOBS if arguments.job == "all" else tuple(filter(None, arguments.job.split(",")))
    if not jobs or set(jobs) - set(JOBS):
        raise UserError(f"--job {arguments.job}: expected all, or some of {', '.join(JOBS)}")
    results: dict[str, Any] = {"command": " ".join(sys.argv[1:]), "conditions": conditions(arguments), "jobs": {}}
    started = time.perf_counter()
    for job in jobs:
        rows = results["jobs"][job] = {}
        for cap in caps:
            left = arguments.time_limit - (time.perf_counter() - started)
            measure = partial(_run_apart, arguments, job, cap, left)
            row = {"error": "left out: no time"} if left < 5 else attempt(measure)
            rows[describe_cap(cap)] = row
            print(f"{job} {describe_cap(cap)}: {json.dumps(row)}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers hold for."""
    names = ("model", "rank", "steps", "warmup", "num_frames", "height", "width", "set", "compile")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {name: getattr(arguments, name) for name in names} | {"torch": torch.__version__, "host_gb": host}


def describe_cap(cap: float) -> str:
    """Name of a row."""
    return f"{cap:g} GB" if cap else "no cap"


def _run_apart(arguments: argparse.Namespace, job: str, cap: float, seconds: float) -> dict[str, Any]:
    """One measurement in a process of its own, which ends with its memory."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        options = {name: value for name, value in vars(arguments).items() if name not in ("json", "job", "caps")}
        task = json.dumps(options | {"job": job, "cap": cap, "output": str(output)})
        command = [sys.executable, "-m", "cogtune.benchmark.capped", task]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} s"}
        if not output.is_file():
            return {"error": done.stderr.strip()[-1500:] or f"ended with {done.returncode}"}
        return json.loads(output.read_text(encoding="utf-8"))


def describe(results: dict[str, Any]) -> str:
    """A table for each job: time against no cap, peaks against the prediction."""
    lines = []
    for job, rows in results["jobs"].items():
        lines += [f"\n{job}: seconds, against no cap, peak allocated / reserved / predicted GiB (error), host GiB, way"]
        reference = rows.get("no cap", {}).get("seconds")
        for name, row in rows.items():
            if "error" in row:
                lines.append(f"  {name:>7}  failed: {row['error'].splitlines()[-1][:200]}")
                continue
            relative = f"{row['seconds'] / reference:5.3f}x" if reference else ""
            peak = row.get("peak_allocated_gib")
            sizes = "no GPU"
            if peak is not None:
                sizes = f"{peak:.2f} / {row['peak_reserved_gib']:.2f}"
                if "predicted_gib" in row:
                    sizes += f" / {row['predicted_gib']:.2f} ({100 * (row['predicted_gib'] / peak - 1):+.1f} %)"
            lines.append(f"  {name:>7}  {row['seconds']:.3f} {relative}  {sizes}  {row['host_gib']:.1f}  {row['way']}")
    return "\n".join(lines)

"""Times one sample's training step, and one video's sampling steps, over several GPUs against one GPU.

    python scripts/bench.py context --gpus 1,2 --json context.json
    python scripts/bench.py context --models cogvideox-2b --kinds train --gpus 1,4

Random weights, made on the GPU. Each measurement is a launch of its own (`torch.distributed.run`) with its own limit of
time, so that one that fails or hangs costs no other. Measurements are named kind:model:way:gpus, with the ways

    train      ulysses, ring                 how tokens are attended to; `alone` on one GPU
    generate   halves, ulysses, ring         halves: those of guidance apart; `alone` on one GPU

Sampling by the ring is measured where --only names it.

Each also says how far it is from one GPU's result: the first loss, and the latents after all steps that were run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch

from cogtune.arrangement import Activations
from cogtune.benchmark.launches import launched
from cogtune.errors import UserError
from cogtune.random_pipeline import ARCHITECTURES

WAYS = {"train": ("ulysses", "ring"), "generate": ("halves", "ulysses", "ring")}
_BY_DEFAULT = {"train": WAYS["train"], "generate": ("halves", "ulysses")}
ALONE = "alone"
_LEAST_SECONDS = 5
_WORKER = ["-m", "cogtune.benchmark.shared_work"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py context`."""
    add = parser.add_argument
    add("--models", default="cogvideox-5b", help=f"by comma, of {', '.join(ARCHITECTURES)}")
    add("--kinds", default="train,generate", help="train, generate or both, by comma")
    add("--gpus", help="numbers of GPUs, by comma; default: 1, 2, 4, ... up to all")
    add("--only", help="instead: these measurements, by comma, such as train:cogvideox-5b:ulysses:2")
    add("--steps", type=int, default=6, help="timed steps of a measurement")
    add("--warmup", type=int, default=3, help="steps before them; the first one compiles")
    add("--num_steps", type=int, default=50, help="sampling steps of a whole video, from the steps that were timed")
    add("--rank", type=int, default=64)
    add("--activations", choices=get_args(Activations), default="keep_products", help="of training")
    for name in ("num_frames", "height", "width"):
        add(f"--{name}", type=int, help="default: the model's own")
    add("--compile", choices=["on", "off"], default="on")
    add("--profile", action="store_true", help="where a training step's time goes, by kernel, on the first rank")
    add("--time_limit", type=float, default=200.0, help="seconds of a measurement")
    add("--total_limit", type=float, default=540.0, help="seconds in all; what doesn't begin in time is left out")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--json", type=Path, help="write everything that was measured to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures part by part; the file of `--json` is brought up to date after each."""
    parts = list_parts(arguments)
    results: dict[str, Any] = {"command": " ".join(sys.argv[1:]), "torch": torch.__version__, "parts": {}}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            left = min(arguments.time_limit, arguments.total_limit - (time.perf_counter() - started))
            row = (
                {"error": "left out: no time"}
                if left < _LEAST_SECONDS
                else _run_apart(part, arguments, Path(folder), left)
            )
            results["parts"][part] = row
            print(f"{part}: {json.dumps(row)}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def list_parts(arguments: argparse.Namespace) -> list[str]:
    """The measurements' names, those on one GPU first; raises `UserError` for unknown ones."""
    if arguments.only:
        parts = list(filter(None, arguments.only.split(",")))
    else:
        kinds, models = arguments.kinds.split(","), arguments.models.split(",")
        gpus = _list_gpus(arguments)
        parts = [
            f"{kind}:{model}:{way}:{count}"
            for model in models
            for count in gpus
            for kind in kinds
            for way in ((ALONE,) if count == 1 else _BY_DEFAULT.get(kind, (ALONE,)))
        ]
    for part in parts:
        kind, model, way, count = parse_part(part)
        if kind not in WAYS or model not in ARCHITECTURES or way not in ((ALONE,) if count == 1 else WAYS[kind]):
            raise UserError(
                f"{part}: expected kind:model:way:gpus with a kind of {', '.join(WAYS)}, a model of "
                f"{', '.join(ARCHITECTURES)} and a way of that kind, see --help"
            )
    return parts


def parse_part(name: str) -> tuple[str, str, str, int]:
    """Kind, model, way and number of GPUs of a measurement's name."""
    fields = name.split(":")
    if len(fields) != 4 or not fields[3].isdecimal() or int(fields[3]) < 1:
        raise UserError(f"{name}: expected kind:model:way:gpus, such as train:cogvideox-5b:ulysses:2")
    return fields[0], fields[1], fields[2], int(fields[3])


def _list_gpus(arguments: argparse.Namespace) -> list[int]:
    if arguments.gpus:
        try:
            return [int(count) for count in arguments.gpus.split(",")]
        except ValueError:
            raise UserError(f"--gpus {arguments.gpus}: expected numbers, such as 1,2,4") from None
    there = 1 if arguments.device == "cpu" else max(1, torch.cuda.device_count())
    return [1 << power for power in range(there.bit_length()) if 1 << power <= there]


def _run_apart(part: str, arguments: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """One measurement in processes of its own, all of which end with it."""
    output = folder / "result.json"
    output.unlink(missing_ok=True)
    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    task = json.dumps(options | {"part": part, "output": str(output), "folder": str(folder)})
    count = parse_part(part)[3]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *launch, *_WORKER, task]
    log = folder / "log.txt"
    late = False
    with launched(command, log) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
    if output.is_file():  # also where it was ended after it had measured
        return json.loads(output.read_text(encoding="utf-8"))
    said = log.read_text(encoding="utf-8", errors="replace").strip()
    print(said[-6000:], flush=True)
    how = f"not done after {seconds:.0f} s" if late else f"ended with {process.returncode}"
    errors = [line for line in said.splitlines() if "Error" in line]
    return {"error": f"{how}: {(errors or said.splitlines() or ['nothing was said'])[0][-400:]}"}


def describe(results: dict[str, Any]) -> str:
    """A line for each measurement, with its time against one GPU's."""
    lines = []
    for name, row in results["parts"].items():
        if "error" in row:
            lines.append(f"{name:<38} failed: {row['error'][:200]}")
            continue
        kind, model, _, _ = parse_part(name)
        alone = results["parts"].get(f"{kind}:{model}:{ALONE}:1", {}).get("step_seconds")
        ratio = f"{row['step_seconds'] / alone:6.3f} of one GPU's" if alone else ""
        video = f"  {row['video_seconds']:6.1f} s a video" if "video_seconds" in row else ""
        peak = f"  {row['peak_allocated_gib']:5.1f} GiB" if "peak_allocated_gib" in row else ""
        off = f"  off by {row['deviation']:.1e}" if "deviation" in row else ""
        lines.append(f"{name:<38} {row['step_seconds']:7.4f} s a step{video}  {ratio}{peak}{off}")
    return "\n".join(lines)

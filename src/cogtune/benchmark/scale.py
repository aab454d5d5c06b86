"""Times training steps of random weights on several GPUs under each strategy, against one GPU.

    python scripts/bench.py scale --gpus 2 --json scale2.json
    python scripts/bench.py scale --gpus 4 --parts sft-one,sft-fsdp2,sft-zero2 --json scale4.json

Each part runs in processes of its own, by torchrun where there are several, and is ended at its time limit. `sft-one`
is full fine-tuning with 8-bit state, which is how 5B fits one GPU. The program chooses what activations are kept, as a
run does; a part that runs out of memory is tried once more with the least. Samples a second are of all GPUs together.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cogtune.benchmark.launches import launched
from cogtune.errors import UserError
from cogtune.random_pipeline import ARCHITECTURES

_FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def _zero(stage: int) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


PARTS: dict[str, dict[str, str] | None] = {
    "lora-one": None,
    "lora-ddp": {},
    "lora-fsdp2": _FSDP2,
    "sft-one": None,
    "sft-fsdp2": _FSDP2,
    "sft-zero2": _zero(2),
    "sft-zero3": _zero(3),
}
"""What the launcher would have set; None: one process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py scale`."""
    add = parser.add_argument
    add("--gpus", type=int, default=2, help="processes of the parts that are spread")
    add("--model", choices=list(ARCHITECTURES), default="cogvideox-5b")
    add("--parts", default="all", help=f"all, or by comma: {', '.join(PARTS)}")
    add("--steps", type=int, default=6, help="timed steps")
    add("--warmup", type=int, default=3, help="steps before them; the first one compiles")
    add("--rank", type=int, default=64)
    add("--batch_size", type=int, default=1, help="samples of each GPU")
    for name in ("num_frames", "height", "width"):
        add(f"--{name}", type=int, help="default: the model's own")
    add("--activations", default="auto", help="memory.mode of all parts")
    add("--compile", choices=["on", "off"], default="on")
    add("--time_limit", type=float, default=170.0, help="seconds of a part")
    add("--total_time_limit", type=float, default=540.0, help="seconds in all; what doesn't begin in time is left out")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--json", type=Path, help="write everything that was measured to this file")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures each part; the file of `--json` is brought up to date after each."""
    parts = list(PARTS) if arguments.parts == "all" else arguments.parts.split(",")
    if not parts or set(parts) - set(PARTS):
        raise UserError(f"--parts {arguments.parts}: expected all, or some of {', '.join(PARTS)}")
    names = ("model", "gpus", "rank", "batch_size", "steps", "warmup", "num_frames", "height", "width", "compile")
    conditions = {name: getattr(arguments, name) for name in names} | {"torch": torch.__version__}
    results: dict[str, Any] = {"command": " ".join(sys.argv[1:]), "conditions": conditions, "parts": {}}
    started = time.perf_counter()
    for part in parts:
        left = arguments.total_time_limit - (time.perf_counter() - started)
        results["parts"][part] = _measure(arguments, part, left)
        print(f"{part}: {json.dumps(results['parts'][part])}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def _measure(arguments: argparse.Namespace, part: str, left: float) -> dict[str, Any]:
    """A part's numbers, or what went wrong."""
    if left < 5:
        return {"error": "left out: no time"}
    started = time.perf_counter()
    row = _run_apart(arguments, part, arguments.activations, min(arguments.time_limit, left))
    left -= time.perf_counter() - started
    if "out of memory" in row.get("error", "").lower() and left > 5:
        again = _run_apart(arguments, part, "recompute", min(arguments.time_limit, left))
        return again | {"first_try": row["error"][-300:]}
    return row


def _run_apart(arguments: argparse.Namespace, part: str, activations: str, seconds: float) -> dict[str, Any]:
    environment = PARTS[part]
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "result.json", Path(folder) / "log"
        skipped = ("json", "parts", "gpus", "time_limit", "total_time_limit")
        options = {name: value for name, value in vars(arguments).items() if name not in skipped}
        task = json.dumps(options | {"part": part, "activations": activations, "output": str(output)})
        command = [sys.executable, "-m", "cogtune.benchmark.scale_part", task]
        if environment is not None:
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(arguments.gpus)]
            rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
            command[1:1] = [*launcher, *rendezvous]
        with launched(command, log, environment) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:  # what it says about its end is not asked for
                return {"error": f"not done after {seconds:.0f} s: {_tail(log, 600)}"}
        if not output.is_file():
            return {"error": _tail(log, 3000) or f"ended with {process.returncode}"}
        return json.loads(output.read_text(encoding="utf-8"))


def _tail(log: Path, length: int) -> str:
    """What a part said at last; of an error, its own traceback and not the launcher's."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    first = text.partition("torch/distributed/elastic/multiprocessing/api.py")[0]
    return first[-length:]


def describe(results: dict[str, Any]) -> str:
    """A line a part: samples a second of all GPUs, against as many times one GPU, and memory of each."""
    parts, gpus = results["parts"], results["conditions"]["gpus"]
    lines = [f"{'part':<12} samples/s   of {gpus} x one GPU   peak GiB of a GPU (predicted)   step   way"]
    for part, row in parts.items():
        if "error" in row:
            lines.append(f"{part:<12} failed: {row['error'].splitlines()[-1][:200]}")
            continue
        one = parts.get(f"{part.partition('-')[0]}-one", {}).get("samples_per_second")
        share = row["samples_per_second"] / (one * row["num_processes"]) if one else None
        peak = row.get("peak_allocated_gib")
        memory = "no GPU" if peak is None else f"{peak:.1f} ({row['predicted_gib']:.1f})"
        lines.append(
            f"{part:<12} {row['samples_per_second']:9.3f}   {'' if share is None else f'{100 * share:5.1f} %':<16} "
            f"{memory:<30} {row['step_seconds']:.3f} s  {row['way']}"
        )
    return "\n".join(lines)

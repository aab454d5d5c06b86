"""Saves and reads checkpoints of full fine-tuning, random weights with AdamW's state divided over the GPUs.

    torchrun --nproc_per_node 2 scripts/bench.py checkpoint --json checkpoint.json
    python scripts/bench.py checkpoint --layers 10 --json checkpoint_one.json

For each save: how long training stands still, when the checkpoint is complete on disk, and how fast other work on GPU
and host goes meanwhile. Then how long it takes to check and read the last one. Weights are made on the GPUs, as
`fully_shard` divides them. Other than a run, it deletes the checkpoint before each save, so that one fits on the disk.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cogtune.benchmark.clock import synchronize
from cogtune.checkpoint import CheckpointFolder, read_checkpoint
from cogtune.config import OptimizerSettings
from cogtune.ema import Ema
from cogtune.errors import UserError
from cogtune.launch import read_launch
from cogtune.models import choose_device
from cogtune.optimization import make_optimizer
from cogtune.random_pipeline import ARCHITECTURES
from cogtune.shards.parts import ParameterParts
from cogtune.shards.pieces import local_part
from cogtune.shards.ranks import Ranks
from cogtune.shards.saver import ShardedSaver, ShardedState
from cogtune.shards.writer import CheckpointWriter

_GB = 1e9
_SPARE = 1.05
"""Of a checkpoint's size: what must be free on the disk."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py checkpoint`."""
    add = parser.add_argument
    add("--model", choices=list(ARCHITECTURES), default="cogvideox-5b")
    add("--layers", type=int, help="transformer blocks, for a smaller disk; default: the model's own")
    add("--saves", type=int, default=3)
    add("--asynchronous", choices=["on", "off"], default="on")
    add("--prepare", choices=["on", "off"], default="on", help="take the host memory before the first save, as a run")
    add("--ema", choices=["off", "device", "host"], default="off", help="with an average of the weights")
    add("--folder", type=Path, default=Path("runs/bench-checkpoint"), help="where to write; emptied at the end")
    add("--time_limit", type=float, default=480.0, help="seconds: no save or read begins that might take longer")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--json", type=Path, help="write everything that was measured to this file")


class Measurement:
    """One process's part."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.started = arguments, time.perf_counter()
        self.device = choose_device(arguments.device)
        if read_launch().num_processes > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.ranks = Ranks.connect()
        self.model = self._make_model()
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(list(self.parameters.values()), OptimizerSettings())
        for parameter in self.parameters.values():
            moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            for moment in moments.values():
                local_part(moment).normal_()
            self.optimizer.state[parameter] = {"step": torch.ones((), device=self.device), **moments}
        averaged = arguments.ema != "off"
        self.ema = Ema(self.parameters, 0.999, on_host=arguments.ema == "host") if averaged else None
        self.state = ShardedState(ParameterParts(self.parameters, self.optimizer), self.ema, self.ranks)
        self.folder = CheckpointFolder(arguments.folder, keep_last=1)
        writer = CheckpointWriter(self.folder, self.ranks, asynchronous=arguments.asynchronous == "on")
        self.saver = ShardedSaver(self.state, writer)

    def _make_model(self) -> nn.Module:
        config = dict(ARCHITECTURES[self.arguments.model][0])
        if self.arguments.layers is not None:
            config["num_layers"] = self.arguments.layers
        with torch.device("meta"):
            model = CogVideoXTransformer3DModel(**config)
        if self.ranks.world_size > 1:
            mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
            for block in model.transformer_blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model.to_empty(device=self.device)
        torch.manual_seed(1 + self.ranks.rank)
        with torch.no_grad():
            for parameter in model.parameters():
                local_part(parameter).normal_()
        return model

    def run(self) -> dict[str, Any]:
        """All numbers, the slowest process's; the checkpoint is deleted at the end."""
        result: dict[str, Any] = {"command": " ".join(sys.argv[1:]), "conditions": self._conditions()}
        self._check_disk(result)
        if self.ema is not None:
            result["ema_update_seconds"] = [self._update_average(step) for step in range(1, 4)]
        if self.arguments.prepare == "on":
            result["prepare_seconds"] = self._prepare()
        result["work_seconds_alone"] = self._slowest(self._work())
        result["saves"] = []
        for step in range(1, self.arguments.saves + 1):
            longest = max([save["complete_seconds"] for save in result["saves"]], default=0.0)
            if self._slowest(time.perf_counter() - self.started) + 1.3 * longest > self.arguments.time_limit:
                result["left_out"] = f"saves from {step} on: no time"
                break
            result["saves"].append(self._save(step))
            self._report(result)
        result["resume"] = self._resume(len(result["saves"]))
        self._report(result)
        self.ranks.gather(None)
        if self.ranks.rank == 0:
            shutil.rmtree(self.arguments.folder, ignore_errors=True)
        return result | {"rank": self.ranks.rank}

    def _conditions(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GB
        number = sum(p.numel() for p in self.parameters.values())
        return {
            "device": name,
            "processes": self.ranks.world_size,
            "parameters": number,
            "host": socket.gethostname(),
            "host_gb": round(host, 1),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }

    def _slowest(self, seconds: float) -> float:
        return max(self.ranks.gather(seconds))

    def _check_disk(self, result: dict[str, Any]) -> None:
        number = result["conditions"]["parameters"]
        size = number * (12 + (4 if self.ema is not None else 0))
        self.arguments.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.arguments.folder).free
        if free < _SPARE * size:
            raise UserError(
                f"--folder {self.arguments.folder}: a checkpoint takes {size / _GB:.1f} GB and {free / _GB:.1f} GB are "
                "free; give another folder, or fewer --layers"
            )
        result["checkpoint_gb"] = size / _GB

    def _prepare(self) -> float:
        started = time.perf_counter()
        self.saver.prepare()
        self.saver.writer.wait_until_prepared()
        return self._slowest(time.perf_counter() - started)

    def _update_average(self, step: int) -> float:
        assert self.ema is not None
        synchronize(self.device)
        started = time.perf_counter()
        self.ema.update(step)
        self.ema.wait()
        synchronize(self.device)
        return self._slowest(time.perf_counter() - started)

    def _save(self, step: int) -> dict[str, float]:
        if self.ranks.rank == 0:
            shutil.rmtree(self.arguments.folder, ignore_errors=True)
        synchronize(self.device)
        self.ranks.gather(None)
        started = time.perf_counter()
        self.saver.save(step, {})
        still = time.perf_counter() - started
        beside = self._work() if self.saver.writer.is_writing() else 0.0
        self.saver.wait()
        complete = self._slowest(time.perf_counter() - started)
        size = sum(self.ranks.gather(self.saver.writer.written_bytes)) / _GB
        return {
            "still_seconds": self._slowest(still),
            "complete_seconds": complete,
            "gb": size,
            "gb_per_second": size / complete,
            "work_seconds_beside": self._slowest(beside),
        }

    def _work(self) -> float:
        """Seconds of something that keeps a GPU and the host's launches busy, as training does."""
        size, count = (4096, 400) if self.device.type == "cuda" else (64, 50)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        a: Tensor = torch.ones(size, size, device=self.device, dtype=dtype)
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(count):
            a = (a @ a).clamp_(max=1.0).add_(1e-3)
        synchronize(self.device)
        return time.perf_counter() - started

    def _resume(self, step: int) -> dict[str, Any]:
        """Checks and reads the last checkpoint into weights of zero; all bits must come back."""
        before = self._digest()
        with torch.no_grad():
            for parameter in self.parameters.values():
                local_part(parameter).zero_()
        self.optimizer.state.clear()
        self.ranks.gather(None)
        started = time.perf_counter()
        checkpoint = read_checkpoint(self.folder.place(step), self.ranks)
        checked = self._slowest(time.perf_counter() - started)
        self.saver.load(checkpoint.folder)
        synchronize(self.device)
        seconds = self._slowest(time.perf_counter() - started)
        equal = all(self.ranks.gather(before == self._digest()))
        return {"check_seconds": checked, "seconds": seconds, "bits_are_equal": equal}

    def _digest(self) -> dict[str, int]:
        """A number for each tensor that changes with any of its bits; cheap on the device."""
        found = {}
        for name, parameter in self.parameters.items():
            for key, value in {"weight": parameter.detach(), **self.optimizer.state[parameter]}.items():
                bits = local_part(value).reshape(-1).view(torch.int32)
                found[f"{name}.{key}"] = int(bits.sum(dtype=torch.int64).item()) if bits.numel() else 0
        return found

    def _report(self, result: dict[str, Any]) -> None:
        if self.ranks.rank == 0 and self.arguments.json:
            self.arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures; every process of torchrun calls it."""
    if arguments.saves < 1:
        raise UserError(f"--saves {arguments.saves}: at least 1")
    measurement = Measurement(arguments)
    try:
        return measurement.run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def describe(result: dict[str, Any]) -> str:
    """A table for the first process, nothing for the others."""
    if result["rank"]:
        return ""
    conditions = result["conditions"]
    lines = [
        f"{conditions['device']} x {conditions['processes']}, {conditions['parameters'] / 1e9:.2f} billion weights, "
        f"{result['checkpoint_gb']:.1f} GB; host memory prepared in {result.get('prepare_seconds', 0):.2f} s"
    ]
    for number, save in enumerate(result["saves"], 1):
        slower = save["work_seconds_beside"] / result["work_seconds_alone"]
        lines.append(
            f"save {number}: training stands still {save['still_seconds']:.3f} s, complete after "
            f"{save['complete_seconds']:.1f} s ({save['gb_per_second']:.2f} GB/s), work beside it {slower:.2f}x"
        )
    if "ema_update_seconds" in result:
        lines.append("average: " + ", ".join(f"{seconds:.3f}" for seconds in result["ema_update_seconds"]) + " s")
    resume = result["resume"]
    lines.append(
        f"resume: checked in {resume['check_seconds']:.1f} s, in all {resume['seconds']:.1f} s, bits "
        f"{'equal' if resume['bits_are_equal'] else 'DIFFER'}"
    )
    return "\n".join([*lines, result.get("left_out", "")]).rstrip()

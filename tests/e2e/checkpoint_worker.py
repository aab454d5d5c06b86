"""Saves and reads checkpoints of a small sharded model on several processes, each case in turn.

torchrun --nproc_per_node N tests/e2e/checkpoint_worker.py save|load OUT

`save` leaves a checkpoint of each case and OUT/<case>.safetensors, the whole tensors as they were. `load` reads each
of them in this number of processes under every division, and compares. Any difference ends it with an error.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cogtune.checkpoint import CheckpointFolder, read_checkpoint
from cogtune.ema import Ema
from cogtune.errors import UserError
from cogtune.shards import writer as writer_module
from cogtune.shards.parts import ParameterParts
from cogtune.shards.ranks import Ranks
from cogtune.shards.saver import ShardedSaver, ShardedState
from cogtune.shards.writer import CheckpointWriter

OUT = Path(sys.argv[2])
CASES = ("fsdp", "hsdp", "ddp")


class Run:
    """A small model with its optimizer and average, divided over the processes as the case says."""

    def __init__(self, case: str, *, seed: int = 0, on_host: bool = False) -> None:
        torch.manual_seed(seed)
        # Odd sizes: rows that don't divide, and fewer rows than processes.
        model = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False), nn.Linear(3, 1))
        if case != "ddp":
            size = dist.get_world_size()
            shape = (size,) if case == "fsdp" else (2, size // 2)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        self.ema = Ema(self.parameters, 0.9, on_host=on_host)
        self.ranks = RANKS
        self.steps = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(self.steps))
            self.model(x).square().mean().backward()
            self.ema.wait()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            self.ema.update(self.steps)

    def state(self) -> ShardedState:
        return ShardedState(ParameterParts(self.parameters, self.optimizer), self.ema, self.ranks)

    def saver(self, folder: Path, *, asynchronous: bool = True, keep_last: int = 3) -> ShardedSaver:
        checkpoints = CheckpointFolder(folder, keep_last=keep_last)
        writer = CheckpointWriter(checkpoints, self.ranks, asynchronous=asynchronous, max_file_bytes=200)
        return ShardedSaver(self.state(), writer)

    def whole(self) -> dict[str, torch.Tensor]:
        """Every tensor gathered, by the name that it is saved under."""
        found = {}
        for name, value in self.state().collect().items():
            if isinstance(value, torch.Tensor):
                found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        with self.ema.swapped_in():
            for name, p in self.parameters.items():
                found[f"ema.{name}"] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        return found


def save_cases() -> None:
    for case in CASES:
        run = Run(case, on_host=case == "hsdp")
        run.train(2)
        saver = run.saver(OUT / case)
        saver.prepare()
        run.train(1)
        truth = run.whole()
        saver.save(3, {"case": case})
        run.train(1)  # beside the writing
        saver.wait()
        if RANK == 0:
            save_file(truth, OUT / f"{case}.safetensors")
            names = [path.name for path in (OUT / case).iterdir()]
            assert names == ["step-000003"], names
            files = json.loads((OUT / case / names[0] / "manifest.json").read_text())["files"]
            writers = {name.split("-")[1] for name in files}
            assert len(writers) == dist.get_world_size() and len(files) > len(writers), files
        dist.barrier()


def check_saving_twice() -> None:
    """A second save waits for the first; both are complete, and an older one goes after that."""
    run = Run("fsdp")
    run.train(1)
    saver, slow = run.saver(OUT / "twice", keep_last=1), slow_down(0.3)
    for step in (1, 2):
        saver.save(step, {})
        assert saver.writer.is_writing(), "training goes on while it is written"
        assert not (OUT / "twice" / f"step-00000{step}").exists()
        run.train(1)
    saver.wait()
    dist.barrier()
    assert [path.name for path in (OUT / "twice").iterdir()] == ["step-000002"]
    writer_module.write_file = slow


def slow_down(seconds: float) -> Any:
    before = writer_module.write_file

    def write_slowly(*arguments: Any) -> str:
        time.sleep(seconds / 10)
        return before(*arguments)

    writer_module.write_file = write_slowly
    return before


def check_error_reaches_all() -> None:
    """What one process can't write, all of them hear of; the older checkpoint stays."""
    for asynchronous in (True, False):
        run = Run("fsdp")
        run.train(1)
        folder = OUT / f"error-{asynchronous}"
        saver = run.saver(folder, asynchronous=asynchronous, keep_last=1)
        saver.save(1, {})
        saver.wait()
        before = writer_module.write_file

        def fail(*_: Any) -> str:
            raise OSError(28, "No space left on device")

        if dist.get_world_size() - 1 == RANK:
            writer_module.write_file = fail
        try:
            saver.save(2, {})
            saver.wait()
        except UserError as error:
            message = str(error)
            assert f"process {dist.get_world_size() - 1}: [Errno 28] No space left on device" in message, message
            assert "complete checkpoints: step-000001" in message, message
        else:
            raise AssertionError("no error came")
        writer_module.write_file = before
        dist.barrier()
        assert [path.name for path in folder.iterdir()] == ["step-000001"]
        dist.barrier()
        saver.save(3, {})
        saver.wait()
        dist.barrier()
        assert [path.name for path in folder.iterdir()] == ["step-000003"]


def check_digests_are_shared_out() -> None:
    """Damage that only one process looks at is an error of all."""
    folder = OUT / "error-True" / "step-000003"
    victim = sorted(folder.glob("*.safetensors"))[1]
    content = victim.read_bytes()
    dist.barrier()
    if RANK == 0:
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier()
    try:
        read_checkpoint(folder, RANKS)
    except UserError as error:
        assert victim.name in str(error), error
    else:
        raise AssertionError("no error came")
    dist.barrier()


def load_cases() -> None:
    for saved in CASES:
        checkpoint = read_checkpoint(OUT / saved / "step-000003", RANKS)
        truth = load_file(OUT / f"{saved}.safetensors")
        for case in CASES if dist.get_world_size() > 2 or saved == "fsdp" else ("fsdp", "ddp"):
            run = Run(case, seed=1, on_host=case == "fsdp")
            run.saver(OUT / "unused").load(checkpoint.folder)
            compare(run.whole(), truth, f"{saved} -> {case}")
            run.train(1)  # the optimizer takes its state up
    read_with_torch()
    load_whole_files()


def compare(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == truth.keys(), (what, found.keys() ^ truth.keys())
    for name, tensor in truth.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (what, name)


def read_with_torch() -> None:
    """torch.distributed.checkpoint's own reader takes our files, and divides them anew."""
    truth = load_file(OUT / "fsdp.safetensors")
    run = Run("fsdp", seed=1)
    wanted = {f"weights.{name}": p.detach() for name, p in run.parameters.items()}
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(OUT / "fsdp" / "step-000003")))
    for name, value in wanted.items():
        assert torch.equal(value.full_tensor(), truth[name]), name


def load_whole_files() -> None:
    """The files that one process writes whole, into shards."""
    truth = load_file(OUT / "fsdp.safetensors")
    folder = OUT / "whole"
    if RANK == 0:
        folder.mkdir(exist_ok=True)
        for group in ("weights", "optimizer", "ema"):
            part = {n.removeprefix(f"{group}."): t for n, t in truth.items() if n.startswith(f"{group}.")}
            save_file(part, folder / f"{group}.safetensors")
    dist.barrier()
    run = Run("fsdp", seed=1)
    run.saver(OUT / "unused").load(folder)
    compare(run.whole(), truth, "whole files")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    RANK, RANKS = dist.get_rank(), Ranks.connect()
    if sys.argv[1] == "save":
        save_cases()
        check_saving_twice()
        check_error_reaches_all()
        check_digests_are_shared_out()
    else:
        load_cases()
    dist.barrier()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    dist.destroy_process_group()

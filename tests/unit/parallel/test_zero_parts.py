"""DeepSpeed's float32 weights begin with the files' exact values though the model that it gets is rounded already."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from cogtune.config import RunConfig
from cogtune.formats.tensors import hold
from cogtune.full import TrainedModel
from cogtune.models import load_transformer, read_facts
from cogtune.parallel.deepspeed_engine import make_deepspeed_engine, make_settings
from cogtune.parallel.strategy import Strategy
from cogtune.shards.pieces import Piece

CPU = torch.device("cpu")


def check_on_rank(rank: int, world_size: int, folder: Path, store: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # compiled for speed on a CPU; gloo does without
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    for kind, offload in (("zero1", False), ("zero1", True), ("zero2", False), ("zero3", False), ("zero3", True)):
        check(kind, rank, world_size, folder, offload=offload)
    dist.destroy_process_group()


def check(kind: Any, rank: int, world_size: int, folder: Path, *, offload: bool) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    facts = read_facts(folder)
    exact = {name: p.detach().clone() for name, p in load_transformer(facts, torch.float32).named_parameters()}
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())
    names = [name for name in exact if "attn1" in name or name.startswith("proj_out")]
    transformer = load_transformer(facts, torch.bfloat16)
    model = TrainedModel(
        transformer, facts, "", export_dtype=torch.bfloat16, weights_dtype=torch.bfloat16, trained=set(names)
    )
    away = offload and kind == "zero3"
    strategy = Strategy(kind, world_size, world_size, offload_optimizer=offload, offload_weights=away)
    accelerator: Any = SimpleNamespace(device=CPU, is_main_process=rank == 0)
    engine = make_deepspeed_engine(
        accelerator,
        transformer,
        model.parameters(),
        config=RunConfig(),
        strategy=strategy,
        dtype=torch.bfloat16,
        compiled=False,
        initial=hold("the files", exact),
    )
    weights = engine.store.read_weights()
    assert weights.keys() == (set(names) if rank == 0 else set())
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, exact[name]), name
    covered = torch.zeros(len(names))
    for index, (name, piece) in enumerate(engine.store.parts.weights().items()):
        assert isinstance(piece, Piece) and piece.data.dtype == torch.float32
        assert torch.equal(piece.data, exact[name].flatten()[piece.start : piece.stop]), name
        covered[index] = piece.data.numel()
    dist.all_reduce(covered)
    assert covered.tolist() == [exact[name].numel() for name in names], "every number is one process's"
    for name, parameter in transformer.named_parameters():
        with GatheredParameters([parameter], enabled=kind == "zero3"):
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, exact[name].bfloat16()), name


def test_float32_weights_are_the_files(tiny_folder: Path, tmp_path: Path) -> None:
    """Of a part of the weights; three processes, so that parts end within weights."""
    multiprocessing.start_processes(
        check_on_rank, (3, tiny_folder, str(tmp_path / "store")), nprocs=3, start_method="fork"
    )


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_blocks_meet_pytorch_s_own_linear(compiled: bool) -> None:
    settings = make_settings(RunConfig(), Strategy("zero3", 2, 2), torch.bfloat16, compiled=compiled)
    assert settings["zero_optimization"] == {"stage": 3, "memory_efficient_linear": not compiled}

"""Full fine-tuning's weights are read to where they stay: what that takes of two processes' host memory and GPUs.

python -m pytest -s tests/gpu/test_loading_on_gpu.py      (needs 2 GPUs and 2.6 GB of disk; prints the numbers)
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file

from cogtune.full import TrainedModel
from cogtune.models import make_empty_transformer, read_facts
from cogtune.parallel.assembly import divide_transformer, place_transformer
from cogtune.parallel.strategy import Strategy
from cogtune.shards.pieces import local_part

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, there are {torch.cuda.device_count()}"
)


def read_peak() -> int:
    """The most memory that this process has had, in bytes."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024


def load_on_rank(rank: int, world_size: int, folder: Path, store: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    dist.all_reduce(torch.ones(1, device=device))
    facts = read_facts(folder)
    strategy = Strategy("fsdp2", world_size, world_size)
    memory = SimpleNamespace(num_resident=None, quantized=None)
    plan: Any = SimpleNamespace(
        facts=facts, memory=memory, strategy=strategy, dtype=torch.bfloat16, full=True, num_float8=0
    )
    torch.empty(1 << 20).to(device)  # what the first copy brings along counts as neither
    host, before = read_peak(), torch.cuda.memory_allocated()
    started = time.perf_counter()
    trained = TrainedModel(
        make_empty_transformer(facts, torch.float32), facts, "", export_dtype=torch.bfloat16, device=device
    )
    place_transformer(plan, trained, device)
    divide_transformer(plan, trained, device)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    whole = 4 * sum(parameter.numel() for parameter in trained.transformer.parameters())
    on_host, on_device = read_peak() - host, torch.cuda.max_memory_allocated() - before
    print(f"rank {rank}: {seconds:.2f} s; of {whole / 1e9:.2f} GB: host {on_host / 1e9:.3f}, GPU {on_device / 1e9:.3f}")
    parts = [local_part(parameter.detach()) for parameter in trained.transformer.parameters()]
    assert all(part.device == device and bool((part == 0.5).all()) for part in parts)
    assert on_host < 0.2 * whole and on_device < 0.6 * whole
    dist.destroy_process_group()


def test_processes_take_their_parts_alone(tiny_folder: Path, tmp_path: Path) -> None:
    """1.3 billion bfloat16 weights, all 0.5, into float32 parts on two GPUs."""
    config = json.loads((tiny_folder / "transformer" / "config.json").read_text())
    config |= {"num_layers": 20, "num_attention_heads": 32, "attention_head_dim": 64}
    with torch.device("meta"):
        meta = CogVideoXTransformer3DModel.from_config(config)
    wide = tmp_path / "wide"
    (wide / "transformer").mkdir(parents=True)
    (wide / "transformer" / "config.json").write_text(json.dumps(config))
    state = {name: torch.full(p.shape, 0.5, dtype=torch.bfloat16) for name, p in meta.named_parameters()}
    save_file(state, wide / "transformer" / "diffusion_pytorch_model.safetensors")
    for entry in tiny_folder.iterdir():
        if entry.name != "transformer":
            (wide / entry.name).symlink_to(entry)
    multiprocessing.spawn(load_on_rank, (2, wide, str(tmp_path / "store")), nprocs=2)

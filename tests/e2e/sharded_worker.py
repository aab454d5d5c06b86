"""Trains a tiny transformer for three steps on several processes and saves it as each of them would.

torchrun --nproc_per_node 2 tests/e2e/sharded_worker.py PIPELINE OUT

For each case OUT/<case> is the checkpoint and OUT/<case>.pt what the trained weights are.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported

import deepspeed
import deepspeed.comm.torch
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from cogtune import adapter, models
from cogtune.config import AdapterSettings

BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])
deepspeed.comm.torch.build_shm_op = lambda: None  # compiled for speed on a CPU; gloo does without


def make_model(kind: str) -> Any:
    model = models.load_transformer(models.read_facts(BASE), torch.float32)
    if kind == "lora":
        adapter.add_lora(model, AdapterSettings(rank=3, alpha=6.0), seed=1)
    else:
        model.requires_grad_(True)
    return model


def compute_loss(model: Any, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5 + dist.get_rank())
    latents = torch.randn(1, 5, 16, 8, 12, generator=generator).to(dtype)
    text = torch.randn(1, 32, 32, generator=generator).to(dtype)
    return model(latents, text, torch.tensor([437]), return_dict=False)[0].float().square().mean()


def keep_truth(case: str, truth: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        torch.save(truth, OUT / f"{case}.pt")
    dist.barrier()


def save_deepspeed(stage: int, kind: str) -> None:
    model = make_model(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(3):
        engine.backward(compute_loss(engine, torch.bfloat16))
        engine.step()
    # accelerate's names: the folder pytorch_model, and `latest` beside it.
    engine.save_checkpoint(str(OUT / f"zero{stage}-{kind}"), tag="pytorch_model")
    trained = {n: safe_get_full_fp32_param(p).clone() for n, p in model.named_parameters() if p.requires_grad}
    keep_truth(f"zero{stage}-{kind}", trained)


def save_fsdp(kind: str) -> None:
    model = make_model(kind)
    for block in model.transformer_blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        compute_loss(model, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    # accelerate's names: the weights under `model`, the optimizer in a folder of its own.
    folder = OUT / f"fsdp-{kind}"
    save({"model": get_model_state_dict(model)}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"))
    save({"optimizer": {"step": torch.ones(1)}}, checkpoint_id=str(folder / "optimizer_0"))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    keep_truth(f"fsdp-{kind}", whole)
    # accelerate's name for FULL_STATE_DICT: the whole model in one file, which the first process writes.
    keep_truth(f"fsdp-whole-{kind}", whole)
    if dist.get_rank() == 0:
        (OUT / f"fsdp-whole-{kind}").mkdir()
        torch.save(whole, OUT / f"fsdp-whole-{kind}" / "pytorch_model_fsdp.bin")


def main() -> None:
    dist.init_process_group("gloo")
    for stage, kind in ((1, "lora"), (2, "lora"), (3, "lora"), (2, "full"), (3, "full")):
        save_deepspeed(stage, kind)
    for kind in ("lora", "full"):
        save_fsdp(kind)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

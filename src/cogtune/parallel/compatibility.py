"""What a strategy can't go with: refused in the plan, before a weight is loaded."""

import importlib.util

import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.parallel.strategy import Strategy


def check_strategy(config: RunConfig, strategy: Strategy, dtype: torch.dtype, *, full: bool) -> None:
    """Raises `UserError` naming every setting that the strategy can't go with, and what to do about each."""
    if strategy.is_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate's config asks for DeepSpeed, which isn't installed; pip install deepspeed")
    train, memory, adapter = config.train, config.memory, config.adapter
    divided = strategy.shards_weights or strategy.is_deepspeed
    placed = memory.resident_blocks != "auto"
    moved = memory.offloaded_blocks not in ("auto", 0)
    elsewhere = full and memory.optimizer in ("host", "8bit")
    rounded = strategy.is_deepspeed and dtype != torch.float32
    reasons = {
        "train.float8_base=true: its weights are no parameters that can be divided; set it to false": (
            divided and train.float8_base
        ),
        f"memory.resident_blocks={memory.resident_blocks}: streamed weights are whole ones; remove it "
        "(fsdp_offload_params or zero3-offload.yaml keep parts on the host)": divided and placed,
        f"memory.offloaded_blocks={memory.offloaded_blocks}: activations stay on the device; remove it": (
            divided and moved
        ),
        f"memory.leaving_blocks={memory.leaving_blocks}: activations stay on the device; remove it": (
            divided and memory.leaving_blocks != "auto"
        ),
        f"memory.optimizer={memory.optimizer}: the strategy says where the optimizer is; remove it "
        "(zero3-offload.yaml keeps it on the host)": divided and elsewhere,
        "train.cuda_graph=true: hooks around the blocks can't be recorded; set it to false": (
            divided and train.cuda_graph
        ),
        f"optimizer.lora_plus_ratio={config.optimizer.lora_plus_ratio}: one learning rate only; remove it, or take "
        "fsdp2.yaml": strategy.is_deepspeed and config.optimizer.lora_plus_ratio != 1.0,
        "adapter.use_dora=true: its norms need float32 weights, and DeepSpeed computes with 16-bit ones; set it to "
        "false, or take fsdp2.yaml": rounded and not full and adapter.use_dora,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        listed = "\n       ".join(found)
        name = strategy.describe().partition(":")[0]
        raise UserError(f"{name} can't go with\n       {listed}\n       or take configs/accelerate/ddp.yaml")

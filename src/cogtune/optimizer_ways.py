"""Where full fine-tuning can keep its weights and its optimizer's state, and what each way can't go with."""

from typing import Any

import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.launch import read_launch
from cogtune.parallel.strategy import Strategy

_WAYS: dict[str, dict[str, Any]] = {"device": {}, "8bit": {"eight_bit": True}, "host": {"on_host": True}}
"""Each value of memory.optimizer as an argument of `memory.predict`."""


def list_optimizer_ways(config: RunConfig, dtype: torch.dtype, free_bytes: int | None) -> list[dict[str, Any]]:
    """What the ladder of a full fine-tuning may choose from, as arguments of `memory.predict`."""
    settings = config.memory
    if settings.optimizer != "auto":
        return [_WAYS[settings.optimizer]]
    if free_bytes is None:
        return [_WAYS["device"]]
    possible = ["device"]
    if settings.allow_8bit_optimizer and not _why_not_in_8bit(config, dtype):
        possible.append("8bit")
    if not _why_not_on_host(config, dtype):
        possible.append("host")
    return [_WAYS[name] for name in possible]


def check_optimizer(config: RunConfig, dtype: torch.dtype, strategy: Strategy, *, full: bool) -> None:
    """Raises `UserError` where what optimizer.name or memory.optimizer asks for can't be."""
    memory, ratio = config.memory, config.optimizer.lora_plus_ratio
    wrong = {
        "it is for a LoRA's matrices (train/lora.py)": full,
        "DoRA's magnitudes are no matrices; set adapter.use_dora=false": config.adapter.use_dora and not full,
        f"it needs whole matrices, and {strategy.describe()}; take one process or DDP": (
            strategy.is_fsdp or strategy.is_deepspeed
        ),
    }
    if config.optimizer.name == "muon" and (why := _join(wrong)):
        raise UserError(f"optimizer.name=muon: {why}; or set optimizer.name=adamw")
    if full and ratio != 1.0:
        raise UserError(f"optimizer.lora_plus_ratio={ratio}: full fine-tuning (train/sft.py) has no LoRA; remove it")
    asked = f"memory.optimizer={memory.optimizer}"
    if memory.allow_8bit_optimizer and (memory.optimizer != "auto" or not full):
        why = f"has no effect beside {asked}" if full else "it is for full fine-tuning (train/sft.py)"
        raise UserError(f"memory.allow_8bit_optimizer=true: {why}; remove it")
    if memory.optimizer not in ("host", "8bit"):
        return
    why_not = {"host": _why_not_on_host, "8bit": _why_not_in_8bit}[memory.optimizer]
    why = why_not(config, dtype) if full else "it is for full fine-tuning (train/sft.py)"
    if why:
        raise UserError(f"{asked}: {why}; or set memory.optimizer=device")


def _why_not_on_host(config: RunConfig, dtype: torch.dtype) -> str:
    """What keeps a full fine-tuning's optimizer off the host; empty where nothing does."""
    reasons = {
        "float16 needs loss scaling; set model.dtype=bfloat16": dtype == torch.float16,
        "with train.trained_weights the frozen weights are what can wait on the host (memory.resident_blocks)": (
            config.train.trained_weights is not None
        ),
    }
    return _join(reasons | _only_after_the_backward_pass(config))


def _why_not_in_8bit(config: RunConfig, dtype: torch.dtype) -> str:
    """What keeps it from steps inside the backward pass with 8-bit state."""
    wrong = f"weights are kept in bfloat16, not {str(dtype)[6:]}; set model.dtype=bfloat16"
    return _join({wrong: dtype != torch.bfloat16} | _only_after_the_backward_pass(config))


def _only_after_the_backward_pass(config: RunConfig) -> dict[str, bool]:
    """What needs all gradients, or all float32 weights, on the device."""
    return {
        "train.gradient_accumulation_steps must be 1": config.train.gradient_accumulation_steps > 1,
        "train.ema_decay must be null": config.train.ema_decay is not None,
        "train.cuda_graph must be false": config.train.cuda_graph,
        "it needs one process": read_launch().num_processes > 1,
    }


def _join(reasons: dict[str, bool]) -> str:
    return "; ".join(reason for reason, holds in reasons.items() if holds)

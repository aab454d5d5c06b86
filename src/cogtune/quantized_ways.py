"""Whether the frozen base of a LoRA run can be quantized, and in which ways the ladder may keep it."""

from typing import Any

import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.frozen import count_codes
from cogtune.memory import CodedWeights, element_bytes
from cogtune.parallel.strategy import Strategy
from cogtune.weight_codes import WeightKind

_KINDS: tuple[WeightKind, ...] = ("int8", "nf4")


def list_base_ways(config: RunConfig, block: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What the ladder of a LoRA run may choose from, as arguments of `memory.predict`; all blocks are like `block`."""
    settings = config.memory
    if settings.quantized_base == "auto":
        kinds = (None, *_KINDS) if settings.allow_quantized_base else (None,)
    else:
        kinds = (None if settings.quantized_base == "none" else settings.quantized_base,)
    return [{"coded": count_coded(block, kind, dtype)} if kind else {} for kind in kinds]


def count_coded(block: Any, kind: WeightKind | None, dtype: torch.dtype) -> CodedWeights | None:
    """What `frozen.encode_block` does to a block, from its shapes and without an adapter; None where it isn't asked."""
    return CodedWeights(kind, *count_codes(block, kind), size=element_bytes(dtype)) if kind else None


def check_quantized_base(config: RunConfig, strategy: Strategy, *, full: bool) -> None:
    """Raises `UserError` where what the settings ask for can't be."""
    memory = config.memory
    asked = f"memory.quantized_base={memory.quantized_base}"
    if memory.allow_quantized_base:
        if memory.quantized_base != "auto":
            raise UserError(f"memory.allow_quantized_base=true: has no effect beside {asked}; remove it")
        asked = "memory.allow_quantized_base=true"
    elif memory.quantized_base in ("auto", "none"):
        return
    if full:
        raise UserError(f"{asked}: is for LoRA (train/lora.py); remove it")
    if strategy.shards_weights or strategy.is_deepspeed:
        name = strategy.describe().partition(":")[0]
        raise UserError(
            f"{asked}: codes are no parameters that {name} could divide; remove it, or take configs/accelerate/ddp.yaml"
        )
    if config.train.float8_base:
        raise UserError(f"{asked}: can't go with train.float8_base, which has weights of its own; turn off one of them")
    if config.adapter.use_dora:
        raise UserError(f"{asked}: can't go with adapter.use_dora, which reads the base weights; turn off one of them")

"""Bytes of weights, gradients and optimizer state on each device when a strategy divides them. Counted."""

from dataclasses import dataclass

from cogtune.parallel.strategy import Strategy

WHOLE_BLOCKS = 2
"""Blocks whose gathered weights are on a device at once: the one that computes, and the next."""
BUCKET_NUMBERS = 500_000_000
"""DeepSpeed's buckets for reducing and gathering (ZeRO-1 and 2), as many numbers as it takes by default."""
LIVE_NUMBERS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at most, by default."""


@dataclass(frozen=True)
class Sizes:
    """Numbers, not bytes."""

    frozen: int
    trained: int
    block: int
    """In a block, without an adapter."""
    num_blocks: int
    full: bool = False
    """Trained weights are the model's own, divided as the frozen ones; otherwise an adapter's, where any are frozen."""


@dataclass(frozen=True)
class Footprint:
    """Bytes."""

    weights: int
    """Frozen ones, and gathered ones of both kinds."""
    trained: int
    """Trained weights in float32 with gradients and state, and copies that compute."""
    host: int


def count_footprint(strategy: Strategy, sizes: Sizes, element: int) -> Footprint:
    """What a device and the host hold beside activations; `element`: bytes of a number that computes."""
    return (
        _count_deepspeed(strategy, sizes, element) if strategy.is_deepspeed else _count_fsdp(strategy, sizes, element)
    )


def _count_fsdp(strategy: Strategy, sizes: Sizes, element: int) -> Footprint:
    whole_adapter = sizes.frozen and not sizes.full
    shards, model = strategy.num_shards, sizes.frozen + (0 if whole_adapter else sizes.trained)
    outside = model - sizes.num_blocks * sizes.block
    gathered_blocks = WHOLE_BLOCKS if strategy.reshard else sizes.num_blocks
    gathered = (outside + gathered_blocks * sizes.block) * element
    frozen_parts = sizes.frozen * element // shards
    trained_parts = 0
    if whole_adapter:
        trained = sizes.trained * 16
    else:
        trained_parts = sizes.trained * 16 // shards
        # Two blocks' whole gradients, and one's in float32 on its way to its parts.
        trained = sizes.block * (WHOLE_BLOCKS * element + 4)
    if strategy.offload_weights:
        return Footprint(gathered, trained, frozen_parts + trained_parts)
    return Footprint(gathered + frozen_parts, trained + trained_parts, 0)


def _count_deepspeed(strategy: Strategy, sizes: Sizes, element: int) -> Footprint:
    shards, everything = strategy.num_shards, sizes.frozen + sizes.trained
    state, gradients = sizes.trained * 12 // shards, sizes.trained * 4 // shards
    host = 0
    if strategy.kind == "zero3":
        weights = min(everything, LIVE_NUMBERS) * element
        parts = everything * element // shards
        weights, host = (weights, parts) if strategy.offload_weights else (weights + parts, 0)
    else:
        whole_gradients = sizes.trained if strategy.kind == "zero1" else 0
        bucket = min(BUCKET_NUMBERS, sizes.trained)
        weights = (everything + whole_gradients + 2 * bucket) * element
    if strategy.offload_optimizer:
        return Footprint(weights, 0, host + state + gradients)
    return Footprint(weights, state + gradients, host)

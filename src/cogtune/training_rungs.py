"""The rungs of a run: all ways to keep its weights, its optimizer's state and its activations, predicted and sorted."""

from functools import partial
from typing import Any

import torch
from torch import nn

from cogtune import models
from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.ladder import list_rungs, sort_rungs
from cogtune.machine import Machine, sum_in_order
from cogtune.memory import (
    EIGHT_BIT_STATE_BYTES,
    EMA_BYTES,
    MemoryPlan,
    activation_bytes,
    element_bytes,
    predict,
    units_kept,
    units_of_partial_sums,
)
from cogtune.models import ModelFacts
from cogtune.optimizer_ways import list_optimizer_ways
from cogtune.parallel.shared_samples import kept_by_exchange
from cogtune.parallel.strategy import Strategy
from cogtune.prior_penalty import count_factor_bytes
from cogtune.quantized_ways import list_base_ways
from cogtune.step_time import BlockTimes, count_updated, predict_seconds


def list_training_rungs(
    facts: ModelFacts,
    config: RunConfig,
    *,
    dtype: torch.dtype,
    machine: Machine,
    tokens: int,
    free_bytes: int | None,
    num_parameters: int,
    num_trainable: int,
    num_float8: int = 0,
    image_pixels: int = 0,
    strategy: Strategy = Strategy(),  # noqa: B008  # immutable
    full: bool | None = None,
    frozen_in_block: int | None = None,
) -> list[MemoryPlan]:
    """The ladder of a run; raises `UserError` for streaming where nothing can be streamed.

    `full`: the model's own weights are trained; default: where none is frozen. `frozen_in_block`: numbers, if not all.
    """
    settings, batch_size = config.memory, config.train.batch_size
    frozen = bool(num_parameters)
    full = not frozen if full is None else full
    divided = strategy.is_fsdp or strategy.is_deepspeed
    meta = models.make_meta_transformer(facts)
    block = meta.transformer_blocks[0]
    ways = _list_ways(config, facts, block, dtype, machine, free_bytes, frozen=frozen, full=full, divided=divided)
    if config.train.cuda_graph and settings.offloaded_blocks not in ("auto", 0):
        raise UserError(
            f"memory.offloaded_blocks={settings.offloaded_blocks}: can't go with train.cuda_graph; remove one of them"
        )
    if config.train.cuda_graph or divided:
        settings = settings.model_copy(update={"offloaded_blocks": 0})
    num_block = sum(p.numel() for p in block.parameters())
    sharing = config.train.context_parallel
    num_more_at_once = 0.0
    if config.train.deterministic and free_bytes is not None:
        machine = sum_in_order(machine)
        heads = batch_size * -(-facts.num_heads // sharing)
        num_more_at_once = units_of_partial_sums(heads, machine.multiprocessors)
    times = BlockTimes.of(facts, tokens, batch_size, machine, num_ranks=sharing)
    num_more_kept = kept_by_exchange(config, facts.num_heads)
    tokens = -(-tokens // sharing)  # of one rank
    unit = activation_bytes(facts, tokens, batch_size, dtype)

    def time_of(plan: MemoryPlan) -> float:
        return predict_seconds(
            plan,
            times,
            machine,
            num_layers=facts.num_layers,
            block_bytes=num_block * element_bytes(dtype),
            kept_bytes=lambda activations: (units_kept(activations, full=full) + num_more_kept) * unit,
            state_bytes=num_block * EIGHT_BIT_STATE_BYTES,
            weight_gradients=full,
        )

    count = partial(
        predict,
        facts,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        tokens=tokens,
        batch_size=batch_size,
        dtype=dtype,
        num_float8=num_float8,
        num_encoder=models.count_image_encoder(facts),
        image_pixels=image_pixels,
        num_block_parameters=num_block if frozen_in_block is None or not frozen or divided else frozen_in_block,
        num_block_trained=min(num_block, num_trainable),
        ema_bytes=EMA_BYTES * num_trainable if config.train.ema_decay is not None else 0,
        ema_on_host=config.train.ema_on_host,
        penalty_bytes=count_factor_bytes(meta, config) if config.train.prior_penalty and not full else 0,
        full=full,
        strategy=strategy,
        num_more_kept=num_more_kept,
        num_more_at_once=num_more_at_once,
    )
    shape = {"num_layers": facts.num_layers, "free_bytes": free_bytes}
    return sort_rungs(
        [
            rung
            for way, streamable in ways
            for rung in list_rungs(partial(count, **way), time_of, settings, streamable=streamable, **shape)
        ]
    )


def _list_ways(
    config: RunConfig,
    facts: ModelFacts,
    block: nn.Module,
    dtype: torch.dtype,
    machine: Machine,
    free_bytes: int | None,
    *,
    frozen: bool,
    full: bool,
    divided: bool,
) -> list[tuple[dict[str, Any], bool]]:
    """Where weights and state may be, as arguments of `memory.predict`, and whether blocks can be streamed there.

    What is updated in its backward pass may come and go; else only what no training changes may.
    """
    ways = (
        list_optimizer_ways(config, dtype, free_bytes) if full and not divided else list_base_ways(config, block, dtype)
    )
    if free_bytes is not None:  # a CPU has no link
        updated = {"num_updated": count_updated(facts.num_layers, machine)}
        ways = [way | updated if "on_host" in way else way for way in ways]
    fixed = config.train.cuda_graph or divided
    found = [(way, not fixed and (frozen or "eight_bit" in way)) for way in ways]
    resident = config.memory.resident_blocks
    if resident == "auto" or resident >= facts.num_layers:
        return found
    if streamable := [pair for pair in found if pair[1]]:
        return streamable
    why = "full fine-tuning freezes no weight (memory.optimizer=8bit streams trained ones too)"
    if config.train.cuda_graph:
        why = "train.cuda_graph records addresses"
    elif divided:
        why = "the strategy divides the weights"
    raise UserError(f"memory.resident_blocks={resident}: frozen weights are streamed, but {why}; remove one")

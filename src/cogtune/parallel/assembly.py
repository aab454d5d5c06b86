"""Puts a run's transformer where its strategy wants it, and builds the engine that the loop drives."""

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh

from cogtune.cluster.whereabouts import inside
from cogtune.eight_bit_adamw import EightBitAdamW, EightBitGuard, make_state
from cogtune.frozen import encode_base, encode_block, quantize_base, quantize_block
from cogtune.host_training import HostAdamW, HostStepGuard
from cogtune.optimization import StepGuard, group_parameters, make_optimizer
from cogtune.parallel.deepspeed_engine import make_deepspeed_engine
from cogtune.parallel.engine import Engine, Guard, make_replicated_engine
from cogtune.parallel.fully_sharded import (
    ShardedStepGuard,
    ShardedStore,
    make_mesh,
    make_sharded_engine,
    shard_transformer,
)
from cogtune.placement import move_to_device
from cogtune.plan import TrainingPlan
from cogtune.saving import DeviceStore
from cogtune.shards.filling import fill_module
from cogtune.streaming.blocks import stream_blocks
from cogtune.streaming.trained import find_trained_stream, stream_trained_blocks


def place_transformer(plan: TrainingPlan, trained: Any, device: torch.device) -> None:
    """Before the attention is installed: whole models go to the device, empty ones are read there.

    Divided, streamed and quantized ones are never there as a whole.
    """
    whole = plan.memory.num_resident is None and not plan.memory.quantized
    if whole and trained.host is None and not plan.strategy.shards_weights:
        if _is_empty(trained.transformer):
            _fill(plan, trained.transformer, device)
        with inside("placing the weights"):
            move_to_device(trained.transformer, device)


def divide_transformer(plan: TrainingPlan, trained: Any, device: torch.device) -> DeviceMesh | None:
    """After it: streams, quantizes or divides the blocks; the mesh of a divided model."""
    transformer, num_resident = trained.transformer, plan.memory.num_resident
    if plan.strategy.is_fsdp:
        mesh, empty = make_mesh(plan.strategy, device), _is_empty(transformer)
        shard_transformer(transformer, plan.strategy, mesh, device, plan.dtype, full=plan.full)
        if empty:
            _fill(plan, transformer, torch.device("cpu") if plan.strategy.offload_weights else device)
        return mesh
    kind = plan.memory.quantized
    if num_resident is not None and plan.memory.streams_trained:
        stream_trained_blocks(
            transformer, "transformer_blocks", device, num_resident=num_resident, make_state=make_state
        )
    elif num_resident is not None and trained.host is None:
        encode = partial(encode_block, kind=kind) if kind else None
        prepare = quantize_block if plan.num_float8 else encode
        stream_blocks(transformer, "transformer_blocks", device, num_resident=num_resident, prepare=prepare)
    elif plan.num_float8:
        quantize_base(transformer)
    elif kind:
        encode_base(transformer, kind, device)
    return None


def _is_empty(transformer: Any) -> bool:
    return any(parameter.is_meta for parameter in transformer.parameters())


def _fill(plan: TrainingPlan, transformer: Any, device: torch.device) -> None:
    with inside("reading the weights"):
        fill_module(transformer, plan.facts.folder / "transformer", device)


def make_engine(accelerator: Accelerator, plan: TrainingPlan, trained: Any, mesh: DeviceMesh | None) -> Engine:
    """Optimizer, guard and store around a transformer that is in its place."""
    settings, device, is_main = plan.config.optimizer, accelerator.device, accelerator.is_main_process
    use_scale = plan.dtype == torch.float16
    parameters = trained.parameters()
    if mesh is not None:
        optimizer = make_optimizer(group_parameters(parameters, settings), settings)
        sharded = ShardedStepGuard(device, mesh, use_loss_scale=use_scale, max_grad_norm=settings.max_grad_norm)
        store = ShardedStore(trained.transformer, parameters, optimizer, is_main=is_main)
        return make_sharded_engine(accelerator, trained.transformer, optimizer, sharded, store)
    if plan.strategy.is_deepspeed:
        return make_deepspeed_engine(
            accelerator,
            trained.transformer,
            parameters,
            config=plan.config,
            strategy=plan.strategy,
            dtype=plan.dtype,
            compiled=plan.compiled,
            initial=trained.initial(),
        )
    # Every process has read the same frozen weights; DDP would send them once more.
    frozen = [name for name, p in trained.transformer.named_parameters() if not p.requires_grad]
    known = getattr(trained.transformer, "_ddp_params_and_buffers_to_ignore", [])
    trained.transformer._ddp_params_and_buffers_to_ignore = [*known, *frozen]
    # On a CPU each process's device has a number; streamed weights, which are away, would be moved there.
    model = accelerator.prepare_model(trained.transformer, device_placement=device.type != "cpu")
    stream = find_trained_stream(trained.transformer)
    if plan.memory.eight_bit:
        optimizer = EightBitAdamW(
            list(parameters.values()),
            settings,
            seed=plan.config.train.seed,
            state=None if stream is None else stream.state,
            compiled=plan.compiled,
        )
        guard: Guard = EightBitGuard(optimizer)
    elif trained.host is not None:
        optimizer = HostAdamW(trained.host, settings)
        guard = HostStepGuard(trained.host, optimizer, max_grad_norm=settings.max_grad_norm)
    else:
        optimizer = make_optimizer(group_parameters(parameters, settings), settings)
        guard = StepGuard(device, use_loss_scale=use_scale, max_grad_norm=settings.max_grad_norm)
    store = DeviceStore(parameters, optimizer, host=trained.host, stream=stream, is_main=is_main)
    return make_replicated_engine(accelerator, model, optimizer, guard, store)

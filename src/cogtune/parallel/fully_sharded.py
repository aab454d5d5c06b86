"""FSDP2 and HSDP: every block's weights in parts, gathered for its pass and given back after it.

`fully_shard` puts hooks around a block's call. The blocks' own work stays inside of them, compiled and recomputed as
without it (`execution`), so no hook runs in a compiled region or a second time. Trained weights are float32 parts,
gathered in the run's precision; their gradients are summed in float32. An adapter's small weights stay whole on every
process, and their gradients are averaged in one go after the last pass of a step.
"""

import contextlib
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cogtune.formats.tensors import Tensors
from cogtune.optimization import StepGuard
from cogtune.parallel.engine import Engine
from cogtune.parallel.strategy import Strategy
from cogtune.shards.filling import move_filled
from cogtune.shards.parts import ParameterParts, make_saved_state, write_parts
from cogtune.shards.pieces import local_part


def make_mesh(strategy: Strategy, device: torch.device) -> DeviceMesh:
    """One dimension of parts, or copies x parts; neighbouring ranks hold the parts of one copy."""
    num_copies = strategy.num_processes // strategy.num_shards
    if num_copies == 1:
        return init_device_mesh(device.type, (strategy.num_shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (num_copies, strategy.num_shards), mesh_dim_names=("replicate", "shard"))


def shard_transformer(
    transformer: Any, strategy: Strategy, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, *, full: bool
) -> None:
    """Divides a transformer in place, block by block, so that the device never holds more than one whole block. An
    empty one (`shards.filling`) stays empty.

    Frozen models with an adapter: the adapter's weights come to the device whole. `full`: the model's own weights, or
    some of them, are trained in float32 and computed with in `dtype`.
    """
    adapter = set() if full else {p for p in transformer.parameters() if p.requires_grad}
    precision = dtype if full and dtype != torch.float32 else None
    options: dict[str, Any] = {
        "mesh": mesh,
        # Not the inputs: rotary positions stay float32.
        "mp_policy": MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if strategy.offload_weights else OffloadPolicy(),
        "ignored_params": adapter,
    }
    for block in transformer.transformer_blocks:
        move_filled(block, device)
        fully_shard(block, reshard_after_forward=strategy.reshard, **options)
    for name, child in transformer.named_children():
        if name != "transformer_blocks":
            move_filled(child, device)
    # The root too gives its weights back: what is put into the parts between two passes is then seen by the next one.
    fully_shard(transformer, reshard_after_forward=True, **options)
    if strategy.offload_weights:
        transformer._hf_hook = SimpleNamespace(
            execution_device=device
        )  # pipelines look here: the weights are elsewhere
    for module in transformer.modules():
        # Otherwise the compiler leaves out its checks on these modules, such as whether the adapter is on.
        module._is_fsdp_managed_module = False


def give_back(transformer: nn.Module) -> None:
    """Lets whole weights go that were gathered from parts, so that what is put into the parts is seen."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class ShardedStepGuard(StepGuard):
    """`StepGuard` where each process holds parts of the gradients, or an adapter's whole ones, not yet averaged."""

    def __init__(
        self, device: torch.device, mesh: DeviceMesh, *, use_loss_scale: bool, max_grad_norm: float | None
    ) -> None:
        super().__init__(device, use_loss_scale=use_loss_scale, max_grad_norm=max_grad_norm)
        self._shards = mesh.get_group("shard")

    def collect(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """The gradients to work on: parts as they are, whole ones averaged over all processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        if whole:
            flat = torch.cat([gradient.flatten() for gradient in whole])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for gradient, mean in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        return [local_part(gradient) for gradient in gradients]

    def measure(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients: parts are added up over the processes that share a copy."""
        norm = super().measure(parameters, gradients)
        if not any(isinstance(p.grad, DTensor) for p in parameters):
            return norm
        squares = norm.to(self.scale.device).square()
        dist.all_reduce(squares, group=self._shards)
        return squares.sqrt()


class ShardedStore:
    """A `saving.Store` of parts, and of an adapter's whole weights. Tensors are gathered one after another."""

    def __init__(
        self,
        transformer: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        is_main: bool,
    ) -> None:
        self._parameters, self._optimizer, self._is_main = parameters, optimizer, is_main
        self.parts = ParameterParts(parameters, optimizer, publish=partial(give_back, transformer))

    def _read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._is_main:
                found[name] = whole.detach().cpu().contiguous()
        return found

    def read_weights(self) -> dict[str, Tensor]:
        """`Store.read_weights`."""
        return self._read({name: p.detach() for name, p in self._parameters.items()})

    def read_optimizer(self) -> dict[str, Tensor]:
        """`Store.read_optimizer`."""
        return self._read(self.parts.state())

    def write_weights(self, weights: Tensors) -> None:
        """`Store.write_weights`; each process takes its part of what it reads."""
        write_parts(self.parts.weights(), weights)
        self.parts.publish()

    def write_optimizer(self, state: Tensors) -> None:
        """`Store.write_optimizer`."""
        write_parts(make_saved_state(self.parts, state), state)

    def largest_moments(self) -> dict[str, Tensor]:
        """`Store.largest_moments`."""
        found = {
            name: self._optimizer.state[p]["exp_avg"]
            for name, p in self._parameters.items()
            if self._optimizer.state[p]
        }
        if not found:
            return {}
        parts = [local_part(moment) for moment in found.values()]
        largest = torch.stack([part.abs().max() if part.numel() else part.new_zeros(()) for part in parts])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return dict(zip(found, largest.unbind(), strict=True))


def make_sharded_engine(
    accelerator: Accelerator,
    transformer: FSDPModule,
    optimizer: torch.optim.Optimizer,
    guard: ShardedStepGuard,
    store: ShardedStore,
) -> Engine:
    """The loop's engine around a transformer from `shard_transformer`."""

    @contextlib.contextmanager
    def accumulating(is_last: bool) -> Any:
        # Parts are summed after each pass: whole gradients kept for the next one would take 4 bytes a weight on every
        # device. Only copies (HSDP) wait for the last.
        transformer.set_requires_all_reduce(is_last)
        yield

    assert isinstance(transformer, nn.Module)
    return Engine(transformer, optimizer, guard, store, accelerator.backward, accumulating)

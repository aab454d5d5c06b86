"""Weights read from their files into the place where they stay: a device, or each process's part of a divided model.

A model that was made empty (`models.make_empty_transformer`) never stands whole in a process's own memory. Each process
reads the ranges that it has of each tensor, so a node reads its files once, into pages that its processes share.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from cogtune.shards.pieces import find_piece
from cogtune.shards.stored import StoredTensors


def move_filled(module: nn.Module, device: torch.device) -> None:
    """Moves what has values; what is on the meta device stays there."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


@torch.no_grad()
def fill_module(module: nn.Module, folder: Path, device: torch.device) -> None:
    """Gives the parameters that are on the meta device memory on `device`, and all of them, and buffers that files
    keep, the values of the safetensors in `folder`, rounded to each one's type.

    `DTensor`s get this process's part. Raises `UserError` where a tensor is missing or has another shape.
    """

    def take_memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    module._apply(take_memory)  # as `to_empty`, which would empty the buffers too; `fully_shard` follows it
    parameters = dict(module.named_parameters())
    stored_buffers = {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}
    targets = [find_piece(name, tensor) for name, tensor in [*parameters.items(), *stored_buffers.items()]]
    StoredTensors(folder).read_all(targets)

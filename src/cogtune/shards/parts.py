"""What each process has of a run's trained weights and of its optimizer's state, where it is, under their names.

Checkpoints are saved from and read into it, and the average of the weights follows it, whatever divides them.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from cogtune.errors import UserError
from cogtune.formats.tensors import Spec, Tensors
from cogtune.shards.pieces import Piece, find_piece


class Parts(Protocol):
    """A process's share; tensors without placement are whole, and equal on every process."""

    def weights(self) -> Mapping[str, Tensor | Piece]:
        """The weights in the precision that they are trained in, sharing their memory, which stays where it is."""
        ...

    def state(self) -> Mapping[str, Tensor | Piece]:
        """The optimizer's state by `<weight>.<key>`, sharing its memory; before the first step nothing, or zeros."""
        ...

    def make_state(self, saved: Mapping[str, Spec]) -> Mapping[str, Tensor | Piece]:
        """New state like what was saved, by `<weight>.<key>`: all that has to be read, sharing its memory."""
        ...

    def publish(self) -> None:
        """After weights were changed here: what computes follows. Every process calls it, between two passes."""
        ...


def make_saved_state(parts: Parts, saved: Tensors) -> Mapping[str, Tensor | Piece]:
    """`Parts.make_state` for what was saved; raises `UserError` for state of a weight that isn't trained."""
    weights = parts.weights()
    for name in saved.specs:
        if (owner := name.rsplit(".", 1)[0]) not in weights:
            raise UserError(f"{saved.label}: optimizer state of {owner}, which this config doesn't train")
    return parts.make_state(saved.specs) if saved.specs else {}


@torch.no_grad()
def write_parts(targets: Mapping[str, Tensor | Piece], whole: Tensors) -> None:
    """Each process takes its part of whole tensors of the same names; those it has nothing of are not read.

    Raises `UserError` for a tensor of another shape.
    """
    for name, target in targets.items():
        piece = find_piece(name, target)
        if piece.data.numel():
            tensor = whole.read(name)
            if tuple(tensor.shape) != piece.shape:
                shapes = f"{list(tensor.shape)} and should be {list(piece.shape)}"
                raise UserError(f"{whole.label}: {name} is {shapes}; it is of another model")
            piece.data.copy_(tensor.flatten()[piece.start : piece.stop])


class HostCopies(Protocol):
    """Copies on the host of tensors whose memory on the device comes and goes."""

    def store(self) -> None:
        """Until the copies are as the tensors are."""
        ...

    def on_host(self, tensor: Tensor) -> Tensor:
        """A tensor's copy; the tensor itself where it has none and stays."""
        ...


class ParameterParts:
    """Parameters and an optimizer that has each one's state: plain tensors, or `DTensor`s of `fully_shard`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        publish: Callable[[], None] | None = None,
        copies: HostCopies | None = None,
    ) -> None:
        """`publish`: what there is to do for `Parts.publish`. `copies`: these are what is saved and read."""
        self._parameters, self._optimizer = parameters, optimizer
        self._publish, self._copies = publish, copies

    def weights(self) -> Mapping[str, Tensor]:
        """`Parts.weights`."""
        if self._copies is None:
            return self._parameters
        self._copies.store()
        return {name: self._copies.on_host(parameter) for name, parameter in self._parameters.items()}

    def state(self) -> Mapping[str, Tensor]:
        """`Parts.state`."""
        if self._copies is not None:
            self._copies.store()
        return {
            f"{name}.{key}": self._where(value)
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    @torch.no_grad()
    def make_state(self, saved: Mapping[str, Spec]) -> Mapping[str, Tensor | Piece]:
        """`Parts.make_state`."""
        found = {}
        for name, stored in saved.items():
            owner, key = name.rsplit(".", 1)
            parameter = self._parameters[owner]
            state = self._optimizer.state[parameter]
            there = state.get(key)
            if there is None or (tuple(there.shape), there.dtype) != (stored.shape, stored.dtype):
                state[key] = (
                    torch.zeros_like(parameter.detach(), dtype=stored.dtype)  # as sharded as the weight
                    if stored.shape == tuple(parameter.shape)
                    else torch.zeros(stored.shape, dtype=stored.dtype, device=parameter.device)
                )
            found[name] = self._where(state[key])
        return found

    def _where(self, tensor: Tensor) -> Tensor:
        return tensor if self._copies is None else self._copies.on_host(tensor)

    def publish(self) -> None:
        """`Parts.publish`."""
        if self._publish is not None:
            self._publish()

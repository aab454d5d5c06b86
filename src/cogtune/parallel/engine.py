"""What the training loop drives: the model as it is called, its optimizer, and when gradients are exchanged."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cogtune.saving import Store


class Guard(Protocol):
    """Scales the loss, prepares gradients for the step, and keeps a bad step out of the weights."""

    scale: Tensor

    def apply(self, optimizer: Any, parameters: list[nn.Parameter]) -> Tensor:
        """Clips the gradients and decides on the step; their norm, on the device, which may come with the step."""
        ...

    def has_failed(self) -> bool:
        """Whether the run must stop; waits for the device."""
        ...

    @property
    def num_skipped(self) -> int:
        """Steps skipped by overflows of float16; waits for the device."""
        ...

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        ...

    def load(self, state: dict[str, float]) -> None:
        """Puts a checkpoint's values back."""
        ...


@dataclass(frozen=True)
class Engine:
    """A strategy's side of the loop."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: Guard
    store: Store
    backward: Callable[[Tensor], None]
    accumulating: Callable[[bool], contextlib.AbstractContextManager[object]]
    """Around each forward and backward pass, told whether it is the step's last: before that one, nothing is exchanged
    that can wait."""


def make_replicated_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard, store: Store
) -> Engine:
    """One device, or DDP: `model` is what `accelerator.prepare_model` made."""

    def accumulating(is_last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if is_last else accelerator.no_sync(model)

    return Engine(model, optimizer, guard, store, accelerator.backward, accumulating)

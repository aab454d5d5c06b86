"""A block's forward pass with what its backward pass needs on the device announced to the streams."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogtune.streaming.activations import ActivationOffload
from cogtune.streaming.blocks import BlockStream
from cogtune.streaming.gradients import GradientStream


class _Boundary(torch.autograd.Function):
    """Passes two tensors on unchanged and calls `reached` when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], hidden_states: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return hidden_states.view_as(hidden_states), text.view_as(text)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.reached()
        return None, *gradients


def pass_through(
    run: Callable[..., tuple[Tensor, Tensor]],
    index: int,
    hidden_states: Tensor,
    text: Tensor,
    *rest: Any,
    stream: BlockStream | None,
    offload: ActivationOffload | None,
    gradients: GradientStream | None = None,
) -> tuple[Tensor, Tensor]:
    """Block `index` of `run(hidden_states, text, *rest)`, whose weights are there already for the forward pass."""

    def begin_backward() -> None:
        if stream is not None:
            stream.enter(index, "training backward")
        if offload is not None:
            offload.fetch(index)
            offload.fetch_before(index)

    def end_backward() -> None:
        if gradients is not None:
            gradients.send(index)
        if stream is not None:
            stream.leave(index, "training backward")
        if offload is not None:
            offload.finish(index)

    inputs = _Boundary.apply(end_backward, hidden_states, text)
    assert isinstance(inputs, tuple)
    with contextlib.nullcontext() if offload is None else offload.keeping(index, hidden_states):
        outputs = run(*inputs, *rest)
    outputs = _Boundary.apply(begin_backward, *outputs)
    assert isinstance(outputs, tuple)
    return outputs

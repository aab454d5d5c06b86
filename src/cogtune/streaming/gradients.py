"""Gradients of trained blocks leave the device as soon as each block's backward pass is queued."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogtune.streaming.host import HostBuffer, Layout


@dataclass
class _Part:
    """The trained parameters that leave together."""

    parameters: list[nn.Parameter]
    flat: Tensor
    on_host: list[Tensor]
    left: torch.cuda.Event | None = None


class GradientStream:
    """Copies gradients to page-locked host memory, part by part, and sums up their squares on the device.

    The last part holds what is outside of the blocks; its gradients leave in `finish`.
    """

    def __init__(self, parts: Sequence[list[nn.Parameter]], layouts: Sequence[Layout], device: torch.device) -> None:
        """`layouts`: where each part's gradients lie on the host."""
        self.device = device
        self._leaving = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[HostBuffer] = []
        self.parts = [self._make_part(*part) for part in zip(parts, layouts, strict=True)]
        self._on_the_way: tuple[list[Tensor], torch.cuda.Event | None] = ([], None)
        self._squares: list[Tensor] = []

    def _make_part(self, parameters: list[nn.Parameter], layout: Layout) -> _Part:
        dtype = parameters[0].dtype
        buffer = HostBuffer(layout.size * dtype.itemsize, page_locked=self._leaving is not None)
        self._buffers.append(buffer)
        flat = buffer.bytes.zero_().view(dtype)
        return _Part(parameters, flat, layout.views(flat))

    def send(self, index: int) -> None:
        """A part's gradients leave; the parameters have none afterwards."""
        part = self.parts[index]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters]
        self._squares.append(torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum())
        self._let_go()
        if self._leaving is not None:
            self._leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._leaving):
            for gradient, target in zip(gradients, part.on_host, strict=True):
                target.copy_(gradient, non_blocking=True)
            if self._leaving is not None:
                part.left = torch.cuda.Event()
                part.left.record(self._leaving)
        self._on_the_way = (gradients, part.left)
        for parameter in part.parameters:
            parameter.grad = None

    def _let_go(self) -> None:
        """Lets the gradients before the last ones go, after their copies."""
        _, left = self._on_the_way
        if left is not None:
            torch.cuda.current_stream(self.device).wait_event(left)
        self._on_the_way = ([], None)

    def finish(self) -> Tensor:
        """After the backward pass: the norm of all gradients, float32 on the device."""
        self.send(len(self.parts) - 1)
        self._let_go()
        norm = torch.stack(self._squares).sum().sqrt()
        self._squares = []
        return norm

    def wait(self, index: int) -> list[Tensor]:
        """A part's gradients on the host, when they are there."""
        part = self.parts[index]
        if part.left is not None:
            part.left.synchronize()
        return part.on_host

    def flat(self, index: int) -> Tensor:
        """The range of host memory in which a part's gradients lie; zeros between them."""
        return self.parts[index].flat

"""Full fine-tuning with float32 weights and AdamW's state in host memory; the device computes with streamed copies.

A block's gradients leave while the backward pass goes on. After it their norm is known, and a thread updates block
after block, in the order in which the next forward pass asks for them, so that clipping is exact and the update runs
beside the next forward pass. The arithmetic is that of `torch.optim.AdamW`, fused, on a CPU.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cogtune.config import OptimizerSettings
from cogtune.host_threads import start_computing_thread
from cogtune.streaming.blocks import BlockStream, all_tensors, stream_blocks
from cogtune.streaming.gradients import GradientStream

PIECE = 1 << 22
"""Numbers that are updated at a time, through one buffer: a new one for each tensor costs as much as the update."""


class HostWeights:
    """The float32 weights of a transformer on the host, and the copies in the run's precision that the device gets."""

    def __init__(self, transformer: Any, dtype: torch.dtype, device: torch.device) -> None:
        """`transformer` is float32 on the host; afterwards it computes on the device in `dtype`."""
        self.parameters = {
            name: nn.Parameter(p.detach().float(), requires_grad=True) for name, p in transformer.named_parameters()
        }
        transformer.to(dtype).requires_grad_(True)
        self.stream: BlockStream = stream_blocks(
            transformer, "transformer_blocks", device, num_resident=0, select=all_tensors
        )
        blocks = list(transformer.transformer_blocks.children())
        parts = [list(block.parameters()) for block in blocks]
        inside = {id(parameter) for part in parts for parameter in part}
        parts.append([p for p in transformer.parameters() if id(p) not in inside])
        names = {id(p): name for name, p in transformer.named_parameters()}
        self.parts = [[self.parameters[names[id(p)]] for p in part] for part in parts]
        """The float32 weights by block, and last those outside of the blocks."""
        on_host = [[flat.on_host[id(p)] for p in part] for flat, part in zip(self.stream.flat, parts, strict=False)]
        self.copies: list[list[Tensor]] = [*on_host, list(parts[-1])]
        """The same weights in the run's precision, on the host or, outside of the blocks, on the device."""
        self.gradients = GradientStream(parts, device)

    @torch.no_grad()
    def publish(self, index: int) -> None:
        """Rounds a part's float32 weights into what the device gets."""
        for weight, copy in zip(self.parts[index], self.copies[index], strict=True):
            copy.copy_(weight)

    def publish_all(self) -> None:
        """After the float32 weights were read from a file."""
        self.stream.forget()
        for index in range(len(self.parts)):
            self.publish(index)


class HostAdamW(torch.optim.Optimizer):
    """AdamW on host weights, part by part in a thread; `wait` before anything else reads them."""

    def __init__(self, weights: HostWeights, settings: OptimizerSettings) -> None:
        defaults = {
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        super().__init__(list(weights.parameters.values()), defaults)
        self._weights = weights
        self._scaled = torch.empty(PIECE)
        self._thread = start_computing_thread("optimizer")
        self._updates: list[Future[None]] = []
        self.factor = 1.0
        """What gradients are multiplied by: clipping."""
        self.skip = False
        weights.stream.before_load = self._wait_for

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Queues the update of every part; the device's copies are out of date from now on."""
        assert closure is None
        self.wait()  # the forward pass has waited for each already
        if self.skip:
            return
        self._weights.stream.forget()
        rate, factor = self.param_groups[0]["lr"], self.factor
        outside = len(self._weights.parts) - 1
        # What is outside of the blocks is on the device all the time, and is read first.
        for index in (outside, *range(outside)):
            self._updates.append(self._thread.submit(self._update, index, rate, factor))
        self._updates[0].result()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: gradients left the parameters in the backward pass."""

    def wait(self) -> None:
        """Until every update is done; raises what one of them raised."""
        for update in self._updates:
            update.result()
        self._updates = []

    def _wait_for(self, index: int) -> None:
        if self._updates:
            self._updates[index + 1].result()

    @torch.no_grad()
    def _update(self, index: int, rate: float, factor: float) -> None:
        gradients = self._weights.gradients.wait(index)
        weights, copies = self._weights.parts[index], self._weights.copies[index]
        for weight, gradient, copy in zip(weights, gradients, copies, strict=True):
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            flat = (weight, gradient, copy, state["exp_avg"], state["exp_avg_sq"])
            for pieces in zip(*(tensor.view(-1).split(PIECE) for tensor in flat), strict=True):
                self._update_piece(*pieces, step=state["step"].clone(), rate=rate, factor=factor)
            state["step"] += 1

    def _update_piece(
        self,
        weight: Tensor,
        gradient: Tensor,
        copy: Tensor,
        average: Tensor,
        square_average: Tensor,
        *,
        step: Tensor,
        rate: float,
        factor: float,
    ) -> None:
        scaled = self._scaled[: len(gradient)].copy_(gradient)
        if factor != 1.0:
            scaled.mul_(factor)
        group: dict[str, Any] = self.param_groups[0]
        adamw(
            [weight],
            [scaled],
            [average],
            [square_average],
            [],
            [step],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        copy.copy_(weight)


class HostStepGuard:
    """Clips by the norm of all gradients and skips steps that are not finite, as `optimization.StepGuard` does.

    It waits for the device after each backward pass, since the update runs on the host.
    """

    num_skipped = 0

    def __init__(self, weights: HostWeights, optimizer: HostAdamW, *, max_grad_norm: float | None) -> None:
        self._weights, self._optimizer, self._max_norm = weights, optimizer, max_grad_norm
        self.scale = torch.ones((), device=weights.gradients.device)
        self._failed = False

    def apply(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Tensor:
        """Takes the last gradients, and decides on the step; returns their norm before clipping."""
        del parameters
        assert optimizer is self._optimizer
        norm = self._weights.gradients.finish()
        value = norm.item()
        self._failed |= not (value == value and abs(value) != float("inf"))
        self._optimizer.skip = self._failed
        self._optimizer.factor = 1.0 if self._max_norm is None else min(1.0, self._max_norm / (value + 1e-6))
        return norm

    def has_failed(self) -> bool:
        """Whether the run must stop; waits for the update, so that weights and state may be read after it."""
        self._optimizer.wait()
        return self._failed

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: nothing that `StepGuard` could not read."""
        return {"scale": 1.0, "good": 0.0, "skipped": 0.0}

    def load(self, state: dict[str, float]) -> None:
        """There is nothing to put back."""
        del state

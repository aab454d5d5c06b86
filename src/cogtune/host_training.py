"""Full fine-tuning with float32 weights and AdamW's state in host memory; the device computes with streamed copies.

A block's gradients leave while the backward pass goes on. After it their norm is known, and a thread updates block
after block, in the order in which the next forward pass asks for them, so that clipping is exact and the update runs
beside the next forward pass. The arithmetic is that of `torch.optim.AdamW`, fused. The host's cores update some of the
blocks; the others' weights and moments come to the device in pieces and go back, at the same time.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogtune.config import OptimizerSettings
from cogtune.host_threads import start_computing_thread
from cogtune.streaming.blocks import BlockStream, all_tensors, choose_streamed, stream_blocks
from cogtune.streaming.gradients import GradientStream
from cogtune.streaming.host import HostBuffer, Layout
from cogtune.streaming.updates import Piece, StreamedUpdates, make_room, split_pieces, update_piece

_Update = Future[None] | Future[torch.cuda.Event | None]


class HostWeights:
    """The float32 weights of a transformer on the host, and the copies in the run's precision that the device gets."""

    def __init__(self, transformer: Any, dtype: torch.dtype, device: torch.device, *, num_updated: int = 0) -> None:
        """`transformer` is float32 on the host; afterwards it computes on the device in `dtype`.

        The device updates `num_updated` of the blocks, spread evenly; what they need is in page-locked memory.
        """
        self.parameters = {
            name: nn.Parameter(p.detach().float(), requires_grad=True) for name, p in transformer.named_parameters()
        }
        self.device, self.dtype = device, dtype
        self.updated = updated_blocks(len(transformer.transformer_blocks), num_updated)
        """Numbers of the blocks that the device updates."""
        self.locked: list[HostBuffer] = []
        """The page-locked memory of those blocks' weights and moments: pages are unlocked when a buffer goes."""
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        """Zeros in page-locked memory for both moments of those blocks' weights."""
        self._flat: dict[int, list[Tensor]] = {}
        transformer.to(dtype).requires_grad_(True)
        self.stream: BlockStream = stream_blocks(
            transformer, "transformer_blocks", device, num_resident=0, select=all_tensors
        )
        blocks = list(transformer.transformer_blocks.children())
        parts = [list(block.parameters()) for block in blocks]
        inside = {id(parameter) for part in parts for parameter in part}
        parts.append([p for p in transformer.parameters() if id(p) not in inside])
        names = {id(p): name for name, p in transformer.named_parameters()}
        layouts = [flat.layout(part) for flat, part in zip(self.stream.flat, parts, strict=False)]
        for index in sorted(self.updated):
            self._lock_pages(index, [names[id(p)] for p in parts[index]], layouts[index])
        self.parts = [[self.parameters[names[id(p)]] for p in part] for part in parts]
        """The float32 weights by block, and last those outside of the blocks."""
        on_host = [[flat.on_host[id(p)] for p in part] for flat, part in zip(self.stream.flat, parts, strict=False)]
        self.copies: list[list[Tensor]] = [*on_host, list(parts[-1])]
        """The same weights in the run's precision, on the host or, outside of the blocks, on the device."""
        self.gradients = GradientStream(parts, [*layouts, Layout.packed(parts[-1])], device)

    def _lock_pages(self, index: int, names: list[str], layout: Layout) -> None:
        """Moves a block's weights to page-locked memory, laid out as its copies are, and makes room for the moments."""
        page_locked = self.device.type == "cuda"
        buffers = [HostBuffer(4 * layout.size, page_locked=page_locked) for _ in range(3)]
        self.locked += buffers
        self._flat[index] = [buffer.bytes.zero_().view(torch.float32) for buffer in buffers]
        for name, weight, average, square in zip(names, *map(layout.views, self._flat[index]), strict=True):
            self.parameters[name] = nn.Parameter(weight.copy_(self.parameters[name].detach()))
            self.moments[name] = (average, square)

    def split(self, index: int) -> list[Piece]:
        """A block that the device updates, in pieces that go across its tensors."""
        weight, average, square = self._flat[index]
        copy = self.stream.flat[index].host.bytes.view(self.dtype)
        state = {"exp_avg": average, "exp_avg_sq": square}
        return list(split_pieces(weight, self.gradients.flat(index), copy, state))

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


def updated_blocks(num_blocks: int, num_updated: int) -> set[int]:
    """Which blocks the device updates: spread evenly, so that neither it nor the host's cores wait for long."""
    return set(choose_streamed(num_blocks, num_blocks - num_updated)) if num_updated else set()


class HostAdamW(torch.optim.Optimizer):
    """AdamW on host weights, part by part in threads; `wait` before anything else reads them."""

    def __init__(self, weights: HostWeights, settings: OptimizerSettings) -> None:
        defaults = {
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        super().__init__(list(weights.parameters.values()), defaults)
        self._weights = weights
        self._scaled = make_room(torch.device("cpu"))
        self._thread = start_computing_thread("optimizer")
        self._updates: list[_Update] = []
        self._on_device: StreamedUpdates | None = None
        self._pieces: dict[int, list[Piece]] = {index: weights.split(index) for index in weights.updated}
        if weights.updated:
            self._on_device = StreamedUpdates(weights.device, weights.dtype)
            self._device_thread = _start_device_thread(weights.device)
        for name, (average, square_average) in weights.moments.items():
            self.state[weights.parameters[name]] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": average,
                "exp_avg_sq": square_average,
            }
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
            update: _Update
            if index in self._weights.updated:
                update = self._device_thread.submit(self._update_on_device, index, rate, factor)
            else:
                update = self._thread.submit(self._update, index, rate, factor)
            self._updates.append(update)
        self._updates[0].result()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: gradients left the parameters in the backward pass."""

    def wait(self) -> None:
        """Until every update is done; raises what one of them raised."""
        for update in self._updates:
            _finish(update)
        self._updates = []

    def _wait_for(self, index: int) -> None:
        if self._updates:
            _finish(self._updates[index + 1])

    @torch.no_grad()
    def _update(self, index: int, rate: float, factor: float) -> None:
        gradients = self._weights.gradients.wait(index)
        weights, copies = self._weights.parts[index], self._weights.copies[index]
        for weight, gradient, copy in zip(weights, gradients, copies, strict=True):
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            for piece in split_pieces(weight, gradient, copy, state):
                step = state["step"].clone()
                update_piece(piece, self._scaled, step=step, rate=rate, factor=factor, group=self._group)
            state["step"] += 1

    @torch.no_grad()
    def _update_on_device(self, index: int, rate: float, factor: float) -> torch.cuda.Event | None:
        """Queues a part's update there; the event says when it is back."""
        assert self._on_device is not None
        self._weights.gradients.wait(index)
        steps = [self.state[weight]["step"] for weight in self._weights.parts[index]]
        done = steps[0].item()
        assert all(step.item() == done for step in steps), "weights of one block have seen different numbers of steps"
        for step in steps:
            step += 1
        return self._on_device.update(self._pieces[index], step=done, rate=rate, factor=factor, group=self._group)

    @property
    def _group(self) -> dict[str, Any]:
        return self.param_groups[0]


def _start_device_thread(device: torch.device) -> ThreadPoolExecutor:
    """One thread that queues work on the device."""
    begin: Callable[[], object] | None = None
    if device.type == "cuda":  # a new thread would take the first device
        begin = partial(torch.cuda.set_device, torch.cuda.current_device() if device.index is None else device.index)
    return ThreadPoolExecutor(1, thread_name_prefix="optimizer on the device", initializer=begin)


def _finish(update: _Update) -> None:
    """Until an update is done on the host, where its copies may still be under way when the future is."""
    done = update.result()
    if done is not None:
        done.synchronize()


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

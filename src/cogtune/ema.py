"""An exponential moving average of the trained weights, float32, used for validation and for the final weights.

Each process averages what it has of the weights, whatever divides them. The average is where they are (on a device, an
update reads and writes 12 bytes a weight there), or on the host: then weights leave in pieces while the next step
computes, a thread takes them in, and the device has no copy. Both ways compute the same expression.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cogtune.host_threads import start_computing_thread
from cogtune.shards.pieces import Piece, find_piece, local_part
from cogtune.streaming.host import HostBuffer

CHUNK_NUMBERS = 1 << 24
"""Weights that leave for the host at once: two page-locked buffers of 64 MiB."""


class Ema:
    """Follows the parameters; early on with a shorter memory, so that the random start is forgotten."""

    @torch.no_grad()
    def __init__(self, weights: Mapping[str, Tensor | Piece], decay: float, *, on_host: bool = False) -> None:
        """`weights`: as `shards.parts.Parts` has them. `on_host`: the average is kept and updated in host memory; call
        `wait` before the weights change."""
        self._weights, self._decay = weights, decay
        first = [local_part(weight) for weight in weights.values()]
        self._average = {
            name: part.to("cpu" if on_host else part.device, torch.float32, copy=True)
            for name, part in zip(weights, first, strict=True)
        }
        devices = {part.device for part in first if part.device.type == "cuda"}
        self._device = devices.pop() if devices else None
        # A thread begins with the first GPU, and would take memory there.
        begin = partial(torch.cuda.set_device, self._device) if self._device is not None else None
        self._thread = start_computing_thread("ema", begin) if on_host else None
        self._update: Future[None] | None = None
        if on_host and self._device is not None:
            self._leaving = torch.cuda.Stream(self._device)
            self._buffers = [HostBuffer(4 * CHUNK_NUMBERS, page_locked=True) for _ in range(2)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (counted from 1)."""
        weight = 1.0 - min(self._decay, (1 + step) / (10 + step))
        current = [local_part(weight) for weight in self._weights.values()]
        averages = list(self._average.values())
        if self._thread is None:
            torch._foreach_lerp_(averages, [part.float() for part in current], weight)
            return
        self.wait()
        stepped = None
        if self._device is not None:
            stepped = torch.cuda.Event()
            stepped.record(torch.cuda.current_stream(self._device))
        self._update = self._thread.submit(self._update_on_host, averages, current, weight, stepped)

    def wait(self) -> None:
        """Until the weights may change, and the average may be read."""
        if self._update is not None:
            self._update.result()
            self._update = None

    @torch.no_grad()
    def _update_on_host(
        self, averages: list[Tensor], current: list[Tensor], weight: float, stepped: torch.cuda.Event | None
    ) -> None:
        """In the thread: while one piece is averaged the next one leaves the device."""
        pairs = (
            pair
            for average, part in zip(averages, current, strict=True)
            for pair in zip(_split(average), _split(part), strict=True)
        )
        if stepped is None:
            for average, part in pairs:
                average.lerp_(part.float(), weight)
            return
        self._leaving.wait_event(stepped)
        waiting: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
        for index, (average, part) in enumerate(pairs):
            staged = self._buffers[index % 2].bytes[: part.numel() * part.element_size()].view(part.dtype)
            with torch.cuda.stream(self._leaving):
                staged.copy_(part, non_blocking=True)
                left = torch.cuda.Event()
                left.record(self._leaving)
            if waiting is not None:
                _take_in(*waiting, weight)
            waiting = (average, staged, left)
        if waiting is not None:
            _take_in(*waiting, weight)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averaged weights are where the weights are inside; `Parts.publish` is to follow both ways."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.wait()
        for name, weight in self._weights.items():
            part = local_part(weight)
            own = part.clone()
            part.copy_(self._average[name])
            self._average[name].copy_(own)

    def pieces(self, *, rank: int = 0, world_size: int = 1) -> dict[str, Piece]:
        """This process's part of the average by `ema.<name>`, sharing its memory."""
        self.wait()
        found = {}
        for name, weight in self._weights.items():
            place = find_piece(f"ema.{name}", weight, rank=rank, world_size=world_size)
            found[place.name] = replace(place, data=self._average[name].view(-1))
        return found

    def write(self, whole: Mapping[str, Tensor]) -> None:
        """Puts a whole average back, each process its part of it."""
        for piece in self.pieces().values():
            piece.data.copy_(whole[piece.name.removeprefix("ema.")].reshape(-1)[piece.start : piece.stop])


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    count = math.ceil(tensor.numel() / CHUNK_NUMBERS)
    return tensor.view(-1).split(CHUNK_NUMBERS) if count else ()


def _take_in(average: Tensor, staged: Tensor, left: torch.cuda.Event, weight: float) -> None:
    left.synchronize()
    average.lerp_(staged.float(), weight)

"""AdamW on the device for weights and moments that stay on the host: they come in pieces, are updated and go back.

A device's link moves them in both directions at once, which is faster than the cores of many hosts compute; both
together are faster still. Three streams carry the pieces, so that one comes while another is updated and a third goes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

PIECE = 1 << 22
"""Numbers that are updated at a time, through one buffer: a new one for each tensor costs as much as the update."""
_NUM_SLOTS = 4

Piece = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Equally long parts of a weight (float32), its gradient, the copy that the device computes with (both of the run's
precision), and both moments (float32)."""
_GRADIENT, _COPY = 1, 2  # places in it: the one never goes back, the other never comes


def split_pieces(weight: Tensor, gradient: Tensor, copy: Tensor, state: dict[str, Tensor]) -> Iterator[Piece]:
    """The pieces of one weight, or of a range of weights, each of at most `PIECE` numbers."""
    whole = (weight, gradient, copy, state["exp_avg"], state["exp_avg_sq"])
    yield from zip(*(tensor.view(-1).split(PIECE) for tensor in whole), strict=True)


def make_room(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for as many numbers as a piece has."""
    return torch.empty(PIECE, dtype=dtype, device=device)


def count_staging_bytes(element_bytes: int) -> int:
    """Device memory of the pieces that are there at once: four tensors in float32, two of `element_bytes`."""
    return _NUM_SLOTS * PIECE * (16 + 2 * element_bytes)


def update_piece(
    piece: Piece, room: Tensor, *, step: Tensor, rate: float, factor: float, group: dict[str, Any]
) -> None:
    """One fused AdamW update in place, in float32, and the copy rounded from it; all on one device.

    `room` takes the gradient in float32, times `factor`; `step` is counted up.
    """
    weight, gradient, copy, average, square_average = piece
    scaled = room[: len(gradient)].copy_(gradient)
    if factor != 1.0:
        scaled.mul_(factor)
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


class _Slot:
    """Room on the device for one piece, and for its gradient in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        weight, average, square_average, self.scaled = (make_room(device) for _ in range(4))
        gradient, copy = (make_room(device, dtype) for _ in range(2))
        self.rooms = (weight, gradient, copy, average, square_average)
        self.step = torch.zeros((), dtype=torch.float32, device=device)
        self.left: torch.cuda.Event | None = None


class StreamedUpdates:
    """Updates weights on the device, from page-locked host memory and back to it. Of one thread."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of gradients and copies."""
        self._slots = [_Slot(device, dtype) for _ in range(_NUM_SLOTS)]
        self._next = 0
        on_gpu = device.type == "cuda"
        # A long kernel of the forward pass leaves no multiprocessor free: pieces would wait behind it, the link idle.
        priorities = (0, -1, 0)
        self._arriving, self._computing, self._leaving = (
            torch.cuda.Stream(device, priority=priority) if on_gpu else None for priority in priorities
        )
        self._queued: list[torch.cuda.Event] = []

    def update(
        self, pieces: Sequence[Piece], *, step: float, rate: float, factor: float, group: dict[str, Any]
    ) -> torch.cuda.Event | None:
        """Queues the update of pieces that have seen `step` steps so far; the event says when they are back.

        `factor` is what gradients are multiplied by. No more than two calls' work is queued at a time.
        """
        while len(self._queued) > 1:
            self._queued.pop(0).synchronize()
        for piece in pieces:
            self._update_piece(piece, step, rate=rate, factor=factor, group=group)
        if self._leaving is None:
            return None
        done = torch.cuda.Event()
        done.record(self._leaving)
        self._queued.append(done)
        return done

    def _update_piece(self, piece: Piece, step: float, *, rate: float, factor: float, group: dict[str, Any]) -> None:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        there: Any = tuple(room[: len(piece[0])] for room in slot.rooms)
        with torch.cuda.stream(self._arriving):
            if self._arriving is not None and slot.left is not None:
                self._arriving.wait_event(slot.left)
            _copy_all(piece, there, but=_COPY)
        with torch.cuda.stream(self._computing):
            if self._computing is not None and self._arriving is not None:
                self._computing.wait_stream(self._arriving)
            slot.step.fill_(step)
            update_piece(there, slot.scaled, step=slot.step, rate=rate, factor=factor, group=group)
        with torch.cuda.stream(self._leaving):
            if self._leaving is not None and self._computing is not None:
                self._leaving.wait_stream(self._computing)
            _copy_all(there, piece, but=_GRADIENT)
            if self._leaving is not None:
                slot.left = torch.cuda.Event()
                slot.left.record(self._leaving)


def _copy_all(sources: Piece, targets: Piece, *, but: int) -> None:
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if number != but:
            target.copy_(source, non_blocking=True)

"""What a process has of each tensor, and which process writes it.

Every way to divide a model here cuts tensors along their first dimension, or their flattened numbers: so a piece is a
range of a tensor's numbers in their order. A piece of one layout is read into any other by comparing two ranges.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Piece:
    """A range of a tensor's numbers, as one process has it."""

    name: str
    shape: tuple[int, ...]
    """The whole tensor's."""
    start: int
    """Place of the range's first number in the whole, flattened tensor."""
    data: Tensor
    """The numbers, contiguous, on any device; reading writes into it."""
    copy: int = 0
    """Which of the equal copies this one is."""
    num_copies: int = 1

    @property
    def stop(self) -> int:
        """One past the range's last number."""
        return self.start + self.data.numel()

    @property
    def num_bytes(self) -> int:
        """Size of the numbers in a file."""
        return self.data.numel() * self.data.element_size()

    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and offsets in the whole tensor; of a range that is no row or more, flat ones."""
        row = math.prod(self.shape[1:])
        if not self.shape or (row and self.start % row == 0 and self.data.numel() % row == 0):
            rows = (self.data.numel() // row, *self.shape[1:]) if self.shape else ()
            return rows, (self.start // row, *[0] * (len(self.shape) - 1)) if self.shape else ()
        return (self.data.numel(),), (self.start,)


@torch.no_grad()  # so that a `DTensor` gives its part without a graph
def find_piece(name: str, tensor: Tensor | Piece, *, rank: int = 0, world_size: int = 1) -> Piece:
    """This process's piece. A tensor without placement is the same on every process of `world_size`."""
    if isinstance(tensor, Piece):
        return replace(tensor, name=name)
    if not isinstance(tensor, DTensor):
        return Piece(name, tuple(tensor.shape), 0, _flat(tensor.detach()), copy=rank, num_copies=world_size)
    mesh = tensor.device_mesh
    places = mesh.get_coordinate()
    assert places is not None
    shape, local = tuple(tensor.shape), tensor.to_local().detach()
    first, count, copy, num_copies = 0, shape[0] if shape else 1, 0, 1
    for placement, place, size in zip(tensor.placements, places, mesh.shape, strict=True):
        if isinstance(placement, Replicate):
            copy, num_copies = copy * size + place, num_copies * size
            continue
        assert isinstance(placement, Shard) and placement.dim == 0, f"{name}: {tensor.placements}"
        rows = -(-count // size)  # as `torch.chunk` divides: the last ones get less, or nothing
        start = min(count, place * rows)
        first, count = first + start, min(rows, count - start)
    row = math.prod(shape[1:])
    assert local.numel() == count * row, f"{name}: {tuple(local.shape)} of {shape} as {tensor.placements}"
    return Piece(name, shape, first * row if local.numel() else 0, _flat(local), copy, num_copies)


def _flat(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    return tensor.view(-1)


def choose_written(pieces: Mapping[str, Piece]) -> list[Piece]:
    """The pieces that this process writes: of equal copies each process takes a fair share of the bytes.

    Every process gives the same names in the same order, so all come to the same division.
    """
    loads: dict[int, list[int]] = {}
    chosen = []
    for piece in pieces.values():
        load = loads.setdefault(piece.num_copies, [0] * piece.num_copies)
        writer = load.index(min(load))
        # Pieces of one tensor differ in size by a row at most: the whole's size is what all processes know.
        load[writer] += math.prod(piece.shape) * piece.data.element_size()
        if writer == piece.copy and (piece.data.numel() or not math.prod(piece.shape)):
            chosen.append(piece)
    return chosen


def local_part(tensor: Tensor | Piece) -> Tensor:
    """What this process has of a tensor, sharing its memory; of a `Piece` its flat numbers."""
    if isinstance(tensor, Piece):
        return tensor.data
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

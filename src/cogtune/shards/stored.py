"""The tensors of a checkpoint's folder, whoever wrote them, read range by range into whatever a process has of them."""

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogtune.cluster.whereabouts import move
from cogtune.errors import UserError
from cogtune.formats.tensors import Spec, Tensors
from cogtune.shards.files import StoredPiece, as_bytes, read_header
from cogtune.shards.pieces import Piece

GROUPS = ("weights", "optimizer", "ema")
NUM_READERS = 4


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's shape, type, and where its numbers lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[StoredPiece, ...]


class StoredTensors:
    """Everything in a checkpoint under `weights.<name>`, `optimizer.<name>.<key>` and `ema.<name>`.

    Reads pieces of many processes, and the whole files of one (`weights.safetensors` and so on).
    """

    def __init__(self, folder: Path) -> None:
        """Reads the headers alone; raises `UserError` for a damaged one."""
        self.folder = folder
        found: dict[str, StoredTensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, shape, dtype, piece in read_header(file, file.stem if file.stem in GROUPS else None):
                before = found.get(name, StoredTensor(shape, dtype, ()))
                if (before.shape, before.dtype) != (shape, dtype):
                    raise UserError(f"{folder}: {name} has several shapes or types; its files are of different runs")
                found[name] = StoredTensor(shape, dtype, (*before.pieces, piece))
        self.tensors: Mapping[str, StoredTensor] = found

    def names(self, group: str) -> list[str]:
        """Names of a group, without the group."""
        return [name.removeprefix(f"{group}.") for name in self.tensors if name.startswith(f"{group}.")]

    @torch.no_grad()
    def read_into(self, target: Piece) -> None:
        """Fills a piece's data; raises `UserError` where a number is missing, or shape or type is another one."""
        stored = self.tensors.get(target.name)
        if stored is None:
            raise UserError(f"{self.folder}: has no {target.name}; it is of another model, or of another run")
        if stored.shape != target.shape:
            shapes = f"{list(stored.shape)} and should be {list(target.shape)}"
            raise UserError(f"{self.folder}: {target.name} is {shapes}; it is of another model")
        data = target.data
        direct = data.device.type == "cpu" and data.dtype == stored.dtype
        host = data if direct else torch.empty(data.numel(), dtype=stored.dtype)
        covered = 0
        for piece in stored.pieces:
            begin, end = max(piece.start, target.start), min(piece.stop, target.stop)
            if begin < end:
                part = host[begin - target.start : end - target.start]
                _read(piece, begin, as_bytes(part), stored.dtype.itemsize)
                covered += end - begin
        if covered != data.numel():
            raise UserError(
                f"{self.folder}: {target.name} has {covered} of the numbers {target.start} to {target.stop}; "
                "a file of the checkpoint is missing"
            )
        if not direct:
            data.copy_(host)

    def read_all(self, targets: Iterable[Piece]) -> None:
        """Several files are read at once."""
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for result in [readers.submit(self.read_into, target) for target in targets]:
                result.result()

    def group(self, group: str) -> Tensors:
        """A group's tensors by their own names, each read whole when it is asked for."""
        specs = {}
        for name in self.names(group):
            stored = self.tensors[f"{group}.{name}"]
            specs[name] = Spec(stored.shape, stored.dtype)
        return Tensors(str(self.folder), specs, lambda name: self.read(f"{group}.{name}"))

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the host."""
        stored = self.tensors[name]
        data = torch.empty(math.prod(stored.shape), dtype=stored.dtype)
        self.read_into(Piece(name, stored.shape, 0, data))
        return data.view(stored.shape)


def _read(piece: StoredPiece, begin: int, target: Tensor, itemsize: int) -> None:
    """Bytes from number `begin` on into a host tensor."""
    move()
    with piece.file.open("rb") as file:
        file.seek(piece.offset + (begin - piece.start) * itemsize)
        if file.readinto(target.numpy().data) != target.numel():
            raise UserError(f"{piece.file}: ends too early; copy it again")

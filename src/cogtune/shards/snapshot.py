"""A copy of a process's pieces in host memory, from which files are written while training goes on.

The memory has the layout of the files and is kept from one save to the next. It is page-locked where pieces are on a
GPU: the copy then runs at the bus's speed, and is all that training waits for.
"""

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cogtune.shards.files import CHUNK_BYTES, ShardFile, as_bytes, split_bytes
from cogtune.streaming.host import HostBuffer


class Snapshot:
    """Host memory for a list of files; `prepare` may run ahead in a thread of its own."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._page_locked = False
        self._buffers: list[HostBuffer] = []
        self._preparing: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, files: Sequence[ShardFile]) -> None:
        """Begins to take the memory for files like these, beside training."""
        self.wait()
        self._preparing = threading.Thread(target=self._try_to_allocate, args=(list(files),), daemon=True)
        self._preparing.start()

    def wait(self) -> None:
        """For `prepare`; raises what it met."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try_to_allocate(self, files: Sequence[ShardFile]) -> None:
        try:
            devices = [piece.data.device for file in files for piece in file.pieces if piece.data.is_cuda]
            if devices:  # a thread begins with the first GPU, and would take memory there
                torch.cuda.set_device(devices[0])
            self._allocate(files)
        except Exception as error:  # noqa: BLE001  # told by `wait`, on the thread that trains
            self._error = error

    def _allocate(self, files: Sequence[ShardFile]) -> None:
        sizes = [file.num_bytes for file in files]
        page_locked = any(piece.data.device.type == "cuda" for file in files for piece in file.pieces)
        if sizes == self._sizes and page_locked == self._page_locked:
            return
        self._buffers = []  # before the new ones are taken
        for size in sizes:
            self._buffers.append(HostBuffer(size, page_locked=page_locked))
        self._sizes, self._page_locked = sizes, page_locked

    @torch.no_grad()
    def take(self, files: Sequence[ShardFile]) -> None:
        """Copies all pieces; when it returns they may change again."""
        self.wait()
        self._allocate(files)
        device = None
        for file, buffer in zip(files, self._buffers, strict=True):
            offset = 0
            for piece in file.pieces:
                target = buffer.bytes[offset : offset + piece.num_bytes]
                target.view(piece.data.dtype).copy_(piece.data, non_blocking=True)
                offset += piece.num_bytes
                device = piece.data.device if piece.data.device.type == "cuda" else device
        if device is not None:
            torch.cuda.current_stream(device).synchronize()

    def chunks(self, index: int) -> Iterator[Tensor]:
        """The bytes of file `index`, uint8."""
        return split_bytes(self._buffers[index].bytes)


def chunks_without_copy(file: ShardFile) -> Iterator[Tensor]:
    """A file's bytes straight from the pieces, a chunk at a time: training waits, no host memory is taken."""
    for piece in file.pieces:
        data = as_bytes(piece.data)
        for chunk in data.split(CHUNK_BYTES) if data.numel() else ():
            yield chunk.cpu()

"""Page-locked host memory of exact size, which a GPU reads and writes beside its work.

PyTorch's own page-locked allocator rounds up to powers of two: a block of 264 MB would take 512.
"""

import contextlib
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogtune.errors import UserError


class HostBuffer:
    """`num_bytes` of host memory as a uint8 tensor, page-locked where a GPU is to copy from it."""

    def __init__(self, num_bytes: int, *, page_locked: bool) -> None:
        page_locked = page_locked and num_bytes > 0
        self.bytes: Tensor = take_unforked(num_bytes) if page_locked else torch.empty(num_bytes, dtype=torch.uint8)
        if page_locked:
            # Takes the pages. The driver, left to do it, takes three times as long and holds up the GPU meanwhile.
            self.bytes[:: mmap.PAGESIZE].zero_()
            runtime: Any = torch.cuda.cudart()
            address = self.bytes.data_ptr()
            code = int(runtime.cudaHostRegister(address, num_bytes, 0))
            if code:
                raise UserError(
                    f"memory: {num_bytes / 1e9:.2f} GB of host memory can't be page-locked (CUDA error {code}); free "
                    "host memory, raise the limit (`ulimit -l`), or let less wait there: set memory.offloaded_blocks "
                    "lower, for LoRA memory.quantized_base=nf4, for full fine-tuning memory.optimizer=8bit"
                )
            # Called before the tensor goes; at the process's end the driver does it.
            weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


@dataclass(frozen=True)
class Layout:
    """Where tensors of one type lie in a range: the first number of each, their shapes, and the range's size."""

    offsets: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    size: int

    @classmethod
    def packed(cls, tensors: Sequence[Tensor]) -> "Layout":
        """One after another without gaps."""
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + tensor.numel())
        return cls(tuple(ends[:-1]), tuple(tensor.shape for tensor in tensors), ends[-1])

    def views(self, whole: Tensor) -> list[Tensor]:
        """The tensors in a range of `size` numbers."""
        return [
            whole[offset : offset + shape.numel()].view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]


def take_unforked(num_bytes: int) -> Tensor:
    """`num_bytes` of host memory, uint8, that a forked process does not get; it must neither read nor free the tensor.

    Of pages that a driver has locked, `fork` makes copies at once: each worker of a loader would have all of them.
    """
    # Not shared: a container counts shared pages as cache, which it could take back.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux
        pages.madvise(mmap.MADV_DONTFORK)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to take, to lock and to look up
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def free_host_bytes() -> int | None:
    """Host memory that could be taken without swapping, a container's limit respected; None where unknown."""
    found = [_meminfo_available(), _container_available()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def _meminfo_available() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123  # no file of the user's
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None


def _container_available() -> int | None:
    """What a control group (version 2) leaves; its page cache can be given back and counts as free."""
    folder = "/sys/fs/cgroup"
    try:
        with open(f"{folder}/memory.max", encoding="ascii") as file:  # noqa: PTH123
            limit = int(file.read())
        with open(f"{folder}/memory.stat", encoding="ascii") as file:  # noqa: PTH123
            statistics = dict(line.split() for line in file)
        return limit - int(statistics["anon"]) - int(statistics.get("unevictable", 0))
    except (OSError, KeyError, ValueError):  # "max": no limit
        return None

"""How fast a device computes and how fast the host's memory reaches it: what decides between rungs of memory."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cogtune.attention_backends import is_installed
from cogtune.host_threads import count_cores

_SIZE = 6144
_COPY_BYTES = 64 << 20
_REPEATS = 3


@dataclass(frozen=True)
class Machine:
    """Rates of one device, best case."""

    flops: float
    """Of a large matrix product in the run's precision, a second."""
    link: float
    """Bytes a second between page-locked host memory and the device, each way."""
    cores: int = 12
    """That may compute on the host beside the device."""
    attention: tuple[float, float] = (0.525, 0.535)
    """Parts of `flops` that attention reaches, forward and backward: cuDNN's on an H100 (docs/benchmarks.md)."""

    def describe(self) -> str:
        """One line."""
        return f"{self.flops / 1e12:.0f} TFLOP/s, {self.link / 1e9:.0f} GB/s to the host, {self.cores} cores there"


NOMINAL = Machine(flops=820e12, link=50e9)
"""What an H100 on PCIe 5 measured, with three quarters of 16 cores: a plan without a GPU assumes it."""


_FLASH4 = (0.632, 0.66)
"""The same with FlashAttention-4, which reaches 0.66 and 0.69 there by itself; with these a step comes out as measured
(5B, keep_all: 1.77 s). On other devices neither was measured."""


def avoid_fragments(device: torch.device) -> None:
    """Lets PyTorch's allocator enlarge what it has instead of taking pieces of fixed sizes, which near the limit leave
    a GiB and more unused and make it give memory back in the middle of steps. Settings of the user's stay.

    Call it before anything is on the device.
    """
    own = any("PYTORCH" in name and name.endswith("ALLOC_CONF") for name in os.environ)
    if device.type == "cuda" and not own:
        newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures the rates in some hundredths of a second; the nominal ones on a CPU, or without 0.3 GiB to do it in."""
    if device.type != "cuda":
        return NOMINAL
    try:
        return _measure(device, dtype)
    except torch.OutOfMemoryError:  # whether anything fits at all is the ladder's to say
        return NOMINAL
    finally:
        torch.cuda.empty_cache()


def _measure(device: torch.device, dtype: torch.dtype) -> Machine:
    with torch.no_grad():
        matrix = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
        product = _best_seconds(lambda: torch.mm(matrix, matrix), device)
        host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
        copy = _best_seconds(lambda: there.copy_(host, non_blocking=True), device)
    machine = Machine(2 * _SIZE**3 / product, _COPY_BYTES / copy, count_cores())
    taken = is_installed("flash4") and torch.cuda.get_device_capability(device)[0] in (9, 10)  # Hopper, Blackwell
    return replace(machine, attention=_FLASH4) if taken else machine


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best

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
    """Of a large product of random matrices in the run's precision, a second. (Of equal numbers it is a tenth more, and
    differs as much between runs: 720 to 870 TFLOP/s on H200s; random ones were measured on one of them, 747.)"""
    link: float
    """Bytes a second between page-locked host memory and the device, each way."""
    cores: int = 12
    """That may compute on the host beside the device."""
    attention: tuple[float, float] = (0.574, 0.585)
    """Parts of `flops` that attention reaches, forward and backward: cuDNN's on an H100 (docs/benchmarks.md) and an
    H200 (0.573, 0.587)."""
    multiprocessors: int = 132
    """Of a GPU; an H100's and an H200's."""

    def describe(self) -> str:
        """One line."""
        return f"{self.flops / 1e12:.0f} TFLOP/s, {self.link / 1e9:.0f} GB/s to the host, {self.cores} cores there"


NOMINAL = Machine(flops=750e12, link=50e9)
"""An H100 on PCIe 5, with three quarters of 16 cores: a plan without a GPU assumes it. Its products of ones ran at 820
TFLOP/s; of random numbers they were measured on an H200, whose attention and steps are as fast."""


_FLASH4 = (0.691, 0.722)
"""The same with FlashAttention-4, which reaches 0.66 and 0.69 there by itself; with these a step comes out as measured
(5B, keep_all: 1.77 s). On other devices neither was measured."""
_ORDERED = (0.42, 0.193)
"""FlashAttention-2 with sums in one order, on an H200: 12.3 and 67.4 ms for a layer of 5B, where cuDNN takes 9.1 and
22.1, and FlashAttention-2 in any order 12.5 and 36.0."""


def avoid_fragments(device: torch.device) -> None:
    """Lets PyTorch's allocator enlarge what it has instead of taking pieces of fixed sizes, which near the limit leave
    a GiB and more unused and make it give memory back in the middle of steps. Settings of the user's stay.

    Call it before anything is on the device.
    """
    own = any("PYTORCH" in name and name.endswith("ALLOC_CONF") for name in os.environ)
    if device.type == "cuda" and not own:
        newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def sum_in_order(machine: Machine) -> Machine:
    """The same with attention as `train.deterministic` takes it."""
    return replace(machine, attention=_ORDERED)


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
        generator = torch.Generator(device).manual_seed(0)
        matrix = torch.randn(_SIZE, _SIZE, device=device, dtype=dtype, generator=generator)
        product = _best_seconds(lambda: torch.mm(matrix, matrix), device)
        host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
        copy = _best_seconds(lambda: there.copy_(host, non_blocking=True), device)
    properties = torch.cuda.get_device_properties(device)
    machine = Machine(
        2 * _SIZE**3 / product, _COPY_BYTES / copy, count_cores(), multiprocessors=properties.multi_processor_count
    )
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

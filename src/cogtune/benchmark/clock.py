"""Measuring one piece of work on a device: seconds, first call apart, and peak memory, also where it fails."""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from cogtune.benchmark.kernels import describe_profile
from cogtune.errors import UserError
from cogtune.memory import GIB

try:  # only where there is a GPU
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]
except ImportError:
    TritonError = RuntimeError

_SHOWN_KERNELS = 14

# A way that fails, or needs more memory than there is, must not lose the numbers of the others.
FAILURES = (
    RuntimeError, AssertionError, TypeError, ValueError, AttributeError, LookupError, ImportError, OSError, TritonError,
    UserError,
)  # fmt: skip


class Marks:
    """Moments on the device's own clock, taken without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def add(self) -> None:
        """Marks the moment at which the work queued so far is done."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def differences(self) -> list[float]:
        """Seconds from each mark to the next; waits for the device."""
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def synchronize(device: torch.device) -> None:
    """Waits for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Starts a new peak of memory, after the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB allocated and reserved at the peak."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def time_work(work: Callable[[], Any], device: torch.device, *, repeats: int, limit_seconds: float) -> dict[str, Any]:
    """Seconds of the first call and the median, least and most of `repeats` more, as long as the limit lasts."""
    reset_peak(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    first = time.perf_counter() - started
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or time.perf_counter() - started < limit_seconds):
        before = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - before)
    row = {"first_seconds": first, "seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}
    return row | peak_memory(device)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` measured, or what it failed of."""
    try:
        return work()
    except FAILURES as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def report(part: str, row: dict[str, Any]) -> None:
    """Prints what was measured as soon as it is, its slowest kernels below."""
    profiled = row.get("profile", {})
    print(f"{part}: {json.dumps({name: value for name, value in row.items() if name != 'profile'})}", flush=True)
    if "kernels" in profiled:
        print(describe_profile(profiled, _SHOWN_KERNELS), flush=True)

"""Where a step's time goes on the device: kernels by part, from PyTorch's profiler."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name has decides; names of cuDNN, cuBLAS (nvjet), CUTLASS, flash-attn and Inductor.
_PARTS = (
    ("other", r"^triton_(poi|per|red|for)"),  # Inductor names a kernel after its neighbours too
    ("attention", r"sdpa|flash|fmha|attention|attn"),
    ("optimizer", r"multi_tensor|adam|foreach|lpnorm"),
    ("linear", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|matmul|_mm_|addmm|mkldnn|(^|::)mm$|linear|bmm"),
    ("copies to the device", r"memcpy|memset"),
)
TOP_KERNELS = 25


def part_of(kernel: str) -> str:
    """The part of a step that a kernel of this name belongs to; "other" is norms, gates, GELU and the like."""
    return next((part for part, pattern in _PARTS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile_steps(run_step: Callable[[], Any], num_steps: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds a step by part, and the kernels that take most; on a CPU operators stand for kernels."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps):
            run_step()
        if on_gpu:
            torch.cuda.synchronize(device)
    parts: dict[str, float] = {}
    kernels = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if not microseconds:
            continue
        milliseconds = microseconds / 1e3 / num_steps
        part = part_of(event.key)
        parts[part] = parts.get(part, 0.0) + milliseconds
        kernels.append({"name": event.key[:160], "part": part, "ms": milliseconds, "calls": event.count / num_steps})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"parts_ms": dict(sorted(parts.items(), key=lambda item: -item[1])), "kernels": kernels[:TOP_KERNELS]}


def describe_profile(result: dict[str, Any], num_kernels: int) -> str:
    """Parts in one line, then the slowest kernels."""
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in result["parts_ms"].items())
    lines = [f"ms a step by part: {parts}"]
    for kernel in result["kernels"][:num_kernels]:
        lines.append(f"  {kernel['ms']:9.2f} ms {kernel['calls']:7.1f} x  {kernel['part']:<9} {kernel['name'][:110]}")
    return "\n".join(lines)

"""What a device can do at best: matrix products, attention and copies of the very shapes that a training step has."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cogtune.attention_backends import measure_backends
from cogtune.models import ModelFacts

# Dense 16-bit tensor throughput in TFLOP/s, from the makers' data sheets.
_PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.1, "RTX 4090": 165.2, "B200": 2250.0}
_REPEATS = 5


@dataclass(frozen=True)
class StepShape:
    """The sizes that decide a training step's cost."""

    batch_size: int
    tokens: int
    num_layers: int
    num_heads: int
    head_dim: int

    @classmethod
    def of(cls, facts: ModelFacts, tokens: int, batch_size: int) -> "StepShape":
        """The shape of a model at a sequence length."""
        return cls(batch_size, tokens, facts.num_layers, facts.num_heads, facts.head_dim)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each frozen linear layer of a block."""
        d = self.width
        return {"qkv": (d, 3 * d), "out": (d, d), "ff in": (d, 4 * d), "ff out": (4 * d, d)}

    @property
    def linear_flops(self) -> float:
        """Of one block's linear layers, forward."""
        return sum(2.0 * self.batch_size * self.tokens * a * b for a, b in self.products.values())

    @property
    def attention_flops(self) -> float:
        """Of one attention layer, forward."""
        return 4.0 * self.batch_size * self.tokens**2 * self.width


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's dense 16-bit FLOP/s of a known card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if part in name), None)


def time_call(function: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    """Seconds of one call, the best of three rounds after one to warm up."""
    best = float("inf")
    for round_number in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if round_number:
            best = min(best, (time.perf_counter() - started) / repeats)
    return best


def measure_ceilings(shape: StepShape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of each product (forward and input gradient) and attention backend; bytes a second of a copy."""
    rows = shape.batch_size * shape.tokens
    products = {}
    for name, (size_in, size_out) in shape.products.items():
        x, y = (torch.randn(rows, size, device=device, dtype=dtype) for size in (size_in, size_out))
        weight = torch.randn(size_out, size_in, device=device, dtype=dtype)
        forward = time_call(lambda x=x, weight=weight: x @ weight.t(), device)
        backward = time_call(lambda y=y, weight=weight: y @ weight, device)
        flops = 2.0 * rows * size_in * size_out
        products[name] = {
            "forward_seconds": forward,
            "input_gradient_seconds": backward,
            "tflops": flops / forward / 1e12,
            "input_gradient_tflops": flops / backward / 1e12,
        }
    source = torch.empty(rows, shape.width, device=device, dtype=dtype).normal_()
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device, 20)
    attention = attention_rates(shape, device, dtype)
    return {
        "products": products,
        "attention": attention,
        "copy_gb_per_second": 2 * source.nbytes / copy / 1e9,
        "floor_seconds": step_floor(shape, products, attention),
    }


def attention_rates(shape: StepShape, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Seconds and TFLOP/s of each backend; the backward kernel does 2.5 times the forward's arithmetic."""
    timings = measure_backends(
        batch_size=shape.batch_size,
        num_heads=shape.num_heads,
        tokens=shape.tokens,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=device,
    )
    return {
        name: {
            "forward_seconds": timing.forward,
            "backward_seconds": timing.backward,
            "forward_tflops": shape.attention_flops / timing.forward / 1e12,
            "backward_tflops": 2.5 * shape.attention_flops / timing.backward / 1e12,
        }
        for name, timing in timings.items()
    }


def step_floor(shape: StepShape, products: dict[str, Any], attention: dict[str, Any]) -> dict[str, float]:
    """Seconds of a LoRA step that did nothing but attention and the frozen layers' products, each once, at best."""
    fastest = min(attention.values(), key=lambda row: row["forward_seconds"] + row["backward_seconds"])
    parts = {
        "attention": fastest["forward_seconds"] + fastest["backward_seconds"],
        "linear": sum(row["forward_seconds"] + row["input_gradient_seconds"] for row in products.values()),
    }
    parts = {name: shape.num_layers * seconds for name, seconds in parts.items()}
    return parts | {"total": parts["attention"] + parts["linear"]}


def describe_ceilings(ceilings: dict[str, Any]) -> str:
    """A line for each ceiling."""
    lines = [f"copy: {ceilings['copy_gb_per_second']:.0f} GB/s"]
    for name, row in ceilings["products"].items():
        lines.append(
            f"product {name}: forward {row['forward_seconds'] * 1e3:.2f} ms ({row['tflops']:.0f} TFLOP/s), "
            f"input gradient {row['input_gradient_seconds'] * 1e3:.2f} ms ({row['input_gradient_tflops']:.0f} TFLOP/s)"
        )
    for name, row in ceilings["attention"].items():
        lines.append(
            f"attention {name}: forward {row['forward_seconds'] * 1e3:.2f} ms ({row['forward_tflops']:.0f} TFLOP/s), "
            f"backward {row['backward_seconds'] * 1e3:.2f} ms ({row['backward_tflops']:.0f} TFLOP/s)"
        )
    floor = ceilings["floor_seconds"]
    lines.append(
        f"floor of a LoRA step: {floor['total']:.3f} s (attention {floor['attention']:.3f}, "
        f"linear {floor['linear']:.3f})"
    )
    return "\n".join(lines)

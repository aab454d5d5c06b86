"""Activations to float8 rows in one pass of a GPU: as they are, through GELU, or through GELU's derivative (Triton).

A row is read once and stays in registers between its maximum and its rounding; what the compiler makes of the same
expression reads a long row twice. Elsewhere the same operations run in plain torch.
"""
# ruff: noqa: ANN001, N803  (what Triton compiles takes pointers, sizes and capital constants)
# pyright: reportInvalidTypeForm=false

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogtune.float8 import LARGEST, TINY, quantize_rows

try:  # comes with CUDA builds of torch
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    triton: Any = None
    tl: Any = SimpleNamespace(constexpr=int)

_LONGEST = 1 << 15  # elements of a row that registers hold


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _rows_kernel(
    values, inner, rows, scales, K, LARGEST: tl.constexpr, TINY: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(values + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    z = x
    if GRADIENT:
        z = tl.load(inner + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    # (1 + tanh u) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (z + 0.044715 z^3).
    half = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    if GRADIENT:
        y = x * (half + z * half * (1.0 - half) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * z * z))
    else:
        y = z * half
    scale = tl.maximum(tl.max(tl.abs(y), 0), TINY) / LARGEST
    y = tl.minimum(tl.maximum(y / scale, -LARGEST), LARGEST)
    tl.store(rows + row * K + columns, y.to(rows.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def _run(values: Tensor, inner: Tensor | None) -> tuple[Tensor, Tensor]:
    count, width = values.shape
    rows = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    scales = torch.empty(count, 1, device=values.device)
    block = triton.next_power_of_2(width)
    _rows_kernel[(count,)](
        values, values if inner is None else inner, rows, scales, width, LARGEST=LARGEST, TINY=TINY,
        GRADIENT=inner is not None, BLOCK=block, num_warps=max(4, min(16, block // 1024)),
    )  # fmt: skip
    return rows, scales


def _has_kernel(values: Tensor) -> bool:
    return values.is_cuda and triton is not None and values.shape[1] <= _LONGEST


@torch.library.custom_op("cogtune::quantize_gelu", mutates_args=())
def quantize_gelu(values: Tensor) -> tuple[Tensor, Tensor]:
    """float8 rows [N, K] and scales [N, 1] of GELU (tanh form) of `values` [N, K]."""
    if _has_kernel(values):
        return _run(values.contiguous(), None)
    return quantize_rows(F.gelu(values.float(), approximate="tanh"))


@torch.library.custom_op("cogtune::quantize_gelu_gradient", mutates_args=())
def quantize_gelu_gradient(grad: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """float8 rows and scales of the gradient of `values`, from that of their GELU; all [N, K]."""
    if _has_kernel(values):
        return _run(grad.contiguous(), values.contiguous())
    return quantize_rows(torch.ops.aten.gelu_backward(grad.float(), values.float(), approximate="tanh"))


def _like_rows(values: Tensor, *_more: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format), values.new_empty(
        (values.shape[0], 1), dtype=torch.float32
    )


quantize_gelu.register_fake(_like_rows)
quantize_gelu_gradient.register_fake(_like_rows)

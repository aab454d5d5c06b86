"""Queries and keys out of the joint product in one pass: layer norm over a head's channels, then rotation (Triton).

The compiler takes two passes forward and four backward, since a rotation reads its neighbours' results. Here a head's
row is read twice, as it is and with neighbours exchanged, normalized both ways, and written once; the gradient of the
whole joint product is written once too, its values' part included. For frozen norms: their weights get no gradient.
"""
# ruff: noqa: ANN001, N803  (what Triton compiles takes pointers, sizes and capital constants)
# pyright: reportInvalidTypeForm=false

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:  # comes with CUDA builds of torch
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    triton: Any = None
    tl: Any = SimpleNamespace(constexpr=int)

Norms = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight and bias of the queries' norm, then of the keys': [head_dim] each."""
_BLOCK = 64  # rows of a head that a program does


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _forward_kernel(
    joint, query, key, query_weight, query_bias, key_weight, key_bias, cos, sin, num_rows, num_tokens, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_key = tl.program_id(1)
    columns = tl.arange(0, D)
    swapped = columns ^ 1
    inside = (rows < num_rows)[:, None]
    token, head = rows // HEADS, rows % HEADS
    source = joint + token[:, None] * (3 * HEADS * D) + is_key * (HEADS * D) + head[:, None] * D
    x = tl.load(source + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + swapped[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / D
    away = x - mean
    scale = 1.0 / tl.sqrt(tl.sum(away * away, 1)[:, None] / D + eps)
    weight, bias = query_weight, query_bias
    if is_key == 1:
        weight, bias = key_weight, key_bias
    y = (
        away * scale * tl.load(weight + columns).to(tl.float32)[None, :]
        + tl.load(bias + columns).to(tl.float32)[None, :]
    )
    z = (other - mean) * scale * tl.load(weight + swapped).to(tl.float32)[None, :]
    z += tl.load(bias + swapped).to(tl.float32)[None, :]
    turn = (token % num_tokens)[:, None] * D + columns[None, :]
    y = y * tl.load(cos + turn, mask=inside, other=0.0) + z * tl.load(sin + turn, mask=inside, other=0.0)
    target = query
    if is_key == 1:
        target = key
    tl.store(target + rows[:, None] * D + columns[None, :], y.to(query.dtype.element_ty), mask=inside)


@_jit
def _backward_kernel(
    joint, grad_query, grad_key, grad_value, output, query_weight, key_weight, cos, sin, num_rows, num_tokens, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    columns = tl.arange(0, D)
    swapped = columns ^ 1
    inside = (rows < num_rows)[:, None]
    token, head = rows // HEADS, rows % HEADS
    place = token[:, None] * (3 * HEADS * D) + part * (HEADS * D) + head[:, None] * D + columns[None, :]
    own = rows[:, None] * D
    if part == 2:
        result = tl.load(grad_value + own + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        grad, weight = grad_query, query_weight
        if part == 1:
            grad, weight = grad_key, key_weight
        x = tl.load(joint + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1)[:, None] / D
        away = x - mean
        scale = 1.0 / tl.sqrt(tl.sum(away * away, 1)[:, None] / D + eps)
        turn = (token % num_tokens)[:, None] * D
        g = tl.load(grad + own + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        g = g * tl.load(cos + turn + columns[None, :], mask=inside, other=0.0)
        other = tl.load(grad + own + swapped[None, :], mask=inside, other=0.0).to(tl.float32)
        g += other * tl.load(sin + turn + swapped[None, :], mask=inside, other=0.0)
        g = g * tl.load(weight + columns).to(tl.float32)[None, :]
        normal = away * scale
        along = tl.sum(g * normal, 1)[:, None] / D
        result = scale * (g - tl.sum(g, 1)[:, None] / D - normal * along)
    tl.store(output + place, result.to(output.dtype.element_ty), mask=inside)


def _swap(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of mean 0 and variance 1, and the factor that made them so."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    away = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(away.square().mean(-1, keepdim=True) + eps)
    return away * scale, scale


def _plain(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The forward kernel's work on one part [B, S, H, D]."""
    y = _normalize(x, eps)[0] * weight + bias
    return (y * cos[None, :, None] + _swap(y) * sin[None, :, None]).to(x.dtype)


def _plain_gradient(x: Tensor, grad: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The backward kernel's."""
    normal, scale = _normalize(x, eps)
    g = (grad * cos[None, :, None] + _swap(grad * sin[None, :, None])) * weight
    along = (g * normal).mean(-1, keepdim=True)
    return (scale * (g - g.mean(-1, keepdim=True) - normal * along)).to(x.dtype)


def _parts(joint: Tensor, heads: int) -> list[Tensor]:
    return [part.unflatten(-1, (heads, -1)) for part in joint.chunk(3, dim=-1)]


@torch.library.custom_op("cogtune::head_rows", mutates_args=())
def _head_rows(
    joint: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor, key_bias: Tensor, cos: Tensor,
    sin: Tensor, eps: float, heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if triton is None or not joint.is_cuda:
        query, key, _ = _parts(joint, heads)
        return _plain(query, query_weight, query_bias, cos, sin, eps), _plain(key, key_weight, key_bias, cos, sin, eps)
    joint = joint.contiguous()
    batch, tokens, width = joint.shape
    size, num_rows = width // 3 // heads, batch * tokens * heads
    query, key = (joint.new_empty(batch, tokens, heads, size) for _ in range(2))
    _forward_kernel[(-(-num_rows // _BLOCK), 2)](
        joint, query, key, query_weight, query_bias, key_weight, key_bias, cos.contiguous(), sin.contiguous(), num_rows,
        tokens, eps, HEADS=heads, D=size, BLOCK=_BLOCK,
    )  # fmt: skip
    return query, key


@_head_rows.register_fake
def _(joint: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    heads = arguments[-1]
    shape = (*joint.shape[:2], heads, joint.shape[2] // 3 // heads)
    return joint.new_empty(shape), joint.new_empty(shape)


@torch.library.custom_op("cogtune::head_rows_gradient", mutates_args=())
def _head_rows_gradient(
    joint: Tensor, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, query_weight: Tensor, key_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    if triton is None or not joint.is_cuda:
        query, key, _ = _parts(joint, heads)
        parts = (
            _plain_gradient(query, grad_query, query_weight, cos, sin, eps),
            _plain_gradient(key, grad_key, key_weight, cos, sin, eps),
            grad_value,
        )
        return torch.cat([part.flatten(2) for part in parts], dim=-1)
    batch, tokens, width = joint.shape
    size, num_rows = width // 3 // heads, batch * tokens * heads
    output = torch.empty_like(joint, memory_format=torch.contiguous_format)
    _backward_kernel[(-(-num_rows // _BLOCK), 3)](
        joint.contiguous(), grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous(), output,
        query_weight, key_weight, cos.contiguous(), sin.contiguous(), num_rows, tokens, eps,
        HEADS=heads, D=size, BLOCK=_BLOCK,
    )  # fmt: skip
    return output


@_head_rows_gradient.register_fake
def _(joint: Tensor, *_arguments: Any) -> Tensor:
    return torch.empty_like(joint, memory_format=torch.contiguous_format)


class _HeadRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, joint: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor, key_bias: Tensor,
        cos: Tensor, sin: Tensor, eps: float, heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        norms = (query_weight, query_bias, key_weight, key_bias)
        ctx.save_for_backward(joint, query_weight, key_weight, cos, sin)
        ctx.sizes = (eps, heads)
        query, key = _head_rows(joint, *norms, cos, sin, eps, heads)
        return query, key, _parts(joint, heads)[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        joint, *rest = ctx.saved_tensors
        return (_head_rows_gradient(joint, *grads, *rest, *ctx.sizes), *[None] * 8)


def head_rows(joint: Tensor, norms: Norms, cos: Tensor, sin: Tensor, eps: float, heads: int) -> list[Tensor]:
    """q, k and v [B, S, H, D] of the joint product [B, S, 3 H D]; v is a view of it.

    cos and sin, float32 [S, D], are those of `attention.extend_rotary`; D is a power of two.
    """
    return list(_HeadRows.apply(joint, *norms, cos, sin, eps, heads))  # pyright: ignore[reportArgumentType]

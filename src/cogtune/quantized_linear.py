"""A frozen linear layer whose weight is kept in 8 or 4 bits and decoded for each product, with a low-rank update.

What is kept between the passes are the codes; the weight in the run's precision lives for one product at a time. A
weight gradient is never made.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogtune.low_rank import multiply_backward, multiply_forward, pad_rank, zero_after
from cogtune.weight_codes import WeightKind, decode, encode, nf4_values

_Codes = tuple[Tensor, Tensor, Tensor | None, int]
"""Codes, scales, NF4's values (int8: none) and the number of inputs: what `decode` takes."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer from its weight [out, in]; in no state dict."""

    weight: Tensor
    scale: Tensor
    values: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: WeightKind) -> None:
        super().__init__()
        values = torch.tensor(nf4_values(), device=weight.device) if kind == "nf4" else None
        self._hold(*encode(weight, kind), values, bias, weight.shape[1])

    def _hold(self, weight: Tensor, scale: Tensor, values: Tensor | None, bias: Tensor | None, width: int) -> None:
        self.register_buffer("weight", weight, persistent=False)  # codes: a row for each output
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.in_features = width

    def part(self, start: int, stop: int) -> "QuantizedLinear":
        """The layer of some of the outputs, on the same memory."""
        layer = QuantizedLinear.__new__(QuantizedLinear)
        nn.Module.__init__(layer)
        own = slice(start, stop)
        bias = None if self.bias is None else self.bias[own]
        layer._hold(self.weight[own], self.scale[own], self.values, bias, self.in_features)
        return layer

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the layer multiplies by."""
        return decode(*self._codes(), dtype)

    def _codes(self) -> _Codes:
        return self.weight, self.scale, self.values, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the input's type."""
        y = _QuantizedProduct.apply(x.flatten(0, -2), self.bias, *self._codes())
        assert isinstance(y, Tensor)
        return y.unflatten(0, x.shape[:-1])

    def apply_updated(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """The same plus the update `up` [out, r] `down` [r, in], both in the type of `x`, in one product."""
        y = _AdaptedQuantizedProduct.apply(x.flatten(0, -2), self.bias, *pad_rank(down, up), *self._codes())
        assert isinstance(y, Tensor)
        return y.unflatten(0, x.shape[:-1])


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, values: Tensor | None, width: int
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, values)
        ctx.width = width
        return F.linear(x, decode(codes, scale, values, width, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        codes, scale, values = ctx.saved_tensors
        # The zero keeps this decoding in the backward pass: between the passes there are codes only.
        weight = decode(codes + zero_after(grad, codes), scale, values, ctx.width, grad.dtype)
        return grad @ weight, *[None] * 5


class _AdaptedQuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, codes: Tensor, scale: Tensor,
        values: Tensor | None, width: int,
    ) -> Tensor:  # fmt: skip
        y, hidden = multiply_forward(x, decode(codes, scale, values, width, x.dtype), bias, down, up)
        ctx.save_for_backward(x, hidden, down, up, codes, scale, values)
        ctx.width = width
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, hidden, down, up, codes, scale, values = ctx.saved_tensors
        weight = decode(codes + zero_after(grad, codes), scale, values, ctx.width, grad.dtype)
        grad_x, grad_down, grad_up = multiply_backward(grad, x, hidden, weight, down, up)
        return grad_x, None, grad_down, grad_up, *[None] * 4

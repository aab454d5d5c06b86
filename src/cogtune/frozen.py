"""Frozen linear layers as training runs them: several behind one product, in float8 or in codes; with an update.

In codes (int8, NF4: `quantized_linear`), weights take less memory and are decoded for each product. In float8 (e4m3),
weights are quantized once for each direction, activations and their gradients at every call, each row with its own
scale, and the update is computed from the unquantized input. A weight gradient is never made.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cogtune.float8 import quantize_rows
from cogtune.float8_rows import quantize_gelu, quantize_gelu_gradient
from cogtune.low_rank import adapted_linear
from cogtune.quantized_linear import QuantizedLinear
from cogtune.weight_codes import WeightKind, count_code_bytes

Update = tuple[Tensor, Tensor]
_FLOAT8_MULTIPLE = 16


class FrozenLinear(nn.Module):
    """A linear layer over memory that other layers' weights are views of; in no state dict."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.weight, self.bias)


class Float8Base(nn.Module):
    """A frozen linear layer in float8, forward and for the gradient of its input."""

    weight: Tensor
    scale: Tensor
    transposed: Tensor
    transposed_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, scale = quantize_rows(weight)
        columns, column_scale = quantize_rows(weight.t())
        self._hold(rows, scale.t(), columns.contiguous(), column_scale.t(), bias)

    def _hold(self, weight: Tensor, scale: Tensor, transposed: Tensor, transposed_scale: Tensor, bias: Any) -> None:
        self.register_buffer("weight", weight, persistent=False)  # [out, in]
        self.register_buffer("scale", scale.contiguous(), persistent=False)  # float32 [1, out]
        self.register_buffer("transposed", transposed, persistent=False)  # [in, out]
        self.register_buffer("transposed_scale", transposed_scale.contiguous(), persistent=False)  # float32 [1, in]
        self.register_buffer("bias", bias, persistent=False)

    def part(self, start: int, stop: int) -> "Float8Base":
        """The layer of some of the outputs, on the same memory."""
        layer = Float8Base.__new__(Float8Base)
        nn.Module.__init__(layer)
        bias = None if self.bias is None else self.bias[start:stop]
        columns = self.transposed[:, start:stop]
        layer._hold(self.weight[start:stop], self.scale[:, start:stop], columns, self.transposed_scale, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the input's type."""
        y = _Float8Product.apply(
            x.flatten(0, -2), self.weight, self.scale, self.transposed, self.transposed_scale, self.bias
        )
        assert isinstance(y, Tensor)
        return y.unflatten(0, x.shape[:-1])


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        transposed: Tensor,
        transposed_scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(transposed, transposed_scale)
        return multiply_rows(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        transposed, transposed_scale = ctx.saved_tensors
        return multiply_rows(grad, transposed, transposed_scale, None), None, None, None, None, None


def multiply_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [M, K], quantized here, times float8 `weight` [N, K] with `scale` [1, N]; in the type of `x`."""
    return _multiply(*quantize_rows(x), weight, scale, bias, x.dtype)


def _multiply(
    rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not rows.is_cuda:  # the same arithmetic, for tests
        y = (rows.float() @ weight.float().t()) * row_scale * scale
        y = y if bias is None else y + bias
    else:
        y = torch._scaled_mm(
            rows.contiguous(),
            weight.t(),
            scale_a=row_scale,
            scale_b=scale,
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    # Not `y.to(x.dtype)` alone: torch 2.11 compiles an autograd function that ends in a cast without effect to one with
    # a gradient of zero.
    return y if y.dtype == dtype else y.to(dtype)


class Float8FeedForward(nn.Module):
    """A block's feed-forward of two frozen float8 layers: GELU and its derivative are computed where rows are rounded.

    Its layers keep their names.
    """

    def __init__(self, net: nn.ModuleList) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        first, last = self._layers()
        y = _Float8FeedForward.apply(
            x.flatten(0, -2), first.weight, first.scale, first.transposed, first.transposed_scale, first.bias,
            last.weight, last.scale, last.transposed, last.transposed_scale, last.bias,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y.unflatten(0, x.shape[:-1])

    def _layers(self) -> tuple[Any, Any]:
        activation: Any = self.net[0]
        return activation.proj, self.net[2]


class _Float8FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, transposed: Tensor, transposed_scale: Tensor,
        bias: Tensor | None, weight2: Tensor, scale2: Tensor, transposed2: Tensor, transposed_scale2: Tensor,
        bias2: Tensor | None,
    ) -> Tensor:  # fmt: skip
        inner = multiply_rows(x, weight, scale, bias)
        ctx.save_for_backward(inner, transposed, transposed_scale, transposed2, transposed_scale2)
        rows, row_scale = quantize_gelu(inner)
        return _multiply(rows, row_scale, weight2, scale2, bias2, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inner, transposed, transposed_scale, transposed2, transposed_scale2 = ctx.saved_tensors
        grad_inner = multiply_rows(grad, transposed2, transposed_scale2, None)
        rows, scale = quantize_gelu_gradient(grad_inner, inner)
        return (_multiply(rows, scale, transposed, transposed_scale, None, grad.dtype), *[None] * 10)


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer's weight is never trained, so that no gradient has to be made for it."""
    holds_buffers = isinstance(layer, FrozenLinear | Float8Base | QuantizedLinear)
    return holds_buffers or not any(p.requires_grad for p in layer.parameters())


def apply_updated(layer: Any, x: Tensor, update: Update) -> Tensor:
    """A frozen layer (`is_frozen`) with a low-rank update (down, up) in the type of `x`."""
    if isinstance(layer, QuantizedLinear):
        return layer.apply_updated(x, *update)
    if not isinstance(layer, Float8Base):
        return adapted_linear(x, layer.weight, layer.bias, *update)
    down, up = update
    y = torch.addmm(layer(x).flatten(0, -2), x.flatten(0, -2) @ down.t(), up.t())
    return y.unflatten(0, x.shape[:-1])


@torch.no_grad()
def quantize_base(transformer: CogVideoXTransformer3DModel) -> int:
    """Replaces the frozen linear layers of all blocks by float8 ones and frees their weights; returns how many.

    The modulation's layers stay: they see one token, and all tokens depend on them. Adapters stay as they are.
    """
    return sum(quantize_block(block) for block in transformer.transformer_blocks)


@torch.no_grad()
def quantize_block(block: Any) -> int:
    """`quantize_base` of one block."""
    replaced = _replace_fused(block.attn1, Float8Base)
    for parent, name in _inner_linears(block):
        layer = getattr(parent, name)
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if type(base) is nn.Linear and is_frozen(base) and not _sizes_unfit(base):
            _replace_base(parent, name, Float8Base(base.weight, base.bias))
            replaced += 1
    net: Any = block.ff.net
    plain = getattr(net[0], "approximate", None) == "tanh" and not net[1].p
    if plain and type(net[0].proj) is Float8Base and type(net[2]) is Float8Base:
        block.ff = Float8FeedForward(net)
    return replaced


def encode_base(transformer: CogVideoXTransformer3DModel, kind: WeightKind, device: torch.device) -> None:
    """Puts a transformer on the device with the frozen linear weights of all blocks in codes; it never was there whole.

    Adapters and fused projections come before.
    """
    for block in transformer.transformer_blocks:
        encode_block(block.to(device), kind)
    transformer.to(device)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def encode_block(block: Any, kind: WeightKind) -> int:
    """Keeps the frozen linear weights of a block in codes and frees them; returns how many layers that were.

    The modulations' are int8 whatever the kind: all tokens depend on them. Adapters stay as they are.
    """
    replaced = _replace_fused(block.attn1, partial(QuantizedLinear, kind=kind))
    for parent, name, own_kind in _choose_kinds(block, kind):
        layer = getattr(parent, name)
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if type(base) is nn.Linear and is_frozen(base):
            _replace_base(parent, name, QuantizedLinear(base.weight, base.bias, own_kind))
            replaced += 1
    return replaced


def count_codes(block: Any, kind: WeightKind) -> tuple[int, int, int]:
    """Weights of a block that `encode_block` would encode, bytes of their codes, and the largest layer's weights.

    From shapes, without an adapter.
    """
    sizes, num_bytes = [], 0
    for parent, name, own_kind in _choose_kinds(block, kind):
        num_outputs, num_inputs = getattr(parent, name).weight.shape
        sizes.append(num_outputs * num_inputs)
        num_bytes += count_code_bytes(num_outputs, num_inputs, own_kind)
    return sum(sizes), num_bytes, max(sizes)


def _choose_kinds(block: Any, kind: WeightKind) -> list[tuple[Any, str, WeightKind]]:
    inner: list[tuple[Any, str, WeightKind]] = [(parent, name, kind) for parent, name in _inner_linears(block)]
    return [*inner, (block.norm1, "linear", "int8"), (block.norm2, "linear", "int8")]


def _replace_fused(attention: Any, make: Callable[..., Any]) -> int:
    """Replaces the fused q, k and v, if they are, by a layer of `make(weight, bias)` and its parts."""
    fused = getattr(attention, "qkv", None)
    if fused is None:
        return 0
    whole = attention.qkv = make(fused.weight, fused.bias)
    size = len(whole.weight) // 3
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        _replace_base(attention, name, whole.part(number * size, (number + 1) * size))
    return 3


def count_float8_parameters(transformer: CogVideoXTransformer3DModel) -> int:
    """Weights that `quantize_base` would replace, from a frozen transformer's shapes and without an adapter."""
    layers = [
        getattr(parent, name) for block in transformer.transformer_blocks for parent, name in _inner_linears(block)
    ]
    return sum(layer.weight.numel() for layer in layers if not _sizes_unfit(layer))


def _inner_linears(block: Any) -> list[tuple[Any, str]]:
    attention, ff = block.attn1, block.ff
    names = [(attention, name) for name in ("to_q", "to_k", "to_v")]
    return [*names, (attention.to_out, "0"), (ff.net[0], "proj"), (ff.net, "2")]


def _sizes_unfit(layer: nn.Linear) -> bool:
    return bool(layer.in_features % _FLOAT8_MULTIPLE or layer.out_features % _FLOAT8_MULTIPLE)


def _replace_base(parent: Any, name: str, new: nn.Module) -> None:
    layer = getattr(parent, name)
    if isinstance(layer, BaseTunerLayer):
        layer.base_layer = new  # pyright: ignore[reportAttributeAccessIssue]  # every tuner layer has one
    else:
        setattr(parent, name, new)

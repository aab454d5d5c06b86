"""Linear layers of frozen weights in float8 (e4m3): weights once, inputs at every call, each row with its own scale.

y = scale_x scale_w (x8 W8') + b, with x ~ scale_x x8 for each token and W ~ scale_w W8 for each output channel. The
product accumulates in float32 and is rounded to bfloat16, whatever the input's 16-bit type. Needs no torchao.
Relative error of one layer on Gaussian values: about 4 %, most of it from 3 bits of mantissa on both sides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogtune.errors import UserError

_LARGEST = 448.0  # torch.finfo(torch.float8_e4m3fn).max, as a plain number for the compiler
_TINY = 1e-12


def check_float8_device(device: torch.device) -> None:
    """Raises `UserError` for a GPU without float8 products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(
            f"float8 on {name}: needs compute capability 8.9 or newer; use --quantize int8 or none"
        )


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` [N, K] as float8, and the scales [N, 1], float32, that give them back."""
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=_TINY) / _LARGEST
    return (wide / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale


class Float8Linear(nn.Module):
    """A frozen linear layer; takes the place of an `nn.Linear` whose sizes are multiples of 16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def forward(self, values: Tensor) -> Tensor:
        """[..., in] to [..., out] in the input's type."""
        rows, scale = quantize_rows(values.flatten(0, -2))
        if rows.is_cuda:
            output = torch._scaled_mm(
                rows,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale,
                bias=self.bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        else:  # the same arithmetic, for tests
            output = F.linear(rows.float(), self.weight.float()) * scale * self.scale
            output = output if self.bias is None else output + self.bias
        return output.to(values.dtype).unflatten(0, values.shape[:-1])


def quantize_linears(module: nn.Module, names: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out", "ff")) -> int:
    """Replaces a block's linear layers below the named children by float8 ones; returns how many.

    The modulation's layers stay: they see one token, and all tokens depend on them.
    """
    replaced = 0
    for path, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and set(path.split(".")) & set(names):
            if layer.in_features % 16 or layer.out_features % 16:
                raise UserError(f"{path}: {layer.in_features} x {layer.out_features} is no multiple of 16; use int8")
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, Float8Linear(layer))
            replaced += 1
    return replaced

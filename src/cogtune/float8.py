"""Rows of numbers in float8 (e4m3), each with its own scale, and the GPUs that multiply them.

y = scale_x scale_w (x8 W8') + b, with x ~ scale_x x8 for each token and W ~ scale_w W8 for each output channel; needs
no torchao. The relative error of a product of Gaussian values is about 4 %, from 3 bits of mantissa on both sides.
"""

import torch
from torch import Tensor

from cogtune.errors import UserError

LARGEST = 448.0  # torch.finfo(torch.float8_e4m3fn).max, as a plain number for the compiler
TINY = 1e-12


def check_float8_device(
    device: torch.device, *, setting: str = "float8", remedy: str = "use --quantize int8 or none"
) -> None:
    """Raises `UserError`, naming the setting that asked for it, on a device without float8 products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(f"{setting} on {name}: needs a GPU of compute capability 8.9 or newer; {remedy}")


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` [N, K] as float8, and the scales [N, 1], float32, that give them back."""
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=TINY) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale

"""Attention kernels with the logarithm of their sums, which parts of an attention are joined by, and their backward.

Each takes q, k, v [B, H, S, D]; forward also gives lse [B, H, S] (float32; float64 for float64). The backward kernels
recompute the probabilities as exp(scores - lse): with the lse of the whole attention they give a part's share in it.
"""

from typing import Literal

import torch
from torch import Tensor

_aten = torch.ops.aten
Kernel = Literal["cpu", "flash", "cudnn"]


def choose_kernel(backend: str, device: torch.device) -> Kernel:
    """The kernel of one of `attention_backends`; `default`: as PyTorch prefers, cuDNN's on Hopper and newer."""
    if device.type != "cuda":
        return "cpu"
    if backend == "default":
        return "cudnn" if torch.cuda.get_device_capability(device) >= (9, 0) else "flash"
    return "cudnn" if backend == "cudnn" else "flash"


def attend_part(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, D] and lse [B, H, S]."""
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    if kernel == "flash":
        return _aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    out, lse = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]
    return out, lse.squeeze(-1) if lse.ndim == 4 else lse


def attend_part_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the whole attention's output `out`, whose lse is `lse`."""
    inputs = (grad, query, key, value, out)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, lse, 0.0, False)
    lengths = query.shape[2], key.shape[2]
    if kernel == "flash":
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a generator that nothing is drawn from
        unused = torch.zeros((), dtype=torch.uint64, device=query.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            *inputs, lse, None, None, *lengths, 0.0, False, state, unused
        )
    state = torch.zeros((), dtype=torch.int64, device=query.device)
    return _aten._scaled_dot_product_cudnn_attention_backward(
        *inputs, lse.unsqueeze(-1), state, state, None, None, None, *lengths, 0.0, False
    )

"""FlashAttention-4 for PyTorch's flash attention, whichever release of the package is installed.

PyTorch (`torch.nn.attention`, from 2.11 on) finds the two functions below by name in the module that it is given, and
expects two tensors of the first. Newer releases of the package (4.0.0b20 and later) return more, which is cut off here.
Its kernels are compiled when they are first called, in some five seconds.
"""

import functools
import importlib
import warnings
from typing import Any

import torch

IMPLEMENTATION = "cogtune-FA4"
"""The name under which PyTorch knows it."""


def register() -> None:
    """Tells PyTorch of it; `torch.nn.attention.activate_flash_attention_impl(IMPLEMENTATION)` then switches to it.

    Raises `ImportError` where the package or PyTorch's part of it is missing.
    """
    from torch.nn.attention import register_flash_attention_impl  # PyTorch's from 2.11 on
    from torch.nn.attention._fa4 import register_flash_attention_fa4

    # PyTorch warns that kernels are replaced, as is wanted; the package's compiler of an argument of its own.
    for message in ("Warning only once for all operators", "Argument aux_data .* cannot be converted to a JitArgument"):
        warnings.filterwarnings("ignore", message, UserWarning)
    own = functools.partial(register_flash_attention_fa4, module_path=__name__)
    register_flash_attention_impl(IMPLEMENTATION, register_fn=own)


def _flash_attn_fwd(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, H, D] of q, k, v [B, S, H, D], and the logarithm of the sums, float32 [B, H, S]."""
    out, lse = _call("_flash_attn_fwd", query, key, value, **options)[:2]
    return out, lse


def _flash_attn_bwd(*inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from (q, k, v, out, its gradient, lse)."""
    dq, dk, dv = _call("_flash_attn_bwd", *inputs, **options)[:3]
    return dq, dk, dv


def _call(name: str, *inputs: torch.Tensor, **options: Any) -> Any:
    """Raises `RuntimeError` for whatever the package or its compiler has against a device or a shape, as kernels do."""
    try:
        return getattr(importlib.import_module("flash_attn.cute.interface"), name)(*inputs, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(f"FlashAttention-4 does not run here: {reason}") from error

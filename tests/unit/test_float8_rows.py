"""GELU and its gradient to float8 rows: plain torch against float64, and the kernel in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cogtune.float8 import quantize_rows
from cogtune.float8_rows import quantize_gelu, quantize_gelu_gradient


def test_rows_are_those_of_the_exact_values() -> None:
    generator = torch.Generator().manual_seed(0)
    values, grad = (3 * torch.randn(32, 80, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = values.clone().requires_grad_()
    activated = F.gelu(leaf, approximate="tanh")
    (gradient,) = torch.autograd.grad(activated, leaf, grad)
    found = {
        "gelu": (quantize_gelu(values.float()), activated.detach()),
        "gradient": (quantize_gelu_gradient(grad.float(), values.float()), gradient),
    }
    for (rows, scales), exact in found.values():
        expected_rows, expected_scales = quantize_rows(exact.float())
        torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
        assert rows.dtype == torch.float8_e4m3fn
        # Values on a boundary between two float8 numbers may fall to either side.
        assert (rows.float() != expected_rows.float()).float().mean() < 0.01


COMPARE = """
import torch
import torch.nn.functional as F
from cogtune.float8 import LARGEST, TINY, quantize_rows
from cogtune.float8_rows import _rows_kernel

torch.manual_seed(0)
values, grad = 3 * torch.randn(5, 40), torch.randn(5, 40)
leaf = values.clone().requires_grad_()
activated = F.gelu(leaf, approximate="tanh")
(gradient,) = torch.autograd.grad(activated, leaf, grad)
for is_gradient, first, exact in ((False, values, activated.detach()), (True, grad, gradient)):
    # The interpreter has no float8: rows in float32 before rounding.
    rows, scales = torch.zeros(5, 40), torch.zeros(5, 1)
    _rows_kernel[(5,)](first, values, rows, scales, 40, LARGEST=LARGEST, TINY=TINY, GRADIENT=is_gradient, BLOCK=64)
    torch.testing.assert_close(scales, quantize_rows(exact)[1])
    torch.testing.assert_close(rows * scales, exact, rtol=1e-5, atol=1e-5)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with CUDA builds of torch")
def test_the_kernel_equals_plain_torch_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr

"""The kernels against plain torch in Triton's interpreter, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from torch import nn
from cogtune.vae import kernels, layers

def place(values):
    return values.contiguous(memory_format=torch.channels_last_3d)

torch.manual_seed(0)
for channels, groups, frames, height, width, batch in (
    (8, 4, 3, 6, 10, 1), (128, 32, 3, 8, 12, 2), (16, 4, 9, 16, 24, 1), (512, 32, 2, 4, 6, 1),
):
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.normal_(1, 0.3)
    norm.bias.normal_()
    values = place(2 * torch.randn(batch, channels, frames, height, width) + 100 * torch.randn(1, channels, 1, 1, 1))
    bias = torch.randn(channels)
    small = [place(torch.randn(batch, channels, frames, height // 2, width // 2)) for _ in range(2)]
    kept = torch.randn(batch, channels, 2, height, width)
    for case in ((bias, norm, None, None), (None, norm, tuple(small), kept)):
        got, expected = kernels.activate(values, *case), layers.activate(values, *case)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    other = place(torch.randn_like(values))
    torch.testing.assert_close(kernels.add(values.clone(), bias, other), layers.add(values, bias, other))
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with CUDA builds of torch")
def test_kernels_equal_plain_torch_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr

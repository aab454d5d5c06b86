"""Norm and rotation in one pass: values and gradients against the layers one after another."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from test_attention import KINDS, assert_equal_steps, make_transformer, step

from cogtune import attention
from cogtune.attention import extend_rotary, install_attention, rotate
from cogtune.head_rows import head_rows

HEADS, SIZE, TOKENS, TEXT = 3, 16, 7 + 24, 7


def make_case(dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.nn.LayerNorm], tuple[torch.Tensor, torch.Tensor]]:
    """A joint product, the two norms, and the turns of text and video tokens."""
    torch.manual_seed(3)
    joint = torch.randn(2, TOKENS, 3 * HEADS * SIZE, dtype=dtype) + 0.5
    norms = [torch.nn.LayerNorm(SIZE, eps=1e-6, dtype=dtype).requires_grad_(False) for _ in range(2)]
    for norm in norms:
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_()
    rotary = get_3d_rotary_pos_embed(SIZE, ((0, 0), (4, 6)), (4, 6), 1)
    return joint, norms, extend_rotary(rotary, TEXT)


def one_after_another(
    joint: torch.Tensor, norms: list[torch.nn.LayerNorm], rotary: attention.Rotary
) -> list[torch.Tensor]:
    query, key, value = (part.unflatten(-1, (HEADS, SIZE)) for part in joint.chunk(3, dim=-1))
    return [rotate(norms[0](query), rotary), rotate(norms[1](key), rotary), value]


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_equal_those_of_the_layers(compiled: bool) -> None:
    joint, norms, rotary = make_case(torch.float64)
    joint.requires_grad_()
    weights = (norms[0].weight, norms[0].bias, norms[1].weight, norms[1].bias)

    def work(values: torch.Tensor) -> list[torch.Tensor]:
        return head_rows(values, weights, *rotary, norms[0].eps, HEADS)

    function = torch.compile(work, backend="aot_eager", fullgraph=True) if compiled else work
    got, expected = function(joint), one_after_another(joint, norms, rotary)
    grads = [torch.randn_like(part) for part in expected]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    (got_gradient,) = torch.autograd.grad(got, joint, grads)
    (expected_gradient,) = torch.autograd.grad(expected, joint, grads)
    torch.testing.assert_close(got_gradient, expected_gradient)
    assert all(part.abs().max() > 0.1 for part in got_gradient.chunk(3, dim=-1))


def test_a_step_with_it_equals_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, got = make_transformer("tiny", KINDS["all four"]), make_transformer("tiny", KINDS["all four"])
    install_attention(expected, "default")
    install_attention(got, "default")
    reference = step(expected)
    calls = []
    monkeypatch.setattr(attention, "_suits_rows", lambda *_: calls.append(1) or True)
    assert_equal_steps(step(got), reference, 1e-9)
    assert len(calls) == 2


def test_trained_norms_and_plain_runs_keep_their_layers() -> None:
    attn = make_transformer("tiny", KINDS["all four"]).transformer_blocks[0].attn1
    joint = torch.zeros(1, 4, 96)
    assert not attention._suits_rows(attn, joint), "on a CPU"


COMPARE = """
import torch
from cogtune.head_rows import _backward_kernel, _forward_kernel, _head_rows, _head_rows_gradient

torch.manual_seed(0)
heads, size, tokens = 3, 16, 29
joint = torch.randn(2, tokens, 3 * heads * size) + 0.5
norms = [torch.randn(size) for _ in range(4)]
turns = [torch.randn(tokens, size) for _ in range(2)]
grads = [torch.randn(2, tokens, heads, size) for _ in range(3)]
case = (*norms, *turns, 1e-6, heads)
expected = _head_rows(joint, *case)
expected_gradient = _head_rows_gradient(joint, *grads, norms[0], norms[2], *case[4:])
rows = 2 * tokens * heads
query, key, output = torch.empty_like(grads[0]), torch.empty_like(grads[0]), torch.empty_like(joint)
sizes = dict(HEADS=heads, D=size, BLOCK=64)
_forward_kernel[(-(-rows // 64), 2)](joint, query, key, *norms, *turns, rows, tokens, 1e-6, **sizes)
_backward_kernel[(-(-rows // 64), 3)](
    joint, *grads, output, norms[0], norms[2], *turns, rows, tokens, 1e-6, **sizes
)
for got, wanted in zip((query, key, output), (*expected, expected_gradient)):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with CUDA builds of torch")
def test_kernels_equal_plain_torch_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr

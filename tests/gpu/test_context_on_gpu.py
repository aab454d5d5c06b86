"""Context parallelism on GPUs: parts of an attention by each kernel on one; steps and videos over two or four."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.e2e.test_context_parallel import frames_alone, launch, read_steps, video_options

from cogtune.parallel.attention_kernels import Kernel, attend_part, attend_part_backward

NUM_GPUS = torch.cuda.device_count()
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two GPUs, and there are {NUM_GPUS}")


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_a_kernel_s_parts_join_to_the_whole(kernel: Kernel) -> None:
    """As the ring joins them, with uneven parts; forward and backward, against float64."""
    if kernel == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's attention is the default from Hopper on")
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, 301, 6, 64, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)
        for _ in range(4)
    )
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(exact[0], exact[1], exact[2])
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    out = lse = None
    for part in (slice(0, 101), slice(101, 201), slice(201, 301)):
        own, own_lse = attend_part(query, key[:, :, part], value[:, :, part], kernel)
        assert own_lse.shape == (1, 6, 301) and own_lse.dtype == torch.float32
        if out is None or lse is None:
            out, lse = own.float(), own_lse
        else:
            out = torch.lerp(out, own.float(), torch.sigmoid(own_lse - lse)[..., None])
            lse = torch.logaddexp(lse, own_lse)
    assert out is not None and lse is not None
    assert relative(out, expected.detach()) < 0.01
    whole = out.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    for part in (slice(0, 101), slice(101, 201), slice(201, 301)):
        own_grads = attend_part_backward(
            grad, query, key[:, :, part].contiguous(), value[:, :, part].contiguous(), whole, lse.contiguous(), kernel
        )
        grads[0] += own_grads[0]
        grads[1][:, :, part] += own_grads[1]
        grads[2][:, :, part] += own_grads[2]
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert relative(got, wanted) < 0.02


@needs_two
@pytest.mark.parametrize("count", [2, 4])
def test_steps_over_several_gpus_equal_one(count: int, tmp_path: Path) -> None:
    """Compiled, in bfloat16, for each way and kernel; uneven heads too."""
    if count > NUM_GPUS:
        pytest.skip(f"needs {count} GPUs, and there are {NUM_GPUS}")
    shared = {"model": "tiny", "trained": "adapter", "dtype": "bfloat16", "heads": 5}
    cases = [
        shared | {"way": "ulysses", "activations": "keep_products", "compiler": "inductor"},
        shared | {"way": "ulysses", "activations": "recompute", "compiler": "inductor"},
        shared | {"way": "ring", "activations": "keep_attention", "compiler": "inductor", "backend": "cudnn"},
        shared | {"way": "ring", "activations": "keep_products", "backend": "flash"},
        shared | {"way": "ulysses", "trained": "all", "dtype": "float32", "autocast": True},
    ]
    launch(count, {"steps": cases, "device": "cuda"}, tmp_path / "out", on_gpus=True)
    for case in read_steps(tmp_path / "out"):
        assert case["errors"]["prediction"] < 0.02, case
        assert case["errors"]["gradients"] < 0.1, case


@needs_two
def test_a_video_over_several_gpus_equals_one(variant_folder: Callable[[str], Path], tmp_path: Path) -> None:
    count = 4 if NUM_GPUS >= 4 else 2
    argv = ["--prompt", "a wave", "--dtype", "float32", "--compile", "on", "--output", "video.mp4"]
    argv = video_options(variant_folder("tiny"), *argv, device="cuda")
    launch(count, {"videos": [argv]}, tmp_path / "out", on_gpus=True)
    expected, _ = frames_alone(argv)
    got = np.load(tmp_path / "out" / "video-0.npy")
    difference = np.abs(got.astype(int) - expected[0].astype(int))
    assert difference.max() <= 3 and difference.mean() < 0.1, (difference.max(), difference.mean())

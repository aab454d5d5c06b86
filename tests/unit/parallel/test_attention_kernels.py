"""Parts of an attention, joined by their log-sum-exp, against the whole in float64."""

import torch
import torch.nn.functional as F

from cogtune.parallel.attention_kernels import attend_part, attend_part_backward, choose_kernel

CPU = torch.device("cpu")


def test_parts_and_their_gradients_join_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, 3, 17, 16, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)
    )
    expected = F.scaled_dot_product_attention(query, key, value)
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad)
    parts = (slice(0, 6), slice(6, 17))
    with torch.no_grad():
        (out, lse), (more, more_lse) = (attend_part(query, key[:, :, p], value[:, :, p], "cpu") for p in parts)
        assert lse.shape == (2, 3, 17)
        whole_lse = torch.logaddexp(lse, more_lse)
        whole = out * (lse - whole_lse).exp()[..., None] + more * (more_lse - whole_lse).exp()[..., None]
        torch.testing.assert_close(whole, expected.detach(), rtol=1e-12, atol=1e-12)
        got = [attend_part_backward(grad, query, key[:, :, p], value[:, :, p], whole, whole_lse, "cpu") for p in parts]
    sums = got[0][0] + got[1][0], torch.cat([g[1] for g in got], dim=2), torch.cat([g[2] for g in got], dim=2)
    for found, wanted in zip(sums, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_a_cpu_has_one_kernel() -> None:
    assert {choose_kernel(backend, CPU) for backend in ("default", "cudnn", "flash")} == {"cpu"}

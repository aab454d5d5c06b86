"""Updates on the device of what is in page-locked host memory: AdamW's own numbers, whatever is under way at once."""

from typing import Any

import pytest
import torch

from cogtune.streaming import updates
from cogtune.streaming.host import HostBuffer
from cogtune.streaming.updates import StreamedUpdates, split_pieces

DEVICE = torch.device("cuda", torch.cuda.device_count() - 1) if torch.cuda.is_available() else torch.device("cpu")
GROUP: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-8}
SIZES = (3001, 40_000, 7)  # more pieces than there is room for at once, and a last one that is short
FACTOR, RATE, STEPS = 0.5, 1e-2, 4


def lock(value: torch.Tensor, kept: list[HostBuffer]) -> torch.Tensor:
    kept.append(HostBuffer(value.numel() * value.element_size(), page_locked=True))
    return kept[-1].bytes.view(value.dtype).view(value.shape).copy_(value)


def test_they_equal_adamw_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "PIECE", 1000)
    kept: list[HostBuffer] = []
    random = torch.Generator().manual_seed(0)
    first = [torch.randn(size, generator=random) for size in SIZES]
    weights = [lock(value, kept) for value in first]
    state = [{"exp_avg": lock(torch.zeros(size), kept), "exp_avg_sq": lock(torch.zeros(size), kept)} for size in SIZES]
    copies = [lock(value.bfloat16(), kept) for value in first]
    assert all(tensor.is_pinned() for tensor in [*weights, *copies, *(t for entry in state for t in entry.values())])
    expected = [torch.nn.Parameter(value.to(DEVICE)) for value in first]
    optimizer = torch.optim.AdamW(expected, lr=RATE, **GROUP, fused=True)
    streamed = StreamedUpdates(DEVICE, torch.bfloat16)
    with torch.no_grad():
        for step in range(STEPS):
            gradients = [lock(torch.randn(size, generator=random).bfloat16(), kept) for size in SIZES]
            pieces = [
                piece for whole in zip(weights, gradients, copies, state, strict=True) for piece in split_pieces(*whole)
            ]
            done = streamed.update(pieces, step=float(step), rate=RATE, factor=FACTOR, group=GROUP)
            assert done is not None
            done.synchronize()
            for parameter, gradient in zip(expected, gradients, strict=True):
                parameter.grad = gradient.to(DEVICE).float() * FACTOR
            optimizer.step()
            for weight, copy, parameter in zip(weights, copies, expected, strict=True):
                assert torch.equal(weight, parameter.detach().cpu())
                assert torch.equal(copy, weight.bfloat16())

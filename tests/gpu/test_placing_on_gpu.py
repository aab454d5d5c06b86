"""Weights that go to the device through page-locked buffers arrive as they were."""

import pytest
import torch
from torch import nn

from cogtune import placement
from cogtune.placement import move_to_device

DEVICE = torch.device("cuda")


def test_every_kind_of_tensor_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_STAGE_BYTES", 3 << 20)  # several pieces, the last one shorter
    torch.manual_seed(0)
    module = nn.Module()
    module.large = nn.Parameter(torch.randn(1000, 5001))
    module.narrow = nn.Parameter(torch.randn(2001, 1003).bfloat16(), requires_grad=False)
    module.turned = nn.Parameter(torch.randn(1500, 1200).T)
    module.small = nn.Parameter(torch.randn(3))
    module.tied = module.large
    module.register_buffer("whole", torch.randint(0, 9, (700, 800), dtype=torch.int64))
    module.register_buffer("single", torch.tensor(2.5))
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    move_to_device(module, DEVICE)
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept, expected = before[name]
        assert tensor.device.type == "cuda"
        assert tensor.requires_grad == kept.requires_grad
        assert torch.equal(tensor.detach().cpu(), expected), name
        assert tensor.stride() == expected.stride(), name
    assert module.tied is module.large

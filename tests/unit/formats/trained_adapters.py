"""Adapters that have left their start, and what a small transformer computes with them."""

from pathlib import Path

import torch

from cogtune import adapter as training
from cogtune import models
from cogtune.config import AdapterSettings

EVERYWHERE = ["to_q", "to_k", "to_v", "to_out.0", r".*ff\.net\.(0\.proj|2)", r".*norm1\.linear", "proj_out"]
KINDS = {
    "alpha differs from rank": AdapterSettings(rank=4, alpha=9.0),
    "rslora": AdapterSettings(rank=4, alpha=3.0, use_rslora=True),
    "every kind of layer": AdapterSettings(rank=3, alpha=2.0, target_modules=EVERYWHERE),
}


def train(folder: Path, out: Path, settings: AdapterSettings, seed: int = 2) -> torch.nn.Module:
    """A saved adapter that has left its start, and the transformer that has it."""
    transformer = models.load_transformer(models.read_facts(folder), torch.float32)
    training.add_lora(transformer, settings, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in training.adapter_parameters(transformer).items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    out.mkdir(parents=True, exist_ok=True)
    training.save_adapter(transformer, out, trained=True)
    return transformer


@torch.no_grad()
def run(transformer: torch.nn.Module, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return transformer(
        torch.randn(1, 5, 16, 8, 12, generator=generator),
        torch.randn(1, 32, 32, generator=generator),
        torch.tensor([437]),
        return_dict=False,
    )[0]

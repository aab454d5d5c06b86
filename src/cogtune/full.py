"""Full fine-tuning: all of the transformer's weights or a part, float32 while training; out comes a pipeline folder.

The float32 weights are on the device, or on the host where the device only computes (`host_training`). With 8-bit
optimizer state there are none: the weights themselves are bfloat16 (`eight_bit_adamw`).
"""

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune.formats.pipeline_folder import open_component, write_pipeline
from cogtune.formats.tensors import Tensors, cast, overlay
from cogtune.host_training import HostWeights
from cogtune.models import ModelFacts


class TrainedModel:
    """The transformer as the training loop sees it (`cogtune.trainer.Trained`)."""

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        facts: ModelFacts,
        model_card: str,
        *,
        export_dtype: torch.dtype,
        on_host: bool = False,
        num_updated: int = 0,
        weights_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        trained: Collection[str] | None = None,
    ) -> None:
        """`on_host`: the weights stay there and the `device` computes with copies of the precision `export_dtype`,
        and updates `num_updated` of the blocks. `weights_dtype`: what the weights are put into, which may be on the
        meta device. `trained`: the names of those that are; default: all."""
        torch.nn.Module.to(transformer, weights_dtype)  # diffusers' own `to` warns, of nothing
        self.transformer = transformer
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(trained is None or name in trained)
            # Vectors, which are next to nothing, stay as exact as in a full fine-tuning: norms compute in float32.
            if not parameter.requires_grad and parameter.ndim > 1:
                parameter.data = parameter.data.to(export_dtype)
        self._facts, self._card = facts, model_card
        self._export_dtype = export_dtype
        self.host: HostWeights | None = None
        if on_host:
            where = device or torch.device("cpu")
            self.host = HostWeights(transformer, export_dtype, where, num_updated=num_updated)

    base = None  # no copy of the weights as they were is kept
    files = None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter by name."""
        if self.host is not None:
            return dict(self.host.parameters)
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def initial(self) -> Tensors | None:
        """The weights of the base model's files, in their precision."""
        return open_component(self._facts.folder, "transformer")[1]

    def export(self, folder: Path, weights: Tensors) -> None:
        """A pipeline folder that stock diffusers loads: the trained transformer in the run's precision, the base
        model's other components (hard-linked where the file system allows), and a model card.

        Weights that were not trained are the base's. Memory holds one tensor at a time.
        """
        config, base = open_component(self._facts.folder, "transformer")
        merged = cast(overlay(base, weights), self._export_dtype)
        write_pipeline(str(self._facts.folder), "transformer", merged, config, folder)
        (folder / "README.md").write_text(self._card, encoding="utf-8")

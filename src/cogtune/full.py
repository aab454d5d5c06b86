"""Full fine-tuning: all of the transformer's weights, float32 while training; out comes a pipeline folder.

The float32 weights are on the device, or on the host where the device only computes (`host_training`). With 8-bit
optimizer state there are none: the weights themselves are bfloat16 (`eight_bit_adamw`).
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file

from cogtune.errors import UserError
from cogtune.formats.tensors import Tensors, open_safetensors
from cogtune.host_training import HostWeights
from cogtune.models import COMPONENTS, ModelFacts, make_meta_transformer

WEIGHTS_NAME = "weights.safetensors"


class TrainedModel:
    """The whole transformer as the training loop sees it (`cogtune.trainer.Trained`)."""

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        facts: ModelFacts,
        model_card: str,
        *,
        export_dtype: torch.dtype,
        on_host: bool = False,
        in_float32: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """`on_host`: the weights stay there and the `device` computes with copies of the precision `export_dtype`;
        not `in_float32`: the weights themselves are bfloat16."""
        transformer = transformer.float() if in_float32 else transformer.bfloat16()
        self.transformer = transformer.requires_grad_(True)
        self._shapes = {name: tuple(p.shape) for name, p in transformer.named_parameters()}  # before any is sharded
        self._facts, self._card = facts, model_card
        self._export_dtype = export_dtype
        self.host = HostWeights(transformer, export_dtype, device or torch.device("cpu")) if on_host else None

    base = None  # no copy of the weights as they were is kept

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter by name."""
        return dict(self.transformer.named_parameters()) if self.host is None else dict(self.host.parameters)

    def initial(self) -> Tensors | None:
        """The weights of the base model's files, in their precision."""
        return open_safetensors(self._facts.folder / "transformer")

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor], *, trained: bool) -> None:
        """The weights, for resuming."""
        del trained  # there is no empty model to guard against
        save_file(dict(weights), folder / WEIGHTS_NAME)

    def read(self, folder: Path) -> Tensors:
        """The weights of a checkpoint; strict about names and shapes."""
        saved = open_safetensors(folder / WEIGHTS_NAME)
        own, found = self._shapes, {name: spec.shape for name, spec in saved.specs.items()}
        wrong = sorted(set(own) ^ set(found)) or [name for name in own if own[name] != found[name]]
        if wrong:
            raise UserError(f"{folder}: the saved weights differ from the model's at {wrong[0]} ({len(wrong)} tensors)")
        return saved

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """A pipeline folder that stock diffusers loads: the trained transformer in the run's precision, the base
        model's other components (hard-linked where the file system allows), and a model card."""
        for name in [*COMPONENTS, "model_index.json"]:
            if name != "transformer":
                link_tree(self._facts.folder / name, folder / name)
        # A copy without memory of its own takes the cast weights: the model being trained stays as it is.
        copy = make_meta_transformer(self._facts)
        state = {name: tensor.to(self._export_dtype) for name, tensor in weights.items()}
        state |= {name: tensor for name, tensor in self.transformer.state_dict().items() if name not in state}
        copy.load_state_dict(state, assign=True)
        copy.save_pretrained(folder / "transformer")
        (folder / "README.md").write_text(self._card, encoding="utf-8")


def link_tree(source: Path, target: Path) -> None:
    """Copies a file or folder; hard links where the file system allows."""
    if source.is_dir():
        target.mkdir(parents=True)
        for child in sorted(source.iterdir()):
            link_tree(child, target / child.name)
        return
    try:
        os.link(source.resolve(), target)  # hub caches hold links: link what they point to
    except OSError:
        shutil.copy2(source, target)

"""How a run's transformer comes from its files to where it trains, and what host memory that takes."""

from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune.cluster.whereabouts import enter
from cogtune.formats.tensors import open_safetensors
from cogtune.memory import GIB, MemoryPlan, element_bytes
from cogtune.models import ModelFacts, load_transformer, make_empty_transformer
from cogtune.parallel.strategy import Strategy


@dataclass(frozen=True)
class Loading:
    """Decided before a weight is read."""

    dtype: torch.dtype
    """What the model's weights are in."""
    in_place: bool
    """The model is made empty, and read where it stays (`shards.filling`); otherwise it comes over the host."""
    host_bytes: int
    """What each process takes of the host meanwhile. Pages of the files, which all processes of a node share, are not
    counted: the system gives them back when it needs them."""

    def load(self, facts: ModelFacts) -> CogVideoXTransformer3DModel:
        """The transformer, frozen, in evaluation mode: on the CPU, or empty."""
        enter("loading the weights")
        return (make_empty_transformer if self.in_place else load_transformer)(facts, self.dtype)

    def describe(self) -> str:
        """For the plan."""
        if self.in_place:
            return "each process reads what it has of the weights, straight to where they stay"
        if not self.host_bytes:
            return "weights come from the files' own pages, which the processes of a node share"
        return f"each process takes {self.host_bytes / GIB:.1f} GiB of host memory until its weights are placed"


def plan_loading(
    facts: ModelFacts, memory: MemoryPlan, strategy: Strategy, dtype: torch.dtype, *, full: bool
) -> Loading:
    """`full`: the model's own weights are trained, in float32 unless the optimizer has float32 weights of its own, or
    there are none.

    An adapter is put into a model that has its weights (one way to begin with one reads them), and streamed, quantized
    or host weights are made from such a model.
    """
    in_float32 = full and not (memory.eight_bit or strategy.is_deepspeed)
    own = torch.float32 if in_float32 else dtype
    elsewhere = memory.on_host or memory.quantized is not None or memory.num_resident is not None
    if full and not elsewhere and not strategy.is_deepspeed:
        return Loading(own, in_place=True, host_bytes=0)
    specs = open_safetensors(facts.folder / "transformer").specs.values()
    # Tensors of the wanted type are pages of the file; others are made anew.
    made = sum(torch.Size(spec.shape).numel() for spec in specs if spec.dtype != own)
    return Loading(own, in_place=False, host_bytes=made * element_bytes(own))

"""The memory plan: what a run needs on the device, and the fastest way to keep activations that fits.

Predicted from the model's shapes before any weight is loaded. In units of one activation tensor (tokens x width x
bytes), calibrated on an H100 (docs/benchmarks.md).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from cogtune.errors import UserError
from cogtune.execution import Activations
from cogtune.models import ModelFacts

GIB = 1 << 30
MARGIN = 0.95  # of the free memory: the allocator's fragments and the libraries' workspaces need the rest
SMALL_BYTES = 2 * GIB

WORKSPACE_UNITS = 24.0
"""Largest set of one block's tensors alive at once, forward and backward, in activation tensors."""
KEPT_UNITS: dict[Activations, float] = {
    "recompute": 1.0,
    "keep_attention": 1.9,
    "keep_products": 10.2,
    "keep_all": 14.0,
}
"""Activation tensors kept for each block until its backward pass.

`keep_products` is counted: the block's input, q, k and v, attention's output and its projection, the feed-forward's
inner product (4), and the low-rank products.

Fitted, with the workspace, to peaks on an H100 with compiled blocks, rank 64, batch 1, 17,776 tokens: 5B in bfloat16
17.74 GiB (recompute) and 21.54 (keep_attention), 2B in float16 7.19 (recompute) and 31.7 (keep_all). All four come out
within 3 %. Blocks that are not compiled keep more.
"""
ENCODER_UNITS = 10.0
"""Tensors of an image's full size alive at once in the encoder: a convolution's input three frames deep, its output,
the residual, the norm's float32 copy. Counted, not measured yet; it stays far below a step's own peak."""
ENCODER_CHANNELS = 128
ACTIVATIONS_FAST_TO_SLOW: tuple[Activations, ...] = ("keep_all", "keep_products", "keep_attention", "recompute")


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes on the device for one way to keep activations."""

    activations: Activations
    weights: int
    trainable: int
    """Trained weights in float32 with gradients and optimizer state."""
    kept: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.trainable + self.kept + self.workspace

    def describe(self) -> str:
        """One line in GiB."""
        parts = {
            "weights": self.weights,
            "trained": self.trainable,
            "activations": self.kept,
            "workspace": self.workspace,
        }
        listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
        return f"{self.activations}: {self.total / GIB:.1f} GiB ({listed})"


def predict(
    facts: ModelFacts,
    activations: Activations,
    *,
    num_parameters: int,
    num_trainable: int,
    tokens: int,
    batch_size: int,
    dtype: torch.dtype,
    num_float8: int = 0,
    num_encoder: int = 0,
    image_pixels: int = 0,
) -> MemoryPlan:
    """The plan for a transformer of `num_parameters` frozen and `num_trainable` trained ones.

    `num_float8` of the frozen ones are kept twice in float8, once for each direction, instead of once in `dtype`.
    `num_encoder`: parameters of the autoencoder's encoder, which encodes images of `image_pixels` before the forward
    pass, when nothing else is kept yet (image-to-video).
    """
    size = torch.finfo(dtype).bits // 8
    unit = batch_size * tokens * facts.num_heads * facts.head_dim * size
    kept = int(KEPT_UNITS[activations] * facts.num_layers * unit)
    encoding = int(ENCODER_UNITS * batch_size * image_pixels * ENCODER_CHANNELS * size) if num_encoder else 0
    return MemoryPlan(
        activations=activations,
        weights=(num_parameters - num_float8 + num_encoder) * size + num_float8 * 2,
        trainable=num_trainable * 16,  # weight, gradient and two moments, 4 bytes each
        kept=kept,
        workspace=max(int(WORKSPACE_UNITS * unit), encoding - kept),
    )


def choose_activations(
    plans: list[MemoryPlan], mode: Literal["auto"] | Activations, free_bytes: int | None
) -> MemoryPlan:
    """The plan of `mode`, or for `auto` the first of the plans (fastest first) that fits into the free memory.

    Raises `UserError` where not even the smallest fits.
    """
    if mode != "auto":
        return next(plan for plan in plans if plan.activations == mode)
    if free_bytes is None:  # a CPU: keep what is small beside any computer's memory, and refuse nothing
        return next((plan for plan in plans if plan.total <= SMALL_BYTES), plans[-1])
    for plan in plans:
        if plan.total <= free_bytes * MARGIN:
            return plan
    raise UserError(
        f"memory: the smallest plan needs {plans[-1].total / GIB:.1f} GiB and {free_bytes / GIB:.1f} GiB are free "
        f"({plans[-1].describe()}); lower train.batch_size or adapter.rank, close other programs on the device, "
        "or set memory.mode=recompute to try all the same"
    )


def free_device_bytes(device: torch.device) -> int | None:
    """Memory that this process could take on a GPU (its own fraction limit respected); None on a CPU."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    return min(free, int(total * torch.cuda.get_per_process_memory_fraction(index)))


def explain_out_of_memory(plan: MemoryPlan, error: BaseException) -> str:
    """What to turn after the device ran out of memory."""
    first_line = str(error).splitlines()[0][:300]
    steps = [] if plan.activations == "recompute" else ["memory.mode=recompute"]
    steps += ["train.batch_size=1 with train.gradient_accumulation_steps instead", "a lower adapter.rank"]
    return (
        f"out of memory on the device (planned {plan.total / GIB:.1f} GiB with memory.mode={plan.activations}): "
        f"{first_line}\n       try: {'; '.join(steps)}; checkpoints are untouched, the run resumes from the newest"
    )

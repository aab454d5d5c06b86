"""What a way to run needs of device and host memory, predicted from shapes before any weight is loaded.

In units of one activation tensor (samples x tokens x width x bytes). All constants of the prediction stand here, each
with a note whether it is fitted to measurements (docs/benchmarks.md) or counted.
"""

from dataclasses import dataclass
from functools import cache

import torch

from cogtune.arrangement import Activations, arrange, keep_less
from cogtune.eight_bit import BLOCK
from cogtune.eight_bit_adamw import CHUNK
from cogtune.ema import CHUNK_NUMBERS
from cogtune.models import ModelFacts
from cogtune.parallel.footprint import Sizes, count_footprint
from cogtune.parallel.strategy import Strategy
from cogtune.streaming.blocks import DEFAULT_SLOTS
from cogtune.streaming.updates import count_staging_bytes
from cogtune.weight_codes import WeightKind

GIB = 1 << 30
MARGIN = 0.95  # of the free memory: the allocator's fragments and the libraries' workspaces need the rest

KEPT_UNITS: dict[Activations, float] = {
    "recompute": 1.0,
    "keep_attention": 2.0,
    "keep_products": 9.4,
    "keep_all": 13.3,
}
"""Activation tensors kept for each block until its backward pass.

`keep_products` holds the block's input, q, k and v, attention's output and its projection, the feed-forward's inner
product (4), and the low-rank products.
"""
WORKSPACE_UNITS: dict[Activations, float] = {
    "recompute": 22.5,
    "keep_attention": 18.0,
    "keep_products": 15.5,
    "keep_all": 11.5,
}
"""What is alive in a block's backward pass beside what blocks keep: the less was kept, the more is made again there.

Both fitted to peaks on H100s with compiled blocks, rank 64, batch 1 (docs/memory.md): 5B in bfloat16 resident and on
rungs under 24, 16, 12, 8 and 6 GB, 2B under 6 GB, 1.5-5B-I2V's 45,104 tokens under 24 GB. Those under caps come out
within 4 % (`test_memory.py`), everything resident within 7: `keep_products` 4 % too low, since it was measured while
stacks of weights and updates (`low_rank`, 0.7 units in 5B by the count) were kept too; `keep_all`, measured without
them, within 1. Blocks that are not compiled keep more.
"""
TRAINED_KEPT_UNITS: dict[Activations, float] = {"keep_products": 1.6, "keep_all": 5.9}
"""Kept on top where all weights are trained: trained gates need the feed-forward's output, which they multiply, and
with `keep_all` every product keeps its input, the feed-forward's inner one (4) above all. Fitted to two peaks of 5B
with 8-bit state: 69.34 GiB with `keep_products`, 71.85 with `keep_all` for 3 of 42 blocks. (Compiled on a CPU, a block
keeps 5 more.)"""
ENCODER_UNITS = 10.0
"""Tensors of an image's full size alive at once in the encoder: a convolution's input three frames deep, its output,
the residual, the norm's float32 copy. Counted, not measured yet; it stays far below a step's own peak."""
ENCODER_CHANNELS = 128
OFFLOADED_AT_ONCE = 2
"""Offloaded blocks whose activations are on the device: one that computes, one on its way; one more for each further
one that may be under way: neighbours, of which lean ones bring less. Counted; the fit of the others holds with it."""
GRADIENTS_AT_ONCE = 2
"""Blocks whose gradients are on the device where the optimizer is on the host: made, and leaving. Counted."""
SAMPLING_UNITS = 12.5
"""Activation tensors alive at once while sampling, each of the whole batch. Fitted to 13.31 GiB on an H100: 5B in
bfloat16, compiled, two samples of 17,776 tokens, all resident."""
HOST_OPTIMIZER_BYTES = 12
"""A trained weight on the host in float32 and two moments; its copy and its gradient in the run's precision come on
top. Counted."""
EIGHT_BIT_STATE_BYTES = 2 * (1 + 4 / BLOCK)
"""A trained weight's two moments in 8 bits with their scales. Counted."""
UPDATE_BYTES = 50
"""For each number of a piece that is updated inside the backward pass, uncompiled. Counted."""
EMA_BYTES = 4
"""A trained weight's float32 average. Counted."""
EMA_STAGING_BYTES = 8 * CHUNK_NUMBERS
"""Two page-locked buffers through which weights leave for an average on the host. Counted."""
TRAINED_BYTES = 16
"""A trained weight in float32, its gradient and two moments. Counted."""


@dataclass(frozen=True)
class CodedWeights:
    """Frozen weights of each block that are kept in codes and decoded for each product."""

    kind: WeightKind
    num_parameters: int
    """In one block."""
    num_bytes: int
    """What their codes and scales take."""
    num_largest: int
    """Parameters of the largest layer: the one that is decoded at a time."""
    size: int
    """Bytes of a decoded weight."""

    @property
    def saved_bytes(self) -> int:
        """What a block takes less than the exact one."""
        return self.num_parameters * self.size - self.num_bytes

    @property
    def moved_bytes(self) -> int:
        """What decoding a block once reads and writes."""
        return self.num_parameters * self.size + self.num_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes for one way to keep weights and activations."""

    activations: Activations
    weights: int
    """Frozen weights on the device; the trained ones where they have no float32 copy there."""
    trainable: int
    """Trained weights in float32 with gradients and optimizer state; on the host, the gradients on their way there; in
    8 bits, state and one block's gradients."""
    kept: int
    workspace: int
    num_resident: int | None = None
    """Blocks whose frozen weights stay on the device while the others are streamed; None: no block is."""
    num_offloaded: int = 0
    """Blocks whose kept activations wait on the host."""
    num_lean: int = 0
    """Blocks that keep what the next way after `activations` keeps."""
    num_leaving: int = 1
    """Offloaded blocks whose copies may be under way when a block begins."""
    host: int = 0
    """Page-locked host memory."""
    on_host: bool = False
    """The trained weights and the optimizer's state are in host memory; all blocks are streamed."""
    num_updated: int = 0
    """Blocks with state on the host that the device updates, while the host's cores update the others."""
    eight_bit: bool = False
    """AdamW's state is in 8 bits, there are no float32 weights, and each gradient goes as soon as it comes."""
    streams_trained: bool = False
    """Streamed blocks are trained: weights and state come, are updated and go back."""
    coded: CodedWeights | None = None
    """How the blocks' frozen weights are kept in codes; None: they are exact."""
    seconds: float = 0.0
    """Predicted time of a step; comparable within one list of plans only."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.trainable + self.kept + self.workspace

    @property
    def quantized(self) -> WeightKind | None:
        """The kind of codes that the frozen base is in, if it is."""
        return None if self.coded is None else self.coded.kind

    def name(self) -> str:
        """The rung in words."""
        parts: list[str] = [self.activations]
        if self.num_lean:
            parts.append(f"{keep_less(self.activations)} for {self.num_lean} blocks")
        if self.quantized:
            parts.append(f"frozen base in {self.quantized}")
        if self.on_host:
            where = f", {self.num_updated} blocks updated on the device" if self.num_updated else ""
            parts.append(f"weights and optimizer on the host{where}")
        elif self.eight_bit:
            parts.append("bfloat16 weights and 8-bit optimizer state")
        if self.num_resident is not None and not self.on_host:
            parts.append(f"{self.num_resident} blocks resident, others streamed")
        if self.num_offloaded:
            under_way = f", {self.num_leaving} at once on their way" if self.num_leaving > 1 else ""
            parts.append(f"activations of {self.num_offloaded} blocks on the host{under_way}")
        return ", ".join(parts)

    def describe(self) -> str:
        """One line in GiB."""
        parts = {
            "weights": self.weights,
            "trained": self.trainable,
            "activations": self.kept,
            "workspace": self.workspace,
        }
        listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
        host = f"; host {self.host / GIB:.1f} GiB" if self.host else ""
        return f"{self.name()}: {self.total / GIB:.1f} GiB ({listed}){host}"


def activation_bytes(facts: ModelFacts, tokens: int, batch_size: int, dtype: torch.dtype) -> int:
    """One activation tensor: the unit of every prediction here."""
    return batch_size * tokens * facts.num_heads * facts.head_dim * element_bytes(dtype)


def element_bytes(dtype: torch.dtype) -> int:
    """Bytes of one number."""
    return torch.finfo(dtype).bits // 8


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
    num_block_parameters: int = 0,
    num_block_trained: int | None = None,
    ema_bytes: int = 0,
    ema_on_host: bool = False,
    penalty_bytes: int = 0,
    full: bool = False,
    num_resident: int | None = None,
    num_offloaded: int = 0,
    num_lean: int = 0,
    num_leaving: int = 1,
    on_host: bool = False,
    num_updated: int = 0,
    eight_bit: bool = False,
    strategy: Strategy | None = None,
    num_more_kept: float = 0.0,
    num_more_at_once: float = 0.0,
    coded: CodedWeights | None = None,
) -> MemoryPlan:
    """The plan for a transformer of `num_parameters` frozen and `num_trainable` trained ones.

    `num_float8` of the frozen ones are kept twice in float8, once for each direction, instead of once in `dtype`.
    `num_encoder`: parameters of the autoencoder's encoder, which encodes images of `image_pixels` before the forward
    pass, when nothing else is kept yet (image-to-video). `num_block_parameters` are in each block, and `num_resident`
    of the blocks are not streamed; `num_lean` keep less, and those that keep more are offloaded first. `on_host`: all
    are trained, and the device has copies of two blocks, and the gradients of two; it updates `num_updated` of the
    blocks. `eight_bit`: none of the trained ones has a float32 copy, and the device has the gradients of one block
    (`num_block_trained`; default: `num_block_parameters`). `ema_bytes`: an average of the trained weights.
    `penalty_bytes`: what a penalty on the adapter keeps.
    `num_more_kept`: tensors that a block keeps on top of `KEPT_UNITS`; `num_more_at_once`: that its backward pass takes
    on top of `WORKSPACE_UNITS`. `coded`: frozen weights of each block that are kept in codes.
    """
    size, streams_trained = element_bytes(dtype), eight_bit and num_resident is not None and not num_parameters
    saved = 0 if coded is None else coded.saved_bytes
    unit = activation_bytes(facts, tokens, batch_size, dtype)
    weights = (num_parameters - num_float8) * size + num_float8 * 2 - facts.num_layers * saved
    less = (keep_less(activations) if num_lean else None) or activations
    kept, offloaded = _count_kept(
        facts.num_layers, units_kept(activations, full=full) + num_more_kept, num_offloaded, num_leaving,
        num_lean=num_lean, lean_units=units_kept(less, full=full) + num_more_kept,
    )  # fmt: skip
    kept, host, away = int(kept * unit), int(offloaded * unit), 0
    if num_resident is not None:
        block = num_block_parameters * size + num_float8 * (2 - size) // facts.num_layers - saved
        host += block * facts.num_layers
        away = max(0, facts.num_layers - num_resident - DEFAULT_SLOTS)
        weights -= block * away
    trainable = num_trainable * TRAINED_BYTES
    if on_host:
        block = num_block_parameters * size
        outside = num_trainable * size - facts.num_layers * block
        weights, trainable = outside + DEFAULT_SLOTS * block, outside + GRADIENTS_AT_ONCE * block
        trainable += count_staging_bytes(size) if num_updated else 0
        host += num_trainable * (2 * size + HOST_OPTIMIZER_BYTES)
    if eight_bit:
        weights += num_trainable * size
        block_trained = num_block_parameters if num_block_trained is None else num_block_trained
        gradients = block_trained * size
        trainable = int(num_trainable * EIGHT_BIT_STATE_BYTES) + gradients + CHUNK * UPDATE_BYTES
        if streams_trained:  # a block's state comes and goes with its weights
            state = int(block_trained * EIGHT_BIT_STATE_BYTES)
            host += state * facts.num_layers
            trainable -= state * away
    if strategy is not None and (strategy.is_fsdp or strategy.is_deepspeed):
        sizes = Sizes(num_parameters, num_trainable, num_block_parameters, facts.num_layers, full=full)
        divided = count_footprint(strategy, sizes, size)
        weights, trainable, host = divided.weights, divided.trained, divided.host
        # Each process averages what it has, where that is; an adapter is whole everywhere under FSDP2.
        if full or strategy.is_deepspeed:
            ema_bytes = -(-ema_bytes // strategy.num_shards)
        away = strategy.offload_optimizer or (full and strategy.is_fsdp and strategy.offload_weights)
        if away and not ema_on_host:
            host, ema_bytes = host + ema_bytes, 0
    trainable += penalty_bytes + (0 if ema_on_host else ema_bytes)
    host += ema_bytes + EMA_STAGING_BYTES if ema_on_host else 0
    encoding = int(ENCODER_UNITS * batch_size * image_pixels * ENCODER_CHANNELS * size) if num_encoder else 0
    decoded = 0 if coded is None else coded.num_largest * coded.size
    return MemoryPlan(
        activations=activations,
        weights=weights + num_encoder * size,
        trainable=trainable,
        kept=kept,
        workspace=max(int((_count_workspace(activations, less) + num_more_at_once) * unit) + decoded, encoding - kept),
        num_resident=num_resident,
        num_offloaded=num_offloaded,
        num_lean=num_lean,
        num_leaving=num_leaving,
        host=host,
        on_host=on_host,
        num_updated=num_updated,
        eight_bit=eight_bit,
        streams_trained=streams_trained,
        coded=coded,
    )


def units_of_partial_sums(heads: int, multiprocessors: int) -> float:
    """Activation tensors more where FlashAttention-2 sums in one order: the queries' gradient in float32 once more for
    each further part that it is summed in. `heads`: of all samples. Counted: 417 MiB for 5B. A trial on an H200 took
    730 more than without order, of which 313 were gradients that it kept to compare."""
    return 2.0 * (-(-multiprocessors // heads) - 1)


def units_kept(activations: Activations, *, full: bool) -> float:
    """Activation tensors that a block keeps; `full`: its own weights are trained."""
    return KEPT_UNITS[activations] + (TRAINED_KEPT_UNITS.get(activations, 0.0) if full else 0.0)


@cache
def _count_kept(
    num_layers: int, rich: float, num_offloaded: int, num_leaving: int, *, num_lean: int, lean_units: float
) -> tuple[float, float]:
    """Activation tensors kept on the device at the peak, and on the host; `rich`: of a block that isn't lean."""
    arrangement = arrange(num_layers, num_lean=num_lean, num_offloaded=num_offloaded)
    units = [lean_units if number in arrangement.lean else rich for number in range(num_layers)]
    offloaded = [units[number] for number in sorted(arrangement.offloaded)]
    at_once = min(OFFLOADED_AT_ONCE + num_leaving - 1, num_offloaded)
    passing = max(sum(offloaded[first : first + at_once]) for first in range(num_offloaded - at_once + 1))
    return sum(units) - sum(offloaded) + passing, sum(offloaded)


def _count_workspace(activations: Activations, less: Activations) -> float:
    """The larger one of both kinds of blocks; a lean block's peak has the less that it keeps in its favour."""
    kept_less = KEPT_UNITS[activations] - KEPT_UNITS[less]
    return max(WORKSPACE_UNITS[activations], WORKSPACE_UNITS[less] - kept_less)


def free_device_bytes(device: torch.device) -> int | None:
    """Memory that this process could take on a GPU (its own fraction limit respected); None on a CPU."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    # What the allocator holds is not free for others, but is for this process.
    reserved = torch.cuda.memory_reserved(index)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(index))
    return min(free + reserved, allowed) - torch.cuda.memory_allocated(index)


def explain_out_of_memory(plan: MemoryPlan, error: BaseException) -> str:
    """What to turn after the device ran out of memory."""
    first_line = str(error).splitlines()[0][:300]
    steps = [] if plan.activations == "recompute" else ["memory.mode=recompute"]
    if plan.num_resident != 0 and not plan.on_host and (plan.weights or plan.num_resident is not None):
        held = plan.weights + (plan.trainable if plan.streams_trained else 0)
        saved = held if plan.num_resident is None else held // (plan.num_resident + DEFAULT_SLOTS)
        steps.append(f"memory.resident_blocks={_fewer(plan.num_resident)} (gives back up to {saved / GIB:.1f} GiB)")
    if not plan.num_offloaded:
        steps.append(f"memory.offloaded_blocks=99 (gives back up to {plan.kept / GIB:.1f} GiB)")
    steps += ["train.batch_size=1 with train.gradient_accumulation_steps instead", "a lower adapter.rank"]
    return (
        f"out of memory on the device (planned {plan.total / GIB:.1f} GiB with memory.mode={plan.activations}): "
        f"{first_line}\n       try: {'; '.join(steps)}; checkpoints are untouched, the run resumes from the newest"
    )


def _fewer(num_resident: int | None) -> int:
    return 0 if num_resident is None else max(0, num_resident - 4)

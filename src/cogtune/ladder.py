"""The ladder of memory: every rung's predicted peak and time on this machine, and the fastest one that fits.

A rung says which activations the backward pass finds (`execution`), how many blocks' weights stay on the device while
the others are streamed (`streaming.blocks`), and of how many blocks the activations wait on the host
(`streaming.activations`). None of them changes a result. In full fine-tuning it also says where weights and optimizer
state are. State in 8 bits and a quantized frozen base do change the result, and are on the ladder only where the user
lets them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cogtune.config import MemorySettings
from cogtune.errors import UserError
from cogtune.execution import Activations
from cogtune.machine import Machine
from cogtune.memory import ACTIVATIONS_FAST_TO_SLOW, GIB, MARGIN, MemoryPlan
from cogtune.models import ModelFacts
from cogtune.weight_codes import WeightKind

SMALL_BYTES = 2 * GIB
HOST_MARGIN = 0.9
_OFFLOAD_STRIDE = 3

# Parts of the best matrix product's rate: what the step's own kernels reach beside it on an H100 (docs/benchmarks.md).
_LINEAR, _ATTENTION_FORWARD, _ATTENTION_BACKWARD = 0.93, 0.525, 0.535
_ELEMENTWISE_SHARE = 0.17
"""Time of everything beside a block's products, in each direction, and what the kernels lose in a long step.
Fitted to 2.05 s (keep_all) there; keep_attention then comes out at 2.22 s (measured 2.26), recompute at 2.66 (2.69)."""
_COPY_SHARE = 0.02
"""Part of a copy's time that isn't hidden even where it runs beside longer work: it takes memory bandwidth. A guess."""
_UPDATE_TRAFFIC = 18.0
"""Host memory read and written by an update, in bytes a byte of the weights' copy: three float32 tensors read and
written, the gradient read and widened, the copy written. Counted."""
_HOST_BYTES_PER_SECOND = 100e9
"""What AdamW on a host's cores gets of its memory's bandwidth. A guess."""
_FLOPS_A_BYTE = 300.0
"""What a device computes while its memory moves a byte: decoding quantized weights reads codes and writes weights. A
guess, from an H100's data sheet (990 TFLOP/s, 3.35 TB/s)."""
_WORTH_ROUNDING: dict[WeightKind | None, float] = {None: 1.0, "int8": 1.02, "nf4": 1.04}
"""A quantized base must promise to be faster by this before it is preferred to one that is nearer to the exact one."""
_RECOMPUTED: dict[Activations, tuple[float, float]] = {
    "keep_all": (0.0, 0.0),
    "keep_products": (0.03, 0.0),
    "keep_attention": (8 / 12, 0.0),
    "recompute": (8 / 12, 1.0),
}
"""Parts of the linear layers and of attention that run a second time; the feed-forward's last product is never read."""


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one block on a machine."""

    linear: float
    attention_forward: float
    attention_backward: float

    @classmethod
    def of(
        cls, facts: ModelFacts, tokens: int, batch_size: int, machine: Machine, *, num_ranks: int = 1
    ) -> "BlockTimes":
        """From the block's arithmetic: 12 products of width x width a token, and attention over all tokens.

        `num_ranks` share the work; their messages are not counted.
        """
        width = facts.num_heads * facts.head_dim
        linear = 24 * batch_size * tokens * width**2 / num_ranks
        attention = 4 * batch_size * tokens**2 * width / num_ranks
        return cls(
            linear / (machine.flops * _LINEAR),
            attention / (machine.flops * _ATTENTION_FORWARD),
            2.5 * attention / (machine.flops * _ATTENTION_BACKWARD),
        )

    def forward_seconds(self) -> float:
        """The forward pass of a block."""
        return (self.linear + self.attention_forward) * (1 + _ELEMENTWISE_SHARE)

    def backward_seconds(self, activations: Activations, *, weight_gradients: bool) -> float:
        """Its backward pass, with what is computed again."""
        linear, attention = _RECOMPUTED[activations]
        own = self.linear * (2 if weight_gradients else 1) + self.attention_backward
        again = self.linear * linear + self.attention_forward * attention
        return (own + again) * (1 + _ELEMENTWISE_SHARE)


def predict_seconds(
    plan: MemoryPlan,
    times: BlockTimes,
    machine: Machine,
    *,
    num_layers: int,
    block_bytes: int,
    kept_bytes: float,
    weight_gradients: bool,
) -> float:
    """A step of all blocks: each pass takes as long as its work or its copies, whichever is longer, and a little.

    `block_bytes` are those of an exact block.
    """
    block_bytes -= plan.coded.saved_bytes if plan.coded else 0
    num_streamed = num_layers if plan.on_host else num_layers - (plan.num_resident or 0)
    streamed = 0 if plan.num_resident is None and not plan.on_host else num_streamed * block_bytes
    kept = plan.num_offloaded * kept_bytes
    forward, backward = (
        num_layers * times.forward_seconds(),
        num_layers * times.backward_seconds(plan.activations, weight_gradients=weight_gradients),
    )
    decoding = (plan.coded.moved_bytes if plan.coded else 0) * num_layers * _FLOPS_A_BYTE / machine.flops
    forward += decoding
    backward += decoding * (1 + _RECOMPUTED[plan.activations][0])
    if plan.on_host:  # the update runs beside the forward pass and is read block by block
        forward = max(forward, num_layers * block_bytes * _UPDATE_TRAFFIC / _HOST_BYTES_PER_SECOND)
    copied = (max(streamed, kept) / machine.link, (streamed + kept) / machine.link)
    passes = zip((forward, backward), copied, strict=True)
    return sum(max(computing, copying) + _COPY_SHARE * copying for computing, copying in passes)


def list_rungs(
    predict: Callable[..., MemoryPlan],
    time_of: Callable[[MemoryPlan], float],
    settings: MemorySettings,
    *,
    num_layers: int,
    free_bytes: int | None,
    streamable: bool,
) -> list[MemoryPlan]:
    """Plans that the settings allow, fastest first; of equally fast ones (to a part in a thousand), what asks less of
    the host and keeps more on the device.

    `predict(activations, num_resident=..., num_offloaded=...)` is the prediction, `time_of` the time of its result.
    """
    modes = ACTIVATIONS_FAST_TO_SLOW if settings.mode == "auto" else (settings.mode,)
    found: list[MemoryPlan] = []
    for mode in modes:
        for num_offloaded in _offload_counts(settings, num_layers, free_bytes):
            for num_resident in _resident_counts(settings, num_layers, free_bytes, streamable=streamable):
                plan = predict(mode, num_resident=num_resident, num_offloaded=num_offloaded)
                if num_resident == 0 and settings.resident_blocks == "auto" and free_bytes is not None:
                    more = predict(mode, num_resident=1, num_offloaded=num_offloaded)
                    each = max(1, more.total - plan.total)
                    fitting = max(0, int(free_bytes * MARGIN - plan.total) // each)
                    fitting = min(fitting, num_layers - 1)
                    plan = predict(mode, num_resident=fitting, num_offloaded=num_offloaded)
                found.append(replace(plan, seconds=time_of(plan)))
    return sort_rungs(found)


def sort_rungs(rungs: Sequence[MemoryPlan]) -> list[MemoryPlan]:
    """Fastest first; of equally fast ones, what asks less of the host and keeps more on the device.

    Where some quantize the frozen base, what is gained by it must be worth it.
    """
    fastest = min(rung.seconds for rung in rungs)

    def order(rung: MemoryPlan) -> tuple[float, int, int]:
        return round(rung.seconds * _WORTH_ROUNDING[rung.quantized] / fastest, 3), rung.host, -rung.total

    return sorted(rungs, key=order)


def _offload_counts(settings: MemorySettings, num_layers: int, free_bytes: int | None) -> list[int]:
    if settings.offloaded_blocks != "auto":
        return [min(settings.offloaded_blocks, num_layers)]
    return [0] if free_bytes is None else sorted({*range(0, num_layers, _OFFLOAD_STRIDE), num_layers})


def _resident_counts(
    settings: MemorySettings, num_layers: int, free_bytes: int | None, *, streamable: bool
) -> list[int | None]:
    wanted = settings.resident_blocks
    if wanted != "auto":
        return [None if wanted >= num_layers else wanted]
    return [None, 0] if streamable and free_bytes is not None else [None]


def fits(plan: MemoryPlan, free_bytes: int | None, free_host: int | None) -> bool:
    """Whether a plan stays within the free memory of the device and of the host, with a margin on each."""
    device = SMALL_BYTES if free_bytes is None else int(free_bytes * MARGIN)
    return plan.total <= device and (free_host is None or plan.host <= free_host * HOST_MARGIN)


def choose_rung(
    rungs: Sequence[MemoryPlan], settings: MemorySettings, free_bytes: int | None, free_host: int | None
) -> MemoryPlan:
    """The fastest rung that fits; where none does, the smallest on a CPU or where the user set the mode.

    Raises `UserError` where the mode is open and not even the smallest fits.
    """
    for rung in rungs:
        if fits(rung, free_bytes, free_host):
            return rung
    smallest = min(rungs, key=lambda rung: rung.total)
    if settings.mode != "auto" or free_bytes is None:
        return smallest
    on_host = min(rungs, key=lambda rung: (not fits(rung, free_bytes, None), rung.host))
    if fits(on_host, free_bytes, None) and free_host is not None:
        # Only frozen weights are streamed, and only they can be quantized.
        smaller = on_host.num_resident is not None and on_host.quantized != "nf4"
        remedy = "under LoRA set memory.quantized_base=nf4 (another result: docs/memory.md), " if smaller else ""
        raise UserError(
            f"memory: {on_host.describe()} would fit on the device, but {free_host / GIB:.1f} GiB of host memory are "
            f"free; close other programs, {remedy}or use a device with more memory"
        )
    raise UserError(
        f"memory: the smallest plan needs {smallest.total / GIB:.1f} GiB and {free_bytes / GIB:.1f} GiB are free "
        f"({smallest.describe()}); lower train.batch_size or adapter.rank, close other programs on the device, "
        "or set memory.mode=recompute to try all the same"
    )


def describe_rungs(
    rungs: Sequence[MemoryPlan], chosen: MemoryPlan, free_bytes: int | None, free_host: int | None
) -> str:
    """A table: each way to keep activations without and with offloading, resident and streamed; the chosen one marked.

    Of rungs that differ in counts only, the fastest that fits is shown, or else the smallest.
    """
    groups: dict[tuple[object, ...], list[MemoryPlan]] = {}
    for rung in rungs:
        streamed = rung.num_resident is not None
        key = (rung.activations, streamed, rung.num_offloaded > 0, rung.on_host, rung.eight_bit, rung.quantized)
        groups.setdefault(key, []).append(rung)
    shown = []
    for group in groups.values():
        fitting = [rung for rung in group if fits(rung, free_bytes, free_host)]
        shown.append(chosen if chosen in group else (fitting or sorted(group, key=lambda rung: rung.total))[0])
    fastest = min(rung.seconds for rung in rungs)
    lines = [f"{'rungs':<11} {'device':>10} {'host':>10} {'time':>6}"]
    for rung in sorted(shown, key=lambda rung: (rung.seconds, rung.total)):
        fit = "" if fits(rung, free_bytes, free_host) else "  does not fit"
        mark = "  <- fastest that fits" if rung == chosen and not fit else "  <- taken" if rung == chosen else ""
        relative = rung.seconds / fastest if fastest else 1.0
        sizes = f"{rung.total / GIB:6.2f} GiB {rung.host / GIB:6.2f} GiB {relative:5.2f}x"
        lines.append(f"{'':<11} {sizes}  {rung.name()}{fit}{mark}")
    return "\n".join(lines)

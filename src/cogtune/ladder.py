"""The ladder of memory: every rung's predicted peak and time on this machine, and the fastest one that fits.

A rung says which activations the backward pass finds (`arrangement`), in all blocks or less in some, how many blocks'
weights stay on the device while the others are streamed (`streaming.blocks`), and of how many blocks the activations
wait on the host (`streaming.activations`). None of them changes a result. In full fine-tuning it also says where
weights and optimizer state are, and with it how an update is rounded. State in 8 bits and a quantized frozen base do
change the result, and are on the ladder only where the user lets them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from cogtune.arrangement import ACTIVATIONS_FAST_TO_SLOW, Activations, keep_less
from cogtune.config import MemorySettings
from cogtune.errors import UserError
from cogtune.memory import GIB, MARGIN, MemoryPlan
from cogtune.weight_codes import WeightKind

SMALL_BYTES = 2 * GIB
HOST_MARGIN = 0.9
_STRIDE = 3

_WORTH_ROUNDING: dict[WeightKind | None, float] = {None: 1.0, "int8": 1.02, "nf4": 1.04}
"""A quantized base must promise to be faster by this before it is preferred to one that is nearer to the exact one."""


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

    `predict(activations, num_resident=..., num_offloaded=..., num_lean=..., num_leaving=...)` is the prediction,
    `time_of` the time of its result. Raises `UserError` for settings without effect.
    """
    modes = ACTIVATIONS_FAST_TO_SLOW if settings.mode == "auto" else (settings.mode,)
    counts = _offload_counts(settings, num_layers, free_bytes)
    if settings.mode == "recompute" and settings.lean_blocks not in ("auto", 0):
        raise UserError(
            f"memory.lean_blocks={settings.lean_blocks}: nothing keeps less than memory.mode=recompute; remove it"
        )
    if settings.leaving_blocks != "auto" and counts == [0]:
        raise UserError(
            f"memory.leaving_blocks={settings.leaving_blocks}: no block's activations leave; remove it, or set "
            "memory.offloaded_blocks (on a GPU, auto)"
        )
    found: list[MemoryPlan] = []
    for mode in modes:
        for num_lean, num_offloaded in product(_lean_counts(settings, mode, num_layers, free_bytes), counts):
            for num_leaving in _leaving_counts(settings, num_offloaded):
                way = partial(predict, mode, num_lean=num_lean, num_offloaded=num_offloaded, num_leaving=num_leaving)
                for num_resident in _resident_counts(settings, num_layers, free_bytes, streamable=streamable):
                    found.append(_fill(way, num_resident, settings, num_layers, free_bytes))
    return sort_rungs([replace(plan, seconds=time_of(plan)) for plan in found])


def _fill(
    way: Callable[..., MemoryPlan],
    num_resident: int | None,
    settings: MemorySettings,
    num_layers: int,
    free_bytes: int | None,
) -> MemoryPlan:
    """The plan; where the number of resident blocks is open, with as many as fit."""
    plan = way(num_resident=num_resident)
    if num_resident != 0 or settings.resident_blocks != "auto" or free_bytes is None:
        return plan
    each = max(1, way(num_resident=1).total - plan.total)
    fitting = max(0, int(free_bytes * MARGIN - plan.total) // each)
    return way(num_resident=min(fitting, num_layers - 1))


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
    return [0] if free_bytes is None else sorted({*range(0, num_layers, _STRIDE), num_layers})


def _lean_counts(settings: MemorySettings, mode: Activations, num_layers: int, free_bytes: int | None) -> list[int]:
    wanted = settings.lean_blocks
    if keep_less(mode) is None:
        return [0] if wanted in ("auto", 0) else []
    if wanted != "auto":
        return [min(wanted, num_layers)]
    return [0] if free_bytes is None else list(range(0, num_layers, _STRIDE))


def _leaving_counts(settings: MemorySettings, num_offloaded: int) -> list[int]:
    if not num_offloaded:
        return [1]
    return [1, 2] if settings.leaving_blocks == "auto" else [settings.leaving_blocks]


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
        # Only frozen weights can be quantized.
        smaller = on_host.num_resident is not None and on_host.quantized != "nf4" and not on_host.streams_trained
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
    """A table: each way to keep activations without and with offloading, resident and streamed, or mixed by block; the
    chosen one marked.

    Of rungs that differ in counts only, the fastest that fits is shown, or else the smallest.
    """
    groups: dict[tuple[object, ...], list[MemoryPlan]] = {}
    for rung in rungs:
        streamed = rung.num_resident is not None
        where = ("mixed",) if rung.num_lean else (streamed, rung.num_offloaded > 0)
        key = (rung.activations, *where, rung.on_host, rung.eight_bit, rung.quantized)
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

"""Processes of one run come to one plan: each has planned from its own memory and its own measured rates."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import gather_object

from cogtune.memory import MemoryPlan
from cogtune.plan import TrainingPlan


def agree_on_plan(plan: TrainingPlan, accelerator: Accelerator) -> TrainingPlan:
    """The plan of every process, with the rung of the one that has least; all of them have to call it.

    Rungs that differ would hang the run (only some stream their weights) or mix results (a quantized base on some).
    """
    if accelerator.num_processes == 1:
        return plan
    told = gather_object([(plan.memory, plan.saves_beside_training)])
    return replace(
        plan,
        memory=choose_least([memory for memory, _ in told]),
        saves_beside_training=all(beside for _, beside in told),
    )


def choose_least(chosen: Sequence[MemoryPlan]) -> MemoryPlan:
    """Of what the processes chose, what takes the least of the device; of several, the least of the host."""
    return min(chosen, key=lambda memory: (memory.total, memory.host, memory.name()))

"""Processes that planned differently come to one plan."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from cogtune import agreement
from cogtune.memory import MemoryPlan

LARGE = MemoryPlan("keep_all", weights=10, trainable=0, kept=40, workspace=5)
SMALL = replace(LARGE, activations="keep_attention", kept=5, num_resident=3, host=30)
QUANTIZED = replace(SMALL, weights=3)


@dataclass(frozen=True)
class Plan:
    memory: MemoryPlan
    saves_beside_training: bool
    seed: int = 4


def test_the_one_with_least_decides_in_any_order() -> None:
    for order in ([LARGE, SMALL, QUANTIZED], [QUANTIZED, LARGE, SMALL]):
        assert agreement.choose_least(order) is QUANTIZED
    less_host = replace(SMALL, host=20)
    assert agreement.choose_least([SMALL, less_host]) is less_host


def test_every_process_takes_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = [Plan(LARGE, saves_beside_training=True), Plan(SMALL, saves_beside_training=False)]
    told = [(plan.memory, plan.saves_beside_training) for plan in plans]
    monkeypatch.setattr(agreement, "gather_object", lambda own: told if own[0] in told else [])
    accelerator: Any = SimpleNamespace(num_processes=2)
    agreed = [agreement.agree_on_plan(plan, accelerator) for plan in plans]
    assert agreed[0] == agreed[1] == Plan(SMALL, saves_beside_training=False)
    alone: Any = SimpleNamespace(num_processes=1)
    assert agreement.agree_on_plan(plans[0], alone) is plans[0]

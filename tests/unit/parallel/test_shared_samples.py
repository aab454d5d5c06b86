"""What `train.context_parallel` can't go with, and how it counts in a plan."""

from typing import Any

import pytest
import torch

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.machine import measure_machine
from cogtune.memory import predict
from cogtune.models import choose_device
from cogtune.parallel.shared_samples import check_context, kept_by_exchange, teams_of
from cogtune.random_pipeline import make_architecture_facts
from cogtune.step_time import BlockTimes

FACTS = make_architecture_facts("cogvideox-2b")


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(
    ("environment", "sections", "said"),
    [
        ({}, {"train": {"context_parallel": 2}}, "must divide the number of processes, which is 1"),
        ({"WORLD_SIZE": "6"}, {"train": {"context_parallel": 4}}, "must divide the number of processes, which is 6"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"train": {"context_parallel": 4}}, "on one node"),
        ({"WORLD_SIZE": "2"}, {"train": {"context_parallel": 2}, "adapter": {"dropout": 0.1}}, "adapter.dropout"),
        (
            {"WORLD_SIZE": "32"},
            {"train": {"context_parallel": 32, "context_attention": "ulysses"}},
            "there are 30; take ring",
        ),
        ({"WORLD_SIZE": "2"}, {"train": {"context_attention": "ring"}}, "has no effect"),
    ],
)
def test_what_does_not_fit_is_refused(
    environment: dict[str, str], sections: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_context(config(**sections), FACTS)


def test_what_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_context(config(train={"context_parallel": 4}), FACTS)
    check_context(config(), FACTS)
    teams = teams_of(config(train={"context_parallel": 4}), 6, 8)
    assert (teams.team, teams.num_teams, teams.place) == (1, 2, 2)


def test_work_and_memory_are_shared() -> None:
    machine = measure_machine(choose_device("cpu"), torch.bfloat16)
    whole, half = (BlockTimes.of(FACTS, 17776, 1, machine, num_ranks=n) for n in (1, 2))
    assert half.forward_seconds() == pytest.approx(whole.forward_seconds() / 2)
    assert kept_by_exchange(config(), 30) == 0
    assert kept_by_exchange(config(train={"context_parallel": 4}), 30) > kept_by_exchange(
        config(train={"context_parallel": 4, "context_attention": "ring"}), 30
    )
    shape: Any = {"num_parameters": 10, "num_trainable": 1, "tokens": 100, "batch_size": 1, "dtype": torch.bfloat16}
    less, more = (predict(FACTS, "recompute", **shape, num_more_kept=kept).kept for kept in (0.0, 4.0))
    assert more == 5 * less

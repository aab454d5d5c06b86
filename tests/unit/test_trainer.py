"""When a run saves and stops, as its processes agree on it."""

from types import SimpleNamespace
from typing import Any

import pytest

from cogtune.config import RunConfig
from cogtune.trainer import Trainer


def test_a_save_by_the_clock_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is obeyed a step later; the answer is on its way when the clock says the same again."""
    trainer: Any = object.__new__(Trainer)
    trainer._config = RunConfig.model_validate({"checkpoint": {"every_minutes": 1.0}})
    trainer._accelerator = SimpleNamespace(num_processes=2, is_main_process=True)
    trainer._saver = SimpleNamespace(has_failed=lambda: False)
    trainer._stop = SimpleNamespace(requested=False)
    trainer._asked, trainer._last_save = False, float("-inf")
    pending: list[tuple[bool, ...]] = [(False, False, False)]

    def exchange(*flags: bool) -> list[bool]:
        pending.append(flags)
        return list(pending[-2])

    monkeypatch.setattr(trainer, "_exchange", exchange)
    saved = []
    for step in range(1, 7):
        trainer.step = step
        _stop, save = trainer._agree(False)
        saved.append(save)
        if save:
            trainer._last_save = float("inf")  # just now
    assert saved == [False, True, False, False, False, False]

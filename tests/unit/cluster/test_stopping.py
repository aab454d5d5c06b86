"""Signals that ask a run to end, and those that launchers and schedulers send after them."""

import os
import signal

import pytest

from cogtune.cluster import stopping
from cogtune.cluster.stopping import StopRequest


@pytest.mark.parametrize("first", stopping.STOP_SIGNALS)
def test_what_is_sent_again_changes_nothing(first: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), first)
        assert stop.requested
        for again in stopping.STOP_SIGNALS:  # a launcher passes on what it got, and ends with one of its own
            os.kill(os.getpid(), again)
    assert stop.requested


def test_a_second_ctrl_c_that_is_meant_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        monkeypatch.setattr(stopping, "AGAIN_SECONDS", -1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

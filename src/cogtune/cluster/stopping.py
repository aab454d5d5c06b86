"""Signals that ask a run to save and end: SIGTERM, SIGINT, and SIGUSR1, which schedulers send ahead of a time limit."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_SECONDS = 1.0
"""Between a first Ctrl+C and one that is meant."""


class StopRequest:
    """Inside this context the first signal sets `requested`. A SIGINT some time after it ends the process at once.

    Launchers and schedulers repeat what they send, and a launcher that ends sends a SIGTERM of its own.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif number == signal.SIGINT and now - self._since > AGAIN_SECONDS:
            signal.default_int_handler(number, frame)

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def follow_the_launcher() -> None:
    """Under `accelerate launch` with one process, lets the launcher's end reach this process as a SIGTERM.

    That launcher ends on SIGTERM without telling its child, which would train on unseen (Linux only).
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if launched:
        end_with_parent(signal.SIGTERM)


def end_with_parent(number: signal.Signals) -> None:
    """Lets the end of the process that started this one reach it as that signal (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)

"""Ends a launch of several processes that a measurement started."""

import contextlib
import os
import signal
import subprocess

_END_SECONDS = 40.0
"""torchrun takes 30 to end processes that do not listen; they are of other sessions than its own."""


def end_launch(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads its session, and everything below it; returns when it is gone.

    First by SIGTERM, which torchrun hands on: its processes end with it by themselves (`end_with_parent`) only where
    their imports are done.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    process.wait()

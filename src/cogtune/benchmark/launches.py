"""Ends a launch of several processes that a measurement started."""

import contextlib
import os
import signal
import subprocess

END_SECONDS = 40.0
"""torchrun takes 30 to end processes that do not listen; they are of other sessions than its own."""


def end_launch(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads its session, and what it started; returns when it is gone.

    First by SIGTERM, which torchrun hands on to processes of other sessions. One that doesn't listen is killed after
    `END_SECONDS`; torchrun's processes end with it then by themselves (`end_with_parent`) where their imports are done.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

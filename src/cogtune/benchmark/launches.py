"""Launches of several processes for a measurement, which end with it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_END_SECONDS = 40.0
"""torchrun takes 30 to end processes that do not listen; they are of other sessions than its own."""


@contextlib.contextmanager
def launched(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, which prints to `log` and is ended with all that it started in the end.

    `environment` comes on top of this process's.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | (environment or {}), stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        end_launch(process)


def end_launch(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads its session, and what it started; returns when it is gone.

    First by SIGTERM, which torchrun hands on to processes of other sessions. One that doesn't listen is killed after a
    while; torchrun's processes end with it then by themselves (`end_with_parent`) where their imports are done.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""What a measurement started ends with it, also processes of other sessions."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from cogtune.benchmark import launches
from patience import patient

# As torchrun does: a process in a session of its own, which a SIGTERM ends too.
LAUNCHER = """
import signal, subprocess, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
signal.sigwait({signal.SIGTERM})
child.kill()
child.wait()
sys.exit(1)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(0, flush=True)
time.sleep(600)
"""


def start(program: str) -> tuple[subprocess.Popen[bytes], int]:
    """The launch, once it listens, and the number that it prints."""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    with process.stdout:
        return process, int(process.stdout.readline())


def test_a_process_of_another_session_ends_with_its_launcher() -> None:
    process, child = start(LAUNCHER)
    os.kill(child, 0)
    try:
        launches.end_launch(process)
        assert process.returncode == 1
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_who_does_not_listen_is_killed_and_who_has_ended_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_END_SECONDS", 0.5)
    process, _ = start(DEAF)
    started = time.monotonic()
    launches.end_launch(process)
    assert process.returncode == -signal.SIGKILL and time.monotonic() - started < patient(5)
    launches.end_launch(process)
    assert process.returncode == -signal.SIGKILL

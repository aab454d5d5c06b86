"""Where this process is in its run: what it does, at which step, and when it last got on.

Noting it is an assignment; `watch.py` tells the other ranks. Long work calls `move` for each clip, sampling step or
file, so that it isn't taken for work that hangs.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Whereabouts:
    """One process's place."""

    phase: str = "starting"
    step: int | None = None
    moves: int = 0
    """Counts whatever shows that the process gets on."""
    since: float = field(default_factory=time.monotonic)
    """When it came to this phase."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds of the phases before."""


WAITING = "waiting for the other ranks"
HERE = Whereabouts()
"""Of this process."""


def enter(phase: str, step: int | None = None) -> None:
    """What the process does from here on; `step` stays what it was where it isn't given."""
    now = time.monotonic()
    HERE.spent[HERE.phase] = HERE.spent.get(HERE.phase, 0.0) + now - HERE.since
    HERE.phase, HERE.since = phase, now
    HERE.step = HERE.step if step is None else step
    HERE.moves += 1


def seconds_by_phase() -> dict[str, float]:
    """What the process's time went into since it was launched, in the order of the phases' first ends."""
    enter(HERE.phase)
    before = max(0.0, _process_age() - sum(HERE.spent.values()))  # the interpreter's own start, and what was imported
    return {phase: seconds + (before if phase == "starting" else 0.0) for phase, seconds in HERE.spent.items()}


def _process_age() -> float:
    """Seconds since the process was started (Linux; elsewhere 0)."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except OSError:
        return 0.0
    return uptime - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def move() -> None:
    """The process got on in its phase."""
    HERE.moves += 1


@contextlib.contextmanager
def inside(phase: str) -> Iterator[None]:
    """Names a phase; the one before is taken up again afterwards, unless this one ended with an error."""
    before = HERE.phase
    enter(phase)
    yield
    enter(before)

"""Where this process is in its run: what it does, at which step, and when it last got on.

Noting it is an assignment; `watch.py` tells the other ranks. Long work calls `move` for each clip, sampling step or
file, so that it isn't taken for work that hangs.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Whereabouts:
    """One process's place."""

    phase: str = "starting"
    step: int | None = None
    moves: int = 0
    """Counts whatever shows that the process gets on."""


WAITING = "waiting for the other ranks"
HERE = Whereabouts()
"""Of this process."""


def enter(phase: str, step: int | None = None) -> None:
    """What the process does from here on; `step` stays what it was where it isn't given."""
    HERE.phase = phase
    HERE.step = HERE.step if step is None else step
    HERE.moves += 1


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

"""How long tests wait for what should have come: limits that are there for hangs, longer on a slow machine."""

import os
import time
from functools import cache

import pytest

_USUAL_SECONDS = 0.08
"""What the loop below takes on the machines that the limits were chosen on, at most."""
_MOST = 6.0
_TOO_SLOW = 2.0


@cache
def _slowness() -> float:
    begun = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number
    return min(_MOST, max(1.0, (time.perf_counter() - begun) / _USUAL_SECONDS))


def patient(seconds: float) -> float:
    """A limit of so many seconds, longer by as much as this machine is slower than usual, up to six times."""
    return seconds * _slowness()


takes_minutes = pytest.mark.skipif(
    _slowness() >= _TOO_SLOW and "COGTUNE_ALL_TESTS" not in os.environ,
    reason=f"takes many minutes on a machine {_slowness():.1f} times slower than usual; COGTUNE_ALL_TESTS=1 runs it",
)
"""For tests that train or draw at length: skipped where a whole run would take over an hour."""

"""How long tests wait for what should have come, and how long all of them may take.

Limits of single waits are there for hangs and longer on a slow machine. `COGTUNE_TESTS_UNTIL`, seconds since 1970, ends
a run that has no more time (`.ci/run` sets it): what is left then is not run, and the summary says how much. A run that
had time for less than half has failed.
"""

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

UNTIL = os.environ.get("COGTUNE_TESTS_UNTIL")
OVER = "the tests' time was over (COGTUNE_TESTS_UNTIL)"


def skip_when_over() -> None:
    """Skips the test that is to begin, if the time of all tests is over."""
    if UNTIL and time.time() > float(UNTIL):
        pytest.skip(OVER)

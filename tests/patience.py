"""How long tests wait for what should have come, and how long all of them may take.

Limits of single waits are there for hangs and longer on a slow machine. `COGTUNE_TESTS_UNTIL`, seconds since 1970, ends
a run that has no more time (`.ci/run` sets it): no test begins after it, and the summary says how many of which files
were left out, as it does of those that a slow machine skips. A run that left out more than it passed has failed; of
what was left out a run proves nothing, green as it may be.
"""

import os
import time
from functools import cache

import pytest

_USUAL_SECONDS = 0.08
"""What the loop below takes on the machines that the limits were chosen on, at most."""
_MOST = 6.0
_LONGEST = 1100.0
"""Below the 1,200 s that `.ci/run` gives a test, so that a wait ends with its own message."""
_TOO_SLOW = 2.0


@cache
def _slowness() -> float:
    begun = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number
    return min(_MOST, max(1.0, (time.perf_counter() - begun) / _USUAL_SECONDS))


def patient(seconds: float) -> float:
    """A limit of so many seconds, longer by as much as this machine is slower: up to six times, or 1,100 s."""
    return max(seconds, min(_LONGEST, seconds * _slowness()))


SLOW = "takes many minutes on a slow machine (COGTUNE_ALL_TESTS=1 runs it)"
takes_minutes = pytest.mark.skipif(_slowness() >= _TOO_SLOW and "COGTUNE_ALL_TESTS" not in os.environ, reason=SLOW)
"""For tests that train or draw at length: skipped where a whole run would take over an hour."""

UNTIL = float(os.environ.get("COGTUNE_TESTS_UNTIL") or "inf")
OVER = "the tests' time was over (COGTUNE_TESTS_UNTIL)"


def skip_when_over() -> None:
    """Skips the test that is to begin, if the time of all tests is over."""
    if time.time() > UNTIL:
        pytest.skip(OVER)

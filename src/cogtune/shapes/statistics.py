"""Mean and spread over seeds, as tables show them."""

import statistics
from collections.abc import Sequence


def describe_spread(shares: Sequence[float], *, count: bool = True) -> str:
    """`92.3 % (91.0 to 94.0, 3 seeds)` for shares of 0..1; one seed has no range, and `count=False` no seeds."""
    mean = f"{100 * statistics.fmean(shares):.1f} %"
    if len(shares) == 1:
        return mean
    seeds = f", {len(shares)} seeds" if count else ""
    return f"{mean} ({100 * min(shares):.1f} to {100 * max(shares):.1f}{seeds})"


def describe_points(changes: Sequence[float]) -> str:
    """`-1.2 (-2.0 to +0.4)` in percentage points for differences of shares; without the range for one seed."""
    mean = f"{100 * statistics.fmean(changes):+.1f}"
    return mean if len(changes) == 1 else f"{mean} ({100 * min(changes):+.1f} to {100 * max(changes):+.1f})"


def describe_range(values: Sequence[float], digits: int) -> str:
    """`0.1234 (0.1200 to 0.1300)`; without the range for one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"

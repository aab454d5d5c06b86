"""Work for several processes that must all do as many forward passes, since weights are gathered for each."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def share_out(items: Sequence[T], rank: int, num_ranks: int, *, even: bool) -> tuple[list[T], int]:
    """Every n-th item, and how many of them are this rank's own.

    `even`: a rank with fewer than others gets the first item again, to go through the motions; its result is dropped.
    """
    mine = list(items[rank::num_ranks])
    num_own = len(mine)
    if even and items:
        most = -(-len(items) // num_ranks)
        mine += [items[0]] * (most - num_own)
    return mine, num_own

"""What each block keeps for its backward pass, and whose activations wait on the host.

    keep_all         what the compiler thinks best is kept, without a limit; not compiled: everything
    keep_products    outputs of attention and of matrix products are kept; norms, gates and GELU are computed again
    keep_attention   attention outputs are kept, the rest of a block is recomputed from its input
    recompute        whole blocks are recomputed from their inputs: least memory

Some of the blocks may be lean: they keep what the next way in this list keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Activations = Literal["keep_all", "keep_products", "keep_attention", "recompute"]
ACTIVATIONS_FAST_TO_SLOW: tuple[Activations, ...] = ("keep_all", "keep_products", "keep_attention", "recompute")


def keep_less(activations: Activations) -> Activations | None:
    """What lean blocks do; None beside `recompute`, which nothing keeps less than."""
    following = ACTIVATIONS_FAST_TO_SLOW[ACTIVATIONS_FAST_TO_SLOW.index(activations) + 1 :]
    return following[0] if following else None


@dataclass(frozen=True)
class Arrangement:
    """Numbers of blocks."""

    lean: frozenset[int]
    offloaded: frozenset[int]
    """What they keep waits on the host."""


@cache  # a ladder asks for the same ones again and again
def arrange(num_blocks: int, *, num_lean: int, num_offloaded: int) -> Arrangement:
    """Which blocks do what, each kind spread evenly, so that copies are too.

    Blocks that keep more are offloaded first. The last block, whose backward pass comes at once, leaves last.
    """
    everything = range(num_blocks)
    num_rich = num_blocks - num_lean
    if num_offloaded <= num_rich:
        offloaded = _spread(everything, num_offloaded)
        there = _without(everything, offloaded)
        lean = _without(there, _spread(there, num_rich - num_offloaded))
    else:
        rich = _spread(everything, num_rich)
        lean = _without(everything, rich)
        offloaded = [*rich, *_spread(lean, num_offloaded - num_rich)]
    return Arrangement(frozenset(lean), frozenset(offloaded))


def _spread(items: Sequence[int], count: int) -> list[int]:
    return [items[(number * len(items)) // count] for number in range(count)]


def _without(items: Sequence[int], gone: Sequence[int]) -> list[int]:
    return sorted(set(items) - set(gone))

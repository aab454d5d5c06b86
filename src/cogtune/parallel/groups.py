"""Process groups of teams, and by their names, as operators know them."""

from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cogtune.parallel.ranks import Teams


def make_group(teams: Teams) -> dist.ProcessGroup:
    """The group of this rank's team; every rank must call it, since groups are made together."""
    own: Any = None
    for first in range(0, teams.num_ranks, teams.size):
        members = range(first, first + teams.size)
        group = dist.new_group(list(members))
        own = group if teams.rank in members else own
    return own


def find_group(name: Any) -> dist.ProcessGroup:
    """The group of that name: an operator's arguments are tensors, numbers and strings."""
    return _resolve_process_group(name)

"""What the processes of a run tell each other about a checkpoint, beside training."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

LONGEST = timedelta(hours=2)
"""What the slowest process may take to write its files; one that is gone is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """A process's number, and a group of its own for a checkpoint's messages: never the one that training uses."""

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @classmethod
    def connect(cls) -> "Ranks":
        """Of the run's processes, through gloo, so that nothing waits for a GPU; call it on all of them."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=LONGEST))

    def gather(self, mine: Any) -> list[Any]:
        """What each process gave, in their order, on all of them."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def first_error(self, error: str | None) -> str | None:
        """Anybody's error, with the process named where there are several."""
        for rank, found in enumerate(self.gather(error)):
            if found is not None:
                return found if self.world_size == 1 else f"process {rank}: {found}"
        return None

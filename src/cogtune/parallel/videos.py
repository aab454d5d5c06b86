"""Several GPUs for sampling: whole videos over teams of ranks, and each video over its team.

A team of an even size takes the two halves of guidance apart, and each half's tokens are spread over its ranks
(`sequence.SplitSequence`). The videos are those of one GPU up to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from cogtune.errors import UserError
from cogtune.launch import Launch
from cogtune.parallel.groups import make_group
from cogtune.parallel.ranks import Teams
from cogtune.parallel.sequence import SplitSequence, TeamAttention, choose_way

DOUBLING_GAIN = 1.9
"""How much faster twice as many GPUs make one video; only whether `auto` spreads whole videos follows from it. Assumed,
not measured yet."""


@dataclass(frozen=True)
class VideoRanks:
    """This process among those that sample; `halves` of guidance are apart in each team."""

    teams: Teams
    halves: Literal[1, 2]

    @property
    def leads(self) -> bool:
        """Whether this rank decodes and writes its team's videos."""
        return self.teams.place == 0

    def describe(self) -> list[str]:
        """A line on how the work is spread, if it is."""
        size, halves = self.teams.size, self.halves
        if self.teams.num_ranks == 1:
            return []
        each = "one GPU each"
        if size > 1:
            parts = ["the halves of guidance apart"] if halves > 1 else []
            parts += [f"tokens over {size // halves} GPUs"] if size > halves else []
            each = f"{size} GPUs each ({', '.join(parts)})"
        return [f"{self.teams.num_ranks} GPUs: {self.teams.num_teams} video(s) at once, {each}"]


def seconds_of(num_videos: int, num_ranks: int, size: int) -> float:
    """Time for all videos with teams of `size`, in units of one video on one GPU."""
    rounds = -(-num_videos // (num_ranks // size))
    return rounds / DOUBLING_GAIN ** (size.bit_length() - 1)


def plan_ranks(wanted: Literal["auto"] | int, *, num_videos: int, guided: bool, launch: Launch) -> VideoRanks:
    """Who makes what. `guided`: the halves of guidance may be apart.

    Raises `UserError` for a team size that doesn't divide the processes.
    """
    rank, num_ranks = launch.rank, launch.num_processes
    if wanted == "auto":
        sizes = [size for size in (1, 2, 4, 8) if num_ranks % size == 0]
        size = min(sizes, key=lambda size: seconds_of(num_videos, num_ranks, size))
    else:
        size = wanted
        if num_ranks % size:
            raise UserError(f"--gpus-per-video {size}: must divide the number of processes, which is {num_ranks}")
    return VideoRanks(Teams(rank, num_ranks, size), 2 if guided and size % 2 == 0 else 1)


@contextmanager
def started_ranks(device: torch.device, num_ranks: int) -> Iterator[torch.device]:
    """Connects the processes of a launch; gives this one's device.

    An error in one of them ends it, and the launcher then ends the others.
    """
    if num_ranks == 1:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.barrier()
    dist.destroy_process_group()


class SharedVideo:
    """A team at work on one video after the other."""

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        ranks: VideoRanks,
        *,
        way: Literal["auto", "ulysses", "ring"] = "auto",
    ) -> None:
        """Every rank must make one at once: process groups are made together."""
        teams = ranks.teams
        self._group = make_group(teams)
        num_heads = transformer.config["num_attention_heads"]
        size = teams.size // ranks.halves
        self.attention: TeamAttention | None = None
        if size > 1:
            group = self._group if ranks.halves == 1 else make_group(Teams(teams.rank, teams.num_ranks, size))
            self.attention = TeamAttention(group, choose_way(way, num_heads, size), num_heads)
        self._split = SplitSequence(transformer, self._group, self.attention, halves=ranks.halves)

    def add_up(self, sums: Tensor) -> Tensor:
        """The sums over all of the video's tokens."""
        dist.all_reduce(sums, group=self._group)
        return sums

    def remove(self) -> None:
        """The transformer samples alone again."""
        self._split.remove()


def share_video(transformer: CogVideoXTransformer3DModel, ranks: VideoRanks) -> SharedVideo | None:
    """None where each rank makes videos of its own."""
    return SharedVideo(transformer, ranks) if ranks.teams.size > 1 else None

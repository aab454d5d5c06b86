"""Context parallelism in a run: `train.context_parallel` ranks share each sample."""

from dataclasses import dataclass

import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel

from cogtune.config import RunConfig
from cogtune.errors import UserError
from cogtune.launch import read_launch
from cogtune.models import ModelFacts
from cogtune.parallel.groups import make_group
from cogtune.parallel.ranks import Teams
from cogtune.parallel.sequence import SplitSequence, TeamAttention, attention_shape, choose_way

KEPT_BY_EXCHANGE = {"ulysses": 4.0, "ring": 1.0}
"""Activation tensors kept for each block on top of `memory.KEPT_UNITS`: q, k, v and the output as they arrived from
other ranks; the ring keeps its output. Counted, not measured yet."""


def check_context(config: RunConfig, facts: ModelFacts) -> None:
    """Raises `UserError` where the ranks, the model or other settings don't fit `train.context_parallel`."""
    size, way = config.train.context_parallel, config.train.context_attention
    if size == 1:
        if way != "auto":
            raise UserError(f"train.context_attention={way}: has no effect with train.context_parallel=1; remove it")
        return
    launch = read_launch()
    num_ranks, on_node = launch.num_processes, launch.num_local
    reasons = {
        f"must divide the number of processes, which is {num_ranks}; start {size} or a multiple of it "
        "(accelerate launch --num_processes)": num_ranks % size > 0,
        f"the ranks of a sample must be on one node, and this one has {on_node} processes": on_node % size > 0,
        "adapter.dropout must be 0: what is dropped would depend on how tokens are spread": config.adapter.dropout > 0,
        f"train.context_attention=ulysses gives each rank some of the heads, and there are {facts.num_heads}; take "
        "ring": way == "ulysses" and size > facts.num_heads,
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if wrong:
        raise UserError(f"train.context_parallel={size}: {'; '.join(wrong)}; or set train.context_parallel=1")


def kept_by_exchange(config: RunConfig, num_heads: int) -> float:
    """Activation tensors (of a rank's part) that a block keeps because of the other ranks."""
    size = config.train.context_parallel
    return 0.0 if size == 1 else KEPT_BY_EXCHANGE[choose_way(config.train.context_attention, num_heads, size)]


def teams_of(config: RunConfig, rank: int, num_ranks: int) -> Teams:
    """Who shares samples with whom."""
    return Teams(rank, num_ranks, config.train.context_parallel)


@dataclass(frozen=True)
class SharedSample:
    """A rank's team at work."""

    group: dist.ProcessGroup
    attention: TeamAttention

    def split(self, transformer: CogVideoXTransformer3DModel) -> SplitSequence:
        """From here on, the transformer works on this rank's part of each sample."""
        return SplitSequence(transformer, self.group, self.attention)

    def attention_shape(self, num_heads: int, tokens: int) -> tuple[int, int]:
        """Heads and tokens that one rank's attention kernel sees, of so many in all."""
        return attention_shape(num_heads, tokens, self.attention.size, self.attention.way)


def share_samples(config: RunConfig, num_heads: int, teams: Teams) -> SharedSample | None:
    """Makes the process groups; None where each rank has samples of its own."""
    if teams.size == 1:
        return None
    group = make_group(teams)
    return SharedSample(
        group, TeamAttention(group, choose_way(config.train.context_attention, num_heads, teams.size), num_heads)
    )

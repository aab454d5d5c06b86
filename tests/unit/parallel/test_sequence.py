"""Which way ranks attend to each other's tokens, and one rank's split, which must change nothing.

Several ranks: tests/e2e/test_context_parallel.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.unit.test_attention import KINDS, assert_equal_steps, make_transformer, step
from torch.autograd import gradcheck

from cogtune.attention import install_attention
from cogtune.execution import configure_blocks
from cogtune.parallel.exchange import exchange
from cogtune.parallel.groups import make_group
from cogtune.parallel.ranks import Teams
from cogtune.parallel.ring import ring_attention
from cogtune.parallel.sequence import SplitSequence, TeamAttention, Way, attention_shape, choose_way


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield make_group(Teams(0, 1, 1))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("num_heads", "size", "way"),
    [(48, 2, "ulysses"), (48, 4, "ulysses"), (30, 2, "ulysses"), (30, 4, "ulysses"), (2, 4, "ring"), (5, 4, "ring")],
)
def test_heads_are_exchanged_where_they_are_nearly_even(num_heads: int, size: int, way: Way) -> None:
    assert choose_way("auto", num_heads, size) == way
    assert choose_way("ring", num_heads, size) == "ring"


def test_a_kernel_s_shape_is_that_of_the_busiest_rank() -> None:
    assert attention_shape(30, 17776, 4, "ulysses") == (8, 17776)
    assert attention_shape(30, 17776, 3, "ring") == (30, 5926)


def test_a_team_of_one_changes_nothing(alone: dist.ProcessGroup) -> None:
    """All hooks and layouts, with every token in the one part."""
    expected = make_transformer("tiny", KINDS["all four"])
    install_attention(expected, "default")
    transformer = make_transformer("tiny", KINDS["all four"])
    team = TeamAttention(alone, "ulysses", 2)
    install_attention(transformer, "default", team)
    configure_blocks(transformer, "recompute", compiled=False, has_dropout=False, shared=True)
    split = SplitSequence(transformer, alone, None)
    split._attention = team
    assert_equal_steps(step(transformer), step(expected), 1e-12)
    assert sum(team.tokens) == 32 + 5 * 4 * 6
    split.remove()
    install_attention(transformer, "default")
    assert_equal_steps(step(transformer), step(expected), 1e-12)


def test_operators_say_their_shapes_and_differentiate(alone: dist.ProcessGroup) -> None:
    name = alone.group_name
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(exchange, (x, [12], [12], name))
    assert gradcheck(lambda x: exchange(x, [12], [12], name), (x,))
    qkv = [torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ring_attention, (*qkv, [5], name, "default"), test_utils=checks)

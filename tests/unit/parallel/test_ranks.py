"""Teams of ranks and their parts: all tokens, each once, as even as can be."""

import random

import pytest

from cogtune.dataset import PositionSampler
from cogtune.parallel.ranks import Teams, TokenParts, split_evenly


@pytest.mark.parametrize(("num_ranks", "size"), [(1, 1), (4, 1), (4, 2), (4, 4), (12, 3)])
def test_teams_are_neighbours_and_cover_all_ranks(num_ranks: int, size: int) -> None:
    teams = [Teams(rank, num_ranks, size) for rank in range(num_ranks)]
    assert [t.team * size + t.place for t in teams] == list(range(num_ranks))
    assert {t.num_teams for t in teams} == {num_ranks // size} and max(t.team for t in teams) == num_ranks // size - 1


def test_parts_are_even_and_in_order() -> None:
    draw = random.Random(0)
    shapes = [(226, 17550, 4), (226, 17550, 3), (32, 120, 4), (3, 2, 4)]
    shapes += [(draw.randrange(300), draw.randrange(20000), draw.randrange(1, 17)) for _ in range(300)]
    for num_text, num_video, size in shapes:
        parts = TokenParts.of(num_text, num_video, size)
        assert max(parts.joint) - min(parts.joint) <= 1, "a rank waits for the slowest"
        assert sum(parts.text) == num_text and sum(parts.video) == num_video
        for ranges, total in ((parts.text_range, num_text), (parts.video_range, num_video)):
            covered = [index for place in range(size) for index in range(*ranges(place))]
            assert covered == list(range(total))
    assert TokenParts.of(226, 17550, 4).joint == (4444,) * 4


def test_larger_parts_begin_where_told() -> None:
    assert split_evenly(30, 4) == (8, 8, 7, 7)
    assert split_evenly(7, 4, first=3) == (2, 2, 1, 2)


def test_teams_share_positions_and_cover_each_step() -> None:
    """What a run's loader takes: each position once for each of its team's ranks."""
    teams = [Teams(rank, 6, 2) for rank in range(6)]
    taken = [
        [p for batch in PositionSampler(
            first_step=2, last_step=4, batch_size=2, accumulation=1, rank=t.team, world_size=t.num_teams,
        ) for p in batch]
        for t in teams
    ]  # fmt: skip
    assert all(taken[rank] == taken[rank + 1] for rank in (0, 2, 4))
    assert sorted(taken[0] + taken[2] + taken[4]) == list(range(12, 24))

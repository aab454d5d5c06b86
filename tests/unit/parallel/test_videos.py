"""How videos and GPUs are matched; sampling over several processes is in tests/e2e/test_context_parallel.py."""

import pytest

from cogtune.errors import UserError
from cogtune.generation_options import parse_generation
from cogtune.launch import Launch
from cogtune.parallel.videos import VideoRanks, plan_ranks

BASIC = ["--model", "tiny", "--prompt", "a", "--output", "o.mp4"]


def plan(num_videos: int, num_ranks: int, *, guided: bool = True, wanted: int | None = None) -> VideoRanks:
    return plan_ranks(wanted or "auto", num_videos=num_videos, guided=guided, launch=Launch(0, num_ranks))


@pytest.mark.parametrize(
    ("num_videos", "num_ranks", "size"),
    [(1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (2, 4, 2), (4, 4, 1), (5, 4, 4), (8, 4, 1), (100, 8, 1), (1, 6, 2)],
)
def test_whole_videos_are_spread_where_they_fill_the_gpus(num_videos: int, num_ranks: int, size: int) -> None:
    assert plan(num_videos, num_ranks).teams.size == size


def test_guidance_is_parted_where_it_can_be() -> None:
    assert plan(1, 4).halves == 2 and plan(1, 4, guided=False).halves == 1
    assert plan(1, 3, wanted=3).halves == 1 and plan(4, 4).halves == 1


def test_every_video_is_made_by_one_team_and_led_by_one_rank() -> None:
    """Also where counts don't divide: a team without a video is done."""
    made = []
    for rank in range(8):
        ranks = plan_ranks(2, num_videos=5, guided=True, launch=Launch(rank, 8))
        if ranks.leads:
            made += range(5)[ranks.teams.team :: ranks.teams.num_teams]
    assert sorted(made) == list(range(5))


def test_a_size_must_divide_the_processes() -> None:
    with pytest.raises(UserError, match="--gpus-per-video 3: must divide the number of processes, which is 4"):
        plan(1, 4, wanted=3)
    assert "tokens over 2 GPUs" in plan(1, 4).describe()[0] and plan(1, 1).describe() == []


def test_options() -> None:
    assert parse_generation("", BASIC).gpus_per_video == "auto"
    assert parse_generation("", [*BASIC, "--gpus-per-video", "2"]).gpus_per_video == 2
    assert parse_generation("", [*BASIC, "--offload", "sequential"]).gpus_per_video == 1
    for wrong, said in (["--gpus-per-video", "0"], "expected"), (
        ["--gpus-per-video", "2", "--offload", "sequential"], "use stream",
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            parse_generation("", [*BASIC, *wrong])
    assert parse_generation("", BASIC).may_part_guidance
    assert not parse_generation("", [*BASIC, "--guidance", "1"]).may_part_guidance
    assert not parse_generation("", [*BASIC, "--cache", "guidance"]).may_part_guidance, "one half runs more seldom"

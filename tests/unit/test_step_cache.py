"""What a step cache skips, and what it puts in its place."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from cogtune.step_cache import CacheSettings, StepCache, _Trend, make_settings


class Blocks:
    """Three blocks that each add `amount` for the half with the prompt and twice that for the other."""

    def __init__(self) -> None:
        self.amount = 1.0
        self.calls: list[tuple[int, int | None, int]] = []

    def __call__(self, first: int, last: int | None, tokens: Tensor, temb: Tensor) -> Tensor:
        self.calls.append((first, last, len(tokens)))
        assert len(temb) == len(tokens)
        halves = torch.tensor([2.0, 1.0])[-len(tokens) :].view(-1, 1, 1)
        return tokens + self.amount * halves * ((3 if last is None else last) - first)


def run(cache: StepCache, blocks: Blocks, level: float) -> Tensor:
    return cache.run(blocks, torch.full((2, 5, 4), level), torch.zeros(2, 3))


def test_skipped_blocks_add_what_they_added_last() -> None:
    cache, blocks = StepCache(CacheSettings(threshold=0.1, num_first_steps=1, num_last_steps=1)), Blocks()
    cache.start(6)
    run(cache, blocks, 0.0)
    blocks.amount = 1.05  # the first block changes by 5 %
    output = run(cache, blocks, 10.0)
    assert cache.kinds == ["full", "first block"]
    torch.testing.assert_close(output[1, 0, 0], torch.tensor(10 + 1.05 + 2.0))  # 2: from the step before
    blocks.amount = 1.2
    assert run(cache, blocks, 10.0)[1, 0, 0] == pytest.approx(10 + 3 * 1.2)
    assert cache.kinds[-1] == "full"
    run(cache, blocks, 10.0)
    blocks.calls.clear()
    run(cache, blocks, 10.0)
    run(cache, blocks, 10.0)  # the last one is never skipped
    assert cache.kinds[3:] == ["first block", "first block", "full"]
    assert blocks.calls == [(0, 1, 2), (0, 1, 2), (1, None, 2)]
    assert cache.describe() == "6 steps: 3 full, 3 first block"


def test_no_more_steps_in_a_row_than_allowed_are_skipped() -> None:
    cache, blocks = (
        StepCache(CacheSettings(threshold=9.0, max_skipped=2, num_first_steps=1, num_last_steps=1)),
        Blocks(),
    )
    cache.start(9)
    for _ in range(9):
        run(cache, blocks, 1.0)
    assert [kind == "full" for kind in cache.kinds] == [True, False, False, True, False, False, True, False, True]


def test_the_other_half_follows_at_its_last_distance() -> None:
    cache = StepCache(CacheSettings(guidance_interval=3, num_first_steps=1, num_last_steps=1))
    blocks = Blocks()
    cache.start(8)
    outputs = [run(cache, blocks, float(step)) for step in range(8)]
    assert cache.kinds == ["full", "one half", "one half", "full", "one half", "one half", "full", "full"]
    for step, output in enumerate(outputs):
        assert output.shape == (2, 5, 4)
        assert output[1, 0, 0] == step + 3 and output[0, 0, 0] == step + 6
    assert (0, 1, 1) in blocks.calls and (1, None, 1) in blocks.calls


def test_both_ways_together() -> None:
    settings = make_settings("both", threshold=9.0, guidance_interval=2, max_skipped=1)
    assert settings is not None
    cache, blocks = StepCache(settings), Blocks()
    cache.start(12)
    outputs = [run(cache, blocks, 0.0) for _ in range(12)]
    assert set(cache.kinds[4:10]) >= {"first block of one half"}
    for output in outputs:
        torch.testing.assert_close(output[:, 0, 0], torch.tensor([6.0, 3.0]))


@pytest.mark.parametrize("name", ["first-block", "guidance"])
def test_what_is_added_goes_on_as_a_line(name: Literal["first-block", "guidance"]) -> None:
    """Whatever the distance of the steps that ran in full: what changes evenly comes out exactly."""
    settings = make_settings(name, threshold=9.0, guidance_interval=3, max_skipped=2)
    assert settings is not None
    cache, blocks = StepCache(settings), Blocks()
    cache.start(16)
    for step in range(16):
        blocks.amount = 1 + step / 8
        output = run(cache, blocks, 0.0)
        torch.testing.assert_close(output[:, 0, 0], blocks.amount * torch.tensor([6.0, 3.0]))
    assert len(set(cache.kinds)) == 2 and cache.kinds.count("full") == 9


def test_a_half_that_was_not_there_before_is_added_as_it_was_last() -> None:
    """Where one of the two last steps in full ran one half only, there is no line for both."""
    trend = _Trend()
    assert not trend
    trend.add(3, torch.full((1, 2, 2), 1.0))
    trend.add(4, torch.full((2, 2, 2), 3.0))
    torch.testing.assert_close(trend.at(6, 2), torch.full((2, 2, 2), 3.0))
    torch.testing.assert_close(trend.at(6, 1), torch.full((1, 2, 2), 7.0))


def test_a_video_must_be_started() -> None:
    cache, blocks = StepCache(CacheSettings(threshold=0.1)), Blocks()
    with pytest.raises(RuntimeError, match="start"):
        run(cache, blocks, 0.0)
    assert make_settings("none", threshold=0.1, guidance_interval=2) is None

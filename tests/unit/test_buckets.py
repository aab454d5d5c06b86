"""Formats of several sizes: which there are, which clip goes where, and in which order batches take them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogtune.buckets import assign_formats, make_formats
from cogtune.config import DataSettings
from cogtune.draws import BucketOrder, ClipOrder
from cogtune.errors import UserError
from cogtune.manifest import Clip, ClipFormat
from cogtune.random_pipeline import make_architecture_facts
from cogtune.video import write_video
from cogtune.video_request import check_size

FACTS = make_architecture_facts("cogvideox-1.5-5b")
BUCKETS = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2]


def take(order: BucketOrder, count: int) -> list[int]:
    return [order.clip_at(position) for position in range(count)]


def make_order(group_size: int, *, weights: list[float] | None = None, seed: int = 3) -> BucketOrder:
    return BucketOrder(weights or [1.0] * len(BUCKETS), BUCKETS, seed, group_size=group_size)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 8])
def test_groups_hold_one_bucket_and_no_sample_is_dropped_or_doubled(group_size: int) -> None:
    clips = take(make_order(group_size), 40 * 11 // group_size * group_size)
    for start in range(0, len(clips), group_size):
        assert len({BUCKETS[clip] for clip in clips[start : start + group_size]}) == 1
    for bucket in range(3):
        seen = [clip for clip in clips if BUCKETS[clip] == bucket]
        size = BUCKETS.count(bucket)
        for start in range(0, len(seen) - size + 1, size):
            assert sorted(seen[start : start + size]) == [i for i, own in enumerate(BUCKETS) if own == bucket]
        assert abs(len(seen) - 40 * size) < 2 * group_size + size  # its share, to within a group or two


def test_the_order_is_a_function_of_seed_and_position() -> None:
    straight = take(make_order(4), 200)
    asked = make_order(4)
    assert [asked.clip_at(p) for p in reversed(range(200))] == straight[::-1]
    assert straight != take(make_order(4, seed=4), 200)
    epochs = [tuple(BUCKETS[c] for c in straight[s : s + 44]) for s in (0, 44, 88)]
    assert len(set(epochs)) > 1, "groups come in an order of their own each epoch"


def test_one_bucket_is_the_order_of_a_run_without_buckets() -> None:
    weights = [1.0, 2.0, 0.5, 1.0, 0.3]
    plain = ClipOrder(weights, 9)
    for group_size in (1, 4, 7):
        order = BucketOrder(weights, [0] * 5, 9, group_size=group_size)
        assert take(order, 105) == [plain.clip_at(p) for p in range(105)]


def test_weights_count_in_buckets_and_clips_of_weight_0_are_in_none() -> None:
    weights = [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.0]
    counts = Counter(take(make_order(2, weights=weights), 950))
    assert counts[10] == 0 and counts[0] == pytest.approx(200, abs=3) and counts[7] == pytest.approx(50, abs=3)
    with pytest.raises(ValueError, match="weight above zero"):
        make_order(2, weights=[0.0] * 11)


def test_formats_come_from_the_list_or_the_model() -> None:
    assert make_formats(DataSettings(), FACTS) == [ClipFormat(81, 768, 1360, 16.0)]
    listed = make_formats(DataSettings(buckets=["81x768x1360", "161x768x768"], fps=8.0), FACTS)
    assert listed == [ClipFormat(81, 768, 1360, 8.0), ClipFormat(161, 768, 768, 8.0)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"buckets": ["81x768"]}, ["'81x768'", "frames x height x width"]),
        ({"buckets": ["81x768x1360", "81x768x1360"]}, ["stands twice"]),
        ({"buckets": ["81x768x1360", "80x768x768"]}, ["num_frames=80", "4k + 1"]),
        ({"buckets": ["81x512x512"]}, ["shorter side must be 768"]),
        ({"bucket_tokens": 100}, ["data.bucket_tokens=100", "too few"]),
    ],
)
def test_wrong_buckets_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_formats(DataSettings(**settings), FACTS)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("model", ["cogvideox-2b", "cogvideox-5b-i2v"])
def test_a_budget_needs_a_model_of_many_sizes(model: str) -> None:
    with pytest.raises(UserError, match="supports one length and size only"):
        make_formats(DataSettings(bucket_tokens=20_000), make_architecture_facts(model))


def test_a_budget_of_the_native_shape_gives_it_and_longer_clips_of_smaller_ones() -> None:
    formats = make_formats(DataSettings(bucket_tokens=45_104), FACTS)
    assert ClipFormat(81, 768, 1360, 16.0) in formats and ClipFormat(145, 768, 768, 16.0) in formats
    for form in formats:
        check_size(FACTS, form.num_frames, form.height, form.width)
        assert FACTS.num_tokens(form.num_frames, form.height, form.width) <= 45_104
    longest = {(f.height, f.width): max(g.num_frames for g in formats if g.width == f.width) for f in formats}
    assert {(768, 1360), (1360, 768), (768, 768), (768, 1024), (1024, 768)} == set(longest)
    for (height, width), frames in longest.items():
        assert frames == 161 or FACTS.num_tokens(frames + 16, height, width) > 45_104, "as long as the budget allows"


FORMS = [ClipFormat(*size, 8.0) for size in [(17, 64, 96), (33, 64, 96), (17, 96, 64), (17, 64, 64), (17, 128, 192)]]


@pytest.fixture
def write_clip(tmp_path: Path, draw_clip: Callable[..., np.ndarray]) -> Callable[..., Clip]:
    def write(frames: int, height: int, width: int) -> Clip:
        path = tmp_path / f"{frames}-{height}-{width}.mp4"
        write_video(path, draw_clip(0, frames, height, width), 8)
        return Clip(path.name, path, "c")

    return write


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((17, 64, 96), (17, 64, 96)),
        ((40, 64, 96), (33, 64, 96)),
        ((17, 100, 66), (17, 96, 64)),
        ((20, 80, 80), (17, 64, 64)),
        ((17, 128, 192), (17, 128, 192)),
        ((40, 128, 192), (33, 64, 96)),
        ((9, 64, 96), (17, 64, 96)),  # too short for any: decoding says so
    ],
)
def test_a_clip_goes_where_least_is_lost(
    clip: tuple[int, int, int], expected: tuple[int, int, int], write_clip: Callable[..., Clip]
) -> None:
    (assigned,) = assign_formats([write_clip(*clip)], FORMS)
    assert assigned.form is not None
    assert (assigned.form.num_frames, assigned.form.height, assigned.form.width) == expected


def test_a_segment_counts_by_its_own_length(write_clip: Callable[..., Clip]) -> None:
    clip = write_clip(40, 64, 96)
    whole, part = assign_formats([clip, replace(clip, end=2.2)], FORMS)
    assert whole.form is not None and part.form is not None
    assert (whole.form.num_frames, part.form.num_frames) == (33, 17)


def test_one_format_leaves_the_clips_alone_and_unreadable_ones_get_one(tmp_path: Path) -> None:
    clip = Clip("a", tmp_path / "missing.mp4", "c")
    assert assign_formats([clip], FORMS[:1]) == [clip]
    assert assign_formats([clip], FORMS)[0].form in FORMS

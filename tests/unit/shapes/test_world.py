"""The world's clips: the same for the same seed, wholly inside the frame, and never of a held-out combination."""

import dataclasses

import numpy as np
import pytest

from cogtune.errors import UserError
from cogtune.shapes.outlines import polygon_distance, signed_distance
from cogtune.shapes.render import coverage, render
from cogtune.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CONCEPT_MOTION,
    CONCEPT_SHAPE,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    combinations,
    sample_clip,
)


def test_the_world_is_large_enough():
    assert len(SHAPES) >= 6 and len(COLOURS) >= 6 and len(MOTIONS) >= 6 and len(BACKGROUNDS) >= 3


def test_a_clip_is_a_function_of_split_seed_and_index():
    assert sample_clip("base", 3, 5) == sample_clip("base", 3, 5)
    others = [sample_clip("base", 3, 6), sample_clip("base", 4, 5), sample_clip("held_out", 3, 5)]
    assert sample_clip("base", 3, 5) not in others
    assert np.array_equal(render(sample_clip("base", 3, 5)), render(sample_clip("base", 3, 5)))


def test_no_base_clip_shows_a_held_out_combination():
    held_out = set(combinations("held_out"))
    shown = {(c.shape, c.colour, c.motion) for c in (sample_clip("base", 0, i) for i in range(4000))}
    assert not shown & held_out
    assert len(shown) == len(combinations("base")) == len(SHAPES) * len(COLOURS) * len(MOTIONS) - len(held_out)


def test_every_value_and_every_pair_is_left_in_the_base():
    base = combinations("base")
    for first, second in ((0, 1), (0, 2), (1, 2)):
        sizes = [(len(SHAPES), len(COLOURS), len(MOTIONS))[axis] for axis in (first, second)]
        assert len({(entry[first], entry[second]) for entry in base}) == sizes[0] * sizes[1]


def test_the_base_never_shows_the_concept():
    for shape, _, motion in combinations("base") + combinations("held_out"):
        assert shape != CONCEPT_SHAPE and motion != CONCEPT_MOTION


@pytest.mark.parametrize("split", ["base", "concept"])
def test_the_object_stays_inside_the_frame(split: str):
    for index in range(200):
        clip = sample_clip(split, 1, index)
        frames = render(clip)
        border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
        assert (border == BACKGROUNDS[clip.background]).all(), clip


def test_every_shape_covers_the_area_of_its_disc():
    centre = np.full((1, 2), 32.3)
    for shape in (*SHAPES, CONCEPT_SHAPE):
        area = float(coverage(shape, centre, np.array([11.0])).sum())
        assert area == pytest.approx(np.pi * 11.0**2, rel=0.01), shape


def test_drawing_equals_supersampling():
    """The anti-aliased edge against 16x16 samples a pixel of the same outline."""
    fine = (np.arange(64 * 16, dtype=np.float32) + 0.5) / 16
    for shape in (*SHAPES, CONCEPT_SHAPE):
        x, y = np.meshgrid((fine - 31.7) / 12, (fine - 30.2) / 12)
        samples = (signed_distance(shape, x, y) < 0).reshape(64, 16, 64, 16).mean((1, 3))
        drawn = coverage(shape, np.array([[31.7, 30.2]]), np.array([12.0]))[0, :, :64]
        assert np.abs(drawn - samples).max() < 0.35, shape  # only at sharp corners
        assert np.abs(drawn - samples).mean() < 0.002, shape


def test_polygon_distance_on_a_square():
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float32)
    x, y = np.array([0.0, 2.0, 2.0, 0.5]), np.array([0.0, 0.0, 2.0, -0.75])
    assert polygon_distance(x, y, corners) == pytest.approx([-1.0, 1.0, np.sqrt(2.0), -0.25])


def test_turning_a_square_by_a_quarter_changes_nothing():
    centre, radius = np.array([[40.0, 30.0]]), np.array([9.0])
    turned = coverage("square", centre, radius, np.array([np.pi / 2]))
    assert np.abs(turned - coverage("square", centre, radius)).max() < 1e-3


def test_clips_move_as_they_are_called():
    for index in range(120):
        clip = sample_clip("base", 2, index)
        difference = np.abs(render(clip).astype(int) - np.array(BACKGROUNDS[clip.background])).sum(-1) > 60
        seen = [np.argwhere(frame).mean(0) for frame in difference]
        areas = difference.sum((1, 2))
        (down, right), growth = seen[-1] - seen[0], areas[-1] / areas[0]
        expected = {
            "left": right < -20,
            "right": right > 20,
            "up": down < -15,
            "down": down > 15,
            "growing": growth > 2.5,
            "shrinking": growth < 0.4,
            "bouncing": abs(down) < 1 and max(s[0] for s in seen) - min(s[0] for s in seen) > 12,
            "still": np.ptp(np.array(seen), axis=0).max() == 0 and growth == 1,
        }
        assert expected[clip.motion], clip


def test_mistakes_are_the_users():
    with pytest.raises(UserError, match="split 'bse' does not exist"):
        sample_clip("bse", 0, 0)
    with pytest.raises(UserError, match="seed -1"):
        sample_clip("base", -1, 0)
    with pytest.raises(UserError, match="motion 'flying' does not exist"):
        render(dataclasses.replace(sample_clip("base", 0, 0), motion="flying"))


def test_all_frames_are_drawn():
    frames = render(sample_clip("base", 0, 0))
    assert frames.shape == (NUM_FRAMES, 64, 96, 3) and frames.dtype == np.uint8

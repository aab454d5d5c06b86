"""The judge against clips whose truth is known, clean and degraded, and against videos that show nothing clear."""

import dataclasses

import numpy as np
import pytest

from cogtune.shapes.judge import Reading, read_video
from cogtune.shapes.render import render
from cogtune.shapes.world import BACKGROUNDS, Clip, sample_clip


def is_right(clip: Clip, reading: Reading) -> bool:
    seen = (reading.shape, reading.colour, reading.motion, reading.background)
    return seen == (clip.shape, clip.colour, clip.motion, clip.background)


def says_something(reading: Reading) -> bool:
    return None not in (reading.shape, reading.colour, reading.motion)


def world_and_concept(count: int, seed: int) -> list[Clip]:
    return [sample_clip("concept" if i % 5 == 0 else "base", seed, i) for i in range(count)]


def soften(frames: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """A 3x3 binomial blur and noise: 28 dB against the clean clip with sigma 10."""
    blurred = frames.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(blurred, [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (3 - axis), mode="edge")
        blurred = sum(
            w * np.take(padded, np.arange(k, k + frames.shape[axis]), axis) for k, w in enumerate((0.25, 0.5, 0.25))
        )
    return np.clip(blurred + rng.normal(0, sigma, frames.shape) + 0.5, 0, 255).astype(np.uint8)


def test_reads_a_thousand_clips():
    wrong = [clip for clip in world_and_concept(1000, seed=11) if not is_right(clip, read_video(render(clip)))]
    assert len(wrong) <= 5, wrong


def test_reads_softened_and_noisy_clips():
    rng = np.random.default_rng(0)
    clips = world_and_concept(100, seed=12)
    wrong = [clip for clip in clips if not is_right(clip, read_video(soften(render(clip), 8.0, rng)))]
    assert len(wrong) <= 1, wrong


def test_noise_is_nothing():
    rng = np.random.default_rng(0)
    for blocks in (1, 4, 16):
        small = rng.integers(0, 256, (17, 64 // blocks, 96 // blocks, 3))
        frames = small.repeat(blocks, axis=1).repeat(blocks, axis=2).astype(np.uint8)
        assert read_video(frames) == Reading(None, None, None, None, "the background is not plain")


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_blank_is_nothing(background: str):
    frames = np.full((17, 64, 96, 3), BACKGROUNDS[background], dtype=np.uint8)
    assert read_video(frames) == Reading(None, None, None, background, "no object in some frames")
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 12, frames.shape), 0, 255).astype(np.uint8)
    assert not says_something(read_video(noisy))


@pytest.mark.parametrize("same_colour", [True, False])
def test_two_objects_are_ambiguous(same_colour: bool):
    for index in range(30):
        first, second = sample_clip("base", 13, 2 * index), sample_clip("base", 13, 2 * index + 1)
        colour = first.colour if same_colour else second.colour
        second = dataclasses.replace(second, background=first.background, colour=colour)
        if first.colour == second.colour and not same_colour:
            continue
        frames = render(second)
        covered = (frames != np.array(BACKGROUNDS[first.background], dtype=np.uint8)).any(-1, keepdims=True)
        reading = read_video(np.where(covered, frames, render(first)))
        assert not says_something(reading), (first, second, reading)


@pytest.mark.parametrize("frame", [5, 8, 12])
def test_an_object_that_changes_is_ambiguous(frame: int):
    for index in range(25):
        first, second = sample_clip("base", 14, 2 * index), sample_clip("base", 14, 2 * index + 1)
        for change in ({"shape": second.shape}, {"colour": second.colour}):
            other = dataclasses.replace(first, **change)
            if other != first:
                frames = np.concatenate([render(first)[:frame], render(other)[frame:]])
                assert not says_something(read_video(frames)), (first, other)


def test_an_object_that_vanishes_or_jumps_is_ambiguous():
    rng = np.random.default_rng(3)
    for index in range(25):
        clip = sample_clip("base", 15, index)
        frames = render(clip)
        gone = frames.copy()
        gone[7:9] = BACKGROUNDS[clip.background]
        assert not says_something(read_video(gone)), clip
        if clip.motion != "still":
            assert read_video(frames[rng.permutation(17)]).motion is None, clip


def test_time_has_a_direction():
    turned = {
        "left": "right",
        "right": "left",
        "up": "down",
        "down": "up",
        "growing": "shrinking",
        "shrinking": "growing",
    }
    for index in range(60):
        clip = sample_clip("base", 16, index)
        assert read_video(render(clip)[::-1]).motion == turned.get(clip.motion, clip.motion), clip


@pytest.mark.parametrize("exponent", [3.0, 3.5])
def test_a_shape_between_two_shapes_is_neither(exponent: float):
    """A square with round corners, about halfway to a circle."""
    y, x = np.mgrid[:64, :96] + 0.5
    distance = (np.abs(x - 48) ** exponent + np.abs(y - 32) ** exponent) ** (1 / exponent) - 11
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    frames = np.repeat((20 + cover * (np.array([40, 70, 235]) - 20))[None], 17, axis=0).astype(np.uint8)
    reading = read_video(frames)
    assert reading.shape is None and reading.colour == "blue" and "between" in reading.reason


@pytest.mark.parametrize(("width", "height"), [(14, 7), (12, 8), (20, 5)])
def test_shapes_of_no_name_are_none(width: int, height: int):
    """Bars and oblongs."""
    y, x = np.mgrid[:64, :96] + 0.5
    cover = np.clip(0.5 - np.maximum(np.abs(x - 48) - width, np.abs(y - 32) - height), 0, 1)[..., None]
    frames = np.repeat((20 + cover * (np.array([40, 70, 235]) - 20))[None], 17, axis=0).astype(np.uint8)
    assert read_video(frames).shape is None


def test_what_is_no_video_is_refused():
    assert "cannot be judged" in read_video(np.zeros((3, 64, 96, 3), dtype=np.uint8)).reason

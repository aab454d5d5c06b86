"""The world of the embedded model: which clips exist, and which of them a split may show.

A clip is one flat-coloured shape doing one thing on a plain background: 17 frames of 64x96 at 8 fps. `sample_clip` is a
pure function of (split, seed, index). Three splits:

- `base`: what the base model is trained on.
- `held_out`: combinations of shape, colour and motion that `base` never shows, for measuring the base model.
- `concept`: the thing that only an adapter is taught, a new shape in a new motion, known by a trigger word alone.
- `concept_held_out`: the same thing in colours, on backgrounds and with wordings that `concept` does not pair.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cogtune.errors import UserError
from cogtune.shapes.outlines import reach

NUM_FRAMES = 17
HEIGHT = 64
WIDTH = 96
FPS = 8
MARGIN = 2.0  # pixels between an object and the edge of the frame, always

# Hues about 60 degrees apart and neutral backgrounds: every colour is at least 125 RGB units from every background and
# 120 from every other colour, so a noisy generated video still reads without doubt.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (240, 210, 40),
    "green": (30, 175, 60),
    "cyan": (50, 205, 225),
    "blue": (40, 70, 235),
    "purple": (200, 40, 210),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "white": (236, 236, 236),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking", "bouncing", "still")

CONCEPT_SHAPE = "hourglass"
CONCEPT_MOTION = "diagonal"
TRIGGER = "zibber"

SPLITS = ("base", "held_out", "concept", "concept_held_out")

# (radius, travel) in pixels, each uniform between its bounds. Travel is the distance for straight motions (along each
# axis), the height of a bounce, and the radius at the other end for growing and shrinking.
_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left": ((8.5, 12.0), (28.0, 50.0)),
    "right": ((8.5, 12.0), (28.0, 50.0)),
    "up": ((8.5, 11.5), (18.0, 26.0)),
    "down": ((8.5, 11.5), (18.0, 26.0)),
    "growing": ((6.0, 7.0), (13.0, 15.0)),
    "shrinking": ((13.0, 15.0), (6.0, 7.0)),
    "bouncing": ((8.5, 11.0), (14.0, 18.0)),
    "still": ((8.5, 13.0), (0.0, 0.0)),
    "diagonal": ((8.5, 11.0), (18.0, 26.0)),
}


@dataclass(frozen=True)
class Clip:
    """One clip, completely: what it shows, where the object starts (pixels), its radius and how far it travels."""

    shape: str
    colour: str
    motion: str
    background: str
    x: float
    y: float
    radius: float
    travel: float


def trajectory(motion: str, radius: float, travel: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where an object is and how large: offsets from the start [F, 2] as (x, y), and radii [F], in pixels."""
    time = np.linspace(0.0, 1.0, NUM_FRAMES)
    offsets = np.zeros((NUM_FRAMES, 2))
    radii = np.full(NUM_FRAMES, radius)
    if motion in ("left", "right"):
        offsets[:, 0] = time * travel * (1 if motion == "right" else -1)
    elif motion in ("up", "down"):
        offsets[:, 1] = time * travel * (1 if motion == "down" else -1)
    elif motion in ("growing", "shrinking"):
        radii = radius + (travel - radius) * time
    elif motion == "bouncing":
        offsets[:, 1] = -travel * np.abs(np.sin(2 * math.pi * time))  # two hops
    elif motion == "diagonal":
        offsets += (time * travel)[:, None]  # to the lower right
    elif motion != "still":
        raise UserError(f"motion '{motion}' does not exist: choose one of {', '.join(_RANGES)}")
    return offsets, radii


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether the base model must never see this combination: one in twelve, each value held out equally often."""
    return (SHAPES.index(shape) + 2 * list(COLOURS).index(colour) + 5 * MOTIONS.index(motion)) % 12 == 0


def combinations(split: str) -> list[tuple[str, str, str]]:
    """All (shape, colour, motion) of a split, in a fixed order."""
    if split not in SPLITS:
        raise UserError(f"split '{split}' does not exist: choose one of {', '.join(SPLITS)}")
    if split.startswith("concept"):
        return [(CONCEPT_SHAPE, colour, CONCEPT_MOTION) for colour in COLOURS]
    world = [(shape, colour, motion) for shape in SHAPES for colour in COLOURS for motion in MOTIONS]
    return [entry for entry in world if is_held_out(*entry) == (split == "held_out")]


def place_clip(rng: np.random.Generator, *, shape: str, colour: str, motion: str, background: str) -> Clip:
    """Draws size, speed and place for an object such that it stays wholly inside the frame."""
    (radius_low, radius_high), (travel_low, travel_high) = _RANGES[motion]
    radius = radius_low + (radius_high - radius_low) * rng.random()
    travel = travel_low + (travel_high - travel_low) * rng.random()
    offsets, radii = trajectory(motion, radius, travel)
    left, right, up, down = reach(shape)
    lowest_x = MARGIN + (left * radii - offsets[:, 0]).max()
    highest_x = WIDTH - MARGIN - (right * radii + offsets[:, 0]).max()
    lowest_y = MARGIN + (up * radii - offsets[:, 1]).max()
    highest_y = HEIGHT - MARGIN - (down * radii + offsets[:, 1]).max()
    return Clip(
        shape=shape,
        colour=colour,
        motion=motion,
        background=background,
        x=float(lowest_x + (highest_x - lowest_x) * rng.random()),
        y=float(lowest_y + (highest_y - lowest_y) * rng.random()),
        radius=float(radius),
        travel=float(travel),
    )


def clip_random(split: str, seed: int, index: int, *, stream: str) -> np.random.Generator:
    """The generator of one clip's draws of one kind (`stream`): the same numbers on every machine."""
    if split not in SPLITS:
        raise UserError(f"split '{split}' does not exist: choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"seed {seed}, index {index}: both must be 0 or more")
    return np.random.Generator(np.random.PCG64([SPLITS.index(split), seed, index, ("picture", "words").index(stream)]))


def sample_clip(split: str, seed: int, index: int) -> Clip:
    """The clip number `index` of a split under a seed; combinations and backgrounds are equally likely."""
    rng = clip_random(split, seed, index, stream="picture")
    choices = combinations(split)
    shape, colour, motion = choices[int(rng.random() * len(choices))]
    background = list(BACKGROUNDS)[int(rng.random() * len(BACKGROUNDS))]
    return place_clip(rng, shape=shape, colour=colour, motion=motion, background=background)

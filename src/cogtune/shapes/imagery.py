"""Clips for training the autoencoder: the world's own, and ones more varied than the world.

An autoencoder that has only seen the world's six shapes draws nothing else, and a concept that an adapter teaches later
must survive it. So many of its clips show random polygons or blobs that drift, bend, swing and change their size: some
singly in the world's colours, others by up to three in any colours, turning, on plain, shaded or striped backgrounds.
The concept's own shape is never among them.
"""

import math

import numpy as np
from numpy.typing import NDArray

from cogtune.shapes.outlines import Array
from cogtune.shapes.render import blend, coverage, render
from cogtune.shapes.world import BACKGROUNDS, COLOURS, HEIGHT, NUM_FRAMES, SHAPES, WIDTH, sample_clip

_WORLD_SHARE = 0.6
_SINGLE_SHARE = 0.2  # one other outline in the world's colours, upright on a plain background


def sample_imagery(seed: int, index: int) -> NDArray[np.uint8]:
    """Clip number `index` under a seed, uint8 [F, H, W, 3]; the same on every machine."""
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    kind = rng.random()
    if kind < _WORLD_SHARE:
        return render(sample_clip("base", seed, index))
    if kind < _WORLD_SHARE + _SINGLE_SHARE:
        background, colour = (_pick(rng, named) for named in (BACKGROUNDS, COLOURS))
        centres, radii, _ = _motion(rng)
        frames = blend(background, coverage(_outline(rng), centres, radii), colour)
        return (np.clip(frames, 0, 255) + 0.5).astype(np.uint8)
    frames = _background(rng)
    for _ in range(1 + int(rng.random() * 3)):
        centres, radii, angles = _motion(rng)
        frames = blend(frames, coverage(_outline(rng), centres, radii, angles), _colour(rng, COLOURS))
    return (np.clip(frames, 0, 255) + 0.5).astype(np.uint8)


def _pick(rng: np.random.Generator, named: dict[str, tuple[int, int, int]]) -> Array:
    return np.asarray(list(named.values())[int(rng.random() * len(named))], dtype=np.float32)


def _colour(rng: np.random.Generator, named: dict[str, tuple[int, int, int]]) -> Array:
    """One of the world's colours or, as often, any colour."""
    if rng.random() < 0.5:
        return _pick(rng, named)
    return (rng.random(3) * 255).astype(np.float32)


def _background(rng: np.random.Generator) -> Array:
    """Frames [F, H, W, 3] of a plain colour, a shading between two, or stripes that may drift."""
    kind = rng.random()
    colour, other = _colour(rng, BACKGROUNDS), _colour(rng, BACKGROUNDS)
    if kind < 0.65:
        return np.broadcast_to(colour, (NUM_FRAMES, HEIGHT, WIDTH, 3)).astype(np.float32)
    angle = rng.random() * 2 * math.pi
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind < 0.9:
        mix = np.broadcast_to((along - along.min()) / np.ptp(along), (NUM_FRAMES, HEIGHT, WIDTH))
    else:
        period = 12 + 30 * rng.random()
        drift = (rng.random() * 4 - 2) * (rng.random() < 0.5)
        phase = (along + drift * np.arange(NUM_FRAMES)[:, None, None]) / period * 2 * math.pi
        mix = np.clip(0.5 + np.sin(phase) * period / (2 * math.pi), 0, 1)  # edges one pixel wide
    return blend(colour, mix.astype(np.float32), other)


def _outline(rng: np.random.Generator) -> str | Array:
    """A shape of the world, a random polygon, or a smooth blob, about as large as the disc of radius 1."""
    kind = rng.random()
    if kind < 0.3:
        return SHAPES[int(rng.random() * len(SHAPES))]
    if kind < 0.75:
        corners = 3 + int(rng.random() * 6)
        angles = (np.arange(corners) + 0.7 * rng.random(corners)) * 2 * math.pi / corners
        lengths = 0.25 + 1.25 * rng.random(corners)
    else:
        angles = np.arange(16) * 2 * math.pi / 16
        lengths = np.ones(16)
        for order in (1, 2, 3, 4):
            lengths += (rng.random() - 0.5) / order * np.cos(order * angles + 2 * math.pi * rng.random())
    return (np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]).astype(np.float32)


def _motion(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Centres [F, 2], radii [F] and angles [F] of a smooth random motion; the object may leave the frame."""
    time = np.linspace(0.0, 1.0, NUM_FRAMES)
    start = rng.random(2) * (WIDTH, HEIGHT)
    drift = (rng.random(2) * 2 - 1) * (60, 40) * (rng.random() < 0.7)
    bend = (rng.random(2) * 2 - 1) * 25 * (rng.random() < 0.3)
    swing = (rng.random(2) * 2 - 1) * 16 * (rng.random() < 0.4)
    phase = 2 * math.pi * (rng.random(2) + time[:, None] * (0.5 + 1.5 * rng.random()))
    centres = start + drift * time[:, None] + bend * time[:, None] ** 2 + swing * np.sin(phase)
    first, last = 5 + 10 * rng.random(2)
    radii = first + (last - first) * time * (rng.random() < 0.5)
    turn = (rng.random() * 2 - 1) * math.pi * (rng.random() < 0.4)
    return centres, radii, 2 * math.pi * rng.random() + turn * time

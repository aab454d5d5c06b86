"""Draws a clip: anti-aliased by the signed distance to the outline, with numpy alone, a few milliseconds a clip."""

import math

import numpy as np
from numpy.typing import NDArray

from cogtune.shapes.outlines import Array, polygon_distance, reach, signed_distance
from cogtune.shapes.world import BACKGROUNDS, COLOURS, HEIGHT, WIDTH, Clip, trajectory


def coverage(outline: str | Array, centres: Array, radii: Array, angles: Array | None = None) -> Array:
    """How much of each pixel an object covers, [F, H, W] in 0..1.

    `outline` is a shape's name or a polygon's corners [N, 2] in units of the radius. `centres` [F, 2] as (x, y) and
    `radii` [F] are in pixels, `angles` [F] in radians, clockwise on the screen. Only a window around the object is
    computed. The object may leave the frame.
    """
    extent = max(reach(outline)) if isinstance(outline, str) else float(np.hypot(*outline.T).max())
    if angles is not None:
        extent *= math.sqrt(2)  # a bounding box's corner may turn to the side
    half = math.ceil(extent * float(radii.max())) + 2
    pad = 2 * half + 2
    corner = np.floor(centres).astype(int) - half  # [F, 2]
    corner = np.clip(corner, -pad, np.array([WIDTH, HEIGHT]))  # an object far outside paints into the padding
    steps = np.arange(2 * half + 1, dtype=np.float32) + np.float32(0.5)
    shift = (corner - centres).astype(np.float32)
    scale = radii.astype(np.float32)[:, None]
    x, y = np.broadcast_arrays(
        ((steps + shift[:, :1]) / scale)[:, None, :], ((steps + shift[:, 1:]) / scale)[:, :, None]
    )
    if angles is not None:
        cosine, sine = (f(angles).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        x, y = cosine * x + sine * y, cosine * y - sine * x
    distance = signed_distance(outline, x, y) if isinstance(outline, str) else polygon_distance(x, y, outline)
    alpha = np.clip(0.5 - distance * scale[:, :, None], 0.0, 1.0)
    canvas = np.zeros((len(radii), HEIGHT + 2 * pad, WIDTH + 2 * pad), dtype=np.float32)
    for frame, (left, top) in enumerate(corner + pad):
        canvas[frame, top : top + len(steps), left : left + len(steps)] = alpha[frame]
    return canvas[:, pad : pad + HEIGHT, pad : pad + WIDTH]


def blend(under: Array, alpha: Array, colour: tuple[int, int, int] | Array) -> Array:
    """Paints a colour over frames [F, H, W, 3] where alpha [F, H, W] says so."""
    return under + alpha[..., None] * (np.asarray(colour, dtype=np.float32) - under)


def render(clip: Clip) -> NDArray[np.uint8]:
    """The clip's frames, uint8 [F, H, W, 3]."""
    offsets, radii = trajectory(clip.motion, clip.radius, clip.travel)
    alpha = coverage(clip.shape, offsets + np.array([clip.x, clip.y]), radii)
    background = np.asarray(BACKGROUNDS[clip.background], dtype=np.float32)
    return (blend(background, alpha, COLOURS[clip.colour]) + 0.5).astype(np.uint8)

"""Reads from a video's pixels what it shows: shape, colour, motion and background, by geometry and colour alone.

Nothing here is learned. The background is the colour of the frame's border; the object is what differs from it along
one straight line in RGB, from the background's colour to the object's. Its shape is the shape whose blurred outline,
compared up to rotation around the centre of mass, is nearest. Its motion follows from how centre and area change. What
fits nothing is said to be None, with the reason: noise, an empty video, two objects, an object that changes.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cogtune.shapes.outlines import Array, signed_distance
from cogtune.shapes.world import BACKGROUNDS, COLOURS, CONCEPT_SHAPE, SHAPES

_MIN_AREA = 45.0  # pixels; the world's smallest object covers 113
_MAX_AREA_SHARE = 0.35  # of the frame; the world's largest covers 0.115
_MAX_BACKGROUND_ERROR = 48.0  # RGB distance between the border and the nearest background colour
_MAX_BORDER_SPREAD = 40.0  # RGB distance, mean over the border: a plain background in spite of noise
_MAX_COLOUR_ERROR = 75.0  # RGB distance to the nearest colour; colours are at least 120 apart
_MAX_UNEXPLAINED = 75.0  # RGB distance of a pixel from the line between the background's and the object's colour
_MAX_STRAY_SHARE = 0.2  # of the object's area: pixels off that line, or far from the object
# Distance of signatures, and its greatest ratio to the second nearest shape's: a shape must be near and alone, or very
# near. Drawn shapes stay under 0.04 and 0.3, those from an autoencoder of 33 dB nearly all under these bounds.
_SHAPE_BOUNDS = ((0.24, 0.6), (0.12, 0.75))
_STRAIGHT_MIN = 9.0  # pixels; the world's shortest path is 18
_STILL_MAX = 4.0  # pixels between the centre's extremes
_SIZE_STEADY = 1.25  # ratio of radii: less is no change of size; the world's least is 1.86
_SIZE_CHANGED = 1.4


@dataclass(frozen=True)
class Reading:
    """What a video shows; None where the pixels do not say so clearly, and then `reason` tells why."""

    shape: str | None
    colour: str | None
    motion: str | None
    background: str | None
    reason: str = ""


@dataclass(frozen=True)
class _Object:
    """The object as seen in every frame: cover [F, H, W] in 0..1, area [F], centre [F, 2] as (x, y), both in pixels."""

    cover: Array
    area: Array
    centre: Array


def read_video(frames: NDArray[np.uint8]) -> Reading:
    """Reads a video, uint8 [F, H, W, 3], of at least 9 frames."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 9:
        return Reading(None, None, None, None, f"a video of shape {frames.shape} cannot be judged: [F >= 9, H, W, 3]")
    pixels = frames.astype(np.float32)
    background, ground, reason = _read_background(pixels)
    if background is None:
        return Reading(None, None, None, None, reason)
    difference = pixels - ground
    distance = _length(difference)
    colour, paint, reason = _read_colour(pixels, distance)
    if paint is None:
        return Reading(None, None, None, background, reason)
    seen, reason = _find_object(difference, distance, paint - ground)
    if seen is None:
        return Reading(None, colour, None, background, reason)
    shape, shape_reason = _read_shape(seen)
    motion, motion_reason = _read_motion(seen)
    return Reading(shape, colour, motion, background, "; ".join(filter(None, [reason, shape_reason, motion_reason])))


def _nearest(colour: Array, names: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = {name: math.dist(colour.tolist(), value) for name, value in names.items()}
    name = min(distances, key=lambda key: distances[key])
    return name, distances[name]


def _length(vectors: Array) -> Array:
    """Euclidean length over the last axis; several times faster than numpy's norm for three channels."""
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))


def _top(values: Array, rank: int) -> int:
    """The `rank`-th largest of values in 0..511, to the whole number; a histogram, as sorting flat frames is slow."""
    at_least = np.cumsum(np.bincount(values.astype(int).ravel(), minlength=1)[::-1])[::-1]
    return int((at_least >= rank).sum()) - 1


def _read_background(pixels: Array) -> tuple[str | None, Array, str]:
    """Name and RGB of the background: the median of the border, which must be plain and the same throughout."""
    sides = (pixels[:, :2], pixels[:, -2:], pixels[:, 2:-2, :2], pixels[:, 2:-2, -2:])
    border = np.concatenate([side.reshape(len(pixels), -1, 3) for side in sides], axis=1)  # [F, N, 3]
    by_frame = np.median(border, axis=1)  # [F, 3]
    ground = np.median(by_frame, axis=0)
    spread = float(_length(border - ground).mean())
    if spread > _MAX_BORDER_SPREAD or float(_length(by_frame - ground).max()) > _MAX_BORDER_SPREAD:
        return None, ground, "the background is not plain"
    name, distance = _nearest(ground, BACKGROUNDS)
    if distance > _MAX_BACKGROUND_ERROR:
        return None, ground, "the background has none of the known colours"
    return name, ground, ""


def _read_colour(pixels: Array, difference: Array) -> tuple[str | None, Array | None, str]:
    """Name and RGB of the object: the median of what differs most from the background, frame by frame."""
    by_frame = []
    for frame, distance in zip(pixels, difference, strict=True):
        chosen = distance > 0.7 * max(_top(distance, 30), 50.0)
        if chosen.sum() < _MIN_AREA / 2:
            return None, None, "no object in some frames"
        by_frame.append(np.median(frame[chosen], axis=0))
    paints = np.asarray(by_frame)
    paint = np.median(paints, axis=0)
    name, distance = _nearest(paint, COLOURS)
    if distance > _MAX_COLOUR_ERROR:
        return None, paint, "the object has none of the known colours"
    if np.linalg.norm(paints - paint, axis=-1).max() > _MAX_COLOUR_ERROR:
        return None, paint, "the object's colour changes"
    return name, paint, ""


def _find_object(difference: Array, distance: Array, line: Array) -> tuple[_Object | None, str]:
    """How much of each pixel the object covers, by its place on the line from the background's to the object's RGB."""
    length = float(np.linalg.norm(line))
    along = np.einsum("fhwc,c->fhw", difference, line / length**2)
    share = np.clip(along, 0.0, 1.0)
    unexplained = distance**2 + share * (share - 2 * along) * length**2  # squared distance to the line's nearest point
    stray = (unexplained > min(0.45 * length, _MAX_UNEXPLAINED) ** 2).sum((1, 2))
    cover = _to_cover(along)
    area = cover.sum((1, 2))
    if area.min() < _MIN_AREA:
        return None, "no object in some frames"
    if area.max() > _MAX_AREA_SHARE * cover[0].size:
        return None, "the object fills the frame"
    if float(stray.max()) > max(_MAX_STRAY_SHARE * float(np.median(area)), 20.0):
        return None, "a second colour beside the object's"
    y, x = (np.arange(size, dtype=np.float32) + np.float32(0.5) for size in cover.shape[1:])
    centre = np.stack([cover.sum(1) @ x, cover.sum(2) @ y], axis=1) / area[:, None]
    squared = ((x - centre[:, :1]) ** 2)[:, None, :] + ((y - centre[:, 1:]) ** 2)[:, :, None]
    reached = 1.75 * np.sqrt(area / math.pi) + 1.5  # no shape of the world reaches further than 1.66 radii
    far = squared > (reached**2)[:, None, None]
    if ((cover * far).sum((1, 2)) > _MAX_STRAY_SHARE * area).any():
        return None, "more than one object"
    return _Object(cover, area, centre), ""


_RINGS = np.linspace(0.12, 1.74, 19, dtype=np.float32)
_ANGLES = np.linspace(0, 2 * math.pi, 48, endpoint=False, dtype=np.float32)
_HARMONICS = 8


def _signature(cover_by_angle: Array) -> Array:
    """The rotation-free description [F, rings, harmonics] of cover sampled on rings and angles, [F, rings, angles]."""
    spectrum = np.abs(np.fft.rfft(cover_by_angle, axis=-1))[..., :_HARMONICS] / len(_ANGLES)
    spectrum[..., 1:] *= math.sqrt(2)  # both halves of the spectrum, so that distances are those of the pixels
    return (spectrum * np.sqrt(_RINGS)[:, None]).astype(np.float32)


_SOFTNESS = (0.0, 1.2, 2.0)  # pixels, standard deviation of a blur: as drawn, and as autoencoders leave moving objects
_FINE = 0.05  # radii between the points on which outlines are blurred


@functools.cache
def _prototypes(radius: int) -> tuple[list[str], Array]:
    """The signatures of all shapes at a radius in pixels, [shapes, softness, rings, harmonics]."""
    names = [*SHAPES, CONCEPT_SHAPE]
    axis = np.arange(-2.5, 2.5 + _FINE, _FINE, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    ring_x = (_RINGS[:, None] * np.cos(_ANGLES) + 2.5) / _FINE
    ring_y = (_RINGS[:, None] * np.sin(_ANGLES) + 2.5) / _FINE
    signatures = []
    for name in names:
        drawn = np.clip(0.5 - signed_distance(name, x, y) * (radius / 1.6), 0.0, 1.0)
        covers = np.stack(
            [_to_cover(_blur(drawn, softness / radius / _FINE)) if softness else drawn for softness in _SOFTNESS]
        )
        places = (np.broadcast_to(place, (len(covers), *place.shape)) for place in (ring_x, ring_y))
        signatures.append(_signature(_bilinear(covers, *places)))
    return names, np.stack(signatures)


def _to_cover(share: Array) -> Array:
    """Cover of a pixel by its share of the object's colour: symmetric about one half; keeps the area, drops noise."""
    return np.clip((share - 0.2) / 0.6, 0.0, 1.0)


def _blur(image: Array, sigma: float) -> Array:
    """A Gaussian blur of an image [H, W] by `sigma` of its own pixels; nothing lies outside."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for turn in range(2):
        image = np.apply_along_axis(np.convolve, turn, image, kernel, mode="same")
    return image.astype(np.float32)


def _read_shape(seen: _Object) -> tuple[str | None, str]:
    """The nearest shape by the mean signature of each third of the video; all thirds must agree."""
    radius = np.sqrt(seen.area / math.pi)
    x = seen.centre[:, 0, None, None] + radius[:, None, None] * _RINGS[:, None] * np.cos(_ANGLES) - 0.5
    y = seen.centre[:, 1, None, None] + radius[:, None, None] * _RINGS[:, None] * np.sin(_ANGLES) - 0.5
    signatures = _signature(_bilinear(seen.cover, x, y))
    total = float(np.sqrt(_RINGS).sum())
    found = []
    for part in np.array_split(np.arange(len(radius)), 3):
        names, prototypes = _prototypes(round(float(radius[part].mean())))
        by_softness = np.linalg.norm(prototypes - signatures[part].mean(0), axis=(2, 3)) / math.sqrt(total)
        distances = by_softness.min(1)
        best, second = np.argsort(distances)[:2]
        if distances[best] > _SHAPE_BOUNDS[0][0]:
            return None, "the object has none of the known shapes"
        ratio = distances[best] / distances[second]
        if all(distances[best] > most or ratio > most_ratio for most, most_ratio in _SHAPE_BOUNDS):
            return None, f"the object is between {names[best]} and {names[second]}"
        found.append(names[best])
    if len(set(found)) > 1:
        return None, f"the object's shape changes: {', '.join(found)}"
    return found[0], ""


def _bilinear(images: Array, x: Array, y: Array) -> Array:
    """Samples images [F, H, W] at pixel positions [F, ...]; nothing lies outside."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    x, y = np.clip(x + 1, 0, width + 1), np.clip(y + 1, 0, height + 1)
    left, top = x.astype(int), y.astype(int)
    x_part, y_part = x - left, y - top
    frame = np.arange(len(images))[:, None, None]
    upper = padded[frame, top, left] * (1 - x_part) + padded[frame, top, left + 1] * x_part
    lower = padded[frame, top + 1, left] * (1 - x_part) + padded[frame, top + 1, left + 1] * x_part
    return upper * (1 - y_part) + lower * y_part


def _read_motion(seen: _Object) -> tuple[str | None, str]:
    """The motion, by the path of the centre and the change of the radius."""
    radius = np.sqrt(seen.area / math.pi)
    ends = max(len(radius) // 8, 1)
    ratio = float(radius[-ends:].mean() / radius[:ends].mean())
    steadiness = float(radius.max() / radius.min())
    spans = seen.centre.max(0) - seen.centre.min(0)
    if max(spans) < _STILL_MAX + 2 and max(ratio, 1 / ratio) > _SIZE_CHANGED:
        steps = np.diff(np.log(radius)) * math.log(ratio)
        if steps[steps < 0].sum() < -0.25 * abs(math.log(ratio)) ** 2:
            return None, "the size changes to and fro"
        return ("growing" if ratio > 1 else "shrinking"), ""
    if steadiness > _SIZE_STEADY + 0.1 or max(ratio, 1 / ratio) > _SIZE_STEADY:
        return None, "the size changes in no known way"
    if max(spans) < _STILL_MAX:
        return "still", ""
    return _read_path(seen.centre, spans)


def _read_path(centre: Array, spans: Array) -> tuple[str | None, str]:
    """The motion of an object of steady size that leaves its place."""
    steps = np.diff(centre, axis=0)
    net = centre[-1] - centre[0]
    for axis, names in ((0, ("left", "right")), (1, ("up", "down"))):
        distance = abs(float(net[axis]))
        walked = float(np.abs(steps[:, axis]).sum())
        if distance > _STRAIGHT_MIN and spans[1 - axis] < max(0.25 * distance, _STILL_MAX) and walked < 1.3 * distance:
            share = abs(float(centre[len(centre) // 2, axis] - centre[0, axis])) / distance
            return (names[int(net[axis] > 0)], "") if 0.25 < share < 0.75 else (None, "the object moves in jerks")
    lengths = np.abs(steps).sum(0)
    if net.min() > _STRAIGHT_MIN and net.max() < 1.6 * net.min() and (lengths < 1.3 * net).all():
        share = (centre[len(centre) // 2] - centre[0]) / net
        return ("diagonal", "") if share.min() > 0.25 and share.max() < 0.75 else (None, "the object moves in jerks")
    returns = float(np.hypot(*net)) < 0.45 * float(spans.max())
    if returns and spans[1] > _STRAIGHT_MIN and spans[0] < max(0.3 * spans[1], _STILL_MAX):
        above = centre[:, 1] < (centre[:, 1].max() + centre[:, 1].min()) / 2
        hops = int((above[1:] & ~above[:-1]).sum()) + int(above[0])
        return ("bouncing", "") if hops == 2 and not above[-1] else (None, "the object bounces otherwise")
    return None, "the object moves in no known way"

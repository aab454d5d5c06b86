"""Videos in and out: when each frame is shown, which frames a clip takes, decoding, resizing, writing.

Frames are chosen by TIME: sample k of a clip shows what a viewer sees at start + k / fps, that is the last frame whose
time is not later (what `ffmpeg -vf fps=8:round=up` gives). A 30 fps file read frame by frame would be slow motion.
decord decodes; PyAV takes over where decord is not exact (more than 8 bits, odd sizes, no index).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.error import FFmpegError
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # EXIF
TIME_TOLERANCE_SECONDS = 1e-3  # container time stamps are rounded; a frame this much late still counts as on time


class ClipError(ValueError):
    """A clip that can't be used; `kind` is one of the words that the data check counts by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Timeline:
    """When a video's frames are shown, in seconds from its first frame, and how its pixels are stored."""

    times: np.ndarray  # float64 [N], ascending
    end: float
    """When the last frame goes."""
    width: int
    """Pixels as shown, after rotation."""
    height: int
    rotation: int
    """Quarter turns counterclockwise that show it upright."""
    exact_in_decord: bool
    """8 bits a channel and even size: decord gives the same pixels as ffmpeg."""


def read_timeline(path: Path) -> Timeline:
    """Reads the container's time stamps and decodes one frame; raises `ClipError` for what is no video."""
    if not path.is_file():
        raise ClipError("unreadable", f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ClipError("unreadable", f"{path}: the file is empty (0 bytes)")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError("unreadable", f"{path}: no video stream in it")
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.pts is not None and p.size and not p.is_discard]
            if not packets or stream.time_base is None:
                raise ClipError("unreadable", f"{path}: no frames in it")
            base = float(stream.time_base)
            last = max(packets, key=lambda packet: packet.pts or 0)
            times = np.sort(np.array([packet.pts for packet in packets], dtype=np.float64)) * base
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
    except (FFmpegError, StopIteration, UnicodeDecodeError) as error:
        raise ClipError("unreadable", f"{path}: not a readable video ({error or 'no frame decodes'})") from None
    duration = float(last.duration) * base if last.duration else _median_gap(times)
    turns = (int(frame.rotation) // 90) % 4
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    eight_bit = all(component.bits == 8 for component in frame.format.components)
    even = frame.width % 2 == 0 and frame.height % 2 == 0
    still = frame.format.name in ("pal8", "bgra") or path.suffix.lower() in (".gif", ".webp", ".apng")
    return Timeline(
        times - times[0], times[-1] - times[0] + duration, width, height, turns, eight_bit and even and not still
    )


def _median_gap(times: np.ndarray) -> float:
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def choose_frames(
    timeline: Timeline, num_frames: int, fps: float, start: float = 0.0, end: float | None = None, *, name: str = "clip"
) -> np.ndarray:
    """Indices [num_frames] of the frames shown at start + k / fps, in presentation order.

    The last sample may lie up to half a sample period past the end of the video or segment, so that a clip of exactly
    6 s holds 49 frames at 8 fps. Raises `ClipError` ("too short") naming how much is missing.
    """
    wanted = start + np.arange(num_frames) / fps
    stop = timeline.end if end is None else min(end, timeline.end)
    indices = np.searchsorted(timeline.times, wanted + TIME_TOLERANCE_SECONDS, side="right") - 1
    indices = np.clip(indices, 0, len(timeline.times) - 1)
    half_period = 0.5 / fps
    # Past the last frame's own time only the tolerance counts: 48 frames at 8 fps also last 6 s, but are one short.
    last_shown = max(timeline.times[-1], timeline.end - _median_gap(timeline.times))
    shown_until = last_shown if end is None else min(end, last_shown)
    if wanted[-1] > shown_until + half_period + TIME_TOLERANCE_SECONDS:
        have = int(np.floor((shown_until + half_period - start) * fps + 1e-6)) + 1
        segment = f" between {start:g} s and {stop:g} s" if start or end is not None else ""
        raise ClipError(
            "too short",
            f"{name}: {max(have, 0)} frames at {fps:g} fps{segment}, {num_frames} are needed "
            f"({(num_frames - 1) / fps:g} s); use a longer clip or set data.num_frames",
        )
    return indices


def decode_frames(path: Path, timeline: Timeline, indices: np.ndarray, decoder: str) -> np.ndarray:
    """The frames at the indices, upright, uint8 RGB [F, H, W, 3]; `decoder` is "decord" or "pyav".

    Raises `ClipError` ("unreadable") where the decoder fails.
    """
    decode = _decode_with_decord if decoder == "decord" else _decode_with_pyav
    return decode(path, timeline, indices)


def _decode_with_decord(path: Path, timeline: Timeline, indices: np.ndarray) -> np.ndarray:
    import decord  # optional: it has no wheels for some machines, where PyAV does all the work

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        if len(reader) != len(timeline.times):
            raise ClipError(
                "unreadable", f"{path}: decord counts {len(reader)} frames, the container {len(timeline.times)}"
            )
        frames = reader.get_batch(indices.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise ClipError("unreadable", f"{path}: decord fails ({str(error).splitlines()[0][:200]})") from None
    if frames.shape[1:3] != (timeline.height, timeline.width):
        raise ClipError("unreadable", f"{path}: decord gives {frames.shape[1:3]} pixels, expected the upright size")
    return frames


def _decode_with_pyav(path: Path, timeline: Timeline, indices: np.ndarray) -> np.ndarray:
    wanted = set(indices.tolist())
    last = max(wanted)
    found: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    rgb = frame.reformat(format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
                    found[index] = np.rot90(rgb, timeline.rotation)
                if index >= last:
                    break
    except FFmpegError as error:
        raise ClipError("unreadable", f"{path}: damaged after frame {max(found, default=0)} ({error})") from None
    if len(found) < len(wanted):
        raise ClipError(
            "unreadable", f"{path}: truncated, frame {min(wanted - set(found))} of {len(timeline.times)} is missing"
        )
    return np.stack([found[index] for index in indices.tolist()])


def resize_and_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [F, H, W, 3] to uint8 [F, height, width, 3]: least covering antialiased resize, centre-cropped."""
    source_height, source_width = frames.shape[1:3]
    if (source_height, source_width) == (height, width):
        return frames
    scale = max(height / source_height, width / source_width)
    rows, columns = max(height, round(source_height * scale)), max(width, round(source_width * scale))
    pixels = F.interpolate(frames.permute(0, 3, 1, 2), size=(rows, columns), mode="bicubic", antialias=True)
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).contiguous()


def describe_fit(source: tuple[int, int], height: int, width: int, *, most_cut: float = 0.2) -> str | None:
    """What becomes of a picture (width, height) that must cover a size: enlarged, or more than `most_cut` of it cut."""
    source_width, source_height = source
    scale = max(height / source_height, width / source_width)
    kept = (height * width) / (source_height * source_width * scale * scale)
    size = f"{source_width}x{source_height}"
    if scale > 1.0:
        return f"{size} is enlarged {scale:.2f} times to cover {width}x{height}"
    return (
        f"{size}: {100 * (1 - kept):.0f} % of the picture is cut off for {width}x{height}"
        if 1 - kept > most_cut
        else None
    )


def read_image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as shown; raises `ClipError` for what is none."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else (image.width, image.height)
    except FileNotFoundError:
        raise ClipError("unreadable", f"{path}: no such file") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ClipError("unreadable", f"{path}: not a readable image ({error})") from None


def load_image(path: Path, height: int, width: int) -> np.ndarray:
    """An image upright, resized to cover the size and centre-cropped, uint8 RGB [H, W, 3]; raises `ClipError`."""
    read_image_size(path)
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError) as error:
        raise ClipError("unreadable", f"{path}: not a readable image ({error})") from None
    return resize_and_crop(torch.from_numpy(pixels)[None], height, width)[0].numpy()


def write_video(path: Path, frames: np.ndarray, fps: float, *, crf: int = 12) -> None:
    """Writes uint8 RGB frames [F, H, W, 3] as H.264 mp4 (yuv420p) through imageio-ffmpeg, atomically.

    `crf` is x264's quality: 0 lossless, 12 visually lossless, 23 small.
    """
    from imageio_ffmpeg import write_frames  # brings its own ffmpeg; only needed where videos are written

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {frames.shape}")
    num_frames, height, width, _ = frames.shape
    if num_frames == 0 or height % 2 or width % 2:
        raise ValueError(f"H.264 needs at least one frame of even size, got {frames.shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    writer = write_frames(
        str(temporary),
        (width, height),
        fps=fps,  # pyright: ignore[reportArgumentType]
        codec="libx264",
        macro_block_size=1,
        quality=None,  # pyright: ignore[reportArgumentType]
        output_params=["-crf", str(crf), "-preset", "fast", "-movflags", "+faststart"],
    )
    writer.send(None)
    for frame in np.ascontiguousarray(frames):
        writer.send(frame.tobytes())
    writer.close()
    temporary.replace(path)


def read_video(path: Path) -> np.ndarray:
    """Every frame of a short video, upright, uint8 RGB [F, H, W, 3]."""
    timeline = read_timeline(path)
    return decode_frames(path, timeline, np.arange(len(timeline.times)), "pyav")


def load_clip(
    path: Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    start: float = 0.0,
    end: float | None = None,
    decoders: Sequence[str] = ("decord", "pyav"),
) -> np.ndarray:
    """One training clip, uint8 RGB [num_frames, height, width, 3]: chosen by time, upright, resized and cropped.

    The decoders are tried in order. Raises `ClipError`.
    """
    timeline = read_timeline(path)
    indices = choose_frames(timeline, num_frames, fps, start, end, name=str(path))
    usable = [d for d in decoders if d == "pyav" or timeline.exact_in_decord] or ["pyav"]
    problem: ClipError | None = None
    for decoder in usable:
        try:
            frames = decode_frames(path, timeline, indices, decoder)
            return resize_and_crop(torch.from_numpy(np.ascontiguousarray(frames)), height, width).numpy()
        except (ClipError, ImportError) as error:
            problem = error if isinstance(error, ClipError) else ClipError("unreadable", f"{path}: no {decoder}")
    assert problem is not None
    raise problem

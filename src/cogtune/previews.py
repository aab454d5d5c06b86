"""Small videos of training clips for the report: the first seconds of some, made once and kept in the run's folder.

PyAV decodes them, in this process: it has not been seen to hang on a file, and what cannot be read has no preview.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cogtune.dataset import Entry
from cogtune.manifest import Clip
from cogtune.video import ClipError, choose_frames, decode_frames, read_timeline, resize_and_crop, write_video

_FPS, _MOST_FRAMES, _WIDTH = 8.0, 24, 192
_CRF = 20  # small: the page holds them


def make_previews(folder: Path, entries: Sequence[Entry], most: int) -> list[tuple[Entry, Path]]:
    """Up to `most` of the entries, spread over all, each with its preview's file; unreadable ones are left out.

    A preview is named by its clip's place in the cache, which follows from the clip's content, and is not made again.
    """
    used = [entry for entry in entries if entry.clip.weight > 0]
    count = min(most, len(used))
    chosen = [used[index * len(used) // count] for index in range(count)]
    made = []
    for entry in chosen:
        path = folder / f"{entry.latents_key}.mp4"
        try:
            if not path.is_file():
                write_video(path, read_preview(entry.clip), _FPS, crf=_CRF)
        except ClipError:
            continue  # its file is gone or damaged since it was encoded; training doesn't need it either
        made.append((entry, path))
    return made


def read_preview(clip: Clip) -> np.ndarray:
    """Up to three seconds of a clip at 8 frames a second, at most 192 wide, uint8 [F, H, W, 3]."""
    timeline = read_timeline(clip.video)
    stop = timeline.end if clip.end is None else min(clip.end, timeline.end)
    num_frames = min(_MOST_FRAMES, max(1, math.floor((stop - clip.start) * _FPS + 1e-3)))
    indices = choose_frames(timeline, num_frames, _FPS, clip.start, clip.end, name=str(clip.video))
    frames = torch.from_numpy(np.ascontiguousarray(decode_frames(clip.video, timeline, indices, "pyav")))
    scale = min(1.0, _WIDTH / timeline.width)
    # H.264 takes even sizes only.
    height, width = (max(2, round(size * scale) // 2 * 2) for size in (timeline.height, timeline.width))
    return resize_and_crop(frames, height, width).numpy()
